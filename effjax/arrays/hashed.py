"""Weights shared through a hash: every entry of the matrix reads one slot of a small table, with a hashed sign."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt32

from effjax.arrays.base import CompressedArray, Spec, full_spec, register, static
from effjax.hashing.integers import mix


def slots_and_signs(
    seed: jax.Array, rows: jax.Array, columns: int, table_size: int, block: int
) -> tuple[jax.Array, jax.Array]:
    """For entries `rows x columns`: the slot `int32` each reads, and its sign as float32 ±1.

    Entries are hashed in runs of `block` consecutive columns, which land in consecutive slots (ROBE's blocks), so that
    a run is one memory access. The sign is hashed per entry.
    """
    column = jnp.arange(columns, dtype=jnp.uint32)
    run, offset = column // block, column % block
    row_hash = mix(rows.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + seed)[:, None]
    slot = (mix(row_hash ^ (run * jnp.uint32(0x85157AF5))) + offset) % jnp.uint32(table_size)
    sign = mix(row_hash + column * jnp.uint32(0xC2B2AE3D) + jnp.uint32(0x27D4EB2F)) >> 31
    return slot.astype(jnp.int32), 1.0 - 2.0 * sign.astype(jnp.float32)


@register
class Hashed(CompressedArray):
    """`W[i, o] = sign(i, o) * table[h(i, o)]` (HashedNets, Chen et al. 2015; blocks as in ROBE, Desai et al. 2022).

    Attributes:
        table: the shared weights, `float[*L, slots]`, trainable.
        seed: `uint32[*L]`, the hash function of each layer.
        in_features, out_features: the matrix.
        block: consecutive columns that share one hash.
        dtype: dtype of the materialised weight.
    """

    table: Float[Array, "*L slots"]
    seed: UInt32[Array, "*L"]
    in_features: int = static()
    out_features: int = static()
    block: int = static(default=1)
    dtype: np.dtype = static(default=np.dtype("float32"))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.table.shape[:-1], self.in_features, self.out_features)

    def materialize(self) -> jax.Array:
        def dense(table: jax.Array, seed: jax.Array) -> jax.Array:
            return self._read(table, seed, jnp.arange(self.in_features))

        for _ in range(self.table.ndim - 1):
            dense = jax.vmap(dense)
        return dense(self.table, self.seed)

    def tiles(self, size: int) -> tuple[Any, Callable[[Any], jax.Array]]:
        rows = jnp.arange(self.in_features).reshape(-1, size)
        return rows, lambda tile: self._read(self.table, self.seed, tile)

    @property
    def row_multiple(self) -> int:
        return 1

    def _read(self, table: jax.Array, seed: jax.Array, rows: jax.Array) -> jax.Array:
        slot, sign = slots_and_signs(seed, rows, self.out_features, table.shape[-1], self.block)
        return (sign * jnp.take(table.astype(jnp.float32), slot, mode="clip")).astype(self.dtype)

    def logical_spec(self) -> Spec:
        return (*full_spec(jax.typeof(self.table).sharding.spec, self.table.ndim)[:-1], None, None)

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        # Any entry may read any slot: the table is replicated over the matrix axes and follows only the stacked ones.
        lead = spec[:-2]
        return {"table": P(*lead, None), "seed": P(*lead)}
