"""effjax: smaller and faster neural networks with pure functions over parameter pytrees."""
