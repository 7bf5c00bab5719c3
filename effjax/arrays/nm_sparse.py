"""n:m sparse weights: of every m consecutive inputs only n values are stored, with their packed positions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, UInt8

from effjax.arrays.base import CompressedArray, Spec, cut_rows, register, static
from effjax.arrays.packing import pack, unpack
from effjax.errors import LeafError


@register
class NMSparse(CompressedArray):
    """n of every m consecutive inputs of a column; the rest is zero.

    Attributes:
        values: `float[*L, in / m * n, out]`.
        indices: positions inside the group of m, packed `ceil(log2 m)` bits each: `uint8[*L, bytes, out]`.
        n, m: the pattern.
        dtype: dtype of the materialised weight.
    """

    values: Float[Array, "*L kept out"]
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
        return self._scatter(self.values, unpack(self.indices, self.index_bits, self.values.shape[-2]))

    def tiles(self, size: int) -> tuple[Any, Callable[[Any], jax.Array]]:
        count, kept = self.shape[-2] // size, size // self.m * self.n

        def dense(tile: tuple[jax.Array, jax.Array]) -> jax.Array:
            values, indices = tile
            return self._scatter(values, unpack(indices, self.index_bits, kept))

        return (cut_rows(self.values, count), cut_rows(self.indices, count)), dense

    @property
    def row_multiple(self) -> int:
        return 8 * self.m  # eight groups: their indices fill whole bytes whatever n and the index width are

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
        return {"values": P(*lead, rows, out), "indices": P(*lead, rows, out)}
