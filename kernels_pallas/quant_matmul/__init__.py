"""Products with `effjax.arrays.Quantized`: one file a platform."""
