"""The key-value cache: a pytree of fixed shapes whose slots know which token they hold."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from effjax.arrays.base import nbytes
from effjax.errors import ConfigError
from effjax.kv.coders import KVCoders, check_layers
from effjax.kv.held import is_coded, resize_slots
from effjax.kv.importance import ATTENTION_RECEIVED, Importance
from effjax.kv.nomad_slots import NomadLayers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of past tokens, per layer, batch row and key head.

    A scan over layers takes keys and values as one array of all layers. A decoder whose layers are written out may hold
    them apart instead, as tuples of one array a layer (`split_layers`): matrix products then read each where it lies,
    where a slice of the whole would be copied for them at every step. All else is as before; only where layers have
    different numbers of slots, `positions` and `scores` are tuples too.

    Slots are filled from 0 in the order of their tokens. `length` and `offset` are apart because eviction empties slots
    but does not change where the text is. A write beyond the last slot is dropped and `length` stays at `slots`, since
    nothing can be raised under `jit`: check sizes beforehand, as `effjax.models.generate` does, or `resize`.

    Attributes:
        k: keys, already rotated, `[layers, batch, kv_heads, slots, head_dim]`, or a tuple of `layers` arrays without
            the first axis, or of the classes that hold them as codes (`effjax.kv.held`).
        v: values, like `k`.
        positions: int32 `[layers, batch, kv_heads, slots]`, the position of the token in each slot, -1 where empty.
        scores: float32, like `positions`: what each token has received so far, summed over queries and the query heads
            of its group, as `importance` says.
        length: int32 `[layers, batch, kv_heads]`, filled slots.
        offset: int32 `[batch]`, the true position of the next token.
        importance: what `scores` mean; by default the attention received. Static: part of the tree's structure.
    """

    k: Any
    v: Any
    positions: Any
    scores: Any
    length: Any
    offset: Any
    importance: Importance = dataclasses.field(default=ATTENTION_RECEIVED, metadata={"static": True})

    @property
    def slots(self) -> int:
        """Of every row and head; where layers differ, of the layer that has least."""
        return min(self.layer_slots)

    @property
    def layer_slots(self) -> tuple[int, ...]:
        """Slots of each layer."""
        if self.is_even:
            return (self.positions.shape[-1],) * self.layers
        return tuple(positions.shape[-1] for positions in self.positions)

    @property
    def layers(self) -> int:
        return self.length.shape[0]

    @property
    def is_even(self) -> bool:
        """Whether all layers have the same number of slots."""
        return not isinstance(self.positions, tuple)

    @property
    def is_split(self) -> bool:
        """Whether keys and values are tuples of one array a layer."""
        return isinstance(self.k, tuple)

    @property
    def is_coded(self) -> bool:
        """Whether keys or values of a layer are held as codes."""
        return self.is_split and any(is_coded(held) for held in (*self.k, *self.v))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, tables of codes included (works on `ShapeDtypeStruct` too)."""
        return nbytes(self)

    def replace(self, **changes: Any) -> "KVCache":
        return dataclasses.replace(self, **changes)


def init_cache(
    *,
    layers: int,
    batch: int,
    kv_heads: int,
    slots: int | Sequence[int],
    head_dim: int,
    dtype: Any = jnp.float32,
    split: bool = False,
    importance: Importance = ATTENTION_RECEIVED,
    coders: KVCoders | NomadLayers | None = None,
    frequencies: Any = None,
) -> KVCache:
    """An empty cache.

    Args:
        layers: decoder blocks.
        batch: rows.
        kv_heads: key heads.
        slots: tokens that each row and head can hold; or one number a layer, which makes a split cache.
        head_dim: width of a head.
        dtype: of keys and values.
        split: holds keys and values of each layer apart, see `KVCache`.
        importance: what scores are to mean.
        coders: of a split cache that holds codes; the layers that they leave are held as they are.
        frequencies: of the rotation, float32 `[head_dim / 2]`, for coders of keys that are not rotated.

    Raises:
        ConfigError: a size below 1, not one number of slots a layer; or coders of other layers, without frequencies,
            with exact first tokens, or of a coding that cannot be held (`effjax.kv.coded_vectors.empty_slots`).

    Example:
        >>> cache = init_cache(layers=2, batch=1, kv_heads=2, slots=16, head_dim=8)
        >>> cache.k.shape, cache.nbytes
        ((2, 1, 2, 16, 8), 4628)
        >>> init_cache(layers=2, batch=1, kv_heads=2, slots=(16, 4), head_dim=8).layer_slots
        (16, 4)
    """
    each = slots_of_layers("init_cache", slots, layers)
    sizes = {
        "layers": layers,
        "batch": batch,
        "kv_heads": kv_heads,
        "slots": min(each, default=1),
        "head_dim": head_dim,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"init_cache: {name} must be at least 1, found {size}")
    heads = (layers, batch, kv_heads)
    even = len(set(each)) == 1
    if coders is not None:
        _check_coders(coders, layers, frequencies)

    shapes = [(batch, kv_heads, count, head_dim) for count in each]

    def vectors() -> Any:
        if split or not even:
            return tuple(jnp.zeros(shape, dtype) for shape in shapes)
        return jnp.zeros((layers, *shapes[0]), dtype)

    def rows(empty: float, dtype: Any) -> Any:
        if even:
            return jnp.full((*heads, each[0]), empty, dtype)
        return tuple(jnp.full((batch, kv_heads, count), empty, dtype) for count in each)

    if coders is None:
        k, v = vectors(), vectors()
    else:
        k = tuple(coders.empty_keys(i, shape, dtype, frequencies) for i, shape in enumerate(shapes))
        v = tuple(coders.empty_values(i, shape, dtype) for i, shape in enumerate(shapes))
    return KVCache(
        k=k,
        v=v,
        positions=rows(-1, jnp.int32),
        scores=rows(0, jnp.float32),
        length=jnp.zeros(heads, jnp.int32),
        offset=jnp.zeros((batch,), jnp.int32),
        importance=importance,
    )


def _check_coders(coders: KVCoders | NomadLayers, layers: int, frequencies: Any) -> None:
    check_layers(coders, layers)
    if coders.exact:
        raise ConfigError(
            f"init_cache: the coders leave the first {coders.exact} tokens uncoded, which a cache cannot; learn them "
            "with exact=0"
        )
    if frequencies is None and not coders.rotated:
        raise ConfigError(
            "init_cache: these coders take keys before their rotation; give its frequencies, or make the cache with "
            "effjax.models.decoder.new_cache(config, ..., coders=coders)"
        )


def slots_of_layers(where: str, slots: int | Sequence[int], layers: int) -> tuple[int, ...]:
    """Slots of each layer, given as one number for all or one a layer.

    Raises:
        ConfigError: there is not one number a layer.
    """
    if isinstance(slots, int):
        return (slots,) * layers
    if len(slots) != layers:
        raise ConfigError(f"{where}: slots must be one number or one a layer ({layers}), found {len(slots)}")
    return tuple(slots)


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


def add_scores(
    cache: KVCache, layer: Int[Array, ""], received: Float[Array, "batch kv_heads slots"], lengths: Int[Array, " batch"]
) -> KVCache:
    """What the new tokens of `write_layer` gave, in the scores of their layer."""
    if cache.importance.retained(lengths) is None:
        return cache.replace(scores=cache.scores.at[layer].add(received))
    return cache.replace(
        scores=cache.scores.at[layer].set(cache.importance.add(cache.scores[layer], received, lengths))
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
    """The inverse of `split_layers`.

    Raises:
        ConfigError: layers have different numbers of slots, or hold codes.
    """
    if cache.is_coded:
        raise ConfigError("join_layers: codes have tables of their own in each layer; the cache stays split")
    if not cache.is_even:
        raise ConfigError(
            f"join_layers: layers have {cache.layer_slots} slots; write resize(cache, {max(cache.layer_slots)}) first"
        )
    return cache.replace(k=jnp.stack(cache.k), v=jnp.stack(cache.v)) if cache.is_split else cache


def one_layer(cache: KVCache, layer: int) -> KVCache:
    """A layer as a split cache of its own."""
    return cache.replace(
        k=(cache.k[layer],),
        v=(cache.v[layer],),
        positions=cache.positions[layer][None],
        scores=cache.scores[layer][None],
        length=cache.length[layer][None],
    )


def of_layers(layers: Sequence[KVCache]) -> KVCache:
    """A split cache of caches of one layer each, which may have different numbers of slots."""
    even = len({layer.slots for layer in layers}) == 1

    def rows(name: str) -> Any:
        each = [getattr(layer, name) for layer in layers]
        return jnp.concatenate(each) if even else tuple(x[0] for x in each)

    return layers[0].replace(
        k=tuple(layer.k[0] for layer in layers),
        v=tuple(layer.v[0] for layer in layers),
        positions=rows("positions"),
        scores=rows("scores"),
        length=jnp.concatenate([layer.length for layer in layers]),
    )


def resize(cache: KVCache, slots: int | Sequence[int]) -> KVCache:
    """The same tokens in `slots` slots: room to go on writing, or unused slots given back.

    Args:
        cache: any cache.
        slots: of all layers; or one number a layer, for a split cache.

    Raises:
        ConfigError: `slots` is below 1, or filled slots would be dropped, or a cache that is not split would get layers
            of different sizes. Dropped slots are seen where lengths are known; under `jit`, tokens beyond `slots` are
            dropped.
    """
    each = slots_of_layers("resize", slots, cache.layers)
    if min(each) < 1:
        raise ConfigError(f"resize: slots must be at least 1, found {min(each)}")
    if isinstance(cache.length, jax.Array) and not isinstance(cache.length, Tracer):
        for layer, count in enumerate(each):
            if count < cache.layer_slots[layer] and (longest := int(jnp.max(cache.length[layer]))) > count:
                raise ConfigError(
                    f"resize: {longest} slots are filled and {count} would drop tokens; write slots={longest} or more, "
                    "or choose what to drop with effjax.kv.evict.kv_evict"
                )
    if cache.is_even and len(set(each)) == 1:
        return _resize_even(cache, each[0])
    if not cache.is_split:
        raise ConfigError(f"resize: layers of {each} slots need a split cache; write split_layers(cache) first")
    return of_layers([_resize_even(one_layer(cache, i), count) for i, count in enumerate(each)])


def _resize_even(cache: KVCache, slots: int) -> KVCache:
    def rows(x: Array, empty: float) -> Array:
        kept = x[..., : min(slots, cache.slots)]
        return jnp.pad(kept, [(0, 0)] * (x.ndim - 1) + [(0, max(slots - cache.slots, 0))], constant_values=empty)

    def vectors(held: Any) -> Any:
        return tuple(resize_slots(x, slots) for x in held) if isinstance(held, tuple) else resize_slots(held, slots)

    return cache.replace(
        k=vectors(cache.k),
        v=vectors(cache.v),
        positions=rows(cache.positions, -1),
        scores=rows(cache.scores, 0),
        length=jnp.minimum(cache.length, slots),
    )
