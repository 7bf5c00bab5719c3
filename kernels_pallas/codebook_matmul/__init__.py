"""Products with `effjax.arrays.Codebook`: one file a platform."""
