"""Products with `effjax.arrays.Hashed`: one file a platform."""
