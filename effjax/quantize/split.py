"""Where weighted k-means in one dimension starts: intervals cut in two, each time where that helps most."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def split_start(
    points: Float[Array, "n columns"], weights: Float[Array, "n columns"], entries: int
) -> Float[Array, "entries columns"]:
    """Centres for `weighted_kmeans`, sorted: the means of `entries` intervals of each column's sorted points.

    The first interval holds all points; then, of all cuts of all intervals, the one that takes most from the weighted
    squared error is made. Nothing is drawn. With weights over several orders of magnitude, as of a Fisher diagonal,
    even distances leave most centres where nothing weighs, and k-means cannot move them; from here it ends within some
    percent of the optimum (asserted in `tests/quantize/test_squeezellm.py`).

    Args:
        points: the values to cluster, a column each.
        weights: not negative. All zero counts as all equal.
        entries: number of centres; where there are fewer distinct points, the last are equal.

    Example:
        >>> points = jnp.array([0.0, 1.0, 10.0, 11.0])[:, None]
        >>> split_start(points, jnp.ones((4, 1)), 3).ravel().tolist()
        [0.0, 1.0, 10.5]
    """
    x, mass = jax.lax.sort((points.astype(jnp.float32), weights.astype(jnp.float32)), dimension=0, num_keys=1)
    n, columns = x.shape
    largest = mass.max(0)
    mass = jnp.where(largest > 0, mass / jnp.where(largest > 0, largest, 1), 1.0)
    middle = (mass * x).sum(0) / mass.sum(0)  # moments about the mean: products of running sums would lose digits
    total, moment = _running_sum(mass), _running_sum(mass * (x - middle))
    place = jax.lax.broadcasted_iota(jnp.int32, (n + 1, columns), 0)

    def between(sums: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
        return jnp.take_along_axis(sums, end, axis=0) - jnp.take_along_axis(sums, start, axis=0)

    def cut(edges: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        start, end = edges  # of the interval that a cut before each point would divide
        left, right = between(total, start, place), between(total, place, end)
        difference = left * between(moment, place, end) - right * between(moment, start, place)
        product = left * right * (left + right)
        gain = jnp.where((left > 0) & (right > 0), jnp.square(difference) / jnp.where(product > 0, product, 1), 0)
        best = jnp.where(gain.max(0) > 0, gain.argmax(0), n).astype(jnp.int32)
        start = jnp.maximum(start, jnp.where(place >= best, best, 0))
        end = jnp.minimum(end, jnp.where(place < best, best, n))
        return (start, end), best

    _, cuts = jax.lax.scan(cut, (jnp.zeros_like(place), jnp.full_like(place, n)), length=entries - 1)
    edge = jnp.zeros((1, columns), jnp.int32)
    edges = jnp.concatenate([edge, jnp.sort(cuts, axis=0), edge + n])
    weight, first = between(total, edges[:-1], edges[1:]), between(moment, edges[:-1], edges[1:])
    means = middle + first / jnp.where(weight > 0, weight, 1)
    low = jnp.take_along_axis(x, jnp.minimum(edges[:-1], n - 1), axis=0)
    high = jnp.take_along_axis(x, jnp.maximum(edges[1:] - 1, 0), axis=0)
    # Rounding of running sums must not carry a light interval's mean out of it; an empty one is at the last point.
    return jnp.where(edges[1:] > edges[:-1], jnp.clip(means, low, high), x[-1:])


def _running_sum(x: jax.Array) -> jax.Array:
    """`[n + 1, columns]`: sums of the first 0, 1, ..., n numbers."""
    return jnp.pad(jnp.cumsum(x, axis=0), ((1, 0), (0, 0)))
