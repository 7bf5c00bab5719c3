"""Attention of one query a row to a cache's slots on a Hopper GPU: blocks of threads share the live slots of a head.

The query heads of a group are rows of one product, filled up to the tensor core's 64, which costs it little: a step of
decoding waits for memory. Each block of threads goes over its share of the live blocks of slots with a running maximum
and sum, copies some steps ahead by TMA; the shares are put together afterwards. Where the sums of weights are asked
for, logits are written to memory as they come, 4 bytes a slot and query head, since maximum and sum are known only at
the end.

Source: flash-decoding (Dao et al. 2023); the loop is that of FlashAttention (Dao et al. 2022) for one row of queries.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from effjax.ops.attention_blocks import Question, slots_shape
from effjax.ops.coded_slots import CodedSlots
from effjax.ops.dispatch import no_hopper
from kernels_pallas.decode_attention import gpu_slots
from kernels_pallas.decode_attention.gpu_slots import WORD, Held, plane, spread, transforms
from kernels_pallas.gpu_packed import round_up
from kernels_pallas.gpu_tile import MULTIPROCESSORS, RESERVED_BYTES, SHARED_BYTES

ROWS = 64  # of a tensor core instruction: the query heads of a group
BLOCK = 64  # slots a step
MOST_COLUMNS = 64  # of outputs that a product adds to at a time
_LEAST = float(jnp.finfo(jnp.float32).min)
_LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """How the slots of a head are shared.

    Attributes:
        splits: blocks of threads that share them.
        stages: steps whose keys and values are in flight.
    """

    splits: int
    stages: int

    def __post_init__(self) -> None:
        if self.splits < 1 or self.stages < 1:
            raise ValueError(f"splits={self.splits}, stages={self.stages}: both are at least 1")


def why_not(a: Question) -> str:
    """Why this is not for the kernel, with the remedy; empty where it is.

    Example:
        >>> from effjax.ops.attention import make_question
        >>> k = jnp.ones((1, 1, 8, 16))
        >>> why_not(make_question("", k[:, :, :4], k, k, jnp.ones((1, 1), jnp.int32), None, None, None, None))
        "queries in float32: the GPU kernel takes bfloat16 and float16; use implementation='reference'"
    """
    reason = _reason(a)
    other = "blocked" if any(isinstance(x, CodedSlots) for x in (a.k, a.v)) else "reference"
    return f"{reason}; use implementation={other!r}" if reason else ""


def unfit(a: Question) -> str:
    """Why the kernel is not chosen unasked though it takes this, in one sentence; empty where it is."""
    del a
    return no_hopper()


def _reason(a: Question) -> str:
    if a.asked is not None and a.counts is not None:
        return "pivotal slots are to be counted: the kernel sums weights"
    _, _, group, head_dim = a.q.shape
    if jnp.dtype(a.q.dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"queries in {jnp.dtype(a.q.dtype).name}: the GPU kernel takes bfloat16 and float16"
    for x, role in ((a.k, "keys"), (a.v, "values")):
        if reason := gpu_slots.why_not(x, role):
            return reason
        if not isinstance(x, CodedSlots) and x.dtype != a.q.dtype:
            return f"{role} in {x.dtype.name}, queries in {a.q.dtype.name}: dense ones must be of the queries' dtype"
    if head_dim % 16 or head_dim > 256:
        return f"head_dim {head_dim}: a tensor core takes multiples of 16 up to 256"
    if group > ROWS:
        return f"{group} query heads a key head: a tensor core instruction has {ROWS} rows"
    size = slots_shape(a.k)[2]
    if a.table is not None and BLOCK % size and size % BLOCK:
        return f"pages of {size} slots: a step takes {BLOCK}, whole pages or a whole part of one"
    if a.table is not None and isinstance(a.v, CodedSlots) and size % BLOCK:
        return f"pages of {size} slots: the scales of values are copied {BLOCK} at a time"
    if size % 8:
        return f"{size} slots{' a page' if a.table is not None else ''}: they are copied 8 at a time"
    return ""


def choose_tile(a: Question, *, multiprocessors: int = MULTIPROCESSORS) -> Tile:
    """Blocks of threads for every multiprocessor, two of which share one, each with at least four steps."""
    batch, heads = a.q.shape[:2]
    steps = a.slots // BLOCK
    splits = max(1, min(-(-2 * multiprocessors // (batch * heads)), steps // 4))
    empty = shared_bytes(a, Tile(splits=1, stages=1))
    step = shared_bytes(a, Tile(splits=1, stages=2)) - empty
    # Two blocks of threads share a multiprocessor where two steps of each fit.
    half = 1 + (SHARED_BYTES // 2 - empty) // step
    return Tile(splits=splits, stages=min(4, half if half >= 2 else 1 + (SHARED_BYTES - empty) // step))


def shared_bytes(a: Question, tile: Tile) -> int:
    """Shared memory of a block of threads: queries, the steps in flight, unpacked codes, and what is on its way out."""
    head_dim = a.q.shape[-1]
    codes = [x.coding.bits if isinstance(x, CodedSlots) else WORD for x in (a.k, a.v)]
    step = BLOCK * sum(head_dim * bits // 8 for bits in codes) + (4 * BLOCK if codes[1] < WORD else 0)
    unpacked = sum(2 * BLOCK * head_dim for bits in codes if bits < WORD)
    leaving = ROWS * 4 * (sum(_widths(a, head_dim * codes[1] // WORD)) + 1)
    return RESERVED_BYTES + 2 * ROWS * head_dim + unpacked + leaving + tile.stages * step


def _widths(a: Question, width: int) -> list[int]:
    """Columns of what leaves through shared memory: of a run of outputs, and of logits where they are others."""
    columns = math.gcd(width, BLOCK)
    return sorted({columns, BLOCK} if a.asked is not None else {columns})


def decode_attention(
    a: Question, *, tile: Tile | None = None, interpret: Any = False
) -> tuple[jax.Array, jax.Array | None]:
    """`(y, received)` as `effjax.ops.decode_attention` defines them.

    Args:
        a: what is asked.
        tile: how the slots are shared; `choose_tile` decides where None.
        interpret: parameters of Mosaic GPU's interpreter, for tests.

    Returns:
        Outputs in the dtype of `q`, and the float32 sums or None. Weights are rounded to the dtype of the values, as in
        the reference. Integers are exact; queries and weights with their scales are rounded to bfloat16.

    Raises:
        ValueError: what `why_not` says.
    """
    if reason := why_not(a):
        raise ValueError(reason)
    group = a.q.shape[2]
    tile = tile or choose_tile(a)
    keys, values = gpu_slots.held(a.k), gpu_slots.held(a.v)
    q = a.q if keys.steps is None else a.q.astype(jnp.float32) * keys.steps
    q = jnp.pad(q.astype(keys.dtype), [(0, 0), (0, 0), (0, round_up(group, 8) - group), (0, 0)])
    y, peak, total, *logits = _call(a, keys.to_planes(q).swapaxes(2, 3), keys, values, tile, interpret or None)
    # Logits and maxima are those of powers of two.
    top = jnp.max(peak, axis=0)
    share = jnp.where(total > 0, jnp.exp2(peak - top), 0.0)
    sums = jnp.sum(share * total, axis=0)
    inverse = jnp.where(sums > 0, 1.0 / jnp.where(sums > 0, sums, 1.0), 0.0)[:, :, :group]
    y = jnp.sum(y * share[:, :, :, :group, None], axis=0) * inverse[..., None]
    y = values.from_planes(y).astype(a.q.dtype)
    if a.asked is None:
        return y, None
    kept = logits[0][..., : a.slots]
    slot = lax.broadcasted_iota(jnp.int32, kept.shape, 3)
    seen = (slot >= a.start[..., None, None]) & (slot < a.length[..., None, None])
    powers = jnp.where(seen, jnp.exp2(kept - top[:, :, :group, None]), 0.0)
    return y, jnp.sum(powers * (inverse * a.asked[:, None, None])[..., None], axis=2)


def _call(a: Question, q: jax.Array, keys: Held, values: Held, tile: Tile, interpret: Any) -> Any:
    """Sums of values `[splits, batch, heads, group, head_dim]`, then maxima and sums of powers `[..., rows]`.

    And, where asked for, logits `[batch, heads, group, slots]`, which hold anything where a slot is not seen.
    """
    batch, heads, group, head_dim = a.q.shape
    rows, size = q.shape[3], keys.array.shape[2]
    pieces = 1 if a.table is None else max(1, BLOCK // size)
    piece = BLOCK // pieces
    per_page = max(1, size // BLOCK)  # steps of a page
    widths = _widths(a, values.width)
    columns = widths[0]
    stored = (keys.array, values.array, *values.scales)
    # Outputs are summed in runs of few registers: (plane, first column, columns).
    runs = [
        (p, left, min(MOST_COLUMNS, values.width - left))
        for p in range(values.planes)
        for left in range(0, values.width, MOST_COLUMNS)
    ]
    scale = a.scale * _LOG2E
    asked = a.asked is not None
    shape = (ROWS, BLOCK)
    row_layout, column_layout = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def kernel(start_gmem: Any, length_gmem: Any, table_gmem: Any, q_gmem: Any, *refs: Any) -> None:
        stored_gmem, refs = refs[: len(stored)], refs[len(stored) :]
        y_gmem, peak_gmem, total_gmem, *logits_gmem = refs[: 3 + asked]
        q_smem, stages, unpacked, row_smem, q_barrier, barriers, out_smem = refs[3 + asked :]
        y_smem, logits_smem = out_smem[0], out_smem[-1]
        k_smem, v_smem, *scales_smem = stages
        head, split, row = lax.axis_index("heads"), lax.axis_index("splits"), lax.axis_index("batch")
        start, length = start_gmem[row, head], length_gmem[row, head]
        first = lax.div(start, BLOCK)
        last = jnp.where(length > start, lax.div(length + (BLOCK - 1), BLOCK), first)
        share = lax.div(last - first + (tile.splits - 1), tile.splits)
        begin = jnp.minimum(first + split * share, last)
        count = jnp.minimum(share, last - begin)

        def fetch(step: Any, stage: Any) -> None:
            block = begin + step
            for p in range(pieces):
                if a.table is None:
                    where, inside = row, pl.ds(block * BLOCK, BLOCK)
                else:
                    # A page behind the last one that is needed is the last one, whatever the table says.
                    place = jnp.minimum(block * pieces + p, lax.div(length - 1, piece))
                    where = table_gmem[row, lax.div(place, per_page)]
                    inside = pl.ds(lax.rem(place, per_page) * piece, piece)
                for gmem, smem in zip(stored_gmem, stages, strict=True):
                    target = smem.at[stage, pl.ds(p * piece, piece)]
                    plgpu.copy_gmem_to_smem(gmem.at[where, head, inside], target, barriers.at[stage])

        for p in range(keys.planes):
            plgpu.copy_gmem_to_smem(q_gmem.at[row, head, p], q_smem.at[p, pl.ds(0, rows)], q_barrier)
        lax.fori_loop(0, jnp.minimum(count, tile.stages), lambda i, _: fetch(i, i), None)
        plgpu.barrier_wait(q_barrier)

        def dense(held: Held, smem: Any, target: Any, stage: Any) -> list[Any]:
            """Matrices of 16-bit floats in shared memory, one a plane."""
            if not held.is_coded:
                return [smem.at[stage]]
            words = plgpu.layout_cast(smem[stage], plgpu.Layout.WGMMA)
            for p in range(held.planes):
                target[p] = plane(words, p, held.bits)
            plgpu.commit_smem()
            return [target.at[p] for p in range(held.planes)]

        def step(i: Any, carry: Any) -> Any:
            y, peak, total, least = carry
            stage = lax.rem(i, tile.stages)
            plgpu.barrier_wait(barriers.at[stage])
            key_planes = dense(keys, k_smem, unpacked[0] if keys.is_coded else None, stage)

            def product(logits: Any) -> jax.Array:
                for p, each in enumerate(key_planes):
                    plgpu.wgmma(logits, q_smem.at[p], each.transpose((1, 0)))
                return logits[...]

            logits = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32)) * scale
            at = (begin + i) * BLOCK
            slot = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + at
            logits = jnp.where((slot >= start) & (slot < length), logits, _LEAST)
            if asked:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                logits_smem[...] = logits
                plgpu.commit_smem()
                target = logits_gmem[0].at[row, head, :, pl.ds(at, BLOCK)]
                plgpu.copy_smem_to_gmem(logits_smem.at[pl.ds(0, group)], target)
            new = jnp.maximum(peak, jnp.max(logits, axis=1))
            fade = jnp.exp2(peak - new)
            powers = jnp.exp2(logits - lax.broadcast_in_dim(new, shape, (0,)))
            total = total * fade + jnp.sum(powers, axis=1)
            if values.is_coded:
                low, size = (spread(plgpu.layout_cast(ref[stage], column_layout), shape) for ref in scales_smem)
                least = least * fade + jnp.sum(powers * (low + size * float(values.centre)), axis=1)
                powers = powers * size
            left = powers.astype(values.dtype)
            value_planes = dense(values, v_smem, unpacked[-1] if values.is_coded else None, stage)

            def sums_of(p: int, begin: int, width: int) -> jax.Array:
                def product(sums: Any) -> jax.Array:
                    plgpu.wgmma(sums, left, value_planes[p].at[:, pl.ds(begin, width)])
                    return sums[...]

                return pl.run_scoped(product, plgpu.ACC((ROWS, width), jnp.float32))

            y = tuple(
                part * lax.broadcast_in_dim(fade, part.shape, (0,)) + sums_of(*run)
                for part, run in zip(y, runs, strict=True)
            )

            @pl.when(i + tile.stages < count)
            def _() -> None:
                fetch(i + tile.stages, stage)

            return y, new, total, least

        def filled(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        y = tuple(filled((ROWS, width), 0.0, plgpu.Layout.WGMMA) for _, _, width in runs)
        vectors = [filled((ROWS,), value, row_layout) for value in (_LEAST, 0.0, 0.0)]
        y, peak, total, least = lax.fori_loop(0, count, step, (y, *vectors))

        for vector, gmem in ((peak, peak_gmem), (total, total_gmem)):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            row_smem[...] = vector
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(row_smem.at[pl.ds(0, rows)], gmem.at[split, row, head])
        for part, (p, begin, width) in zip(y, runs, strict=True):
            if values.is_coded:
                part = part + lax.broadcast_in_dim(least, part.shape, (0,))
            for left in range(0, width, columns):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                y_smem[...] = part[:, left : left + columns]
                plgpu.commit_smem()
                target = y_gmem.at[split, row, head, :, pl.ds(p * values.width + begin + left, columns)]
                plgpu.copy_smem_to_gmem(y_smem.at[pl.ds(0, group)], target)
        plgpu.wait_smem_to_gmem(0)

    def result(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    def staged(x: jax.Array) -> Any:
        inner = (tile.stages, BLOCK, *x.shape[3:])
        return plgpu.SMEM(inner, x.dtype, transforms=transforms(x.shape[3]) if x.ndim == 4 else ())

    def planes_of(held: Held, size: int) -> Any:
        return plgpu.SMEM((held.planes, size, held.width), held.dtype, transforms=transforms(held.width))

    lead = (tile.splits, batch, heads)
    outputs = [result(*lead, group, head_dim), result(*lead, rows), result(*lead, rows)]
    if asked:
        outputs.append(result(batch, heads, group, round_up(a.slots, BLOCK)))
    table = jnp.zeros((1, 1), jnp.int32) if a.table is None else jnp.clip(a.table, 0, keys.array.shape[0] - 1)
    return plgpu.kernel(
        kernel,
        out_type=outputs,
        grid=(heads, tile.splits, batch),
        grid_names=("heads", "splits", "batch"),
        scratch_types=[
            planes_of(keys, ROWS),
            [staged(x) for x in stored],
            [planes_of(held, BLOCK) for held in (keys, values) if held.is_coded],
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=keys.planes),
            plgpu.Barrier(num_arrivals=len(stored) * pieces, num_barriers=tile.stages),
            [plgpu.SMEM((ROWS, width), jnp.float32) for width in widths],
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(a.start, a.length, table, q, *stored)
