"""`x @ W` and `x @ W.T` for an n:m sparse matrix on a Hopper GPU: only kept values are read."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.nm_sparse import NMSparse
from effjax.arrays.quantized import Quantized
from kernels_pallas import gpu_common
from kernels_pallas import gpu_packed as packing
from kernels_pallas.gpu_packed import Packed
from kernels_pallas.gpu_tile import Tile, choose_tile

__all__ = ["Tile", "choose_tile", "nm_matmul", "pack", "why_not"]

RUN = 16  # inputs of a run, each of which is a product of its own


def nm_matmul(
    x: Float[Array, "rows in"],
    w: NMSparse,
    *,
    transpose: bool = False,
    tile: Tile | None = None,
    interpret: Any = False,
) -> Float[Array, "rows out"]:
    """Multiplies by a matrix of which n of every m inputs are stored, spread over their places in registers.

    Hopper's sparse tensor core instruction cannot be reached from Mosaic GPU, so nothing is saved but bytes: a gain
    where the product is bound by reading the weights, none where it is bound by arithmetic.

    Args:
        x: `[rows, in]`, bf16 or float32, or `[rows, out]` when `transpose`.
        w: `[in, out]`, with values in bf16.
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
    y = gpu_common.matmul(x, pack(w), transpose=transpose, tile=tile, interpret=interpret)
    return y[:, : n if transpose else out]


def why_not(rows: int, x_dtype: Any, w: NMSparse, *, transpose: bool = False) -> str:
    """Why `nm_matmul` does not take this product, and what does; an empty string where it takes it."""
    reason = _reason(rows, x_dtype, w, transpose)
    return f"{reason}; use implementation='reference'" if reason else ""


def _reason(rows: int, x_dtype: Any, w: NMSparse, transpose: bool) -> str:
    del transpose
    if len(w.shape) != 2:
        return f"a stack of matrices {list(w.shape)}: use jax.vmap or index one"
    if isinstance(w.values, Quantized):
        return f"kept values of {w.values.bits} bits: the kernel takes them in bfloat16"
    if w.values.dtype != jnp.bfloat16:
        return f"values of {w.values.dtype}: the tensor core takes bfloat16"
    run = _groups(w) * w.m
    if run > RUN:
        return f"a {w.n}:{w.m} pattern fills whole bytes only every {run} inputs: the kernel takes at most {RUN}"
    return packing.refusal(rows, x_dtype)


def pack(w: NMSparse) -> Packed:
    """The matrix as the kernels read it: a plane for each kept value of a run, and those of its packed positions."""
    (n_in, out), bits = w.shape, w.index_bits
    assert not isinstance(w.values, Quantized)  # why_not has asked
    groups = _groups(w)
    run, kept = groups * w.m, groups * w.n
    runs, pairs, group = packing.padded(n_in, out, 1, run)
    stored = packing.column_pairs(packing.pad_to(w.values, runs * kept, 2 * pairs)).reshape(runs, kept * pairs)
    size = kept * bits // 8
    places = packing.column_pairs(packing.pad_to(w.indices, runs * size, 2 * pairs)).reshape(runs, size * pairs)
    n, m = w.n, w.m

    def values(j: int, parity: int, planes: Any, sides: Any, constants: Any, spread: Any) -> list[jax.Array]:
        del sides, constants, spread
        first, place = j // m * n, j % m
        total = None
        for i in range(first, first + n):
            value = packing.half_bits(planes[i], parity)
            here = packing.code_of(planes[kept:], i, parity, bits) == packing.word16(place)
            value = jnp.where(here, value, jnp.zeros_like(value))
            total = value if total is None else total | value  # places of a group differ, or values are zero
        assert total is not None
        return [packing.bf16_bits(total)]

    return Packed(
        planes=(*((stored, i) for i in range(kept)), *((places, i) for i in range(size))),
        sides=(),
        constants=(),
        run=run,
        runs=runs,
        pairs=pairs,
        group=group,
        values=values,
        scale=None,
        parts=1,
        step=16,
    )


def _groups(w: NMSparse) -> int:
    """Groups of m inputs whose packed positions fill whole bytes."""
    return 8 // math.gcd(8, w.n * w.index_bits)
