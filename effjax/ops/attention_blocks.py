"""Attention of one query a row to the slots of a cache in plain JAX: all slots at once, or block by block.

Source: the running maximum and sum of Milakov and Gimelshein, Online normalizer calculation for softmax (2018).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax import _compat
from effjax.ops.coded_slots import CodedSlots

Slots = Any  # dense `[batch, kv_heads, slots, head_dim]`, or CodedSlots
_LEAST = float(jnp.finfo(jnp.float32).min)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a cache: the operands of `effjax.ops.decode_attention`, checked.

    Attributes:
        q: `[batch, kv_heads, group, head_dim]`.
        k, v: slots, dense or coded; or pages `[num_pages, kv_heads, page_size, head_dim]` where there is a table.
        start, length: int32 `[batch, kv_heads]`, the first slot that is seen, and the first behind them that is not.
        asked: float32 `[batch]`, or None for no column sums.
        table: int32 `[batch, pages_per_row]`, or None.
        scale: of the logits.
        counts: an `effjax.kv.Importance` that counts pivotal slots in `received`; None sums weights.
    """

    q: Any
    k: Any
    v: Any
    start: Any
    length: Any
    asked: Any
    table: Any
    scale: float = dataclasses.field(metadata={"static": True})
    counts: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def slots(self) -> int:
        """Slots that a row and head can have."""
        size = slots_shape(self.k)[2]
        return size if self.table is None else size * self.table.shape[1]


def slots_shape(x: Slots) -> tuple[int, ...]:
    return tuple(x.shape)


def _decoded(x: Slots) -> Array:
    return x.with_tokens(x.tokens) if isinstance(x, CodedSlots) else x


def reference(a: Question) -> tuple[Array, Array | None]:
    """The definition: every key and value decoded, and all logits at once."""
    k, v = (_decoded(x) if a.table is None else _rows_of(x, a.table) for x in (a.k, a.v))
    logits = _logits(a, k)
    seen = _between(a, jax.lax.broadcasted_iota(jnp.int32, logits.shape, 3))
    logits = jnp.where(seen, logits, _LEAST)
    peak = jnp.max(logits, axis=-1)
    powers = jnp.where(seen, jnp.exp(logits - peak[..., None]), 0.0)
    total = jnp.sum(powers, axis=-1)
    inverse = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    y = (_values(powers, v) * inverse[..., None]).astype(a.q.dtype)
    return y, None if a.asked is None else _received(a, powers, inverse, seen)


def blocked(a: Question, block: int) -> tuple[Array, Array | None]:
    """The same block by block, and only those that hold a slot that some row sees; codes are decoded a block at a time.

    A cache of pages goes page by page.
    """
    batch, heads, group, head_dim = a.q.shape
    block = min(block, a.slots) if a.table is None else slots_shape(a.k)[2]
    first = jnp.min(a.start) // block
    count = (jnp.max(a.length) + block - 1) // block
    axes = _compat.varying_axes(jax.tree.leaves(a))

    def state(shape: tuple[int, ...], value: float) -> Array:
        filled = jnp.full(shape, value, jnp.float32)  # a loop's state varies from the start as at the end
        return jax.lax.pcast(filled, tuple(axes), to="varying") if axes else filled

    def add(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        peak, total, y, *kept = carry
        at = jnp.minimum(index * block, a.slots - block)  # the last block may begin in the one before
        logits = _logits(a, _cut(a.k, a.table, index, at, block))
        slot = at + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 3)
        seen = _between(a, slot) & (slot >= index * block)
        new = jnp.maximum(peak, jnp.max(jnp.where(seen, logits, _LEAST), axis=-1))
        powers = jnp.where(seen, jnp.exp(logits - new[..., None]), 0.0)
        fade = jnp.exp(peak - new)
        y = y * fade[..., None] + _values(powers, _cut(a.v, a.table, index, at, block))
        total = total * fade + jnp.sum(powers, axis=-1)
        return new, total, y, *(jax.lax.dynamic_update_slice_in_dim(x, logits, at, axis=3) for x in kept)

    shape = (batch, heads, group)
    start = [state(shape, _LEAST), state(shape, 0), state((*shape, head_dim), 0)]
    if a.asked is not None:
        start.append(state((*shape, a.slots), 0))
    peak, total, y, *kept = jax.lax.fori_loop(first, count, add, tuple(start))
    inverse = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    y = (y * inverse[..., None]).astype(a.q.dtype)
    if a.asked is None:
        return y, None
    if a.counts is not None:  # thresholds are of all slots
        seen = _between(a, jax.lax.broadcasted_iota(jnp.int32, kept[0].shape, 3))
        return y, _received(a, jnp.where(seen, jnp.exp(kept[0] - peak[..., None]), 0.0), inverse, seen)
    shares = inverse * a.asked[:, None, None]

    def give(index: Array, received: Array) -> Array:
        at = jnp.minimum(index * block, a.slots - block)
        logits = jax.lax.dynamic_slice_in_dim(kept[0], at, block, axis=3)
        seen = _between(a, at + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 3))
        powers = jnp.where(seen, jnp.exp(logits - peak[..., None]), 0.0)
        given = jnp.sum(powers * shares[..., None], axis=2)
        return jax.lax.dynamic_update_slice_in_dim(received, given, at, axis=2)

    return y, jax.lax.fori_loop(first, count, give, state((batch, heads, a.slots), 0))


