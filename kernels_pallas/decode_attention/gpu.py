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
        >>> from effjax.ops.attention import _question
        >>> k = jnp.ones((1, 1, 8, 16))
        >>> why_not(_question("", k[:, :, :4], k, k, jnp.ones((1, 1), jnp.int32), None, None, None, None))
        "float32: the GPU kernel takes bfloat16 and float16; use implementation='reference'"
    """
    reason = _reason(a)
    other = "blocked" if any(isinstance(x, CodedSlots) for x in (a.k, a.v)) else "reference"
    return f"{reason}; use implementation={other!r}" if reason else ""


def unfit(a: Question) -> str:
    """Why the kernel is not chosen unasked though it takes this, in one sentence; empty where it is."""
    del a
    return no_hopper()


def _reason(a: Question) -> str:
    _, _, group, head_dim = a.q.shape
    for x, role in ((a.k, "keys"), (a.v, "values")):
        if isinstance(x, CodedSlots):
            return f"{role} coded by {x.coding}: the GPU kernel takes dense ones"
    dtypes = {jnp.dtype(x.dtype) for x in (a.q, a.k, a.v)}
    if len(dtypes) > 1:
        return f"dtypes {sorted(d.name for d in dtypes)}: the GPU kernel takes queries, keys and values of one"
    if dtypes.isdisjoint({jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}):
        return f"{dtypes.pop().name}: the GPU kernel takes bfloat16 and float16"
    if head_dim % 16 or head_dim > 256:
        return f"head_dim {head_dim}: a tensor core takes multiples of 16 up to 256"
    if group > ROWS:
        return f"{group} query heads a key head: a tensor core instruction has {ROWS} rows"
    if a.table is not None and BLOCK % slots_shape(a.k)[2] and slots_shape(a.k)[2] % BLOCK:
        return f"pages of {slots_shape(a.k)[2]} slots: a step takes {BLOCK}, whole pages or a whole part of one"
    if slots_shape(a.k)[2] % 8:
        return f"{slots_shape(a.k)[2]} slots{' a page' if a.table is not None else ''}: they are copied 8 at a time"
    return ""


def choose_tile(a: Question, *, multiprocessors: int = MULTIPROCESSORS) -> Tile:
    """Blocks of threads for every multiprocessor, two of which share one, each with at least four steps."""
    batch, heads, _, head_dim = a.q.shape
    steps = a.slots // BLOCK
    splits = max(1, min(-(-2 * multiprocessors // (batch * heads)), steps // 4))
    empty = shared_bytes(a, Tile(splits=1, stages=1))
    step = 2 * BLOCK * head_dim * a.k.dtype.itemsize
    # Two blocks of threads share a multiprocessor where two steps of each fit.
    half = 1 + (SHARED_BYTES // 2 - empty) // step
    return Tile(splits=splits, stages=min(4, half if half >= 2 else 1 + (SHARED_BYTES - empty) // step))


def shared_bytes(a: Question, tile: Tile) -> int:
    """Shared memory of a block of threads: queries, the steps in flight, and what is on its way out."""
    head_dim, size = a.q.shape[-1], a.q.dtype.itemsize
    return (
        RESERVED_BYTES + ROWS * (head_dim * size + 4 * sum(_widths(a)) + 4) + tile.stages * 2 * BLOCK * head_dim * size
    )


def _widths(a: Question) -> list[int]:
    """Columns of what leaves through shared memory: of a run of outputs, and of logits where they are others."""
    columns = math.gcd(a.q.shape[-1], BLOCK)
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
        the reference.

    Raises:
        ValueError: what `why_not` says.
    """
    if reason := why_not(a):
        raise ValueError(reason)
    group = a.q.shape[2]
    tile = tile or choose_tile(a)
    rows = round_up(group, 8)
    q = jnp.pad(a.q, [(0, 0), (0, 0), (0, rows - group), (0, 0)])
    y, peak, total, *logits = _call(a, q, tile, interpret or None)
    # Logits and maxima are those of powers of two.
    top = jnp.max(peak, axis=0)
    share = jnp.where(total > 0, jnp.exp2(peak - top), 0.0)
    sums = jnp.sum(share * total, axis=0)
    inverse = jnp.where(sums > 0, 1.0 / jnp.where(sums > 0, sums, 1.0), 0.0)[:, :, :group]
    y = jnp.sum(y * share[:, :, :, :group, None], axis=0) * inverse[..., None]
    if a.asked is None:
        return y.astype(a.q.dtype), None
    kept = logits[0][..., : a.slots]
    slot = lax.broadcasted_iota(jnp.int32, kept.shape, 3)
    seen = (slot >= a.start[..., None, None]) & (slot < a.length[..., None, None])
    powers = jnp.where(seen, jnp.exp2(kept - top[:, :, :group, None]), 0.0)
    return y.astype(a.q.dtype), jnp.sum(powers * (inverse * a.asked[:, None, None])[..., None], axis=2)


