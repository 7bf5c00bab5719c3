"""Softmax attention with shared key heads: of whole texts, and of new tokens to the slots of a cache.

Sources: Ainslie et al., grouped-query attention (2023); sums of powers instead of weights as in Dao et al.,
FlashAttention (2022), though all slots of a run of queries are taken at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.kv.importance import ATTENTION_RECEIVED, Importance
from effjax.kv.nomad_slots import NomadSlots
from effjax.ops.attention import decode_attention

_RUN_SCORES, _LEAST_RUN = 2**20, 16  # scores of a run: 4 MiB in float32


def attend(
    q: Float[Array, "batch length kv_heads group head_dim"],
    k: Float[Array, "batch kv_heads slots head_dim"],
    v: Float[Array, "batch kv_heads slots head_dim"],
    seen: Bool[Array, "batch kv_heads length slots"],
) -> Float[Array, "batch length kv_heads group head_dim"]:
    """Softmax attention of whole texts."""
    # Queries and outputs are turned by hand, tokens innermost but one, so that XLA's CPU compiler does not turn the
    # scores, which are `length / head_dim` times as large, for its matrix products.
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bhgtd,bhsd->bhgts", q.transpose(0, 2, 3, 1, 4), k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(seen[:, :, None], logits, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bhgts,bhsd->bhgtd", weights.astype(v.dtype), v).transpose(0, 3, 1, 2, 4)


Seen = Callable[[Int[Array, "batch queries"]], Bool[Array, "batch kv_heads queries slots"]]


def attend_to_slots(
    q: Float[Array, "batch length kv_heads group head_dim"],
    k: Float[Array, "batch kv_heads slots head_dim"],
    v: Float[Array, "batch kv_heads slots head_dim"],
    seen: Seen,
    positions: Int[Array, "batch length"],
    asked: Float[Array, "batch length"],
    importance: Importance = ATTENTION_RECEIVED,
) -> tuple[Float[Array, "batch length kv_heads group head_dim"], Float[Array, "batch kv_heads slots"]]:
    """Softmax attention to a cache, and what each slot receives of it in float32, queries weighed by `asked`.

    What a slot receives is its weight, or 1 where it is pivotal, as `importance` says (see `Importance`); summed over
    the query heads of a group.

    Long prompts go by runs of queries whose scores stay in the cache of a processor; on one, all scores at once take
    five times as long (512 queries of 32 heads).
    """
    batch, length, kv_heads, group, _ = q.shape
    if length == 1:
        y, received = _attend_once(q[:, 0], k, v, seen(positions)[:, :, 0], asked[:, 0], importance)
        return y[:, None], received
    fitting = max(_RUN_SCORES // (batch * kv_heads * group * k.shape[2]), _LEAST_RUN)
    run = 1 << fitting.bit_length() - 1
    if length <= run:
        return _attend_run(q, k, v, seen(positions), asked, importance)

    def runs(x: Array) -> Array:
        padded = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, -length % run if a == 1 else 0, 0) for a in range(x.ndim)])
        return jnp.moveaxis(padded.reshape(batch, -1, run, *x.shape[2:]), 1, 0)

    def one(received: Array, queries: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, positions, asked = queries
        y, more = _attend_run(q, k, v, seen(positions), asked, importance)
        return received + more, y

    none = jnp.zeros(k.shape[:3], jnp.float32)
    received, y = jax.lax.scan(one, none, (runs(q), runs(positions), runs(asked)))
    return jnp.moveaxis(y, 0, 1).reshape(batch, -1, *q.shape[2:])[:, :length], received


def attend_to_filled(
    q: Float[Array, "batch 1 kv_heads group head_dim"],
    k: Any,
    v: Any,
    length: Int[Array, "batch kv_heads"],
    asked: Float[Array, "batch 1"],
    importance: Importance = ATTENTION_RECEIVED,
) -> tuple[Float[Array, "batch 1 kv_heads group head_dim"], Float[Array, "batch kv_heads slots"]]:
    """`attend_to_slots` of one query a row that sees every filled slot: what stays unread costs nothing.

    Keys and values are `[batch, kv_heads, slots, head_dim]`, or codes (`effjax.ops.CodedSlots`). A kernel runs where
    there is one, see `effjax.ops.decode_attention`; derivatives are those of its definition. Keys that are looked up
    (`NomadSlots`) have no derivatives.
    """
    if isinstance(k, NomadSlots):
        y, received = k.attend(q[:, 0], v, length, asked[:, 0])
        return y[:, None], received
    y, received = _attend_to_filled(q[:, 0], k, v, length, asked[:, 0], importance)
    return y[:, None], received


@partial(jax.custom_jvp, nondiff_argnums=(5,))
def _attend_to_filled(q: Array, k: Any, v: Any, length: Array, asked: Array, importance: Importance) -> Any:
    return decode_attention(q, k, v, length, asked=asked, importance=importance)


@_attend_to_filled.defjvp
def _attend_to_filled_jvp(importance: Importance, primals: Any, tangents: Any) -> Any:
    def definition(q: Array, k: Any, v: Any, length: Array, asked: Array) -> Any:
        return decode_attention(q, k, v, length, asked=asked, importance=importance, implementation="reference")

    return jax.jvp(definition, primals, tangents)


def _attend_run(
    q: Float[Array, "batch length kv_heads group head_dim"],
    k: Float[Array, "batch kv_heads slots head_dim"],
    v: Float[Array, "batch kv_heads slots head_dim"],
    seen: Bool[Array, "batch kv_heads length slots"],
    asked: Float[Array, "batch length"],
    importance: Importance,
) -> tuple[Float[Array, "batch length kv_heads group head_dim"], Float[Array, "batch kv_heads slots"]]:
    """`attend_to_slots` of some queries; the heads of a group are rows of one product, as they share keys."""
    batch, length, kv_heads, group, head_dim = q.shape
    rows, slots = (batch, kv_heads, group * length), k.shape[2]
    scaled = _scaled(q.transpose(0, 2, 3, 1, 4)).reshape(*rows, head_dim)
    logits = jnp.einsum("bhrd,bhsd->bhrs", scaled, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, kv_heads, group, length, slots)
    logits = jnp.where(seen[:, :, None], logits, jnp.finfo(jnp.float32).min).reshape(*rows, slots)
    powers, inverse, share = _softmax(logits)
    y = jnp.einsum("bhrs,bhsd->bhrd", powers.astype(v.dtype), v, preferred_element_type=jnp.float32)
    y = (y * inverse[..., None]).astype(q.dtype).reshape(batch, kv_heads, group, length, head_dim)
    each = (batch, kv_heads, group, length)
    if importance.counts_pivotal:
        hits = importance.pivotal(powers.reshape(*each, slots), inverse.reshape(each), seen[:, :, None])
        given, weights = hits.reshape(*rows, slots), jnp.broadcast_to(asked[:, None, None, :], each)
    else:
        given, weights = powers, share.reshape(each) * asked[:, None, None, :]
    return y.transpose(0, 3, 1, 2, 4), jnp.einsum("bhr,bhrs->bhs", weights.reshape(rows), given)


def _attend_once(
    q: Float[Array, "batch kv_heads group head_dim"],
    k: Float[Array, "batch kv_heads slots head_dim"],
    v: Float[Array, "batch kv_heads slots head_dim"],
    seen: Bool[Array, "batch kv_heads slots"],
    asked: Float[Array, " batch"],
    importance: Importance,
) -> tuple[Float[Array, "batch kv_heads group head_dim"], Float[Array, "batch kv_heads slots"]]:
    """`attend_to_slots` of one query a row.

    Keys and values are read as they lie in the cache: with the queries on the left, XLA's CPU compiler would turn all
    keys at every step.
    """
    logits = jnp.einsum("bhsd,bhgd->bhsg", k, _scaled(q), preferred_element_type=jnp.float32).swapaxes(2, 3)
    logits = jnp.where(seen[:, :, None], logits, jnp.finfo(jnp.float32).min)
    powers, inverse, share = _softmax(logits)
    y = jnp.einsum("bhgs,bhsd->bhgd", powers.astype(v.dtype), v, preferred_element_type=jnp.float32)
    if importance.counts_pivotal:
        received = jnp.einsum("b,bhgs->bhs", asked, importance.pivotal(powers, inverse, seen[:, :, None]))
    else:
        received = jnp.einsum("bhgs,bhg->bhs", powers, share * asked[:, None, None])
    return (y * inverse[..., None]).astype(q.dtype), received


def _softmax(logits: Float[Array, "*any slots"]) -> tuple[Array, Array, Array]:
    """Powers, what they are to be multiplied by, and the same with 0 for queries that see no slot.

    Products with the powers are divided instead of the powers, which are many more.
    """
    peak = jnp.max(logits, axis=-1, keepdims=True)
    powers = jnp.exp(logits - peak)
    inverse = 1.0 / jnp.sum(powers, axis=-1)
    return powers, inverse, jnp.where(peak[..., 0] > jnp.finfo(jnp.float32).min, inverse, 0.0)


def _scaled(q: Float[Array, "*any head_dim"]) -> Float[Array, "*any head_dim"]:
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
