"""Keys and values as the TPU's attention reads them: dense, as integers, or as indices of codebooks.

An array whose rows do not fill 128 lanes lies turned in a TPU's memory, slots last; it is read so, since a kernel that
wanted it otherwise would have it copied, filled up to 128 lanes, at every step.

Codes become operands of the matrix unit as they are. A scale of a key's channel is put on the query, one of a value's
token on the weights, and what is the same for all slots does not change a softmax, so it is left out.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from effjax.kv.cq import CQ
from effjax.kv.integer import PerChannel, PerToken
from effjax.ops.attention_blocks import Slots
from effjax.ops.coded_slots import CodedSlots
from kernels_pallas.words import LANES, SUBLANES, pad_to, round_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operand:
    """An array of a cache, and where its slots are.

    Attributes:
        array: `[batch (or pages), heads, ..., ...]`, or `[heads, ..., ...]` where all slots share it.
        axis: of the slots, -2 or -1; None where they share it.
    """

    array: jax.Array
    axis: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Keys or values: what is stored, and what is done with a block of it.

    Attributes:
        operands: what is stored.
        planes: a vector's channels are taken apart into so many runs, channel `i` into run `i % planes`.
        parts: a float32 number goes to the matrix unit as a sum of so many bfloat16 ones, since codes are exact.
        dtype: of the operands of the matrix unit.
        logits: `logits(q, arrays)` -> float32 `[rows, block]` from queries `[planes, parts * rows, head_dim / planes]`.
        values: `values(powers, seen, arrays)` -> `planes` arrays `[rows, head_dim / planes]`, sums of values times
            float32 powers `[rows, block]`.
        query: `query(q)` -> float32 `[batch, heads, group, head_dim]`, with the scales of channels.
    """

    operands: tuple[Operand, ...]
    planes: int
    parts: int
    dtype: Any
    logits: Callable[[Any, Sequence[jax.Array]], jax.Array]
    values: Callable[[jax.Array, jax.Array, Sequence[jax.Array]], list[jax.Array]]
    query: Callable[[jax.Array], jax.Array]


