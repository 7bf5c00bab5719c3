"""Uniformly quantized weights: packed integer codes, a scale and optionally a zero point per group of inputs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer, UInt8

from effjax.arrays.base import CompressedArray, Spec, cut_rows, register, static
from effjax.arrays.packing import pack, packed_size, unpack
from effjax.errors import LeafError


def centre(bits: int) -> float:
    """The zero point of a symmetric grid: `2**(bits-1)`, and 1/2 for one bit, whose two levels are ±scale/2."""
    return 0.5 if bits == 1 else float(2 ** (bits - 1))


@register
class Quantized(CompressedArray):
    """`W[i, o] = scales[g(i), o] * (code[i, o] - zero[g(i), o])` with groups `g` of consecutive inputs.

    Attributes:
        codes: the packed codes, `uint8[*L, ceil(in * bits / 8), out]` (see `effjax.arrays.packing`).
        scales: `float[*L, groups, out]`; one group is per-channel quantization.
        zeros: packed integer zero points, `uint8[*L, ceil(groups * bits / 8), out]`; or real ones,
            `float[*L, groups, out]` (HQQ), which formats with integer zero points cannot hold; or None for a symmetric
            grid.
        bits: 1 to 8.
        pad: codes that fill the last byte of a column, so that `in` follows from the arrays.
        dtype: dtype of the materialised weight.

    Example:
        >>> import jax.numpy as jnp
        >>> codes = jnp.arange(8, dtype=jnp.uint8).reshape(8, 1)
        >>> w = Quantized.from_codes(codes, jnp.ones((1, 1)), None, bits=4, dtype=jnp.float32)
        >>> w.materialize().ravel().tolist()
        [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0]
    """

    codes: UInt8[Array, "*L bytes out"]
    scales: Float[Array, "*L groups out"]
    zeros: UInt8[Array, "*L zero_bytes out"] | Float[Array, "*L groups out"] | None
    bits: int = static()
    pad: int = static(default=0)
    dtype: np.dtype = static(default=np.dtype("float32"))

    @classmethod
    def from_codes(
        cls,
        codes: Integer[Array, "*L in out"],
        scales: Float[Array, "*L groups out"],
        zeros: Integer[Array, "*L groups out"] | Float[Array, "*L groups out"] | None,
        *,
        bits: int,
        dtype: Any,
    ) -> "Quantized":
        """Packs codes in `[0, 2**bits)` and integer zero points in the same range; floating zero points stay as given.

        Raises:
            LeafError: bits outside 1–8, groups that do not divide the inputs, or zero points of another shape than the
                scales.
        """
        n, groups = codes.shape[-2], scales.shape[-2]
        if not 1 <= bits <= 8:
            raise LeafError(f"bits={bits}: a Quantized array holds 1 to 8 bits")
        if n % groups:
            raise LeafError(f"{groups} groups of scales do not divide {n} inputs")
        if zeros is not None and zeros.shape != scales.shape:
            raise LeafError(f"zero points {list(zeros.shape)} for scales {list(scales.shape)}: one a scale is needed")
        return cls(
            codes=pack(codes, bits),
            scales=scales,
            zeros=zeros if zeros is None or _is_real(zeros) else pack(zeros, bits),
            bits=bits,
            pad=packed_size(n, bits) * 8 // bits - n,
            dtype=np.dtype(dtype),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, size, out = self.codes.shape
        return (*lead, size * 8 // self.bits - self.pad, out)

    @property
    def group_size(self) -> int:
        return self.shape[-2] // self.scales.shape[-2]

    def zero_points(self) -> jax.Array | float:
        """Zero points, unpacked to `float32[*L, groups, out]`; one number for a symmetric grid."""
        if self.zeros is None:
            return centre(self.bits)
        if _is_real(self.zeros):
            return self.zeros.astype(jnp.float32)
        return unpack(self.zeros, self.bits, self.scales.shape[-2]).astype(jnp.float32)

    def materialize(self) -> jax.Array:
        return _dequantize(unpack(self.codes, self.bits, self.shape[-2]), self.scales, self.zero_points(), self.dtype)

    def tiles(self, size: int) -> tuple[Any, Callable[[Any], jax.Array]]:
        count = self.shape[-2] // size
        zeros = self.zero_points()
        codes = cut_rows(self.codes, count)
        if self.scales.shape[-2] == 1:
            return codes, lambda tile: _dequantize(unpack(tile, self.bits, size), self.scales, zeros, self.dtype)

        def dense(tile: tuple[jax.Array, jax.Array, jax.Array | float]) -> jax.Array:
            codes, scales, zeros = tile
            return _dequantize(unpack(codes, self.bits, size), scales, zeros, self.dtype)

        scales = cut_rows(self.scales, count)
        if isinstance(zeros, jax.Array):
            return (codes, scales, cut_rows(zeros, count)), dense
        return (codes, scales), lambda tile: dense((*tile, zeros))

    @property
    def row_multiple(self) -> int:
        group_size = self.group_size
        if group_size == self.shape[-2]:  # one group: any run of whole bytes will do
            return 8
        return math.lcm(8, group_size)

    def columns(self, ids: jax.Array) -> "Quantized":
        return jax.tree.map(lambda field: jnp.take(field, ids, axis=-1), self)

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        *lead, rows, out = spec
        groups = self.scales.shape[-2]
        unpacked = self.zeros is None or _is_real(self.zeros)
        zeros_fill_bytes = unpacked or groups == 1 or groups * self.bits % 8 == 0
        if self.shape[-2] * self.bits % 8 or not zeros_fill_bytes:
            rows = None
        grouped = P(*lead, rows if groups > 1 else None, out)
        return {"codes": P(*lead, rows, out), "scales": grouped, "zeros": None if self.zeros is None else grouped}


def _is_real(zeros: Any) -> bool:
    """Whether zero points are stored as floating numbers, one a group, instead of packed codes."""
    return jnp.issubdtype(zeros.dtype, jnp.floating)


def _dequantize(codes: jax.Array, scales: jax.Array, zeros: jax.Array | float, dtype: np.dtype) -> jax.Array:
    """`scales * (codes - zeros)` in float32, one scale a group of rows, cast to `dtype` at the end."""
    *lead, n, out = codes.shape
    groups = scales.shape[-2]
    shape = (*lead, groups, n // groups, out)
    across = (*range(len(lead) + 1), len(lead) + 2)  # [*L, groups, out] over the rows of a group

    def spread(x: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(lax.convert_element_type(x, jnp.float32), shape, across)

    values = lax.convert_element_type(lax.reshape(codes, shape), jnp.float32)
    values = lax.sub(values, spread(zeros) if isinstance(zeros, jax.Array) else lax.full(shape, zeros, jnp.float32))
    values = lax.mul(values, spread(scales))
    return lax.convert_element_type(lax.reshape(values, (*lead, n, out)), dtype)
