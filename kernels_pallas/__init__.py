"""Pallas kernels for TPU and GPU, one folder an operation; the plain jax references are in `effjax.ops`."""
