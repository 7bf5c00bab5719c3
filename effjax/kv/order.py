"""The n-th smallest of many numbers without sorting them: by halving a range of bit patterns."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def ordered_bits(x: Float[Array, "*any"]) -> Int[Array, "*any"]:
    """float32 as int32 in the same order, both zeros alike; NaN is not placed.

    Example:
        >>> ordered_bits(jnp.array([-jnp.inf, -2.0, -0.0, 0.0, 1.0])).tolist()
        [-2139095041, -1073741825, 0, 0, 1065353216]
    """
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def order_statistic(
    bits: Int[Array, "*any n"], index: Int[Array, "*any 1"], *, low: int = -(2**31), high: int = 2**31 - 1
) -> Int[Array, "*any 1"]:
    """The `index`-th smallest along the last axis, which lies in `[low, high]`.

    A pass of compare and sum for each halving of the range, thirty-two at most: a sort takes several times as long.

    Example:
        >>> order_statistic(jnp.array([5, -7, 9, 0]), jnp.array([2])).tolist()
        [5]
    """

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, where the sum would not fit
        enough = jnp.sum(bits <= middle, axis=-1, keepdims=True, dtype=jnp.int32) > index
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = tuple(jnp.full((*bits.shape[:-1], 1), end, jnp.int32) for end in (low, high))
    return jax.lax.fori_loop(0, (high - low).bit_length(), halve, bounds)[1]
