"""Curation of transfer sets: which unlabelled images of a large gallery a student shall learn a task from.

Vemulapalli et al., Knowledge Transfer from Vision Foundation Models for Efficient Training of Small Task-specific
Models (ICML 2024): the few labelled images of the task are the queries, and what lies nearest to them in the embedding
of a foundation model forms the set. The gallery is read in blocks, so that it may be a memory-mapped file.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.models.transformer import unit

Mode = Literal["random", "best_matches", "query_balanced"]
BLOCK = 4096  # rows of the gallery that are compared at once


def curate(
    queries: Float[Array | np.ndarray, "queries d"],
    gallery: Float[Array | np.ndarray, "rows d"],
    n: int,
    *,
    mode: Mode = "query_balanced",
    key: jax.Array | None = None,
    block: int = BLOCK,
) -> Int[Array, "n"]:
    """Chooses `n` different rows of the gallery; a pure function, and deterministic.

    Rows are compared by the cosine. Of rows that are equally near the first is taken, so that without ties the choice
    does not depend on the order of the gallery.

    Args:
        queries: embeddings of the task's labelled images.
        gallery: embeddings of what can be chosen; numpy arrays and memory-mapped files are read block by block.
        n: how many.
        mode: "random", any rows; "best_matches", those with the largest cosine to any query, which may all be
            neighbours of a few queries; "query_balanced", the queries in turn take the nearest row that nobody has, so
            that each has `n / queries` of them, rounded down or up.
        key: for "random" alone.
        block: rows of the gallery at a time. Memory is `queries * (n + block)` numbers ("query_balanced") or
            `queries * block` ("best_matches").

    Returns:
        Row numbers, int32: the best first, or in the order in which they were taken or drawn.

    Raises:
        ValueError: `n` is not in 1 to rows, widths differ, there is no query, `mode` is unknown or has no key.

    Example:
        >>> queries = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> gallery = jnp.array([[5.0, 0.1], [3.0, 0.0], [-1.0, 0.0], [1.0, 0.5], [0.2, 0.9]])
        >>> curate(queries, gallery, 3, mode="best_matches").tolist(), curate(queries, gallery, 3).tolist()
        ([1, 0, 4], [1, 4, 0])
    """
    rows = gallery.shape[0]
    if not 1 <= n <= rows:
        raise ValueError(f"curate: n={n} of a gallery {list(gallery.shape)}: choose 1 to {rows}")
    if mode == "random":
        if key is None:
            raise ValueError("curate: mode='random' draws rows: pass a key")
        return jax.random.permutation(key, rows)[:n].astype(jnp.int32)
    if mode not in ("best_matches", "query_balanced"):
        raise ValueError(f"curate: mode={mode!r}: choose 'random', 'best_matches' or 'query_balanced'")
    if queries.ndim != 2 or queries.shape[0] == 0 or queries.shape[1:] != gallery.shape[1:]:
        raise ValueError(
            f"curate: queries {list(queries.shape)} and gallery {list(gallery.shape)}: give at least one query, and "
            "embeddings of one model"
        )
    if mode == "best_matches":
        return _nearest(queries, gallery, n, block, joined=True)[0]
    return _in_turn(_nearest(queries, gallery, n, block, joined=False), rows)


def query_counts(
    queries: Float[Array | np.ndarray, "queries d"], chosen: Float[Array | np.ndarray, "n d"]
) -> Int[Array, "queries"]:
    """How many of the chosen embeddings have each query as their nearest: few queries with most of them are a collapse.

    Example:
        >>> queries = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> query_counts(queries, jnp.array([[2.0, 1.0], [3.0, 0.0], [0.0, 1.0]])).tolist()
        [2, 1]
    """
    nearest = (unit(jnp.asarray(chosen)) @ unit(jnp.asarray(queries)).T).argmax(axis=1)
    return jnp.bincount(nearest, length=queries.shape[0])


def _nearest(queries: Any, gallery: Any, n: int, block: int, *, joined: bool) -> Int[Array, "lists n"]:
    """The `n` nearest rows of each query, best first; or one list, of cosines to whichever query is nearest."""
    queries = unit(jnp.asarray(queries))
    lists = 1 if joined else len(queries)
    best = jnp.full((lists, n), -jnp.inf), jnp.zeros((lists, n), jnp.int32)
    for start in range(0, gallery.shape[0], block):
        best = _merge(best, queries, jnp.asarray(gallery[start : start + block]), start, joined)
    return best[1]


@partial(jax.jit, static_argnames="joined")
def _merge(best: Any, queries: jax.Array, rows: jax.Array, start: int, joined: bool) -> tuple[jax.Array, jax.Array]:
    """The running lists after one more block. `top_k` prefers what comes first, which are the earlier rows."""
    cosines = queries @ unit(rows).T
    if joined:
        cosines = cosines.max(axis=0, keepdims=True)
    ids = jnp.broadcast_to(start + jnp.arange(len(rows), dtype=jnp.int32), cosines.shape)
    scores, ids = (jnp.concatenate(pair, axis=1) for pair in zip(best, (cosines, ids), strict=True))
    scores, where = jax.lax.top_k(scores, best[0].shape[1])
    return scores, jnp.take_along_axis(ids, where, axis=1)


@partial(jax.jit, static_argnames="rows")
def _in_turn(lists: Int[Array, "queries n"], rows: int) -> Int[Array, "n"]:
    """Queries take the first of their list that is free. A list of `n` suffices: all of it taken, `n` are taken."""

    def take(taken: jax.Array, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = lists[turn % len(lists)]
        chosen = own[jnp.argmin(taken[own])]
        return taken.at[chosen].set(True), chosen

    return jax.lax.scan(take, jnp.zeros(rows, bool), jnp.arange(lists.shape[1]))[1]
