"""Integer codes between the least and the greatest of some numbers, as the plain codings of caches use them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

Scales = tuple[Array, Array]  # the least number, and the distance of two successive codes


def minmax_scales(x: Float[Array, "*any"], bits: int, axis: int, dtype: str = "float16") -> Scales:
    """Least number and step of asymmetric codes over an axis, which stays with size 1."""
    low, high = jnp.min(x, axis=axis, keepdims=True), jnp.max(x, axis=axis, keepdims=True)
    return low.astype(dtype), ((high - low) / (2**bits - 1)).astype(dtype)


def minmax_codes(x: Float[Array, "*any"], scales: Scales, bits: int) -> UInt8[Array, "*any"]:
    """The nearest codes under scales as they are stored; numbers beyond the range get the code at its end."""
    low, step = (scale.astype(jnp.float32) for scale in scales)
    codes = jnp.round((x.astype(jnp.float32) - low) / jnp.where(step > 0, step, 1.0))
    return jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8)


def minmax_values(codes: UInt8[Array, "*any"], scales: Scales) -> Float[Array, "*any"]:
    """What codes stand for, float32."""
    low, step = (scale.astype(jnp.float32) for scale in scales)
    return low + step * codes.astype(jnp.float32)
