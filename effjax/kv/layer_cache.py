"""What one layer of a split cache holds while new tokens pass it, and the cache before and after them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.kv.cache import KVCache
from effjax.kv.coded_vectors import CodedVectors
from effjax.kv.held import read_slots, write_slots
from effjax.kv.importance import ATTENTION_RECEIVED, Importance
from effjax.kv.nomad_slots import NomadSlots
from effjax.kv.windowed_vectors import WindowedVectors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """What one layer of a split cache holds while new tokens pass it.

    Attributes:
        k, v: `[batch, kv_heads, slots, head_dim]`, or codes.
        positions: int32 `[batch, kv_heads, slots]`, those of the new tokens included.
        targets: int32 `[batch, kv_heads, length]`, the slot of each new token; `slots` for one that is not kept.
        length: int32 `[batch, kv_heads]`, filled slots, those of the new tokens included.
        received: float32 `[batch, kv_heads, slots]`, what the new tokens gave; None before.
        importance: as of the whole cache.
    """

    k: Any
    v: Any
    positions: Any
    targets: Any
    length: Any
    received: Any = None
    importance: Importance = dataclasses.field(default=ATTENTION_RECEIVED, metadata={"static": True})

    @property
    def sums_inside(self) -> bool:
        """Whether attention to keys as they are held gives what `importance` asks; looked up keys count no pivots."""
        return not (self.importance.counts_pivotal and isinstance(self.k, NomadSlots))

    def write(
        self,
        k: Float[Array, "batch kv_heads length head_dim"],
        v: Float[Array, "batch kv_heads length head_dim"],
        unrotated: Float[Array, "batch kv_heads length head_dim"],
    ) -> "LayerCache":
        """Keys and values of the new tokens in their slots; a coding may take keys as they are before the rotation."""
        at = (
            jax.lax.broadcasted_iota(jnp.int32, self.targets.shape, 0),
            jax.lax.broadcasted_iota(jnp.int32, self.targets.shape, 1),
            self.targets,
        )
        turns = isinstance(self.k, CodedVectors) and self.k.frequencies is not None
        return dataclasses.replace(
            self, k=write_slots(self.k, at, unrotated if turns else k), v=write_slots(self.v, at, v)
        )

    def read(self) -> tuple[Array, Array]:
        """Rotated keys and values in all slots, `[batch, kv_heads, slots, head_dim]`; decoded where they are codes."""
        return read_slots(self.k, self.positions), read_slots(self.v, self.positions)

    def operands(self) -> tuple[Any, Any]:
        """The same for `effjax.models.attention.attend_to_filled`, which decodes codes piece by piece."""

        def one(held: Any) -> Any:
            return held.operand(self.positions) if isinstance(held, CodedVectors | WindowedVectors) else held

        return one(self.k), one(self.v)


def open_layers(
    cache: KVCache, positions: Int[Array, "batch length"], lengths: Int[Array, " batch"]
) -> tuple[KVCache, list[LayerCache]]:
    """A split cache that knows of new tokens, and its layers, ready to take their keys and values.

    Row `b` takes its first `lengths[b]` tokens. What does not depend on keys and values, the slots of the tokens and
    their positions, is written here once for all layers.
    """
    if not cache.is_even:
        return _open_uneven(cache, positions, lengths)
    shape = (*cache.length.shape, positions.shape[1])
    step = jax.lax.broadcasted_iota(jnp.int32, shape, 3)
    targets = jnp.where(step < lengths[None, :, None, None], cache.length[..., None] + step, cache.slots)
    at = (*(jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3)), targets)
    where = jnp.broadcast_to(positions[None, :, None, :], shape)
    written = cache.positions.at[at].set(where, mode="drop")
    length = jnp.minimum(cache.length + lengths[None, :, None], cache.slots)
    layers = [
        LayerCache(k=k, v=v, positions=written[i], targets=targets[i], length=length[i], importance=cache.importance)
        for i, (k, v) in enumerate(zip(cache.k, cache.v, strict=True))
    ]
    return cache.replace(positions=written, length=length), layers


def _open_uneven(
    cache: KVCache,
    positions: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
) -> tuple[KVCache, list[LayerCache]]:
    """`open_layers` where each layer has its own number of slots."""
    shape = (*cache.length.shape[1:], positions.shape[1])
    step = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    where = jnp.broadcast_to(positions[:, None, :], shape)
    most = jnp.asarray(cache.layer_slots, jnp.int32)[:, None, None]
    length = jnp.minimum(cache.length + lengths[None, :, None], most)
    layers = []
    for i, slots in enumerate(cache.layer_slots):
        targets = jnp.where(step < lengths[:, None, None], cache.length[i][..., None] + step, slots)
        at = (*(jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2)), targets)
        written = cache.positions[i].at[at].set(where, mode="drop")
        layers.append(
            LayerCache(
                k=cache.k[i],
                v=cache.v[i],
                positions=written,
                targets=targets,
                length=length[i],
                importance=cache.importance,
            )
        )
    return cache.replace(positions=tuple(layer.positions for layer in layers), length=length), layers


def close_layers(cache: KVCache, layers: Sequence[LayerCache], lengths: Int[Array, " batch"]) -> KVCache:
    """The cache that `open_layers` gave, after each of its layers took the new tokens."""
    if cache.is_even:
        scores = cache.importance.add(cache.scores, jnp.stack([layer.received for layer in layers]), lengths)
    else:
        scores = tuple(
            cache.importance.add(old, layer.received, lengths) for old, layer in zip(cache.scores, layers, strict=True)
        )
    return cache.replace(k=tuple(layer.k for layer in layers), v=tuple(layer.v for layer in layers), scores=scores)
