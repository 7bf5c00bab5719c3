"""Attention of one query a row to a cache's slots on a TPU: one pass over the live blocks of keys and values.

The grid goes over rows, key heads and blocks of slots. Lengths (and the pages of a paged cache) are known before a
block is fetched: blocks that a row does not see are neither fetched, since the index of the fetch stands still, nor
computed. Logits stay in vector memory, 4 bytes a slot and query head, so that the sums of a slot's weights, which need
the maximum and the sum over all slots, cost no second pass over the keys and no word of memory but themselves.

Source: FlashAttention's running maximum and sum (Dao et al. 2022), for one query (flash-decoding, Dao et al. 2023).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.ops.attention_blocks import Question, slots_shape
from effjax.ops.coded_slots import CodedSlots
from kernels_pallas.decode_attention import tpu_paged
from kernels_pallas.decode_attention.tpu_slots import (
    Held,
    Operand,
    bfloat16_parts,
    held,
    padded_rows,
    slot_bytes,
    slots_multiple,
)
from kernels_pallas.decode_attention.tpu_slots import why_not as why_not_slots
from kernels_pallas.frame import simulator
from kernels_pallas.words import LANES, round_up

BLOCK_BYTES = 2**19  # keys and values a step: what hides the time that a step takes by itself
MOST_BLOCK, MOST_PIECES = 2048, 4
VECTOR_MEMORY = 32 * 2**20  # of a step, at most
_LEAST = float(jnp.finfo(jnp.float32).min)


def why_not(a: Question) -> str:
    """Why this is not for the kernel, with the remedy; empty where it is.

    Example:
        >>> from effjax.ops.attention import make_question
        >>> k = jnp.ones((1, 1, 8, 16), jnp.float16)
        >>> why_not(make_question("", k[:, :, :4], k, k, jnp.ones((1, 1), jnp.int32), None, None, None, None))
        "queries in float16: a TPU multiplies bfloat16 and float32; use implementation='blocked'"
    """
    reason = _reason(a)
    return f"{reason}; use implementation='blocked'" if reason else ""


def unfit(a: Question) -> str:
    """Why the kernel is not chosen unasked though it takes this, in one sentence; empty where it is."""
    head_dim = a.q.shape[-1]
    if _dense_pages(a) and head_dim % LANES:
        return f"pages {head_dim} wide do not fill a TPU's 128 lanes, and would be copied into such as do at every step"
    return ""


def _reason(a: Question) -> str:
    if a.asked is not None and a.counts is not None:
        return "pivotal slots are to be counted: the kernel sums weights"
    if jnp.dtype(a.q.dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"queries in {jnp.dtype(a.q.dtype).name}: a TPU multiplies bfloat16 and float32"
    for x, role in ((a.k, "keys"), (a.v, "values")):
        if reason := why_not_slots(x, role, a.q.dtype):
            return reason
        multiple = slots_multiple(x, paged=True)
        if a.table is not None and not _dense_pages(a) and slots_shape(x)[2] % multiple:
            return f"pages of {slots_shape(x)[2]} slots: {role} so held need a multiple of {multiple}"
    if _dense_pages(a) and (reason := tpu_paged.why_not(a)):
        return reason
    if (need := vmem_bytes(a, choose_block(a))) > VECTOR_MEMORY:
        return f"{a.slots} slots take {need >> 20} MiB of vector memory; the kernel has {VECTOR_MEMORY >> 20}"
    return ""


def _dense_pages(a: Question) -> bool:
    """Whether a kernel of its own copies the pages; those of codes are blocks of this one, several a step."""
    return a.table is not None and not isinstance(a.k, CodedSlots) and not isinstance(a.v, CodedSlots)


def choose_block(a: Question) -> int:
    """Slots a step: of a paged cache whole pages."""
    size = slots_shape(a.k)[2]
    if _dense_pages(a):
        return size * tpu_paged.choose_pieces(a)
    wanted = min(MOST_BLOCK, BLOCK_BYTES // (slot_bytes(a.k) + slot_bytes(a.v)))
    if a.table is not None:
        return size * max(1, min(MOST_PIECES, wanted // size, a.table.shape[1]))
    return min(max(LANES, wanted // LANES * LANES), round_up(size, LANES))


def vmem_bytes(a: Question, block: int) -> int:
    """Vector memory of a step: each block twice, as the next one is on its way, what it is unpacked to, and logits."""
    if _dense_pages(a):
        return tpu_paged.vmem_bytes(a, block // a.k.shape[2])
    _, _, group, head_dim = a.q.shape
    rows, wide = padded_rows(group), round_up(head_dim, LANES)
    blocks = pl.cdiv(a.slots, block)
    width = round_up(block, LANES)
    stored = 2 * block * sum(max(slot_bytes(x), LANES * x.dtype.itemsize // 4) for x in (a.k, a.v))
    tables = sum(2 * 4 * wide * 2 * LANES for x in (a.k, a.v) if hasattr(x, "tables"))
    unpacked = 4 * block * wide * 4
    few = 24 * rows * wide * 4 + 8 * rows * width * 4
    sums = 0 if a.asked is None else blocks * rows * width * 4 + 2 * round_up(blocks, 8) * width * 4
    return stored + tables + unpacked + few + sums + 2**20


def decode_attention(
    a: Question, *, block: int | None = None, interpret: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """`(y, received)` as `effjax.ops.decode_attention` defines them.

    Args:
        a: what is asked.
        block: slots a step; `choose_block` decides where None.
        interpret: run on the CPU in the simulator of a TPU.

    Returns:
        Outputs in the dtype of `q`, and the float32 sums or None. With bfloat16 values the weights are rounded to
        bfloat16, as in the reference. Integers are exact, their scales put on queries and weights in 16 bits (24 for
        float32 queries); entries of codebooks are rounded to the dtype of the queries.

    Raises:
        ValueError: what `why_not` says.
    """
    if reason := why_not(a):
        raise ValueError(reason)
    batch, heads, group, head_dim = a.q.shape
    size = slots_shape(a.k)[2]
    block = choose_block(a) if block is None else block
    if _dense_pages(a):
        return tpu_paged.paged_attention(a, pieces=block // size, interpret=interpret)
    pieces = 1 if a.table is None else block // size
    steps = pl.cdiv(a.slots, block)
    rows = padded_rows(group)
    keys, values = (held(x, a.q.dtype, paged=a.table is not None) for x in (a.k, a.v))
    q = _queries(a, keys, rows)
    asked = jnp.zeros((batch,), jnp.float32) if a.asked is None else a.asked
    table = jnp.zeros((1, 1), jnp.int32) if a.table is None else a.table
    stored = [operand for each in (keys, values) for operand in each.operands for _ in range(_copies(operand, pieces))]
    places = [p for each in (keys, values) for operand in each.operands for p in range(_copies(operand, pieces))]
    wide = head_dim // values.planes
    out_shape = [jax.ShapeDtypeStruct((batch, heads, values.planes, rows, wide), a.q.dtype)]
    out_specs = [pl.BlockSpec((1, 1, values.planes, rows, wide), lambda b, h, i, *_: (b, h, 0, 0, 0))]
    scratch = [pltpu.VMEM((rows, LANES), jnp.float32) for _ in range(2)]
    scratch.append(pltpu.VMEM((values.planes, rows, wide), jnp.float32))
    if a.asked is not None:
        out_shape.append(jax.ShapeDtypeStruct((batch, heads, steps, block), jnp.float32))
        out_specs.append(pl.BlockSpec((1, 1, steps, block), lambda b, h, i, *_: (b, h, 0, 0)))
        scratch.append(pltpu.VMEM((steps, rows, block), jnp.float32))
    kernel = functools.partial(
        _kernel,
        keys=keys,
        values=values,
        pieces=pieces,
        block=block,
        group=group,
        asked=a.asked is not None,
        scale=a.scale,
    )
    found = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, heads, steps),
            in_specs=[
                pl.BlockSpec((1, 1, *q.shape[2:]), lambda b, h, i, *_: (b, h, 0, 0, 0)),
                *(_spec(o, p, pieces, block, size, a) for o, p in zip(stored, places, strict=True)),
            ],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes(a, block)
        ),
        cost_estimate=_cost(a),
        interpret=simulator(interpret),
        name="decode_attention",
    )(a.start, a.length, asked, table, q, *(operand.array for operand in stored))
    y = found[0].transpose(0, 1, 3, 4, 2).reshape(batch, heads, rows, head_dim)[:, :, :group]
    if a.asked is None:
        return y, None
    return y, found[1].reshape(batch, heads, steps * block)[:, :, : a.slots]


def _queries(a: Question, keys: Held, rows: int) -> jax.Array:
    """`[batch, heads, planes, parts * rows, head_dim / planes]`, with all scales where codes are multiplied."""
    batch, heads, group, head_dim = a.q.shape
    q = keys.query(a.q.astype(jnp.float32))
    q = jnp.pad(q, [(0, 0), (0, 0), (0, rows - group), (0, 0)])
    parts = [q.astype(keys.dtype)] if keys.parts == 1 else bfloat16_parts(q, keys.parts)
    stacked = jnp.concatenate(parts, axis=2).reshape(batch, heads, -1, head_dim // keys.planes, keys.planes)
    return stacked.transpose(0, 1, 4, 2, 3)


def _copies(operand: Operand, pieces: int) -> int:
    """A step takes an operand's blocks one by one where they lie on pages."""
    return 1 if operand.axis is None else pieces


