"""The key-value cache: a pytree of fixed shapes whose slots know which token they hold."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from effjax.errors import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of past tokens, per layer, batch row and key head.

    A scan over layers takes keys and values as one array of all layers. A decoder whose layers are written out may hold
    them apart instead, as tuples of one array a layer (`split_layers`): matrix products then read each where it lies,
    where a slice of the whole would be copied for them at every step. All else is as before.

    Slots are filled from 0 in the order of their tokens. `length` and `offset` are apart because eviction empties slots
    but does not change where the text is. A write beyond the last slot is dropped and `length` stays at `slots`, since
    nothing can be raised under `jit`: check sizes beforehand, as `effjax.models.generate` does, or `resize`.

    Attributes:
        k: keys, already rotated, `[layers, batch, kv_heads, slots, head_dim]`, or a tuple of `layers` arrays without
            the first axis.
        v: values, like `k`.
        positions: int32 `[layers, batch, kv_heads, slots]`, the position of the token in each slot, -1 where empty.
        scores: float32, like `positions`: the attention that each token has received so far, summed over queries and
            the query heads of its group.
        length: int32 `[layers, batch, kv_heads]`, filled slots.
        offset: int32 `[batch]`, the true position of the next token.
    """

    k: Any
    v: Any
    positions: Any
    scores: Any
    length: Any
    offset: Any

    @property
    def slots(self) -> int:
        return self.positions.shape[-1]

    @property
    def layers(self) -> int:
        return self.positions.shape[0]

    @property
    def is_split(self) -> bool:
        """Whether keys and values are tuples of one array a layer."""
        return isinstance(self.k, tuple)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays (works on `ShapeDtypeStruct` too)."""
        return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    def replace(self, **changes: Any) -> "KVCache":
        return dataclasses.replace(self, **changes)


def init_cache(
    *,
    layers: int,
    batch: int,
    kv_heads: int,
    slots: int,
    head_dim: int,
    dtype: Any = jnp.float32,
    split: bool = False,
) -> KVCache:
    """An empty cache.

    Args:
        layers: decoder blocks.
        batch: rows.
        kv_heads: key heads.
        slots: tokens that each row and head can hold.
        head_dim: width of a head.
        dtype: of keys and values.
        split: holds keys and values of each layer apart, see `KVCache`.

    Raises:
        ConfigError: a size below 1.

    Example:
        >>> cache = init_cache(layers=2, batch=1, kv_heads=2, slots=16, head_dim=8)
        >>> cache.k.shape, cache.nbytes
        ((2, 1, 2, 16, 8), 4628)
    """
    sizes = {
        "layers": layers,
        "batch": batch,
        "kv_heads": kv_heads,
        "slots": slots,
        "head_dim": head_dim,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"init_cache: {name} must be at least 1, found {size}")
    heads = (layers, batch, kv_heads)

    def vectors() -> Any:
        if split:
            return tuple(jnp.zeros((batch, kv_heads, slots, head_dim), dtype) for _ in range(layers))
        return jnp.zeros((*heads, slots, head_dim), dtype)

    return KVCache(
        k=vectors(),
        v=vectors(),
        positions=jnp.full((*heads, slots), -1, jnp.int32),
        scores=jnp.zeros((*heads, slots), jnp.float32),
        length=jnp.zeros(heads, jnp.int32),
        offset=jnp.zeros((batch,), jnp.int32),
    )


def write_layer(
    cache: KVCache,
    layer: Int[Array, ""],
    k: Float[Array, "batch kv_heads length head_dim"],
    v: Float[Array, "batch kv_heads length head_dim"],
    positions: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
) -> KVCache:
    """Appends new tokens to one layer, in place when the cache is donated or a loop's carry.

    Row `b` takes its first `lengths[b]` tokens; padding is not written, so its slots stay empty.
    """
    batch, heads, new = k.shape[:3]
    step = jax.lax.broadcasted_iota(jnp.int32, (batch, heads, new), 2)
    slot = cache.length[layer][:, :, None] + step
    slot = jnp.where(step < lengths[:, None, None], slot, cache.slots)  # out of range, therefore dropped
    at = (
        layer,
        jax.lax.broadcasted_iota(jnp.int32, slot.shape, 0),
        jax.lax.broadcasted_iota(jnp.int32, slot.shape, 1),
        slot,
    )
    where = jnp.broadcast_to(positions[:, None, :], slot.shape)
    length = jnp.minimum(cache.length[layer] + lengths[:, None], cache.slots)
    return cache.replace(
        k=cache.k.at[at].set(k.astype(cache.k.dtype), mode="drop"),
        v=cache.v.at[at].set(v.astype(cache.v.dtype), mode="drop"),
        positions=cache.positions.at[at].set(where, mode="drop"),
        length=cache.length.at[layer].set(length),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """What one layer of a split cache holds while new tokens pass it.

    Attributes:
        k, v: `[batch, kv_heads, slots, head_dim]`.
        positions: int32 `[batch, kv_heads, slots]`, those of the new tokens included.
        targets: int32 `[batch, kv_heads, length]`, the slot of each new token; `slots` for one that is not kept.
        received: float32 `[batch, kv_heads, slots]`, the attention that the new tokens gave; None before.
    """

    k: Any
    v: Any
    positions: Any
    targets: Any
    received: Any = None

    def write(
        self, k: Float[Array, "batch kv_heads length head_dim"], v: Float[Array, "batch kv_heads length head_dim"]
    ) -> "LayerCache":
        """Keys and values of the new tokens in their slots."""
        at = (
            jax.lax.broadcasted_iota(jnp.int32, self.targets.shape, 0),
            jax.lax.broadcasted_iota(jnp.int32, self.targets.shape, 1),
            self.targets,
        )
        return dataclasses.replace(
            self,
            k=self.k.at[at].set(k.astype(self.k.dtype), mode="drop"),
            v=self.v.at[at].set(v.astype(self.v.dtype), mode="drop"),
        )


def open_layers(
    cache: KVCache, positions: Int[Array, "batch length"], lengths: Int[Array, " batch"]
) -> tuple[KVCache, list[LayerCache]]:
    """A split cache that knows of new tokens, and its layers, ready to take their keys and values.

    Row `b` takes its first `lengths[b]` tokens. What does not depend on keys and values, the slots of the tokens and
    their positions, is written here once for all layers.
    """
    shape = (*cache.length.shape, positions.shape[1])
    step = jax.lax.broadcasted_iota(jnp.int32, shape, 3)
    targets = jnp.where(step < lengths[None, :, None, None], cache.length[..., None] + step, cache.slots)
    at = (*(jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3)), targets)
    where = jnp.broadcast_to(positions[None, :, None, :], shape)
    written = cache.positions.at[at].set(where, mode="drop")
    layers = [
        LayerCache(k=k, v=v, positions=written[i], targets=targets[i])
        for i, (k, v) in enumerate(zip(cache.k, cache.v, strict=True))
    ]
    length = jnp.minimum(cache.length + lengths[None, :, None], cache.slots)
    return cache.replace(positions=written, length=length), layers


def close_layers(cache: KVCache, layers: Sequence[LayerCache]) -> KVCache:
    """The cache that `open_layers` gave, after each of its layers took the new tokens."""
    return cache.replace(
        k=tuple(layer.k for layer in layers),
        v=tuple(layer.v for layer in layers),
        scores=cache.scores + jnp.stack([layer.received for layer in layers]),
    )


def split_layers(cache: KVCache) -> KVCache:
    """The same cache with keys and values of each layer apart.

    Example:
        >>> cache = split_layers(init_cache(layers=2, batch=1, kv_heads=2, slots=16, head_dim=8))
        >>> len(cache.k), cache.k[0].shape
        (2, (1, 2, 16, 8))
    """
    if cache.is_split:
        return cache
    return cache.replace(
        k=tuple(cache.k[i] for i in range(cache.layers)), v=tuple(cache.v[i] for i in range(cache.layers))
    )


def join_layers(cache: KVCache) -> KVCache:
    """The inverse of `split_layers`, for what takes all layers as one array, as `effjax.kv.evict.kv_evict` does."""
    return cache.replace(k=jnp.stack(cache.k), v=jnp.stack(cache.v)) if cache.is_split else cache


def resize(cache: KVCache, slots: int) -> KVCache:
    """The same tokens in `slots` slots: room to go on writing, or unused slots given back.

    Raises:
        ConfigError: `slots` is below 1, or filled slots would be dropped. The latter is seen where lengths are known;
            under `jit`, tokens beyond `slots` are dropped.
    """
    if slots < 1:
        raise ConfigError(f"resize: slots must be at least 1, found {slots}")
    known = isinstance(cache.length, jax.Array) and not isinstance(cache.length, Tracer)
    if slots < cache.slots and known and (longest := int(jnp.max(cache.length))) > slots:
        raise ConfigError(
            f"resize: {longest} slots are filled and {slots} would drop tokens; write slots={longest} or more, or "
            "choose "
            "what to drop with effjax.kv.evict.kv_evict"
        )

    def fit(x: Array, axis: int, empty: float) -> Array:
        kept = jax.lax.slice_in_dim(x, 0, min(slots, cache.slots), axis=axis)
        widths = [(0, 0, 0)] * x.ndim
        widths[axis] = (0, max(slots - cache.slots, 0), 0)
        return jax.lax.pad(kept, jnp.asarray(empty, x.dtype), widths)

    return cache.replace(
        k=jax.tree.map(lambda x: fit(x, -2, 0), cache.k),
        v=jax.tree.map(lambda x: fit(x, -2, 0), cache.v),
        positions=fit(cache.positions, -1, -1),
        scores=fit(cache.scores, -1, 0),
        length=jnp.minimum(cache.length, slots),
    )
