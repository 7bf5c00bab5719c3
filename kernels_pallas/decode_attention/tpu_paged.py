"""Attention of one query a row to a cache in pages on a TPU, all key heads of a row at once.

A page holds the keys of all heads side by side, so that one copy brings them all; rows have one length, and the heads
go over the same pages. The copies of a step are started while the step before is computed, those of a row's first step
during the last one of the row before.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.ops.attention_blocks import Question
from kernels_pallas.decode_attention.tpu_slots import dot, padded_rows
from kernels_pallas.frame import simulator
from kernels_pallas.words import LANES, SUBLANES, round_up

STEP_BYTES = 2**20  # keys and values a step, all heads together
MOST_PIECES = 32
_LEAST = float(jnp.finfo(jnp.float32).min)


def why_not(a: Question) -> str:
    """Why pages are not for this kernel; empty where they are. Dtypes are those of `tpu_slots.why_not`."""
    size = a.k.shape[2]
    multiple = SUBLANES * (4 // a.k.dtype.itemsize)
    if a.k.dtype != a.v.dtype:
        return f"keys in {a.k.dtype.name} and values in {a.v.dtype.name} on one page: they are copied alike"
    return f"pages of {size} slots: {a.k.dtype.name} fills registers of {multiple}" if size % multiple else ""


def choose_pieces(a: Question) -> int:
    """Pages a step."""
    _, heads, size, head_dim = a.k.shape
    page = 2 * heads * size * round_up(head_dim, LANES) * a.k.dtype.itemsize
    return max(1, min(MOST_PIECES, STEP_BYTES // page, a.table.shape[1]))


def vmem_bytes(a: Question, pieces: int) -> int:
    """Vector memory: two steps of pages, queries and outputs, what a head is computed in, and logits."""
    _, heads, size, head_dim = a.k.shape
    rows, wide, width = padded_rows(a.q.shape[2]), round_up(head_dim, LANES), round_up(pieces * size, LANES)
    steps = pl.cdiv(a.table.shape[1], pieces)
    pages = 4 * pieces * heads * size * wide * a.k.dtype.itemsize
    few = heads * rows * (5 * wide + 2 * LANES) * 4
    head = 4 * pieces * size * wide * 4 + 8 * rows * width * 4
    sums = 0 if a.asked is None else heads * width * 4 * (steps * rows + 2 * round_up(steps, SUBLANES))
    return pages + few + head + sums + 2**20


def paged_attention(a: Question, *, pieces: int, interpret: bool = False) -> tuple[jax.Array, jax.Array | None]:
    """`(y, received)` from pages of dense keys and values that `why_not` has nothing against."""
    batch, heads, group, head_dim = a.q.shape
    size, rows = a.k.shape[2], padded_rows(group)
    steps, block = pl.cdiv(a.table.shape[1], pieces), pieces * size
    dtype = jnp.promote_types(a.k.dtype, a.q.dtype)
    q = jnp.pad(a.q.astype(dtype), [(0, 0), (0, 0), (0, rows - group), (0, 0)])
    asked = jnp.zeros((batch,), jnp.float32) if a.asked is None else a.asked
    whole = pl.BlockSpec((1, heads, rows, head_dim), lambda b, *_: (b, 0, 0, 0))
    out_shape, out_specs = [jax.ShapeDtypeStruct(q.shape, a.q.dtype)], [whole]
    scratch: list[Any] = [
        *(pltpu.VMEM((2, pieces, heads, size, head_dim), a.k.dtype) for _ in range(2)),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SMEM((1,), jnp.int32),
        *(pltpu.VMEM((heads, rows, width), jnp.float32) for width in (LANES, LANES, head_dim)),
    ]
    if a.asked is not None:
        out_shape.append(jax.ShapeDtypeStruct((batch, heads, steps, block), jnp.float32))
        out_specs.append(pl.BlockSpec((1, heads, steps, block), lambda b, *_: (b, 0, 0, 0)))
        scratch.append(pltpu.VMEM((steps, heads, rows, block), jnp.float32))
    moved = 2 * batch * heads * a.slots * head_dim * a.k.dtype.itemsize
    found = pl.pallas_call(
        functools.partial(_kernel, group=group, asked=a.asked is not None, scale=a.scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch,),
            in_specs=[whole, *(pl.BlockSpec(memory_space=pl.ANY) for _ in range(2))],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_bytes(a, pieces)
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * heads * group * a.slots * head_dim,
            bytes_accessed=moved,
            transcendentals=batch * heads * group * a.slots,
        ),
        interpret=simulator(interpret),
        name="paged_decode_attention",
    )(a.start[:, 0], a.length[:, 0], asked, a.table, q, a.k, a.v)
    y = found[0][:, :, :group]
    return y, None if a.asked is None else found[1].reshape(batch, heads, -1)[:, :, : a.slots]


def _kernel(
    start_ref: Any,
    length_ref: Any,
    asked_ref: Any,
    table_ref: Any,
    q_ref: Any,
    k_hbm: Any,
    v_hbm: Any,
    *refs: Any,
    group: int,
    asked: bool,
    scale: float,
) -> None:
    outs = refs[: 1 + asked]
    k_pages, v_pages, arrived, turn, peak, total, sums, *kept = refs[1 + asked :]
    pieces, heads, size, head_dim = k_pages.shape[1:]
    block = pieces * size
    b = pl.program_id(0)

    def steps_of(row: Any) -> tuple[Any, Any]:
        start, length = start_ref[row], length_ref[row]
        first = lax.div(start, block)
        return first, jnp.where(length > start, lax.div(length + (block - 1), block) - first, 0)

    def copies(row: Any, step: Any, place: Any, act: str) -> None:
        """Starts the copies of a step, or waits for them: of pages that hold slots of the row, no others."""
        for piece in range(pieces):
            page = step * pieces + piece

            @pl.when(page * size < length_ref[row])
            def _(piece: int = piece, page: Any = page) -> None:
                which = jnp.clip(table_ref[row, page], 0, k_hbm.shape[0] - 1) if act == "start" else 0
                for source, target in ((k_hbm, k_pages), (v_hbm, v_pages)):
                    copy = pltpu.make_async_copy(source.at[which], target.at[place, piece], arrived.at[place])
                    getattr(copy, act)()

    def fetch_first_of(row: Any, place: Any) -> None:
        @pl.when(row < pl.num_programs(0))
        def _() -> None:
            first, count = steps_of(row)

            @pl.when(count > 0)
            def _() -> None:
                copies(row, first, place, "start")

    @pl.when(b == 0)
    def _() -> None:
        turn[0] = 0
        # What a step has no page for is what was there: numbers, from here on.
        v_pages[...] = jnp.zeros(v_pages.shape, v_pages.dtype)
        fetch_first_of(0, 0)

    first, count = steps_of(b)
    begin = turn[0]
    turn[0] = begin + count
    start, length = start_ref[b], length_ref[b]
    peak[...] = jnp.full(peak.shape, _LEAST, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    sums[...] = jnp.zeros(sums.shape, jnp.float32)

    @pl.when(count == 0)
    def _() -> None:
        fetch_first_of(b + 1, lax.rem(begin, 2))

    def step(i: Any, carry: None) -> None:
        place = lax.rem(begin + i, 2)

        @pl.when(i + 1 < count)
        def _() -> None:
            copies(b, first + i + 1, 1 - place, "start")

        @pl.when(i + 1 == count)
        def _() -> None:
            fetch_first_of(b + 1, 1 - place)

        copies(b, first + i, place, "wait")
        for h in range(heads):
            keys = k_pages[place, :, h].reshape(block, head_dim)
            logits = dot(q_ref[0, h], keys.astype(q_ref.dtype), 1) * scale
            slot = (first + i) * block + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            seen = (slot >= start) & (slot < length)
            logits = jnp.where(seen, logits, _LEAST)
            if asked:
                kept[0][first + i, h] = logits
            old = peak[h, :, :1]
            new = jnp.maximum(old, jnp.max(logits, axis=1, keepdims=True))
            powers = jnp.where(seen, jnp.exp(logits - new), 0.0)
            fade = jnp.exp(old - new)
            peak[h] = jnp.broadcast_to(new, peak.shape[1:])
            total[h] = total[h] * fade + jnp.sum(powers, axis=1, keepdims=True)
            values = v_pages[place, :, h].reshape(block, head_dim)
            sums[h] = sums[h] * fade + dot(powers.astype(values.dtype), values, 0)
        return carry

    lax.fori_loop(0, count, step, None)
    if asked:
        outs[1][...] = jnp.zeros(outs[1].shape, jnp.float32)
    for h in range(heads):
        powers = total[h, :, :1]
        inverse = jnp.where(powers > 0, 1.0 / jnp.where(powers > 0, powers, 1.0), 0.0)
        outs[0][0, h] = (sums[h] * inverse).astype(outs[0].dtype)
        if asked:
            row = lax.broadcasted_iota(jnp.int32, inverse.shape, 0)
            share = jnp.where(row < group, inverse * asked_ref[b], 0.0)

            def give(i: Any, carry: None, h: int = h, share: jax.Array = share) -> None:
                given = jnp.exp(kept[0][first + i, h] - peak[h, :, :1]) * share
                outs[1][0, h, pl.ds(first + i, 1), :] = jnp.sum(given, axis=0, keepdims=True)
                return carry

            lax.fori_loop(0, count, give, None)
