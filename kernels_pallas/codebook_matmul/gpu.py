"""`x @ W` and `x @ W.T` for a matrix of indices into tables of at most 16 values, on a Hopper GPU."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from effjax.arrays.codebook import Codebook
from kernels_pallas import gpu_common
from kernels_pallas import gpu_packed as packing
from kernels_pallas.gpu_packed import Packed
from kernels_pallas.gpu_tile import Tile, choose_tile

__all__ = ["Tile", "choose_tile", "codebook_matmul", "pack", "why_not"]

ENTRIES = 16  # a look-up is a tree of as many selections, on pairs of values


def codebook_matmul(
    x: Float[Array, "rows in"],
    w: Codebook,
    *,
    transpose: bool = False,
    tile: Tile | None = None,
    interpret: Any = False,
) -> Float[Array, "rows out"]:
    """Multiplies by a matrix whose values are looked up in registers, on the way to the tensor core.

    There is no gather from registers or shared memory in Mosaic GPU, so a look-up is a binary tree of selections by the
    bits of the code, two outputs at once. Values are bf16 where `x` and the weight's dtype are, else two bf16 parts
    with 16 bits between them.

    Args:
        x: `[rows, in]`, bf16 or float32, or `[rows, out]` when `transpose`.
        w: `[in, out]`, with one table, a table a column or tables for groups of columns.
        transpose: multiply by `W.T`: the gradient with respect to `x`.
        tile: how the product is cut; `choose_tile` decides where None.
        interpret: parameters of Mosaic GPU's interpreter, for tests.

    Returns:
        float32 `[rows, out]`, or `[rows, in]` when `transpose`.

    Raises:
        ValueError: `why_not` has a reason, or the tile does not fit.
    """
    if reason := why_not(x.shape[0], x.dtype, w, transpose=transpose):
        raise ValueError(reason)
    (n, out), width = w.shape, x.shape[1]
    if width != (out if transpose else n):
        raise ValueError(f"x {list(x.shape)} does not multiply W{'.T' if transpose else ''} of {n}x{out}")
    packed = pack(w, parts=packing.weight_parts(x.dtype, w.dtype))
    scales = w.float_scales()
    whole = scales if packed.scale is None else None  # one scale a column: outside of the kernel
    if transpose:
        if whole is not None:
            x = (x.astype(jnp.float32) * whole).astype(x.dtype if packed.parts == 1 else jnp.float32)
        return gpu_common.matmul(x, packed, transpose=True, tile=tile, interpret=interpret)[:, :n]
    y = gpu_common.matmul(x, packed, transpose=False, tile=tile, interpret=interpret)[:, :out]
    return y if whole is None else y * whole


def why_not(rows: int, x_dtype: Any, w: Codebook, *, transpose: bool = False) -> str:
    """Why `codebook_matmul` does not take this product, and what does; an empty string where it takes it."""
    reason = _reason(rows, x_dtype, w, transpose)
    return f"{reason}; use implementation='reference'" if reason else ""


def _reason(rows: int, x_dtype: Any, w: Codebook, transpose: bool) -> str:
    if len(w.shape) != 2:
        return f"a stack of matrices {list(w.shape)}: use jax.vmap or index one"
    in_groups, out_groups, entries = w.tables.shape
    if entries > ENTRIES or w.bits > 4:
        return f"tables of {entries} entries: a look-up in registers takes at most {ENTRIES}"
    if in_groups > 1:
        return f"{in_groups} tables along the inputs: the kernel keeps one set of tables in registers"
    if transpose and out_groups > 1:
        return f"{out_groups} tables along the outputs: a transposed product takes one table for the matrix"
    groups = 1 if w.scales is None else w.scales.shape[-2]
    run, _ = packing.packed_runs(w.bits)
    return packing.refusal(rows, x_dtype) or packing.group_refusal(w.shape[0], groups, run, transpose)


def pack(w: Codebook, *, parts: int = 1) -> Packed:
    """The matrix as the kernels read it.

    Args:
        w: `[in, out]`.
        parts: bf16 parts of a value, 1 or 2.
    """
    n, out = w.shape
    scales = w.float_scales()
    groups = 1 if scales is None else scales.shape[-2]
    bits = w.bits
    run, _ = packing.packed_runs(bits)
    runs, pairs, group = packing.padded(n, out, groups, run)
    # A global scale makes float32 of the quotient; without it scales stay as narrow as they are stored.
    stored = w.scales if w.global_scale is None else scales
    sides = () if stored is None or groups == 1 else packing.row_sides(stored, pairs)
    dtype = None if stored is None else stored.dtype
    _, columns, entries = w.tables.shape
    per_column = columns > 1
    size = 2**bits

    tables = w.tables[0].astype(jnp.float32).T  # [entries, columns]
    tables = jnp.concatenate([tables, jnp.repeat(tables[-1:], size - entries, axis=0)])  # as a clipped look-up has it
    words = jnp.concatenate(packing.exact_terms(tables, parts))
    if per_column:
        words = packing.pad_to(jnp.repeat(words, out // columns, axis=1), words.shape[0], 2 * pairs)
        constants = packing.column_pairs(words)
    else:
        constants = lax.bitcast_convert_type(words[:, 0], jnp.uint16)

    def values(j: int, parity: int, planes: Any, sides: Any, constants: Any, spread: Any) -> list[jax.Array]:
        del sides
        entry = [spread(packing.half_bits(word, parity)) if per_column else word for word in constants[0]]
        code = packing.code_of(planes, j, parity, bits)
        return [packing.bf16_bits(_look_up(code, entry[i * size : (i + 1) * size])) for i in range(parts)]

    def scale(parity: int, sides: Any) -> jax.Array:
        return packing.side_value(sides, parity, dtype)

    return Packed(
        planes=packing.packed_planes(w.codes, bits, runs, pairs),
        sides=sides,
        constants=(constants,),
        run=run,
        runs=runs,
        pairs=pairs,
        group=group,
        values=values,
        scale=scale if groups > 1 else None,
        parts=parts,
        step=packing.step_runs(group),
    )


def _look_up(code: jax.Array, entries: list[jax.Array]) -> jax.Array:
    """`entries[code]` of 16-bit words: halves of the table chosen bit by bit, without a branch or a comparison."""
    bit = 0
    while len(entries) > 1:
        one = (code >> packing.word16(bit) if bit else code) & packing.word16(1)
        mask = packing.word16(0) - one  # all bits set where the code's bit is
        entries = [low ^ ((low ^ high) & mask) for low, high in zip(entries[::2], entries[1::2], strict=True)]
        bit += 1
    return entries[0]
