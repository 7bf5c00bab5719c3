"""`x @ W` and `x @ W.T` for a uniformly quantized matrix on a Hopper GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.arrays.packing import unpack
from effjax.arrays.quantized import Quantized, centre
from kernels_pallas import gpu_common
from kernels_pallas import gpu_packed as packing
from kernels_pallas.gpu_packed import Packed
from kernels_pallas.gpu_tile import Tile, choose_tile

__all__ = ["Tile", "choose_tile", "pack", "quant_matmul", "why_not"]


def quant_matmul(
    x: Float[Array, "rows in"],
    w: Quantized,
    *,
    transpose: bool = False,
    tile: Tile | None = None,
    interpret: Any = False,
) -> Float[Array, "rows out"]:
    """Multiplies by a quantized matrix whose codes are dequantised in registers, on the way to the tensor core.

    Codes, and codes less an integer zero point, are exact in bf16; scales multiply the sums over a group. The error is
    that of float32 sums, except in a transposed product with groups, where the scaled weight is rounded to bf16, or to
    16 bits where `x` or the weight's dtype is float32.

    Args:
        x: `[rows, in]`, bf16 or float32, or `[rows, out]` when `transpose`. A float32 is three terms of bf16.
        w: `[in, out]`.
        transpose: multiply by `W.T`: the gradient with respect to `x`.
        tile: how the product is cut; `choose_tile` decides where None.
        interpret: parameters of Mosaic GPU's interpreter, for tests.

    Returns:
        float32 `[rows, out]`, or `[rows, in]` when `transpose`.

    Raises:
        ValueError: `why_not` has a reason, or the tile does not fit.

    Source: the registers' way to the tensor core is that of Marlin (Frantar et al. 2024, section 3).
    """
    if reason := why_not(x.shape[0], x.dtype, w, transpose=transpose):
        raise ValueError(reason)
    (n, out), width = w.shape, x.shape[1]
    if width != (out if transpose else n):
        raise ValueError(f"x {list(x.shape)} does not multiply W{'.T' if transpose else ''} of {n}x{out}")
    packed = pack(w, parts=packing.weight_parts(x.dtype, w.dtype))
    if not transpose:
        y = gpu_common.matmul(x, packed, transpose=False, tile=tile, interpret=interpret)[:, :out]
        if packed.scale is None:
            y = y * _factor(w) * w.scales.astype(jnp.float32)
        return y + jnp.matmul(_group_sums(x, w), _shift(w), precision="highest") if _real_zeros(w) else y
    g = x
    if packed.scale is None:
        g = x.astype(jnp.float32) * (_factor(w) * w.scales.astype(jnp.float32))
        g = g.astype(jnp.bfloat16) if packed.parts == 1 else g
    dx = gpu_common.matmul(g, packed, transpose=True, tile=tile, interpret=interpret)[:, :n]
    if not _real_zeros(w):
        return dx
    groups = jnp.matmul(x.astype(jnp.float32), _shift(w).T, precision="highest")
    return dx + jnp.repeat(groups, w.group_size, axis=-1)


def why_not(rows: int, x_dtype: Any, w: Quantized, *, transpose: bool = False) -> str:
    """Why `quant_matmul` does not take this product, and what does; an empty string where it takes it."""
    reason = _reason(rows, x_dtype, w, transpose)
    return f"{reason}; use implementation='reference'" if reason else ""


def _reason(rows: int, x_dtype: Any, w: Quantized, transpose: bool) -> str:
    if len(w.shape) != 2:
        return f"a stack of matrices {list(w.shape)}: use jax.vmap or index one"
    run, _ = packing.packed_runs(w.bits)
    return packing.refusal(rows, x_dtype) or packing.group_refusal(w.shape[0], w.scales.shape[-2], run, transpose)


def pack(w: Quantized, *, parts: int = 1) -> Packed:
    """The matrix as the kernels read it: views of its arrays, and copies only of what needs padding.

    Args:
        w: `[in, out]`.
        parts: bf16 parts of a scaled weight in a transposed product.
    """
    (n, out), groups = w.shape, w.scales.shape[-2]
    run, _ = packing.packed_runs(w.bits)
    runs, pairs, group = packing.padded(n, out, groups, run)
    scale_sides = packing.row_sides(w.scales, pairs) if groups > 1 else ()
    zero_sides = ()
    if w.zeros is not None and not _real_zeros(w):
        zeros = unpack(w.zeros, w.bits, groups)
        zero_sides = (packing.column_pairs(packing.pad_to(zeros, groups, 2 * pairs)),)
    bits, factor, scale_dtype = w.bits, _factor(w), w.scales.dtype
    # A mask in a register: an AND and an OR with two immediate operands would be two instructions, so they are one.
    masks = () if bits == 8 else (jnp.full((1,), 2**bits - 1, jnp.uint16),)

    def values(j: int, parity: int, words: Any, sides: Any, constants: Any, spread: Any) -> list[jax.Array]:
        code = packing.code_of(words, j, parity, bits, constants[0][0] if constants else None)
        if zero_sides:
            zero = packing.code_of([sides[-1]], 0, parity, 8)
            return [_exact(code, bits) - spread(_exact(zero, bits))]
        if bits == 1:  # twice the code less 1, the halves of which are not among bf16's numbers from 128 to 256
            return [_exact(code << packing.word16(1), bits) - _bf16(129)]
        return [_exact(code, bits) if bits == 8 else _exact(code, bits) - _bf16(128 + centre(bits))]

    def scale(parity: int, sides: Any) -> jax.Array:
        value = packing.side_value(sides, parity, scale_dtype)
        return value if factor == 1 else value * np.float32(factor)

    return Packed(
        planes=packing.packed_planes(w.codes, bits, runs, pairs),
        sides=(*scale_sides, *zero_sides),
        constants=masks,
        run=run,
        runs=runs,
        pairs=pairs,
        group=group,
        values=values,
        scale=scale if groups > 1 else None,
        parts=parts,
        step=packing.step_runs(group),
    )


def _exact(code: jax.Array, bits: int) -> jax.Array:
    """A code as bf16, off by a constant: `128 + code` up to 7 bits, `code - 128` for 8.

    A bf16 between 128 and 256 has its 7 bits of fraction for units, so that a code is put there by an OR. Eight bits
    are the difference of two such numbers: the lower seven, and 256 or 128 for a top bit that is clear or set.
    """
    if bits < 8:
        return packing.bf16_bits(code | packing.word16(0x4300))
    low = packing.bf16_bits((code & packing.word16(0x7F)) | packing.word16(0x4300))
    top = packing.bf16_bits((code & packing.word16(0x80)) ^ packing.word16(0x4380))
    return low - top


def _bf16(x: float) -> np.ndarray:
    return np.asarray(x, jnp.bfloat16)


def _real_zeros(w: Quantized) -> bool:
    return w.zeros is not None and jnp.issubdtype(w.zeros.dtype, jnp.floating)


def _factor(w: Quantized) -> float:
    """What the values of the kernel are to be multiplied by beside the scale; see `values` for one bit."""
    return 0.5 if w.bits == 1 and (w.zeros is None or _real_zeros(w)) else 1.0


def _shift(w: Quantized) -> jax.Array:
    """`[groups, out]`: what real zero points add to each weight of a group that the kernel took as symmetric."""
    assert w.zeros is not None
    return w.scales.astype(jnp.float32) * (centre(w.bits) - w.zeros.astype(jnp.float32))


def _group_sums(x: jax.Array, w: Quantized) -> jax.Array:
    return x.astype(jnp.float32).reshape(x.shape[0], -1, w.group_size).sum(-1)
