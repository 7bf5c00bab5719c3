"""The best of the labels that a query's hash buckets hold: hash, look up, score and rank, natively in one call."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from effjax.hashing.lsh import SignProjections
from effjax.ops.platform import platform_operation
from kernels_cpu import label_top_k as native


class LabelTopK(NamedTuple):
    """The best labels of each query.

    Attributes:
        values: `float32[*batch, k]`, their logits, largest first; -inf where a query has fewer.
        labels: `int32[*batch, k]`; -1 where a query has fewer.
        scored: `int32[*batch]`, the labels whose logits were computed.
    """

    values: Float[Array, "*batch k"]
    labels: Int32[Array, "*batch k"]
    scored: Int32[Array, "*batch"]


def label_top_k(
    h: Float[Array, "*batch d"],
    hash_functions: SignProjections,
    ids: Int32[Array, "tables labels"],
    offsets: Int32[Array, "tables edges"],
    weights: Float[Array, "labels d"],
    bias: Float[Array, "labels"],
    fallback: Int32[Array, "few"],
    *,
    k: int,
    implementation: str | None = None,
) -> LabelTopK:
    """The `k` largest of `h @ weights[j] + bias[j]` over the labels `j` in the buckets of `[h, 1]`.

    A query whose buckets hold fewer than `k` labels scores those of `fallback` too. Of equal logits the smaller label
    comes first. The logits have derivatives with respect to `h`, `weights` and `bias`; which labels are found has none.

    Args:
        h: queries; computed in float32.
        hash_functions: of `d + 1` channels, without rehashing.
        ids, offsets: of `effjax.sparsity.LabelTables`.
        weights: a row a label, float32 or bfloat16.
        bias: of the labels.
        fallback: labels, may be none.
        k: at most the number of labels.
        implementation: "reference" (the definition: all logits, those of other labels masked; no faster than that) or
            "cpu", whose work grows with the buckets alone; None takes the native kernel in a jitted program for one
            CPU, else the reference. A code within rounding of a boundary may differ between the two.

    Raises:
        ValueError: shapes that do not fit together, `k` out of range, or an implementation that does not run here.

    Example:
        >>> lsh = SignProjections.make(jax.random.key(0), dim=3, rows=1, hashes=1)
        >>> ids, offsets = jnp.array([[0, 1, 2, 3]]), jnp.array([[0, 4, 4]])  # all in the first of two buckets
        >>> best = label_top_k(-lsh.directions[:2, 0].T, lsh, ids, offsets, jnp.eye(4, 2), jnp.arange(4.0), ids[0], k=2)
        >>> best.labels.tolist(), best.scored.tolist()
        ([[3, 2]], [4])
    """
    dim, _, tables = hash_functions.directions.shape
    labels = ids.shape[-1]
    if hash_functions.rehash is not None:
        raise ValueError("label_top_k: hash_functions must not rehash; make SignProjections without buckets")
    fits = (
        h.shape[-1:] == (dim - 1,)
        and ids.shape == (tables, labels)
        and offsets.shape == (tables, hash_functions.buckets + 1)
        and weights.shape == (labels, dim - 1)
        and bias.shape == (labels,)
        and fallback.ndim == 1
    )
    if not fits:
        raise ValueError(
            f"label_top_k: h {h.shape}, ids {ids.shape}, offsets {offsets.shape}, weights {weights.shape}, bias "
            f"{bias.shape} and fallback {fallback.shape} do not fit {tables} tables of {hash_functions.buckets} "
            f"buckets and hashes of {dim} channels, one more than h has"
        )
    if weights.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"label_top_k: weights {weights.dtype}: store them as float32 or bfloat16")
    if not 1 <= k <= labels:
        raise ValueError(f"label_top_k: k={k}: choose 1 to {labels}, the number of labels")
    batch = h.shape[:-1]
    flat = h.reshape(-1, dim - 1).astype(jnp.float32)
    arrays = (flat, hash_functions.directions.astype(jnp.float32), ids, offsets, weights, bias.astype(jnp.float32))
    results: Any = _top_k(k, implementation, *arrays, fallback.astype(jnp.int32))
    values, found, scored = results
    return LabelTopK(values.reshape(*batch, k), found.reshape(*batch, k), scored.reshape(batch))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _top_k(k: int, implementation: str | None, *arrays: jax.Array) -> list[jax.Array]:
    if implementation is None:
        return _chosen(*arrays, k=k)
    if implementation == "reference":
        return _reference(*arrays, k=k)
    if implementation != "cpu":
        raise ValueError(f"label_top_k: implementation={implementation!r}: choose 'reference' or 'cpu'")
    reason = _why_not(arrays[1])
    if reason:
        raise ValueError(f"label_top_k: implementation='cpu' does not run: {reason}")
    return _native(*arrays, k=k)


def _forward(k: int, implementation: str | None, *arrays: jax.Array) -> tuple[list[jax.Array], tuple]:
    results: Any = _top_k(k, implementation, *arrays)
    return results, (arrays[0], arrays[4], results[1])


def _backward(k: int, implementation: str | None, kept: tuple, cotangents: list[jax.Array]) -> tuple:
    h, weights, found = kept
    g = jnp.where(found >= 0, cotangents[0], 0)
    at = jnp.maximum(found, 0)
    to_h = jnp.einsum("nk,nkd->nd", g, weights[at].astype(jnp.float32))
    to_weights = jnp.zeros(weights.shape, jnp.float32).at[at].add(g[..., None] * h[:, None])
    to_bias = jnp.zeros(weights.shape[:1], jnp.float32).at[at].add(g)
    return to_h, None, None, None, to_weights.astype(weights.dtype), to_bias, None


_top_k.defvjp(_forward, _backward)


def _reference(*arrays: jax.Array, k: int) -> list[jax.Array]:
    h, directions, ids, offsets, weights, bias, fallback = arrays
    lsh = SignProjections(directions=directions, rehash=None, buckets=offsets.shape[1] - 1)
    codes = lsh(jnp.concatenate([h, jnp.ones_like(h[:, :1])], 1))
    labels = ids.shape[1]

    def add(members: jax.Array, table: Any) -> tuple[jax.Array, None]:
        ids, offsets, code = table
        place = jnp.zeros(labels, jnp.int32).at[ids].set(jnp.arange(labels, dtype=jnp.int32))
        begin, end = offsets[code][:, None], offsets[code + 1][:, None]
        return members | ((place >= begin) & (place < end)), None

    members = jax.lax.scan(add, jnp.zeros((h.shape[0], labels), bool), (ids, offsets, codes.T))[0]
    few = members.sum(1, keepdims=True) < k
    members |= few & jnp.zeros(labels, bool).at[fallback].set(True)
    logits = jnp.where(members, h @ weights.astype(jnp.float32).T + bias, -jnp.inf)
    values, found = jax.lax.top_k(logits, k)
    scored = members.sum(1, dtype=jnp.int32)
    some = jnp.arange(k) < scored[:, None]
    return [jnp.where(some, values, -jnp.inf), jnp.where(some, found, -1).astype(jnp.int32), scored]


def _why_not(directions: jax.Array) -> str:
    _, hashes, tables = directions.shape
    return native.why_not(hashes, tables)


def _native(*arrays: jax.Array, k: int) -> list[jax.Array]:
    return list(native.label_top_k(*arrays, k=k))


def _where_native(*arrays: jax.Array, k: int) -> list[jax.Array]:
    run = _reference if _why_not(arrays[1]) else _native
    return run(*arrays, k=k)


_chosen = platform_operation(
    "label_top_k",
    lambda h, *_, k: [
        ((h.shape[0], k), jnp.dtype(jnp.float32)),
        ((h.shape[0], k), jnp.dtype(jnp.int32)),
        ((h.shape[0],), jnp.dtype(jnp.int32)),
    ],
    default=_reference,
    one_device={"cpu": _where_native},
    static_argnames=("k",),
)