def _spec(operand: Operand, piece: int, pieces: int, block: int, size: int, a: Question) -> pl.BlockSpec:
    shape = operand.array.shape
    if operand.axis is None:
        return pl.BlockSpec((1, *shape[1:]), lambda b, h, i, *_: (h, 0, 0))
    count = block if a.table is None else size
    inner = (count, shape[3]) if operand.axis == -2 else (shape[2], count)

    def at(b: Any, h: Any, i: Any, start: Any, length: Any, asked: Any, table: Any) -> tuple[Any, ...]:
        first, last = start[b, h], jnp.maximum(length[b, h] - 1, 0)
        if a.table is None:
            row, place = b, jnp.clip(i, lax.div(first, block), lax.div(last, block))
        else:
            page = jnp.clip(i * pieces + piece, lax.div(first, size), lax.div(last, size))
            row, place = jnp.clip(table[b, page], 0, shape[0] - 1), 0
        return (row, h, place, 0) if operand.axis == -2 else (row, h, 0, place)

    return pl.BlockSpec((1, 1, *inner), at)


def _kernel(
    start_ref: Any,
    length_ref: Any,
    asked_ref: Any,
    table_ref: Any,
    q_ref: Any,
    *refs: Any,
    keys: Held,
    values: Held,
    pieces: int,
    block: int,
    group: int,
    asked: bool,
    scale: float,
) -> None:
    del table_ref  # the index of a fetch has read it
    b, h, i = (pl.program_id(axis) for axis in range(3))
    start, length = start_ref[b, h], length_ref[b, h]
    counts = [sum(_copies(operand, pieces) for operand in each.operands) for each in (keys, values)]
    key_refs, value_refs, rest = refs[: counts[0]], refs[counts[0] : sum(counts)], refs[sum(counts) :]
    outs, (peak, total, sums, *kept) = rest[: 1 + asked], rest[1 + asked :]

    @pl.when(i == 0)
    def _() -> None:
        peak[...] = jnp.full(peak.shape, _LEAST, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    @pl.when((i * block < length) & ((i + 1) * block > start))
    def _() -> None:
        logits = keys.logits(q_ref[0, 0], _block(keys, key_refs, pieces)) * scale
        slot = i * block + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        seen = (slot >= start) & (slot < length)
        logits = jnp.where(seen, logits, _LEAST)
        if asked:
            kept[0][i] = logits
        old = peak[:, :1]
        new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
        powers = jnp.where(seen, jnp.exp(logits - new), 0.0)
        fade = jnp.exp(old - new)
        peak[...] = jnp.broadcast_to(new, peak.shape)
        total[...] = total[...] * fade + jnp.sum(powers, axis=1, keepdims=True)
        for plane, added in enumerate(values.values(powers, seen, _block(values, value_refs, pieces))):
            sums[plane] = sums[plane] * fade + added

    @pl.when(i == pl.num_programs(2) - 1)
    def _() -> None:
        sum_of_powers = total[:, :1]
        inverse = jnp.where(sum_of_powers > 0, 1.0 / jnp.where(sum_of_powers > 0, sum_of_powers, 1.0), 0.0)
        for plane in range(values.planes):
            outs[0][0, 0, plane] = (sums[plane] * inverse).astype(outs[0].dtype)
        if not asked:
            return
        row = lax.broadcasted_iota(jnp.int32, inverse.shape, 0)
        share = jnp.where(row < group, inverse * asked_ref[b], 0.0)
        outs[1][0, 0] = jnp.zeros(outs[1].shape[2:], jnp.float32)

        def give(j: Any, carry: None) -> None:
            given = jnp.exp(kept[0][j] - peak[:, :1]) * share
            outs[1][0, 0, pl.ds(j, 1), :] = jnp.sum(given, axis=0, keepdims=True)
            return carry

        lax.fori_loop(lax.div(start, block), lax.div(length + (block - 1), block), give, None)


def _block(each: Held, refs: Any, pieces: int) -> list[jax.Array]:
    """The arrays of a block, their pieces put together along the slots."""
    arrays, taken = [], 0
    for operand in each.operands:
        count = _copies(operand, pieces)
        found = [ref[0] if operand.axis is None else ref[0, 0] for ref in refs[taken : taken + count]]
        arrays.append(found[0] if count == 1 else jnp.concatenate(found, axis=operand.axis))
        taken += count
    return arrays


def _cost(a: Question) -> pl.CostEstimate:
    """For the compiler's scheduler, as if every slot were live."""
    batch, heads, group, head_dim = a.q.shape
    moved = batch * heads * a.slots * (slot_bytes(a.k) + slot_bytes(a.v) + (0 if a.asked is None else 4))
    queries = batch * heads * group
    return pl.CostEstimate(
        flops=4 * queries * a.slots * head_dim,
        bytes_accessed=moved + 2 * math.prod(a.q.shape) * a.q.dtype.itemsize,
        transcendentals=queries * a.slots,
    )
