"""Weighted k-means of vectors: centres that a draw of k-means++ starts and Lloyd's steps improve."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

_PIECE = 1024  # points at once, so that their distances to all centres stay in a processor's cache


def vector_kmeans(
    points: Float[Array, "n channels"],
    weights: Float[Array, "n *channels"],
    entries: int,
    *,
    key: Key[Array, ""],
    iterations: int = 50,
    tolerance: float = 1e-4,
) -> Float[Array, "entries channels"]:
    """Centres that make `sum_j weights[j] min_k |points[j] - centres[k]|^2` small, in float32.

    With weights of channels a centre is, channel by channel, the weighed mean of the points that are nearest to it by
    distances without weights, as codes are made, when gradients are not known. A centre that loses all its weight stays
    where it is. Points are moved to their mean first, so that distances, which are computed by products, keep their
    digits.

    Args:
        points: what to cluster, float32.
        weights: of points, or of their channels; not negative, only their ratios matter. All zero counts as all equal.
        entries: number of centres. Where there are fewer distinct points, some centres are equal.
        key: of the draws of the start.
        iterations: steps at most.
        tolerance: a run ends when no centre moves by more than this fraction of the root mean square distance of
            the points from their mean.

    Example:
        >>> points = jnp.array([[0.0, 0.0], [1.0, 0.0], [9.0, 9.0]])
        >>> centres = vector_kmeans(points, jnp.array([1.0, 3.0, 1.0]), 2, key=jax.random.key(0))
        >>> sorted(centres.round(4).tolist())
        [[0.75, 0.0], [9.0, 9.0]]

    Source: Lloyd (1982); Arthur and Vassilvitskii, k-means++ (2007).
    """
    shares = normalised(weights if weights.ndim == 2 else weights[:, None])
    weights = jnp.mean(shares, axis=1)
    middle = jnp.sum(weights[:, None] * points, axis=0) / jnp.sum(weights)
    moved = points.astype(jnp.float32) - middle
    start = plus_plus(moved, weights, entries, key=key)
    limit = tolerance * jnp.sqrt(jnp.sum(weights[:, None] * jnp.square(moved)) / jnp.sum(weights))
    channels = moved.shape[1]
    pieces = _pieces(moved), _pieces(jnp.concatenate([shares * moved, shares], axis=1))  # padding weighs nothing

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        centres, _, count = state
        lengths = jnp.sum(jnp.square(centres), axis=1, keepdims=True) / 2

        def add(sums: Array, piece: tuple[Array, Array]) -> tuple[Array, None]:
            points, counted = piece
            # Half of the squared distances, less what all centres have in common.
            distances = lengths - jnp.dot(centres, points.T, precision="highest")
            # Equal distances count for each of the centres: comparing with the minimum is a vector operation, where an
            # argmin goes point by point on most backends, and hardly any but equal centres are at equal distances.
            members = jnp.where(distances == jnp.min(distances, axis=0), 1.0, 0.0)
            return sums + jnp.dot(members, counted, precision="highest"), None

        sums, _ = jax.lax.scan(add, jnp.zeros((entries, pieces[1].shape[-1]), jnp.float32), pieces)
        mass = sums[:, channels:]
        found = jnp.where(mass > 0, sums[:, :channels] / jnp.where(mass > 0, mass, 1.0), centres)
        return found, jnp.max(jnp.abs(found - centres)), count + 1

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] > limit) & (state[2] < iterations)

    first = start, jnp.float32(jnp.inf), jnp.int32(0)
    return jax.lax.while_loop(unfinished, step, first)[0] + middle


def plus_plus(
    points: Float[Array, "n channels"], weights: Float[Array, " n"], entries: int, *, key: Key[Array, ""]
) -> Float[Array, "entries channels"]:
    """Starting centres: points drawn one after another, by weight times squared distance from those drawn before."""
    across = points.T
    shares = jax.random.uniform(key, (entries,))

    def draw(mass: Array, share: Array) -> Array:
        sums = jnp.cumsum(mass)
        return jnp.minimum(jnp.searchsorted(sums, share * sums[-1], side="right"), points.shape[0] - 1)

    def add(distance: Array, share: Array) -> tuple[Array, Array]:
        mass = weights * distance
        centre = points[draw(jnp.where(jnp.max(mass) > 0, mass, weights), share)]
        return jnp.minimum(distance, jnp.sum(jnp.square(across - centre[:, None]), axis=0)), centre

    first = points[draw(weights, shares[0])]
    distance = jnp.sum(jnp.square(across - first[:, None]), axis=0)
    _, rest = jax.lax.scan(add, distance, shares[1:])
    return jnp.concatenate([first[None], rest])


def normalised(weights: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Weights of mean 1, in float32; all equal where none counts. Squared gradients are far from 1 otherwise."""
    weights = weights.astype(jnp.float32)
    largest = jnp.max(weights)
    weights = jnp.where(largest > 0, weights / jnp.where(largest > 0, largest, 1.0), 1.0)
    return weights / jnp.mean(weights)


def _pieces(x: Float[Array, "n *any"]) -> Float[Array, "pieces size *any"]:
    size = min(_PIECE, x.shape[0])
    padded = jnp.pad(x, [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1))
    return padded.reshape(-1, size, *x.shape[1:])
