"""Hash tables of labels: sorted ids and offsets of buckets, built and read under jit with static shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LabelTables:
    """In each table, every label lies in the one bucket of its code; a query reads the bucket of its own code.

    Attributes:
        ids: `int32[tables, labels]`, the labels of a table in the order of their codes.
        offsets: `int32[tables, buckets + 1]`, where each bucket begins in `ids`, and where the last ends.

    Example:
        >>> tables = build_tables(jnp.array([[2, 0], [1, 0], [2, 3]]), buckets=4)
        >>> tables.ids.tolist(), tables.offsets.tolist()
        ([[1, 0, 2], [0, 1, 2]], [[0, 0, 1, 3, 3], [0, 2, 2, 2, 3]])
    """

    ids: Int32[Array, "tables labels"]
    offsets: Int32[Array, "tables edges"]

    @property
    def buckets(self) -> int:
        """Of a table."""
        return self.offsets.shape[-1] - 1

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.offsets.nbytes

    def most(self) -> int:
        """The most slots that a query can ask `retrieve` for: the largest bucket of each table. Not under jit."""
        return int(np.diff(np.asarray(self.offsets), axis=-1).max(-1).sum())

    def sizes(self, codes: Int32[Array, "*batch tables"]) -> Int32[Array, "*batch tables"]:
        """Labels in the bucket of each table."""
        at = jnp.arange(self.offsets.shape[0])
        return self.offsets[at, codes + 1] - self.offsets[at, codes]


def build_tables(codes: Int32[Array, "labels tables"], buckets: int) -> LabelTables:
    """The tables of labels with these codes, each in `[0, buckets)`.

    Raises:
        ValueError: codes that are not integers of two axes, no label or table, or no bucket.
    """
    if codes.ndim != 2 or 0 in codes.shape or not jnp.issubdtype(codes.dtype, jnp.integer) or buckets < 1:
        raise ValueError(
            f"build_tables: codes {codes.dtype}{list(codes.shape)} and buckets={buckets}: give integers [labels, "
            "tables] of at least one label and table, and a positive number of buckets"
        )
    by_table = codes.T.astype(jnp.int32)
    ids = jnp.argsort(by_table, axis=1, stable=True).astype(jnp.int32)
    ordered = jnp.take_along_axis(by_table, ids, axis=1)
    edges = jnp.arange(buckets + 1, dtype=jnp.int32)
    offsets = jax.vmap(lambda row: jnp.searchsorted(row, edges))(ordered)
    return LabelTables(ids=ids, offsets=offsets.astype(jnp.int32))


def slots(
    tables: LabelTables, codes: Int32[Array, "*batch tables"], which: Int32[Array, "*batch n"]
) -> Int32[Array, "*batch n"]:
    """The labels at places `which` of a query's buckets laid end to end; a label may lie in several.

    Places past the end give some label; compare with `tables.sizes(codes).sum(-1)`.
    """
    at = jnp.arange(codes.shape[-1])
    ends = jnp.cumsum(tables.sizes(codes), axis=-1)
    begins = ends - tables.sizes(codes)
    table = jnp.sum(which[..., :, None] >= ends[..., None, :], -1)
    table = jnp.minimum(table, codes.shape[-1] - 1)
    start = tables.offsets[at, codes] - begins
    place = jnp.take_along_axis(start, table, axis=-1) + which
    return tables.ids[table, jnp.clip(place, 0, tables.ids.shape[-1] - 1)]


def retrieve(
    tables: LabelTables, codes: Int32[Array, "*batch tables"], *, max_candidates: int
) -> tuple[Int32[Array, "*batch candidates"], Bool[Array, "*batch candidates"]]:
    """The union of the buckets of a query, in ascending order, padded.

    Args:
        tables: of the labels.
        codes: of the queries.
        max_candidates: slots of the result. Where the buckets together hold more, counted with the labels that lie in
            several, those of the last tables are lost; `tables.most()` is always enough.

    Returns:
        ids: each label once, in slots where `valid`; the number of labels elsewhere.
        valid: which slots hold a label.

    Raises:
        ValueError: codes of another number of tables, or no slot.

    Example:
        >>> tables = build_tables(jnp.array([[2, 0], [1, 0], [2, 3]]), buckets=4)
        >>> ids, valid = retrieve(tables, jnp.array([2, 0]), max_candidates=5)
        >>> ids.tolist(), valid.tolist()
        ([0, 1, 2, 3, 3], [True, True, True, False, False])
    """
    count, labels = tables.ids.shape
    if codes.shape[-1:] != (count,) or max_candidates < 1:
        raise ValueError(
            f"retrieve: codes {list(codes.shape)} of {count} tables, max_candidates={max_candidates}: give a code a "
            "table and at least one slot"
        )
    which = jnp.broadcast_to(jnp.arange(max_candidates), (*codes.shape[:-1], max_candidates))
    held = which < tables.sizes(codes).sum(-1, keepdims=True)
    found = jnp.sort(jnp.where(held, slots(tables, codes, which), labels), axis=-1)
    again = jnp.concatenate([jnp.zeros_like(held[..., :1]), found[..., 1:] == found[..., :-1]], axis=-1)
    ids = jnp.sort(jnp.where(again, labels, found), axis=-1)
    return ids, ids < labels


def with_last(x: Float[Array, "*n d"], last: Float[Array, "*n"]) -> Float[Array, "*n d1"]:
    """`[x, last]` in float32: a label as `[w, b]` and a query as `[h, 1]`, whose product is the logit."""
    return jnp.concatenate([x.astype(jnp.float32), last[..., None].astype(jnp.float32)], axis=-1)


def same_norm(points: Float[Array, "n d"]) -> Float[Array, "n d1"]:
    """A further channel that gives all points the norm of the longest.

    The angle to a query with a zero there then falls as the product grows, so that hashes for the angle are hashes for
    the product: plain MIPS-LSH (Neyshabur and Srebro 2015, Simple-LSH).

    Example:
        >>> same_norm(jnp.array([[3.0, 4.0], [0.0, 3.0]])).tolist()
        [[3.0, 4.0, 0.0], [0.0, 3.0, 4.0]]
    """
    squares = jnp.sum(jnp.square(points.astype(jnp.float32)), -1)
    return with_last(points, jnp.sqrt(jnp.maximum(squares.max() - squares, 0)))
