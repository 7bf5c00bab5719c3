"""Where centroids start: exact k-means in one dimension, k-means++ for vectors, and the repair of duplicates."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

EXACT = 1024  # weights up to which the clustering is the best there is
RUNS = 512  # runs of sorted weights that a larger set is cut to; clusters begin and end with runs, before refinement
STEPS = 30  # refinements over all weights


def kmeans(w: Float[Array, " N"], entries: int) -> Float[Array, " entries"]:
    """Centroids of least squared error, ascending and distinct.

    Up to 1024 weights the optimum, by dynamic programming over the sorted weights (Wang and Song 2011, section 2).
    Above, the optimum over 512 runs of consecutive sorted weights, refined by 30 k-means steps over all of them.
    Draws nothing.

    Args:
        w: weights of one table.
        entries: number of centroids.

    Example:
        >>> kmeans(jnp.array([0.0, 0.5, 5.0, 5.5, 8.0]), 3).tolist()
        [0.25, 5.25, 8.0]
    """
    x = jnp.sort(w.astype(jnp.float32))
    middle = x.mean()
    spread = jnp.maximum(jnp.abs(x - middle).max(), jnp.finfo(jnp.float32).tiny)
    x = (x - middle) / spread  # squares of tiny weights would vanish
    length = 1 if x.size <= EXACT else -(-x.size // RUNS)
    pad = -x.size % length
    held = (jnp.arange(x.size + pad) < x.size).reshape(-1, length).astype(jnp.float32)
    runs = jnp.pad(x, (0, pad)).reshape(-1, length)
    counts, sums = held.sum(1), runs.sum(1)
    starts = _best_starts(counts, sums, entries)
    edges = jnp.append(starts, counts.size)
    prefix_n, prefix = _prefix(counts), _prefix(sums)
    c = _means(prefix[edges], prefix_n[edges], runs[:, 0][jnp.minimum(starts, counts.size - 1)])
    if length > 1:
        c = lax.fori_loop(0, STEPS, lambda _, c: _refine(x, runs, prefix, jnp.sort(c)), c)
    return repair(c * spread + middle)


def _prefix(x: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros(1), jnp.cumsum(x)])


def _means(sums: jax.Array, counts: jax.Array, otherwise: jax.Array) -> jax.Array:
    """Means between consecutive edges of running sums."""
    n = jnp.diff(counts)
    return jnp.where(n > 0, jnp.diff(sums) / jnp.maximum(n, 1), otherwise)


def _best_starts(counts: jax.Array, sums: jax.Array, entries: int) -> Int[Array, " entries"]:
    """First run of each cluster in the partition of least squared error; a cluster may be empty."""
    squares = jnp.square(sums) / counts
    n, s, q = _prefix(counts), _prefix(sums), _prefix(squares)
    total = s - s[:, None]  # [first, end): entry [first, end]
    number = n - n[:, None]
    cost = q - q[:, None] - jnp.square(total) / jnp.maximum(number, 1)
    cost = jnp.where(number > 0, jnp.maximum(cost, 0), jnp.where(number == 0, 0, jnp.inf))

    def add_cluster(best: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        costs = best[:, None] + cost
        return costs.min(0), costs.argmin(0)

    none = jnp.where(jnp.arange(n.size) == 0, 0.0, jnp.inf)
    _, choices = lax.scan(add_cluster, none, None, length=entries)

    def back(end: jax.Array, choice: jax.Array) -> tuple[jax.Array, jax.Array]:
        return choice[end], choice[end]

    _, starts = lax.scan(back, jnp.int32(n.size - 1), choices.astype(jnp.int32), reverse=True)
    return starts


def _refine(x: jax.Array, runs: jax.Array, prefix: jax.Array, c: jax.Array) -> jax.Array:
    """One k-means step over sorted weights: clusters are what lies between the middles of neighbours."""
    ends = jnp.searchsorted(x, (c[1:] + c[:-1]) / 2)
    edges = jnp.concatenate([jnp.zeros(1, ends.dtype), ends, jnp.full(1, x.size, ends.dtype)])
    length = runs.shape[1]
    run = jnp.minimum(edges // length, runs.shape[0] - 1)
    inside = jnp.arange(length) < (edges - run * length)[:, None]
    running = prefix[run] + jnp.where(inside, runs[run], 0).sum(1)
    return _means(running, edges.astype(jnp.float32), c)


def repair(c: Float[Array, " K"]) -> Float[Array, " K"]:
    """Centroids ascending, and equal ones spread towards the next larger, so that their number stays K.

    Example:
        >>> repair(jnp.array([1.0, 0.0, 0.0, 0.5, 0.0, 0.0])).tolist()
        [0.0, 0.125, 0.25, 0.375, 0.5, 1.0]
    """
    c = jnp.sort(c)
    index = jnp.arange(c.size)
    first = jnp.searchsorted(c, c, side="left")
    end = jnp.searchsorted(c, c, side="right")
    # After the largest there is no next: steps of at least a 64th of it are steps in bfloat16 as well.
    beyond = c[-1] + jnp.maximum(jnp.abs(c[-1]), 1e-30) / 64 * c.size
    following = jnp.where(end < c.size, c[jnp.minimum(end, c.size - 1)], beyond)
    return c + (following - c) * (index - first) / (end - first)


def nearest(w: Float[Array, "*L n g m"], tables: Float[Array, "*L 1 g K"]) -> Int[Array, "*L n g m"]:
    """Index of the nearest entry of ascending tables; between two, the larger."""
    middles = (tables[..., 1:] + tables[..., :-1]) / 2

    def add(code: jax.Array, j: jax.Array) -> tuple[jax.Array, None]:
        return code + (w >= lax.dynamic_index_in_dim(middles, j, axis=middles.ndim - 1)).astype(code.dtype), None

    return lax.scan(add, jnp.zeros(w.shape, jnp.uint8), jnp.arange(middles.shape[-1]))[0]


def kmeans_vectors(x: Float[Array, "N dim"], entries: int, key: jax.Array, steps: int = 100) -> Float[Array, "K dim"]:
    """k-means++ (Arthur and Vassilvitskii 2007) and Lloyd's iterations, for vectors of weights.

    Example:
        >>> corners = jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> sorted(kmeans_vectors(jnp.repeat(corners, 5, axis=0), 3, jax.random.key(0)).tolist())
        [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    """
    x = x.astype(jnp.float32)
    keys = jax.random.split(key, entries)

    def choose(closest: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.where(closest.max() > 0, jnp.log(closest), 0)  # where all are taken, any will do
        c = x[jax.random.categorical(key, logits)]
        return jnp.minimum(closest, jnp.square(x - c).sum(-1)), c

    _, c = lax.scan(choose, jnp.full(x.shape[0], 1e30), keys)

    def step(_: jax.Array, c: jax.Array) -> jax.Array:
        owner = jnp.square(x[:, None] - c).sum(-1).argmin(-1)
        sums = jax.ops.segment_sum(x, owner, entries)
        n = jax.ops.segment_sum(jnp.ones(x.shape[0]), owner, entries)[:, None]
        return jnp.where(n > 0, sums / jnp.maximum(n, 1), c)

    return lax.fori_loop(0, steps, step, c)
