"""Weights that many leaves read from one table: every entry has a place in the model, a slot, a sign and a scale."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32, UInt32

from effjax.arrays.base import CompressedArray, Spec, full_spec, register, static
from effjax.arrays.view import View
from effjax.errors import LeafError
from effjax.hashing.integers import mix


def fold_slots(seed: jax.Array, place: jax.Array, slots: int) -> jax.Array:
    """Random folding (STABLE-RPS): runs of `slots` consecutive places, each turned by a hashed amount.

    A run covers every slot once, so slots are read by equally many places, up to one, and with as many slots as places
    the map is a bijection.

    Args:
        seed: `uint32` of the model.
        place: `uint32`, the position among all shared weights of the model.
        slots: size of the table, below 2^31.
    """
    size = jnp.uint32(slots)
    return (mix(mix(seed) ^ (place // size)) % size + place % size) % size


def tile_slots(seed: jax.Array, start: jax.Array, entry: jax.Array, slots: int, block: int) -> jax.Array:
    """Tiles of `block` consecutive entries of a leaf, each at a hashed place inside the table (ROAST).

    Args:
        seed: `uint32` of the model.
        start: `uint32`, the place of the leaf's first entry, which tells its tiles from those of other leaves.
        entry: `uint32`, the position inside the leaf.
        slots: size of the table, at least `block`.
        block: length of a tile.
    """
    tile = mix(mix(seed + start * jnp.uint32(0x9E3779B1)) ^ (entry // block * jnp.uint32(0x85157AF5)))
    return tile % jnp.uint32(slots - block + 1) + entry % block


def place_signs(seed: jax.Array, place: jax.Array) -> jax.Array:
    """A hashed ±1 for every place, float32."""
    bit = mix(mix(seed + jnp.uint32(0x27D4EB2F)) ^ (place * jnp.uint32(0xC2B2AE3D))) >> 31
    return 1.0 - 2.0 * bit.astype(jnp.float32)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """`2**exponent`, float32 and exact, for exponents of -126 to 127."""
    return jax.lax.bitcast_convert_type((exponent.astype(jnp.int32) + 127) << 23, jnp.float32)


@register
class Shared(CompressedArray):
    """`W[i, o] = sign(p) * 2**exponent * table[h(p)]` where `p = start + i * out + o` is the place in the whole model.

    The slots are those of `tile_slots` with a `block`, those of `fold_slots` without.

    Attributes:
        table: the weights of the model, `float[*L, slots]`, trainable; None while the leaf waits in a `SharedParams`,
            where the table stands once for all leaves.
        seed: `uint32[*L]`, the hash function of the model.
        start: `uint32[*L]`, the place of each matrix's first entry.
        exponent: `int32[*L]`, the scale of each matrix against the table. A power of two, so that dividing by it and
            multiplying again gives the same bits; an integer, so that it is frozen.
        in_features, out_features: the matrix.
        block: length of ROAST's tiles; None for the random folding of STABLE-RPS.
        dtype: dtype of the materialised weight.
    """

    table: Float[Array, "*L slots"] | None = None
    seed: UInt32[Array, "*L"]
    start: UInt32[Array, "*L"]
    exponent: Int32[Array, "*L"]
    in_features: int = static()
    out_features: int = static()
    block: int | None = static(default=None)
    dtype: np.dtype = static(default=np.dtype("float32"))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.seed.shape, self.in_features, self.out_features)

    def materialize(self) -> jax.Array:
        if self.table is None:
            raise LeafError(f"{self} waits for its table: read it through effjax.sketch.expand(shared)")

        def dense(w: Shared) -> jax.Array:
            return w._read(jnp.arange(w.in_features))

        for _ in range(self.ndim - 2):
            dense = jax.vmap(dense)
        return dense(self)

    def slots_and_factors(self, rows: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
        """For entries `rows x out` of one matrix: the slot `int32` each reads, and the float32 factor it reads it with.

        Args:
            rows: which inputs.
            slots: size of the table, which the leaf need not hold.
        """
        columns = jnp.arange(self.out_features, dtype=jnp.uint32)
        entry = rows.astype(jnp.uint32)[:, None] * jnp.uint32(self.out_features) + columns
        place = self.start + entry
        if self.block is None:
            slot = fold_slots(self.seed, place, slots)
        else:
            slot = tile_slots(self.seed, self.start, entry, slots, self.block)
        return slot.astype(jnp.int32), place_signs(self.seed, place) * power_of_two(self.exponent)

    def tiles(self, size: int) -> tuple[Any, Callable[[Any], jax.Array]] | None:
        if self.table is None:
            return None
        return jnp.arange(self.in_features).reshape(-1, size), self._read

    @property
    def row_multiple(self) -> int:
        return 1

    def _read(self, rows: jax.Array) -> jax.Array:
        assert self.table is not None  # materialize and tiles have asked
        slot, factor = self.slots_and_factors(rows, self.table.shape[-1])
        return (factor * jnp.take(self.table.astype(jnp.float32), slot, mode="clip")).astype(self.dtype)

    def logical_spec(self) -> Spec:
        return (*full_spec(jax.typeof(self.seed).sharding.spec, self.seed.ndim), None, None)

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        # Any entry may read any slot: the table is replicated over the matrix axes and follows only the stacked ones.
        lead = spec[:-2]
        fields = {name: P(*lead) for name in ("seed", "start", "exponent")}
        return fields if self.table is None else {"table": P(*lead, None), **fields}


def shared_array(leaf: Any) -> Shared | None:
    """The `Shared` array of a leaf, also inside a view; None where the leaf is another one."""
    inner = leaf.array if isinstance(leaf, View) else leaf
    return inner if isinstance(inner, Shared) else None


def with_table(leaf: Any, table: jax.Array) -> Any:
    """A leaf that reads `table`, of one dimension; a leaf that is no `Shared` array as it is."""
    array = shared_array(leaf)
    if array is None:
        return leaf
    array = array.replace(table=jnp.broadcast_to(table, (*array.seed.shape, *table.shape)))
    return leaf.replace(array=array) if isinstance(leaf, View) else array


def with_any_table(leaf: Any) -> Any:
    """A leaf whose table is elsewhere with one of zeros, to see whether its other fields fit; others as they are."""
    array = shared_array(leaf)
    return leaf if array is None or array.table is not None else with_table(leaf, jnp.zeros(array.block or 1))