def _logits(a: Question, k: Array) -> Float[Array, "batch kv_heads group slots"]:
    """Keys are read as they lie: with the queries on the left, XLA's CPU compiler would turn them."""
    dtype = jnp.promote_types(a.q.dtype, k.dtype)
    q, k = a.q.astype(dtype), k.astype(dtype)
    logits = jnp.einsum("bhsd,bhgd->bhsg", k, q, preferred_element_type=jnp.float32, precision=_precision(dtype))
    return logits.swapaxes(2, 3) * a.scale


def _values(powers: Float[Array, "batch kv_heads group slots"], v: Array) -> Array:
    given = powers.astype(v.dtype)
    return jnp.einsum("bhgs,bhsd->bhgd", given, v, preferred_element_type=jnp.float32, precision=_precision(v.dtype))


def _received(
    a: Question,
    powers: Float[Array, "batch kv_heads group slots"],
    inverse: Float[Array, "batch kv_heads group"],
    seen: Bool[Array, "batch kv_heads group slots"],
) -> Float[Array, "batch kv_heads slots"]:
    if a.counts is not None:
        return jnp.einsum("b,bhgs->bhs", a.asked, a.counts.pivotal(powers, inverse, seen))
    return jnp.einsum("bhgs,bhg->bhs", powers, inverse * a.asked[:, None, None])


def _precision(dtype: Any) -> Any:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _between(a: Question, slot: Int[Array, "batch kv_heads group slots"]) -> Array:
    return (slot >= a.start[..., None, None]) & (slot < a.length[..., None, None])


def _cut(x: Slots, table: Array | None, index: Array, at: Array, block: int) -> Array:
    """Slots `at` to `at + block`, or page `index` of every row."""
    if table is not None:
        return _rows_of(x, jax.lax.dynamic_slice_in_dim(table, index, 1, axis=1))
    return x.decode(at, block) if isinstance(x, CodedSlots) else jax.lax.dynamic_slice_in_dim(x, at, block, axis=2)


def _rows_of(pages: Slots, table: Int[Array, "batch pages_per_row"]) -> Array:
    """The slots of every row's pages, side by side, decoded; what a page behind the last may be does not matter."""

    def gather(x: Array) -> Array:
        rows = x.at[jnp.maximum(table, 0)].get(mode="clip").swapaxes(1, 2)
        return rows.reshape(*rows.shape[:2], -1, rows.shape[-1])

    if isinstance(pages, CodedSlots):
        return pages.with_tokens({name: gather(x) for name, x in pages.tokens.items()})
    return gather(pages)