def _call(a: Question, q: jax.Array, tile: Tile, interpret: Any) -> Any:
    """Sums of values `[splits, batch, heads, group, head_dim]`, then maxima and sums of powers `[..., rows]`.

    And, where asked for, logits `[batch, heads, group, slots]`, which hold anything where a slot is not seen.
    """
    batch, heads, group, head_dim = a.q.shape
    rows, size = q.shape[2], slots_shape(a.k)[2]
    pieces = 1 if a.table is None else max(1, BLOCK // size)
    piece = BLOCK // pieces
    per_page = max(1, size // BLOCK)  # steps of a page
    widths = _widths(a)
    columns = widths[0]
    swizzle = next(width for width in (128, 64, 32) if head_dim * 2 % width == 0)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    scale = a.scale * _LOG2E
    asked = a.asked is not None

    def kernel(start_gmem: Any, length_gmem: Any, table_gmem: Any, q_gmem: Any, k_gmem: Any, v_gmem: Any, *refs: Any):
        y_gmem, peak_gmem, total_gmem, *logits_gmem = refs[: 4 if asked else 3]
        q_smem, k_smem, v_smem, row_smem, q_barrier, barriers, *out_smem = refs[4 if asked else 3 :]
        y_smem, logits_smem = out_smem[0], out_smem[-1]
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
                inside = pl.ds(p * piece, piece)
                for gmem, smem in ((k_gmem, k_smem), (v_gmem, v_smem)):
                    if a.table is None:
                        source = gmem.at[row, head, pl.ds(block * BLOCK, BLOCK)]
                    else:
                        # A page behind the last one that is needed is the last one, whatever the table says.
                        place = jnp.minimum(block * pieces + p, lax.div(length - 1, piece))
                        page = table_gmem[row, lax.div(place, per_page)]
                        source = gmem.at[page, head, pl.ds(lax.rem(place, per_page) * piece, piece)]
                    plgpu.copy_gmem_to_smem(source, smem.at[stage, inside], barriers.at[stage])

        plgpu.copy_gmem_to_smem(q_gmem.at[row, head], q_smem.at[pl.ds(0, rows)], q_barrier)
        lax.fori_loop(0, jnp.minimum(count, tile.stages), lambda i, _: fetch(i, i), None)
        plgpu.barrier_wait(q_barrier)

        def step(i: Any, carry: Any) -> Any:
            y, peak, total = carry
            stage = lax.rem(i, tile.stages)
            plgpu.barrier_wait(barriers.at[stage])

            def product(logits: Any) -> jax.Array:
                plgpu.wgmma(logits, q_smem, k_smem.at[stage].transpose((1, 0)))
                return logits[...]

            logits = pl.run_scoped(product, plgpu.ACC((ROWS, BLOCK), jnp.float32)) * scale
            at = (begin + i) * BLOCK
            slot = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=plgpu.Layout.WGMMA) + at
            logits = jnp.where((slot >= start) & (slot < length), logits, _LEAST)
            if asked:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                logits_smem[...] = logits
                plgpu.commit_smem()
                target = logits_gmem[0].at[row, head, :, pl.ds(at, BLOCK)]
                plgpu.copy_smem_to_gmem(logits_smem.at[pl.ds(0, group)], target)
            new = jnp.maximum(peak, jnp.max(logits, axis=1))
            fade = jnp.exp2(peak - new)
            powers = jnp.exp2(logits - lax.broadcast_in_dim(new, logits.shape, (0,)))
            total = total * fade + jnp.sum(powers, axis=1)
            left = powers.astype(a.v.dtype)

            def sums_of(run: int, width: int) -> jax.Array:
                def product(sums: Any) -> jax.Array:
                    plgpu.wgmma(sums, left, v_smem.at[stage, :, pl.ds(run * MOST_COLUMNS, width)])
                    return sums[...]

                return pl.run_scoped(product, plgpu.ACC((ROWS, width), jnp.float32))

            y = tuple(
                part * lax.broadcast_in_dim(fade, part.shape, (0,)) + sums_of(run, part.shape[1])
                for run, part in enumerate(y)
            )

            @pl.when(i + tile.stages < count)
            def _() -> None:
                fetch(i + tile.stages, stage)

            return y, new, total

        row_layout = plgpu.Layout.WGMMA.reduce(1)
        runs = [min(MOST_COLUMNS, head_dim - left) for left in range(0, head_dim, MOST_COLUMNS)]
        zeros = tuple(plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA) for width in runs)
        least = plgpu.layout_cast(jnp.full((ROWS,), _LEAST, jnp.float32), row_layout)
        none = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout)
        y, peak, total = lax.fori_loop(0, count, step, (zeros, least, none))

        for vector, gmem in ((peak, peak_gmem), (total, total_gmem)):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            row_smem[...] = vector
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(row_smem.at[pl.ds(0, rows)], gmem.at[split, row, head])
        for left in range(0, head_dim, columns):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            part, within = y[left // MOST_COLUMNS], left % MOST_COLUMNS
            y_smem[...] = part[:, within : within + columns]
            plgpu.commit_smem()
            target = y_gmem.at[split, row, head, :, pl.ds(left, columns)]
            plgpu.copy_smem_to_gmem(y_smem.at[pl.ds(0, group)], target)
        plgpu.wait_smem_to_gmem(0)

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    lead = (tile.splits, batch, heads)
    outputs = [shape(*lead, group, head_dim), shape(*lead, rows), shape(*lead, rows)]
    if asked:
        outputs.append(shape(batch, heads, group, round_up(a.slots, BLOCK)))
    table = jnp.zeros((1, 1), jnp.int32) if a.table is None else jnp.clip(a.table, 0, slots_shape(a.k)[0] - 1)
    return plgpu.kernel(
        kernel,
        out_type=outputs,
        grid=(heads, tile.splits, batch),
        grid_names=("heads", "splits", "batch"),
        scratch_types=[
            plgpu.SMEM((ROWS, head_dim), q.dtype, transforms=transforms),
            *(plgpu.SMEM((tile.stages, BLOCK, head_dim), x.dtype, transforms=transforms) for x in (a.k, a.v)),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2 * pieces, num_barriers=tile.stages),
            *(plgpu.SMEM((ROWS, width), jnp.float32) for width in widths),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(a.start, a.length, table, q, a.k, a.v)
