"""Decoding with NoMAD: the coded keys of a layer, one more key a step, and attention of one query a row to them."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.errors import ConfigError
from effjax.kv.nomad import (
    BLOCK,
    BYTES,
    Codebooks,
    check_books,
    decode,
    encode,
    from_blocks,
    lookup_sums,
    nearest,
    query_table,
    to_blocks,
)
from effjax.ops.platform import platform_operation
from kernels_cpu import nomad as native
from kernels_cpu._native import NATIVE

Lengths = Int[Array, "batch kv_heads"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NomadKeys:
    """The keys of one layer: codes of all, and those of the last block as they are until it is full.

    Slot `i` of a row and head lies in block `i // 32`. Slots from `length // 32 * 32` on are read from `recent`, so a
    block counts as codes from the moment it is full; its codes are written key by key before that.

    Attributes:
        codes: uint8 `[batch, kv_heads, blocks, subs, 16]`.
        recent: `[batch, kv_heads, 32, head_dim]`, slot `i` in row `i % 32`.
    """

    codes: Any
    recent: Any

    @property
    def slots(self) -> int:
        """Keys that there is room for."""
        return self.codes.shape[-3] * BLOCK


def init_keys(*, batch: int, slots: int, head_dim: int, books: Codebooks, dtype: Any = jnp.float32) -> NomadKeys:
    """Room for `slots` keys, rounded up to whole blocks of 32.

    Raises:
        ConfigError: the codebooks are not of heads of `head_dim` channels.

    Example:
        >>> init_keys(batch=1, slots=100, head_dim=8, books=jnp.zeros((2, 4, 16, 2))).codes.shape
        (1, 2, 4, 4, 16)
    """
    kv_heads = books.shape[0]
    check_books(head_dim, kv_heads, books)
    blocks = -(-slots // BLOCK)
    return NomadKeys(
        codes=jnp.zeros((batch, kv_heads, blocks, books.shape[1], BYTES), jnp.uint8),
        recent=jnp.zeros((batch, kv_heads, BLOCK, head_dim), dtype),
    )


def code_keys(k: Float[Array, "batch kv_heads slots head_dim"], lengths: Lengths, books: Codebooks) -> NomadKeys:
    """Codes the keys of a prompt, which fill the first `lengths` slots of each row and head.

    Raises:
        ConfigError: the codebooks are others'.
    """
    codes = encode(k, books)
    first = lengths // BLOCK * BLOCK
    slot = first[..., None] + jax.lax.broadcasted_iota(jnp.int32, (*lengths.shape, BLOCK), 2)
    recent = jnp.take_along_axis(k, jnp.minimum(slot, k.shape[2] - 1)[..., None], axis=2)
    return NomadKeys(codes=codes, recent=recent)


def append_key(keys: NomadKeys, k: Float[Array, "batch kv_heads head_dim"], at: Lengths, books: Codebooks) -> NomadKeys:
    """Writes one key a row and head into slot `at`, the next free one; where there is no such slot, nothing is written.

    The cost does not depend on the length. Give the arrays away (`donate_argnums`, or the carry of a loop), or they are
    copied.

    Raises:
        ConfigError: the codebooks are others', or shapes differ.
    """
    if k.shape != (*keys.recent.shape[:2], keys.recent.shape[3]) or at.shape != k.shape[:2]:
        raise ConfigError(
            f"NoMAD: a cache of {list(keys.recent.shape)} recent keys takes one key a row and head, "
            f"[batch, kv_heads, head_dim] with slots [batch, kv_heads]; found {list(k.shape)} and {list(at.shape)}"
        )
    check_books(k.shape[-1], k.shape[1], books)
    batch, kv_heads, blocks = keys.codes.shape[:3]
    row, head = (jax.lax.broadcasted_iota(jnp.int32, (batch, kv_heads), axis) for axis in (0, 1))
    block, place = at // BLOCK, at % BLOCK
    code = nearest(k[:, :, None], books)[:, :, 0, :, None]  # [batch, kv_heads, subs, 1]
    old = keys.codes[row, head, jnp.minimum(block, blocks - 1)]
    byte = jax.lax.broadcasted_iota(jnp.int32, old.shape, 3) == (place % BYTES)[..., None, None]
    shift = (4 * (place // BYTES)).astype(jnp.uint8)[..., None, None]
    new = jnp.where(byte, old & ~(jnp.uint8(15) << shift) | code << shift, old)
    keep = jnp.where(block < blocks, place, BLOCK)
    return NomadKeys(
        codes=keys.codes.at[row, head, block].set(new, mode="drop"),
        recent=keys.recent.at[row, head, keep].set(k.astype(keys.recent.dtype), mode="drop"),
    )


def take_keys(
    keys: NomadKeys,
    slots: Int[Array, "batch kv_heads kept"],
    lengths: Lengths,
    kept: Lengths,
    books: Codebooks,
) -> NomadKeys:
    """The keys in these slots, moved together, as eviction leaves them.

    A key that was coded and comes into the last block, which is not full, becomes its centre: it is kept no more.

    Args:
        keys: filled up to `lengths`.
        slots: where each row and head takes its keys from, in the order in which they will lie; any slot beyond the
            first `kept`.
        lengths: filled slots before.
        kept: filled slots after.
        books: of this layer.

    Raises:
        ConfigError: the codebooks are others'.
    """
    check_books(keys.recent.shape[-1], keys.recent.shape[1], books)
    codes = jnp.take_along_axis(from_blocks(keys.codes), slots[..., None], axis=2)
    step = jax.lax.broadcasted_iota(jnp.int32, (*kept.shape, BLOCK), 2)
    last = jnp.minimum((kept // BLOCK * BLOCK)[..., None] + step, slots.shape[-1] - 1)
    origin = jnp.take_along_axis(slots, last, axis=2)[..., None]
    centres = decode(to_blocks(jnp.take_along_axis(codes, last[..., None], axis=2)), books)
    exact = jnp.take_along_axis(keys.recent, origin % BLOCK, axis=2)
    recent = jnp.where(origin >= (lengths // BLOCK * BLOCK)[..., None, None], exact, centres.astype(exact.dtype))
    return NomadKeys(codes=to_blocks(codes), recent=recent)


def nomad_attention(
    q: Float[Array, "batch kv_heads group head_dim"],
    keys: NomadKeys,
    v: Float[Array, "batch kv_heads slots value_dim"],
    lengths: Lengths,
    books: Codebooks,
    *,
    seen: Bool[Array, "batch kv_heads slots"] | None = None,
    with_received: bool = False,
    implementation: Literal["reference", "cpu"] | None = None,
) -> tuple[Float[Array, "batch kv_heads group value_dim"], Float[Array, "batch kv_heads slots"] | None]:
    """Softmax attention of one query a row and head to coded keys.

    Logits are look-ups for the keys of full blocks and products for the last keys of a block that is not full; both
    divided by `sqrt(head_dim)`. In float32, whatever the dtype of values.

    Args:
        q: queries after rotation.
        keys: what `code_keys` and `append_key` give; the key of the query's own token is among them.
        v: values as they are, float32, bfloat16 or float16, at most as many slots as `keys` has.
        lengths: filled slots.
        books: of this layer.
        seen: slots that the query may see besides being filled; all where None.
        with_received: also gives what each slot receives: its weights, summed over the group.
        implementation: "cpu" names the native kernel, "reference" plain jnp; None takes the kernel where the program
            is for one CPU device and the library is there.

    Returns:
        Outputs in the dtype of `q`, 0 for a query that sees no slot, and what slots receive in float32, or None.

    Raises:
        ConfigError: shapes or dtypes do not fit together; the message names them.
        RuntimeError: the kernel is named and there is no native library.

    Example:
        >>> books = jax.random.normal(jax.random.key(0), (1, 4, 16, 2))
        >>> k, v = jax.random.normal(jax.random.key(1), (2, 1, 1, 40, 8))
        >>> lengths = jnp.array([[40]])
        >>> y, received = nomad_attention(
        ...     k[:, :, :2], code_keys(k, lengths, books), v, lengths, books, with_received=True
        ... )
        >>> y.shape, received.shape, round(float(received.sum()), 4)
        ((1, 1, 2, 8), (1, 1, 40), 2.0)

    Source: Zhang et al., NoMAD-Attention (2024), section 3.
    """
    _check(q, keys, v, lengths, books, seen)
    scaled = q.astype(jnp.float32) * q.shape[-1] ** -0.5
    mask = jnp.zeros((0,), bool) if seen is None else seen
    recent, books = keys.recent.astype(jnp.float32), books.astype(jnp.float32)
    arrays = (scaled, keys.codes, recent, v, lengths.astype(jnp.int32), books, mask)
    if implementation is None:
        found = _attend(*arrays, with_received=with_received)
    else:
        one = {"reference": _attend_reference, "cpu": native.attend}[implementation]
        found = one(*arrays, with_received=with_received)
    group, width = q.shape[2], v.shape[-1]
    y = found[..., : group * width].reshape(*q.shape[:-1], width).astype(q.dtype)
    return y, found[..., group * width :] if with_received else None


def decoded_keys(keys: NomadKeys, lengths: Lengths, books: Codebooks) -> Float[Array, "batch kv_heads slots head_dim"]:
    """The keys that `nomad_attention` works with, but for its 8-bit tables: centres, and the exact last keys."""
    slot = jax.lax.broadcasted_iota(jnp.int32, (*lengths.shape, keys.slots), 2)
    exact = jnp.tile(keys.recent.astype(jnp.float32), (1, 1, keys.slots // BLOCK, 1))
    partial = slot >= (lengths // BLOCK * BLOCK)[..., None]
    return jnp.where(partial[..., None], exact, decode(keys.codes, books))


def _check(q: Any, keys: NomadKeys, v: Any, lengths: Any, books: Any, seen: Any) -> None:
    if q.ndim != 4:
        raise ConfigError(f"NoMAD: queries are [batch, kv_heads, group, head_dim], one a row, found {list(q.shape)}")
    batch, kv_heads, _, head_dim = q.shape
    check_books(head_dim, kv_heads, books)
    for name, found, wanted in (
        ("codes", keys.codes.shape, (batch, kv_heads, keys.codes.shape[-3], books.shape[1], BYTES)),
        ("recent keys", keys.recent.shape, (batch, kv_heads, BLOCK, head_dim)),
        ("values", v.shape, (batch, kv_heads, *v.shape[-2:])),
        ("lengths", lengths.shape, (batch, kv_heads)),
        *(() if seen is None else (("seen", seen.shape, (batch, kv_heads, v.shape[-2])),)),
    ):
        if tuple(found) != tuple(wanted):
            raise ConfigError(f"NoMAD: queries {list(q.shape)} need {name} {list(wanted)}, found {list(found)}")
    if v.shape[-2] > keys.slots:
        raise ConfigError(f"NoMAD: values have {v.shape[-2]} slots, the coded keys {keys.slots}; make room with both")
    if v.dtype.name not in native.VALUES:
        raise ConfigError(f"NoMAD: values are {v.dtype.name}; cast them to one of {', '.join(native.VALUES)}")


def _attend_shape(
    q: Any, codes: Any, recent: Any, v: Any, lengths: Any, books: Any, seen: Any, *, with_received: bool
) -> Any:
    """Outputs of a head's group and what its slots receive, in one row: an operation has one result."""
    del codes, recent, lengths, books, seen
    return (*q.shape[:2], q.shape[2] * v.shape[-1] + (v.shape[-2] if with_received else 0)), jnp.float32


