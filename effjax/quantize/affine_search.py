"""The affine grid of least weighted error: both ends of the range moved inwards, coarse steps first."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.quantize.uniform import Grid, UniformGrid

COARSE = 8  # strides of each end in the first round
Ends = tuple[jax.Array, jax.Array]  # how far each end has moved, in steps: float32[groups, 1, out]


def search_affine(
    groups: Float[Array, "groups size out"],
    weights: Float[Array, "groups size"],
    kind: UniformGrid,
    *,
    candidates: int = 2048,
    exhaustive: bool = False,
) -> Grid:
    """Searches `lo = min + a R / T`, `hi = max - b R / T` with `a, b` in `0 .. T/2 - 1` (LeanQuant, section 3.3).

    The paper tries all `T**2 / 4` pairs, a million for T = 2048, in one GPU kernel. The error is smooth in both ends on
    the scale of a step of the grid, so a coarse search over 9 by 9 pairs, refined around the best pair of each group by
    halving the stride down to one, ends within a percent or so of the error of the full one (tested), after about a
    hundred pairs.

    Args:
        groups: weights, one grid for each group and output.
        weights: importance of every input.
        kind: bits and stored dtype of an asymmetric grid.
        candidates: T.
        exhaustive: tries all pairs.
    """
    low, high = groups.min(-2, keepdims=True), groups.max(-2, keepdims=True)
    step = (high - low) / candidates
    top = candidates // 2 - 1
    share = (weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30))[..., None]

    def grid(ends: Ends) -> Grid:
        return kind.spanning(groups, low + ends[0] * step, high - ends[1] * step)

    def error(ends: Ends) -> jax.Array:
        found = grid(ends)
        return (share * jnp.square(kind.values(kind.round(groups, found), found) - groups)).sum(-2, keepdims=True)

    def best_of(centre: Ends, best: jax.Array, moves: jax.Array) -> tuple[Ends, jax.Array]:
        """The best of the pairs `centre + moves`."""

        def better(state: tuple[Ends, jax.Array], move: jax.Array) -> tuple[tuple[Ends, jax.Array], None]:
            (a, b), least = state
            tried = jnp.clip(centre[0] + move[0], 0, top), jnp.clip(centre[1] + move[1], 0, top)
            loss = error(tried)
            improved = loss < least
            ends = jnp.where(improved, tried[0], a), jnp.where(improved, tried[1], b)
            return (ends, jnp.where(improved, loss, least)), None

        return jax.lax.scan(better, (centre, best), moves)[0]

    start = jnp.zeros_like(low), jnp.zeros_like(low)
    first = error(start)
    if exhaustive:
        return grid(best_of(start, first, _pairs(jnp.arange(candidates // 2, dtype=jnp.float32)))[0])
    stride = max(1, top // COARSE)
    ends, least = best_of(start, first, _pairs(jnp.arange(0, top + 1, stride, dtype=jnp.float32)[: COARSE + 1]))
    around = _pairs(jnp.array([-1.0, 0.0, 1.0]))

    def refine(state: tuple[Ends, jax.Array], stride: jax.Array) -> tuple[tuple[Ends, jax.Array], None]:
        return best_of(*state, around * stride), None

    strides = []
    while stride > 1:
        stride = -(-stride // 2)
        strides.append(float(stride))
    if strides:
        (ends, least), _ = jax.lax.scan(refine, (ends, least), jnp.array(strides, jnp.float32))
    return grid(ends)


def _pairs(values: jax.Array) -> Float[Array, "pairs 2"]:
    return jnp.stack(jnp.meshgrid(values, values, indexing="ij"), axis=-1).reshape(-1, 2)
