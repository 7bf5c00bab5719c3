"""Hash families, and the sketches made of them."""