def why_not(x: Slots, role: str, q_dtype: Any) -> str:
    """Why keys or values (`role`) held so are not for the kernel; empty where they are."""
    if not isinstance(x, CodedSlots):
        if jnp.dtype(x.dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
            return f"{role} in {jnp.dtype(x.dtype).name}: a TPU multiplies bfloat16 and float32"
        return ""
    coding = x.coding
    if isinstance(coding, CQ):
        if coding.bits > 8 or 8 % coding.bits:
            return f"{role} coded by {coding}: codes are looked up where whole ones fill a byte (1, 2, 4 or 8 bits)"
        if coding.channels % SUBLANES and SUBLANES % coding.channels:
            return f"{role} coded by {coding}: channels that share a code must divide 8 or be a multiple of it"
        return "" if x.shape[-1] % SUBLANES == 0 else f"{role} coded by {coding} with head_dim {x.shape[-1]}, not 8's"
    wanted = PerChannel if role == "keys" else PerToken
    if not isinstance(coding, wanted):
        return f"{role} coded by {coding}: the kernel takes {wanted.__name__} and CQ"
    if 8 % coding.bits or x.shape[-1] % (8 // coding.bits):
        return f"{role} coded by {coding}: whole codes must fill a byte (1, 2, 4 or 8 bits)"
    if role == "values" and x.tokens["step"].shape[-1] != 1:
        return f"values coded by {coding}: the kernel takes one scale a token"
    return ""


def held(x: Slots, q_dtype: Any, *, paged: bool = False) -> Held:
    """How the kernel meets keys or values that `why_not` has nothing against."""
    if not isinstance(x, CodedSlots):
        return _dense(x, q_dtype, is_turned(x, paged=paged))
    return _codebooks(x, q_dtype) if isinstance(x.coding, CQ) else _integers(x, q_dtype, is_turned(x, paged=paged))


def is_turned(x: Slots, *, paged: bool) -> bool:
    """Whether an array lies with its slots last; pages do where they fill the lanes."""
    array = x.tokens["codes"] if isinstance(x, CodedSlots) else x
    if isinstance(x, CodedSlots) and isinstance(x.coding, CQ):
        return True
    return bool(array.shape[-1] % LANES) and (not paged or array.shape[-2] % LANES == 0)


def _stored(x: jax.Array, turned: bool) -> Operand:
    return Operand(array=x.swapaxes(-1, -2), axis=-1) if turned else Operand(array=x, axis=-2)


def dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """The last axis of `a` with `axis` of `b`, float32; float32 operands are multiplied as such."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def bfloat16_parts(x: jax.Array, count: int) -> list[jax.Array]:
    """Bfloat16 arrays that add up to the first `8 * count` bits of float32 ones: by masks, which no compiler undoes.

    Example:
        >>> x = jnp.array([1.2345678])
        >>> float(sum(part.astype(jnp.float32) for part in bfloat16_parts(x, 3))[0]) == float(x[0])
        True
    """
    parts = []
    for _ in range(count):
        top = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536), jnp.float32)
        parts.append(top.astype(jnp.bfloat16))
        x = x - top
    return parts


def _dense(x: jax.Array, q_dtype: Any, turned: bool) -> Held:
    dtype = jnp.promote_types(x.dtype, q_dtype)
    slots = x.shape[2]

    def logits(q: Any, arrays: Sequence[jax.Array]) -> jax.Array:
        return dot(q[0], arrays[0].astype(dtype), 0 if turned else 1)

    def values(powers: jax.Array, seen: jax.Array, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        (v,) = arrays
        axis = 1 if turned else 0
        if slots % v.shape[axis]:  # behind the last slot is what was in memory, and not a number times zero is none
            last = jnp.max(jnp.where(seen, lax.broadcasted_iota(jnp.int32, seen.shape, 1), -1))
            v = jnp.where(lax.broadcasted_iota(jnp.int32, v.shape, axis) <= last, v.astype(jnp.float32), 0.0)
        return [dot(powers.astype(x.dtype), v.astype(x.dtype), axis)]

    return Held(
        operands=(_stored(x, turned),),
        planes=1,
        parts=1,
        dtype=dtype,
        logits=logits,
        values=values,
        query=lambda q: q,
    )


def _integers(x: CodedSlots, q_dtype: Any, turned: bool) -> Held:
    bits, parts = x.coding.bits, 3 if q_dtype == jnp.float32 else 2
    planes = 8 // bits
    centre = 128.0 if bits == 8 else 0.0  # what a code is short of, as int8
    operands = [_stored(x.tokens["codes"], turned)]
    if isinstance(x.coding, PerToken):
        operands.append(Operand(array=_two_halves(x.tokens["low"], x.tokens["step"]), axis=-1))

    def logits(q: Any, arrays: Sequence[jax.Array]) -> jax.Array:
        each = [dot(q[i], codes, 0 if turned else 1) for i, codes in enumerate(_planes(arrays[0], bits))]
        return _added(functools.reduce(jnp.add, each), parts)

    def values(powers: jax.Array, seen: jax.Array, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        low, step = (_half_to_float(word) for word in (arrays[1], lax.shift_right_logical(arrays[1], jnp.int32(16))))
        least = jnp.sum(jnp.where(seen, powers * (low + centre * step), 0.0), axis=1, keepdims=True)
        stacked = jnp.concatenate(bfloat16_parts(jnp.where(seen, powers * step, 0.0), parts))
        products = [dot(stacked, codes, 1 if turned else 0) for codes in _planes(arrays[0], bits)]
        return [_added(product, parts) + least for product in products]

    def query(q: jax.Array) -> jax.Array:
        return q * x.tables["step"].astype(jnp.float32)

    return Held(
        operands=tuple(operands),
        planes=planes,
        parts=parts,
        dtype=jnp.dtype(jnp.bfloat16),
        logits=logits,
        values=values,
        query=query,
    )


def _added(stacked: jax.Array, parts: int) -> jax.Array:
    """The sum of `parts` arrays that lie one below the other."""
    rows = stacked.shape[0] // parts
    return functools.reduce(jnp.add, [stacked[i * rows : (i + 1) * rows] for i in range(parts)])


def _planes(codes: jax.Array, bits: int) -> list[jax.Array]:
    """Bfloat16 codes of every byte's first code, second one and so on; of 8 bits less 128."""
    if codes.shape[0] % (4 * SUBLANES):  # bytes that do not fill registers of words
        wide = codes.astype(jnp.int32)
        found = [lax.shift_right_logical(wide, jnp.int32(i * bits)) & jnp.int32(2**bits - 1) for i in range(8 // bits)]
        return [(code - (128 if bits == 8 else 0)).astype(jnp.float32).astype(jnp.bfloat16) for code in found]
    words = pltpu.bitcast(codes, jnp.int32)
    if bits == 8:
        found = [words ^ jnp.int32(-0x7F7F7F80)]  # the sign bit of each byte flipped
    else:
        mask = jnp.int32((2**bits - 1) * 0x01010101)
        found = [(lax.shift_right_logical(words, jnp.int32(i * bits)) if i else words) & mask for i in range(8 // bits)]
    return [pltpu.bitcast(word, jnp.int8).astype(jnp.bfloat16) for word in found]


def _two_halves(low: jax.Array, step: jax.Array) -> jax.Array:
    """Two float16 numbers of every slot in a word of 32 bits, slots last: `[*L, slots, 1]` to `[*L, 1, slots]`."""
    words = [lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16).astype(jnp.uint32) for x in (low, step)]
    return lax.bitcast_convert_type(words[0] | words[1] << 16, jnp.int32).swapaxes(-1, -2)


def _half_to_float(word: jax.Array) -> jax.Array:
    """The float16 in the lower half of a word, by integer operations: a vector unit has none of its own."""
    magnitude = word & jnp.int32(0x7FFF)
    sign = lax.shift_left(word & jnp.int32(0x8000), jnp.int32(16))
    normal = lax.shift_left(magnitude, jnp.int32(13)) + jnp.int32(112 << 23)
    small = lax.bitcast_convert_type(magnitude.astype(jnp.float32) * 2.0**-24, jnp.int32)
    return lax.bitcast_convert_type(jnp.where(magnitude < 0x400, small, normal) | sign, jnp.float32)


def _codebooks(x: CodedSlots, q_dtype: Any) -> Held:
    """Vectors are made turned too, channels by slots: a codebook's channel is a register row that slots look up in."""
    bits, channels = x.coding.bits, x.coding.channels
    heads, groups, entries, _ = x.tables.shape
    table = x.tables.astype(jnp.float32).transpose(0, 1, 3, 2).reshape(heads, groups * channels, entries)
    operands = (
        Operand(array=x.tokens["codes"].swapaxes(-1, -2), axis=-1),
        Operand(array=pad_to(table, 1, LANES), axis=None),
    )

    def vectors(arrays: Sequence[jax.Array]) -> jax.Array:
        codes, table = arrays[0].astype(jnp.int32), arrays[1]
        rows = []
        for top in range(0, table.shape[0], SUBLANES):
            places = _places(codes, top, bits, channels)
            columns = []
            for left in range(0, places.shape[1], LANES):
                place = places[:, left : left + LANES]
                found = _look_up(table[top : top + SUBLANES, :LANES], place)
                if entries > LANES:
                    found = jnp.where(place < LANES, found, _look_up(table[top : top + SUBLANES, LANES:], place))
                columns.append(found)
            rows.append(columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=1))
        return jnp.concatenate(rows).astype(q_dtype)

    def logits(q: Any, arrays: Sequence[jax.Array]) -> jax.Array:
        return dot(q[0], vectors(arrays), 0)

    def values(powers: jax.Array, seen: jax.Array, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        return [dot(powers.astype(q_dtype), vectors(arrays), 1)]

    return Held(
        operands=operands,
        planes=1,
        parts=1,
        dtype=q_dtype,
        logits=logits,
        values=values,
        query=lambda q: q,
    )


def _places(codes: jax.Array, top: int, bits: int, channels: int) -> jax.Array:
    """The codes of channels `top` to `top + 8`, a row each."""
    rows = []
    for group in range(top // channels, (top + SUBLANES - 1) // channels + 1):
        byte, shift = divmod(group * bits, 8)
        code = lax.shift_right_logical(codes[byte : byte + 1], jnp.int32(shift)) & jnp.int32(2**bits - 1)
        rows.append(jnp.broadcast_to(code, (min(channels, SUBLANES), codes.shape[1])))
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows)


def _look_up(table: jax.Array, places: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, places & jnp.int32(LANES - 1), axis=1, mode="promise_in_bounds")


def slots_multiple(x: Slots, *, paged: bool) -> int:
    """A block of slots, or a page, must be a multiple of it: whole registers, or 128 lanes."""
    if isinstance(x, CodedSlots) or is_turned(x, paged=paged):
        return LANES
    return SUBLANES * (4 // x.dtype.itemsize)


def slot_bytes(x: Slots) -> int:
    """Bytes of a slot, of keys or of values of one head."""
    arrays = x.tokens.values() if isinstance(x, CodedSlots) else (x,)
    return sum(array.shape[-1] * array.dtype.itemsize for array in arrays)


def padded_rows(group: int) -> int:
    return round_up(group, SUBLANES)