def _attend_reference(
    q: Array,
    codes: Array,
    recent: Array,
    v: Array,
    lengths: Array,
    books: Array,
    seen: Array,
    *,
    with_received: bool,
) -> Array:
    slots = v.shape[-2]
    tables = query_table(q, books)
    looked = lookup_sums(tables.table, codes)[..., :slots].astype(jnp.float32)
    looked = looked / tables.scale[..., None] + tables.bias[..., None]
    exact = jnp.einsum("bhgd,bhrd->bhgr", q, recent, precision="highest")
    exact = jnp.tile(exact, (1, 1, 1, codes.shape[2]))[..., :slots]
    slot = jax.lax.broadcasted_iota(jnp.int32, (*lengths.shape, slots), 2)
    logits = jnp.where((slot >= (lengths // BLOCK * BLOCK)[..., None])[:, :, None], exact, looked)
    filled = slot < lengths[..., None]
    shown = (filled if seen.ndim == 1 else filled & seen)[:, :, None]
    peak = jnp.max(logits, axis=-1, keepdims=True, where=shown, initial=-jnp.inf)
    powers = jnp.where(shown, jnp.exp(logits - jnp.where(peak > -jnp.inf, peak, 0.0)), 0.0)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    weights = powers / jnp.where(total == 0, 1.0, total)
    values = jnp.where(filled[..., None], v.astype(jnp.float32), 0.0)
    y = jnp.einsum("bhgs,bhsd->bhgd", weights, values, precision="highest").reshape(*q.shape[:2], -1)
    return jnp.concatenate([y, jnp.sum(weights, axis=2)], axis=-1) if with_received else y


def _attend_cpu(*arrays: Array, with_received: bool) -> Array:
    if NATIVE.load() is None:
        NATIVE.warn_once("nomad.attend")
        return _attend_reference(*arrays, with_received=with_received)
    return native.attend(*arrays, with_received=with_received)


_attend = platform_operation(
    "nomad_attention", _attend_shape, _attend_reference, {"cpu": _attend_cpu}, ("with_received",)
)
