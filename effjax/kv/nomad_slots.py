"""The keys of one layer of a cache as NoMAD holds them, and the codebooks of all layers."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.arrays.base import nbytes
from effjax.errors import ConfigError
from effjax.kv.coding import At
from effjax.kv.nomad import BLOCK, from_blocks, nearest, to_blocks
from effjax.kv.nomad_attention import NomadKeys, append_key, decoded_keys, init_keys, nomad_attention, take_keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NomadLayers:
    """The codebooks of all layers, and how logits are made of them.

    `effjax.models.decoder.new_cache(..., coders=layers)` makes a cache whose keys are held so; values stay as they are.

    Attributes:
        books: `[kv_heads, subs, 16, d_sub]` of each layer.
        eight_bits: tables are brought to 8 bits, as in decoding; False keeps them in float32 (`apply_nomad` alone).
        recent: a query reads the keys of its own block of 32 as they are, until that is full, as in decoding; False
            codes every key, its own too (`apply_nomad` alone).
    """

    books: tuple[Any, ...]
    eight_bits: bool = dataclasses.field(default=True, metadata={"static": True})
    recent: bool = dataclasses.field(default=True, metadata={"static": True})

    rotated = True
    exact = 0

    @property
    def layers(self) -> int:
        return len(self.books)

    @property
    def nbytes(self) -> int:
        """Bytes of all codebooks."""
        return nbytes(self.books)

    def bits_per_channel(self, shape: tuple[int, ...], *, tables: bool = True) -> float:
        """Bits of a coded number of a key: `4 / d_sub`; see `effjax.kv.coders.KVCoders.bits_per_channel`."""
        kv_heads, subs, entries, d_sub = self.books[0].shape
        numbers = shape[-3] * shape[-2] * shape[-1]
        return 4 / d_sub + (32 * kv_heads * subs * entries * d_sub / numbers if tables else 0)

    def empty_keys(self, layer: int, shape: tuple[int, int, int, int], dtype: Any, frequencies: Any) -> "NomadSlots":
        """No key in slots for `shape` `[batch, kv_heads, slots, head_dim]`; codebooks are copied, see `empty_slots`.

        Raises:
            ConfigError: the codebooks are of other heads.
        """
        del frequencies
        batch, kv_heads, slots, head_dim = shape
        books = jnp.array(self.books[layer], copy=True)
        if books.shape[0] != kv_heads:
            raise ConfigError(
                f"NoMAD: the codebooks of layer {layer} are of {books.shape[0]} key heads, the cache has {kv_heads}; "
                "learn them with learn_layers on this model"
            )
        keys = init_keys(batch=batch, slots=slots, head_dim=head_dim, books=books, dtype=dtype)
        return NomadSlots(keys=keys, books=books, slots=slots)

    def empty_values(self, layer: int, shape: tuple[int, int, int, int], dtype: Any) -> Array:
        """Values are held as they are."""
        del layer
        return jnp.zeros(shape, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NomadSlots:
    """The keys of one layer; stands in a split `KVCache` where else an array `[batch, kv_heads, slots, head_dim]` does.

    Attributes:
        keys: codes in blocks of 32, and the keys of the last block as they are.
        books: of this layer.
        slots: of the cache; blocks are whole, so there may be room for a few more.
    """

    keys: NomadKeys
    books: Any
    slots: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        batch, kv_heads, _, head_dim = self.keys.recent.shape
        return batch, kv_heads, self.slots, head_dim

    @property
    def dtype(self) -> Any:
        return self.keys.recent.dtype

    def write(self, at: At, x: Float[Array, "batch kv_heads length head_dim"]) -> Self:
        """New keys, after rotation, in the slots behind those that are filled; a slot out of range is dropped."""
        row, head, slot = at
        if x.shape[2] == 1:
            free = jnp.where(slot < self.slots, slot, self.keys.slots)[..., 0]
            return dataclasses.replace(self, keys=append_key(self.keys, x[:, :, 0], free, self.books))
        codes = from_blocks(self.keys.codes).at[row, head, slot].set(nearest(x, self.books), mode="drop")
        # Of several keys with one place among the recent ones the newest counts; a scatter has no order of its own.
        newest = jnp.max(jnp.where(slot < self.slots, slot, -1), axis=-1, keepdims=True)
        place = jnp.where((slot < self.slots) & (slot > newest - BLOCK), slot % BLOCK, BLOCK)
        recent = self.keys.recent.at[row, head, place].set(x.astype(self.dtype), mode="drop")
        return dataclasses.replace(self, keys=NomadKeys(codes=to_blocks(codes), recent=recent))

    def read(self, positions: Int[Array, "batch kv_heads slots"]) -> Float[Array, "batch kv_heads slots head_dim"]:
        """The keys that attention works with: centres, and the exact last keys."""
        lengths = jnp.sum(positions >= 0, axis=-1, dtype=jnp.int32)
        return decoded_keys(self.keys, lengths, self.books)[:, :, : self.slots].astype(self.dtype)

    def take(
        self,
        order: Int[Array, "batch kv_heads kept"],
        filled: Bool[Array, "batch kv_heads kept"],
        before: Int[Array, "batch kv_heads"],
        slots: int,
    ) -> Self:
        """The keys of these slots, filled ones first, in a cache of `slots` slots that held `before`."""
        kept = jnp.sum(filled, axis=-1, dtype=jnp.int32)
        keys = take_keys(self.keys, order, before, kept, self.books)
        return dataclasses.replace(self, keys=keys, slots=order.shape[-1]).resized(slots)

    def resized(self, slots: int) -> Self:
        """The same keys with room for `slots`."""
        blocks = -(-slots // BLOCK)
        codes = self.keys.codes[:, :, :blocks]
        codes = jnp.pad(codes, [(0, 0), (0, 0), (0, blocks - codes.shape[2]), (0, 0), (0, 0)])
        return dataclasses.replace(self, keys=dataclasses.replace(self.keys, codes=codes), slots=slots)

    def attend(
        self,
        q: Float[Array, "batch kv_heads group head_dim"],
        v: Float[Array, "batch kv_heads slots head_dim"],
        length: Int[Array, "batch kv_heads"],
        asked: Float[Array, " batch"],
    ) -> tuple[Float[Array, "batch kv_heads group head_dim"], Float[Array, "batch kv_heads slots"]]:
        """As `effjax.ops.decode_attention`, by look-ups."""
        y, received = nomad_attention(q, self.keys, v, length, self.books, with_received=True)
        assert received is not None
        return y, received * asked[:, None, None]
