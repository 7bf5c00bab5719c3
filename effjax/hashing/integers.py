"""Hash functions of integer keys, pure and the same in every process: a seed and a key in, uint32 out."""

import jax
import jax.numpy as jnp


def mix(x: jax.Array) -> jax.Array:
    """Murmur3's 32-bit finaliser: a bijection on uint32 whose every output bit depends on every input bit."""
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x85EBCA6B)
    x = x ^ (x >> 13)
    x = x * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
