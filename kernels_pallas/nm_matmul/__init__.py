"""Products with `effjax.arrays.NMSparse`: one file a platform."""
