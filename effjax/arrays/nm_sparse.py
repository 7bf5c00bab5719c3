"""n:m sparse weights: of every m consecutive inputs only n values are stored, with their packed positions."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, UInt8

from effjax.arrays.base import CompressedArray, Spec, cut_rows, materialize, register, static
from effjax.arrays.packing import pack, unpack
from effjax.arrays.quantized import Quantized
from effjax.errors import LeafError


@register
class NMSparse(CompressedArray):
    """n of every m consecutive inputs of a column; the rest is zero.

    Attributes:
        values: `float[*L, in / m * n, out]`, or those quantized (`effjax.quantize.quantize_kept`).
        indices: positions inside the group of m, packed `ceil(log2 m)` bits each: `uint8[*L, bytes, out]`.
        n, m: the pattern.
        dtype: dtype of the materialised weight.
    """

    values: Float[Array, "*L kept out"] | Quantized
    indices: UInt8[Array, "*L bytes out"]
    n: int = static()
    m: int = static()
    dtype: np.dtype = static(default=np.dtype("float32"))

    @classmethod
    def from_dense(cls, w: Float[Array, "*L in out"], mask: Bool[Array, "*L in out"], *, n: int, m: int) -> "NMSparse":
        """Keeps the entries of `w` where `mask` is true.

        Where the mask keeps fewer than n of a group, zeros fill up. A mask that keeps more cannot be represented:
        `pack_mask` checks that before it calls this.

        Raises:
            LeafError: m does not divide the inputs, or n and m make no pattern.
        """
        *lead, rows, out = w.shape
        if not 1 <= n < m <= 256:
            raise LeafError(f"{n}:{m} is no pattern: 1 <= n < m <= 256")
        if rows % m:
            raise LeafError(f"a {n}:{m} pattern needs inputs divisible by {m}, the matrix has {rows}")
        groups = jnp.where(mask, w, 0).reshape(*lead, rows // m, m, out)
        kept = mask.reshape(groups.shape)
        # Kept positions first, in their order: a stable sort of "dropped" along the group.
        order = jnp.argsort(~kept, axis=-2, stable=True)[..., :n, :]
        values = jnp.take_along_axis(groups, order, axis=-2).reshape(*lead, rows // m * n, out)
        indices = pack(order.reshape(*lead, rows // m * n, out), (m - 1).bit_length())
        return cls(values=values, indices=indices, n=n, m=m, dtype=np.dtype(w.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, kept, out = self.values.shape
        return (*lead, kept // self.n * self.m, out)

    @property
    def index_bits(self) -> int:
        return (self.m - 1).bit_length()

    def materialize(self) -> jax.Array:
        return self._scatter(materialize(self.values), unpack(self.indices, self.index_bits, self.values.shape[-2]))

    def tiles(self, size: int) -> tuple[Any, Callable[[Any], jax.Array]]:
        count, kept = self.shape[-2] // size, size // self.m * self.n
        if isinstance(self.values, Quantized):
            values, dense_values = self.values.tiles(kept)
        else:
            values, dense_values = cut_rows(self.values, count), lambda tile: tile

        def dense(tile: tuple[Any, jax.Array]) -> jax.Array:
            values, indices = tile
            return self._scatter(dense_values(values), unpack(indices, self.index_bits, kept))

        return (values, cut_rows(self.indices, count)), dense

    @property
    def row_multiple(self) -> int:
        # Eight groups: their indices fill whole bytes whatever n and the index width are.
        kept = self.values.row_multiple if isinstance(self.values, Quantized) else 1
        return self.m * math.lcm(8, kept // math.gcd(kept, self.n))

    def columns(self, ids: jax.Array) -> "NMSparse":
        return jax.tree.map(lambda field: jnp.take(field, ids, axis=-1), self)

    def _scatter(self, values: jax.Array, indices: jax.Array) -> jax.Array:
        *lead, kept, out = values.shape
        grouped = (*lead, kept // self.n, self.n, 1, out)
        hit = indices.reshape(grouped) == jnp.arange(self.m, dtype=jnp.uint8)[:, None]
        # One-hot over the m positions: no scatter, so it vectorises and partitions on every backend.
        dense = jnp.where(hit, values.reshape(grouped), 0).sum(axis=-3)
        return dense.reshape(*lead, kept // self.n * self.m, out).astype(self.dtype)

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        *lead, rows, out = spec
        rows = None if self.values.shape[-2] * self.index_bits % 8 else rows
        values: Any = P(*lead, rows, out)
        if isinstance(self.values, Quantized):
            values = self.values.replace(**self.values.field_specs((*lead, rows, out)))
        return {"values": values, "indices": P(*lead, rows, out)}

    def logical_spec(self) -> Spec:
        return self.values.logical_spec() if isinstance(self.values, Quantized) else super().logical_spec()

    def astype(self, dtype: Any) -> "NMSparse":
        values = self.values.astype(dtype) if isinstance(self.values, Quantized) else self.values
        return self.replace(values=values, dtype=np.dtype(dtype))
