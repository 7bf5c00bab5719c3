"""Choosing a batch by scores without repeats: how likely each example is to be in it, and drawing it exactly so."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key

from effjax.errors import ConfigError

_UNITS = 2**30  # of an int32: sums of probabilities are exact, and the same in any order


def inclusion_probabilities(
    scores: Float[Array, " n"], batch: int, *, uniform: float | Float[Array, ""] = 0.0
) -> Float[Array, " n"]:
    """Probabilities proportional to the scores that add up to `batch`, none above 1.

    Those that would be above are 1, and the others share what is left (probability-proportional-to-size sampling).

    Args:
        scores: not negative; what is not finite counts as 0. All zero counts as all equal.
        batch: size of the sample.
        uniform: share of the probability given to all alike, so that no example starves and no weight explodes.

    Raises:
        ConfigError: `batch` is not between 1 and the number of scores.

    Example:
        >>> inclusion_probabilities(jnp.array([1.0, 1.0, 2.0, 8.0]), 2).tolist()
        [0.25, 0.25, 0.5, 1.0]
    """
    n = scores.shape[0]
    if not 1 <= batch <= n:
        raise ConfigError(f"batch={batch} of {n} scores: must be between 1 and their number")
    scores = jnp.where(jnp.isfinite(scores), jnp.maximum(scores.astype(jnp.float32), 0.0), 0.0)
    scores = scores / jnp.maximum(scores.max(), jnp.finfo(jnp.float32).tiny)
    total = scores.sum()
    p = jnp.where(total > 0, (1 - uniform) * scores / jnp.where(total > 0, total, 1.0) + uniform / n, 1 / n)

    def more(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        full, _, _ = state
        rest = jnp.where(full, 0.0, p)
        scaled = p * (batch - full.sum()) / jnp.maximum(rest.sum(), jnp.finfo(jnp.float32).tiny)
        grown = full | (scaled >= 1)
        return grown, jnp.where(grown, 1.0, scaled), jnp.any(grown != full)

    none = jnp.zeros(n, bool)
    return jax.lax.while_loop(lambda state: state[2], more, (none, p, jnp.array(True)))[1]


def systematic(
    key: Key[Array, ""], probabilities: Float[Array, " n"], batch: int
) -> tuple[Int32[Array, " batch"], Float[Array, " batch"]]:
    """Draws `batch` different indices, index `i` with probability `probabilities[i]` (Madow 1949).

    The probabilities are laid end to end; one random start and equal strides hit the indices. They are counted in whole
    units, so that the result does not depend on the order of a sum, and the weights are those of the units.

    Returns:
        Ascending indices, and `(batch / n) / probability` of each: with them, the mean over the batch has the mean over
        all `n` as its expectation (Horvitz and Thompson 1952).

    Example:
        >>> index, weights = systematic(jax.random.key(0), jnp.array([0.25, 0.25, 0.5, 1.0]), 2)
        >>> int(index[1]), weights.tolist()[1]
        (3, 0.5)
    """
    n = probabilities.shape[0]
    units = jnp.ceil(jnp.minimum(probabilities, 1.0) * (_UNITS // batch)).astype(jnp.int32)
    total = units.sum()
    stride = (total + batch - 1) // batch
    # Strides end a little behind the last unit: the least likely index takes what is left, less than `batch` units.
    units = units.at[jnp.argmin(units)].add(stride * batch - total)
    ends = jnp.cumsum(units)
    start = jax.random.randint(key, (), 0, stride)
    index = jnp.searchsorted(ends, start + stride * jnp.arange(batch, dtype=jnp.int32), side="right").astype(jnp.int32)
    return index, (batch / n) * stride.astype(jnp.float32) / units[index].astype(jnp.float32)
