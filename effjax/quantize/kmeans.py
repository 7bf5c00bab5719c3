"""Weighted k-means in one dimension, for all columns of a matrix at once."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

Running = tuple[jax.Array, jax.Array]  # sums as a large and a small number each: nearly twice the digits of float32
COMPARE_ALL = 512  # points up to which comparing with all beats a binary search


def weighted_kmeans(
    points: Float[Array, "n columns"],
    weights: Float[Array, "n columns"],
    entries: int,
    *,
    start: Float[Array, "entries columns"] | None = None,
    iterations: int = 100,
    tolerance: float = 1e-6,
) -> Float[Array, "entries columns"]:
    """Lloyd's algorithm, from evenly spaced centres or from given ones; centres come back sorted.

    In one dimension the points of a centre are an interval of the sorted points. So points are sorted once, weights and
    weighted points are summed up once, and a step is `entries` searches and differences of those running sums, in
    place of a pass over all points. Running sums have some forty bits, since weights may span many orders of magnitude.
    A centre without points, or without weight, stays where it is. Every column stops for itself, so that a column's
    result does not depend on the others.

    Args:
        points: the values to cluster, a column each.
        weights: not negative; only their ratios within a column matter. All zero counts as all equal.
        entries: number of centres, 2 or more.
        start: sorted centres to start from; at even distances from `min` to `max` of each column where None.
        iterations: steps at most.
        tolerance: a column stops when no centre moves by more than this fraction of its range.

    Example:
        >>> points, weights = jnp.array([0.0, 1.0, 10.0, 11.0]), jnp.array([1.0, 3.0, 1.0, 1.0])
        >>> weighted_kmeans(points[:, None], weights[:, None], 2).ravel().tolist()
        [0.75, 10.5]
    """
    points, weights = jax.lax.sort((points.astype(jnp.float32), weights.astype(jnp.float32)), dimension=0, num_keys=1)
    largest = weights.max(0)
    weights = jnp.where(largest > 0, weights / jnp.where(largest > 0, largest, 1), 1.0)
    mass, moment = _running_sums(weights), _running_sums(weights * points)
    low, high = points[0], points[-1]
    if start is None:
        start = low + (high - low) * jnp.linspace(0.0, 1.0, entries, dtype=jnp.float32)[:, None]

    def step(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        centres, moving, count = state
        ends = _interval_ends(points, (centres[1:] + centres[:-1]) / 2)
        total, first = _between(mass, ends), _between(moment, ends)
        found = jnp.where(total > 0, first / jnp.where(total > 0, total, 1), centres)
        found = jnp.clip(found, low, high)
        moved = jnp.abs(found - centres).max(0) > tolerance * (high - low)
        return jnp.where(moving, found, centres), moving & moved, count + 1

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return state[1].any() & (state[2] < iterations)

    first = start, jnp.ones(points.shape[1], bool), jnp.int32(0)
    return jax.lax.while_loop(unfinished, step, first)[0]


def nearest(
    w: Float[Array, "*rows columns"], table: Float[Array, "entries columns"]
) -> tuple[UInt8[Array, "*rows columns"], Float[Array, "*rows columns"]]:
    """Codes and values of the nearest entries in sorted tables, one a column; the lower entry in the middle."""
    middles = (table[1:] + table[:-1]) / 2
    if len(table) > 16:
        codes = (w[..., None, :] > middles).sum(-2).astype(jnp.uint8)
        rows = codes.reshape(-1, w.shape[-1]).astype(jnp.int32)
        return codes, jnp.take_along_axis(table, rows, axis=0).reshape(w.shape)
    # A chain of selections, each a vector operation; a gather goes element by element on most backends.
    codes, values = jnp.zeros(w.shape, jnp.uint8), jnp.broadcast_to(table[0], w.shape)
    for entry in range(1, len(table)):
        above = w > middles[entry - 1]
        codes, values = jnp.where(above, jnp.uint8(entry), codes), jnp.where(above, table[entry], values)
    return codes, values


def _interval_ends(points: jax.Array, middles: jax.Array) -> Int[Array, "ends columns"]:
    """Where each centre's run of the sorted points begins, and the end of the last: counts of points up to a middle."""
    n, columns = points.shape
    if n <= COMPARE_ALL:
        inner = (points[:, None, :] <= middles).sum(0)
    else:

        def halve(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = state  # points before `low` are up to the middle, those from `high` are beyond
            at = (low + high) // 2
            below = (low < high) & (jnp.take_along_axis(points, jnp.minimum(at, n - 1), axis=0) <= middles)
            return jnp.where(below, at + 1, low), jnp.where(below, high, jnp.minimum(at, high))

        edges = jnp.zeros(middles.shape, jnp.int32), jnp.full(middles.shape, n, jnp.int32)
        inner = jax.lax.fori_loop(0, n.bit_length(), halve, edges)[0]
    edge = jnp.zeros((1, columns), jnp.int32)
    return jnp.concatenate([edge, inner.astype(jnp.int32), edge + n])


def _running_sums(x: Float[Array, "n columns"]) -> Running:
    """Sums of the first 0, 1, ..., n numbers of every column: `[n + 1, columns]` each."""

    def add(total: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Running]:
        high, low = total
        new = high + x
        back = new - high
        lost = (high - (new - back)) + (x - back)  # what rounding took from the sum, exactly (Knuth's two-sum)
        return (new, low + lost), (new, low + lost)

    zero = jnp.zeros_like(x[0])
    sums = jax.lax.scan(add, (zero, zero), x)[1]
    return tuple(jnp.pad(part, ((1, 0), (0, 0))) for part in sums)  # type: ignore[return-value]


def _between(running: Running, ends: jax.Array) -> jax.Array:
    """Sums of the runs between neighbouring ends."""
    high, low = (jnp.take_along_axis(part, ends, axis=0) for part in running)
    return (high[1:] - high[:-1]) + (low[1:] - low[:-1])
