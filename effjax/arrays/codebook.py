"""Weights that are indices into small tables of values: non-uniform quantization, NF4, lookup-table sketches."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer, UInt8

from effjax.arrays.base import CompressedArray, Spec, cut_rows, register, static
from effjax.arrays.packing import pack, packed_size, unpack
from effjax.errors import LeafError


@register
class Codebook(CompressedArray):
    """`W[i, o] = scales[s(i), o] / global_scale * tables[g(i), c(o), code[i, o]]`, in groups of inputs and outputs.

    Attributes:
        codes: packed codes, `uint8[*L, ceil(in * bits / 8), out]`.
        tables: `float[*L, in_groups, out_groups, entries]` with 2 to 256 entries; `out_groups = out` is a table a
            column (LeanQuant, SqueezeLLM), `in_groups = out_groups = 1` one table for the matrix (NF4).
        scales: `float[*L, groups, out]`, or None where the tables hold the values themselves. Eight-bit floats too.
        bits: bits of a code, at least `log2(entries)`.
        pad: codes that fill the last byte of a column.
        dtype: dtype of the materialised weight.
        global_scale: `float32[*L, 1, 1]` that `scales` are divided by (the second level of NVFP4), or None.

    Example:
        >>> import jax.numpy as jnp
        >>> tables = jnp.array([-1.0, 0.0, 2.0]).reshape(1, 1, 3)
        >>> w = Codebook.from_codes(jnp.array([[2], [0], [1]]), tables, dtype=jnp.float32)
        >>> w.materialize().ravel().tolist(), w.bits
        ([2.0, -1.0, 0.0], 2)
    """

    codes: UInt8[Array, "*L bytes out"]
    tables: Float[Array, "*L in_groups out_groups entries"]
    scales: Float[Array, "*L groups out"] | None
    bits: int = static()
    pad: int = static(default=0)
    dtype: np.dtype = static(default=np.dtype("float32"))
    global_scale: Float[Array, "*L 1 1"] | None = None

    @classmethod
    def from_codes(
        cls,
        codes: Integer[Array, "*L in out"],
        tables: Float[Array, "*L in_groups out_groups entries"],
        scales: Float[Array, "*L groups out"] | None = None,
        *,
        dtype: Any,
        global_scale: Float[Array, "*L 1 1"] | None = None,
    ) -> "Codebook":
        """Packs codes in `[0, entries)` with as many bits as the table needs.

        Raises:
            LeafError: a table of fewer than 2 or more than 256 entries, or groups that do not divide the matrix.
        """
        *_, n, out = codes.shape
        *_, in_groups, out_groups, entries = tables.shape
        if not 2 <= entries <= 256:
            raise LeafError(f"a codebook of {entries} entries: 2 to 256 can be indexed with 1 to 8 bits")
        if n % in_groups or out % out_groups:
            raise LeafError(f"{in_groups}x{out_groups} tables do not divide a matrix of {n}x{out}")
        if scales is not None and n % scales.shape[-2]:
            raise LeafError(f"{scales.shape[-2]} groups of scales do not divide {n} inputs")
        bits = (entries - 1).bit_length()
        pad = packed_size(n, bits) * 8 // bits - n
        return cls(
            codes=pack(codes, bits),
            tables=tables,
            scales=scales,
            bits=bits,
            pad=pad,
            dtype=np.dtype(dtype),
            global_scale=global_scale,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, size, out = self.codes.shape
        return (*lead, size * 8 // self.bits - self.pad, out)

    def materialize(self) -> jax.Array:
        return look_up(unpack(self.codes, self.bits, self.shape[-2]), self.tables, self.float_scales(), self.dtype)

    def float_scales(self) -> jax.Array | None:
        """Scales as they multiply the table's values, `float32[*L, groups, out]`, or None."""
        if self.scales is None:
            return None
        scales = self.scales.astype(jnp.float32)
        return scales if self.global_scale is None else scales / self.global_scale

    def tiles(self, size: int) -> tuple[Any, Callable[[Any], jax.Array]]:
        count = self.shape[-2] // size
        grouped_tables = self.tables.shape[-3] > 1
        parts, whole_scales = {"codes": cut_rows(self.codes, count)}, self.float_scales()
        if grouped_tables:
            parts["tables"] = cut_rows(self.tables, count)
        if whole_scales is not None and whole_scales.shape[-2] > 1:
            parts["scales"] = cut_rows(whole_scales, count)

        def dense(tile: dict[str, jax.Array]) -> jax.Array:
            tables, scales = tile.get("tables", self.tables), tile.get("scales", whole_scales)
            return look_up(unpack(tile["codes"], self.bits, size), tables, scales, self.dtype)

        return parts, dense

    @property
    def row_multiple(self) -> int:
        counts = (self.tables.shape[-3], 1 if self.scales is None else self.scales.shape[-2])
        n = self.shape[-2]
        return math.lcm(8, *(n // count for count in counts if count > 1))

    def columns(self, ids: jax.Array) -> "Codebook":
        out, out_groups = self.codes.shape[-1], self.tables.shape[-2]
        tables = self.tables if out_groups == 1 else jnp.take(self.tables, ids // (out // out_groups), axis=-2)
        scales = None if self.scales is None else jnp.take(self.scales, ids, axis=-1)
        return self.replace(codes=jnp.take(self.codes, ids, axis=-1), tables=tables, scales=scales)

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        *lead, rows, out = spec
        rows = None if self.shape[-2] * self.bits % 8 else rows
        in_groups, out_groups, _ = self.tables.shape[-3:]
        tables = P(*lead, rows if in_groups > 1 else None, out if out_groups > 1 else None, None)
        scales = None if self.scales is None else P(*lead, rows if self.scales.shape[-2] > 1 else None, out)
        top = None if self.global_scale is None else P(*lead, None, None)
        return {"codes": P(*lead, rows, out), "tables": tables, "scales": scales, "global_scale": top}


def look_up(codes: jax.Array, tables: jax.Array, scales: jax.Array | None, dtype: np.dtype) -> jax.Array:
    """Table values of all codes, times their group's scale, in float32 and cast to `dtype` at the end."""
    *lead, n, out = codes.shape
    *_, in_groups, out_groups, entries = tables.shape
    blocks = codes.reshape(*lead, in_groups, n // in_groups, out_groups, out // out_groups).astype(jnp.int32)
    blocks = jnp.swapaxes(blocks, -3, -2).reshape(*lead, in_groups, out_groups, -1)
    values = jnp.take_along_axis(tables.astype(jnp.float32), blocks, axis=-1, mode="clip")
    values = values.reshape(*lead, in_groups, out_groups, n // in_groups, out // out_groups)
    values = jnp.swapaxes(values, -3, -2).reshape(*lead, n, out)
    if scales is not None:
        groups = scales.shape[-2]
        scaled = values.reshape(*lead, groups, n // groups, out) * scales.astype(jnp.float32)[..., :, None, :]
        values = scaled.reshape(*lead, n, out)
    return values.astype(dtype)
