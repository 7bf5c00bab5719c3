"""The cache of any Flax model, Linen or NNX, read as a `KVCache` and written back: eviction for models one cannot edit.

`flax.linen.MultiHeadDotProductAttention(decode=True)` and `nnx.MultiHeadAttention` keep `cached_key`, `cached_value`
and `cache_index`; they write at the index, see what is below it, and take the number of slots from the arrays. So an
evicted cache, packed to the front with its index set back, is one that they go on with as it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from effjax.arrays.base import PyTree
from effjax.errors import ConfigError
from effjax.kv.cache import KVCache
from effjax.kv.importance import ATTENTION_RECEIVED, Importance
from effjax.paths import leaves_with_paths, map_with_paths

KEY, VALUE, INDEX, WEIGHTS = "cached_key", "cached_value", "cache_index", "attention_weights"


def from_flax(
    cache: PyTree,
    *,
    before: KVCache | None = None,
    scores: Float[Array, "layers batch heads slots"] | None = None,
    importance: Importance = ATTENTION_RECEIVED,
) -> KVCache:
    """Reads the "cache" collection of a Linen model, or the `nnx.Cache` state of an NNX model.

    Layers come in the order of the tree; a module that `nn.scan` has stacked gives one layer for each of its axis. All
    rows and heads hold the same number of tokens, the index of their layer.

    Args:
        cache: any tree; a node with `cached_key [*stacked, batch, slots, heads, head_dim]`, `cached_value` and
            `cache_index [*stacked]` is a layer. Other leaves, such as a counter of positions, are left out.
        before: what an earlier eviction gave: its tokens, which lie first, keep their positions and scores, later ones
            get those from its `offset` on. None where nothing was evicted: slot `i` holds token `i`.
        scores: of every slot, in place of those of `before`; sums of `flax_attention` are what `H2O` ranks by.
        importance: what `scores` mean, `method.importance`.

    Raises:
        ConfigError: no layer is found, one is incomplete or of another rank, layers differ in shape, or scores do not
            fit.

    Example:
        >>> import flax.linen as nn
        >>> attention = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
        >>> cache = attention.init(jax.random.key(0), jnp.ones((1, 16, 8)))["cache"]
        >>> from_flax(cache).k.shape
        (1, 1, 2, 16, 4)
    """
    keys, values, lengths = [], [], []
    for k, v, index in _layers(cache):
        keys.append(jnp.moveaxis(k, -2, -3))
        values.append(jnp.moveaxis(v, -2, -3))
        lengths.append(index)
    k, v, length = jnp.concatenate(keys), jnp.concatenate(values), jnp.concatenate(lengths).astype(jnp.int32)
    layers, batch, heads, slots, _ = k.shape
    slot = jnp.arange(slots)
    positions, kept, offset = jnp.broadcast_to(slot, (layers, batch, heads, slots)), jnp.zeros(()), jnp.max(length)
    length = jnp.broadcast_to(length[:, None, None], (layers, batch, heads))
    if before is not None:
        if before.positions.shape != positions.shape:
            raise ConfigError(
                f"from_flax: `before` has slots {before.positions.shape}, the model's cache {positions.shape}; give "
                "what to_flax wrote into this cache"
            )
        new = before.length[..., None]
        positions = jnp.where(slot < new, before.positions, slot - new + before.offset[:, None, None])
        offset, kept = before.offset + (length - before.length)[0, :, 0], before.scores
    if scores is not None and scores.shape != positions.shape:
        raise ConfigError(f"from_flax: scores of shape {scores.shape} for slots {positions.shape}")
    filled = slot < length[..., None]
    return KVCache(
        k=k,
        v=v,
        positions=jnp.where(filled, positions, -1).astype(jnp.int32),
        scores=jnp.where(filled, kept if scores is None else scores, 0.0).astype(jnp.float32),
        length=length,
        offset=jnp.broadcast_to(offset, (batch,)).astype(jnp.int32),
        importance=importance,
    )


def to_flax(kv: KVCache, cache: PyTree) -> PyTree:
    """Writes keys, values and filled lengths into the places that they have in `cache`.

    The model goes on in `kv.slots` slots, fewer bytes than before. It writes over its last slot when they are full:
    leave room, `kv_evict(kv, method, slots=budget + room)`, and evict again before it is used up. Whatever counts
    positions elsewhere in the model is not touched, so tokens keep their true positions.

    Args:
        kv: of one number of slots and of tokens for all rows and heads of a layer; not split, not coded.
        cache: the tree that `from_flax` read, as arrays or as `jax.ShapeDtypeStruct`.

    Raises:
        ConfigError: `kv` is split, has other layers, or rows and heads hold different numbers of tokens (seen where
            lengths are known; under `jit` a shorter row would attend to empty slots).
    """
    if kv.is_split:
        raise ConfigError("to_flax: the layers of this cache are apart; write join_layers(cache) first")
    found = list(_layers(cache))
    count = sum(k.shape[0] for k, _, _ in found)
    if count != kv.layers:
        raise ConfigError(f"to_flax: {kv.layers} layers for a model with {count}")
    if not isinstance(kv.length, Tracer) and bool(jnp.any(kv.length != kv.length[:, :1, :1])):
        raise ConfigError(
            "to_flax: rows or heads of a layer hold different numbers of tokens, for which a Flax cache has one index; "
            "use a method that fills its budget in each of them"
        )
    parts: dict[str, Any] = {}
    start = 0
    for path, leaf in leaves_with_paths(cache):
        *_, name = path.split("/")
        if name == KEY:
            stacked = leaf.ndim - 4
            where = slice(start, start + leaf.shape[0] if stacked else start + 1)
            start = where.stop
            for end, x in ((KEY, kv.k[where]), (VALUE, kv.v[where])):
                x = jnp.moveaxis(x, -3, -2)
                parts[path[: -len(KEY)] + end] = x if stacked else x[0]
            index = kv.length[where, 0, 0]
            parts[path[: -len(KEY)] + INDEX] = index if stacked else index[0]
    return map_with_paths(lambda path, leaf: parts[path].astype(leaf.dtype) if path in parts else leaf, cache)


def flax_attention(intermediates: PyTree) -> Float[Array, "layers batch heads slots"]:
    """What each slot received from the queries of a call with `sow_weights=True`, summed over them.

    Args:
        intermediates: the collection of that name; its `attention_weights [*stacked, batch, heads, queries, slots]` are
            taken in the order of the tree, as `from_flax` takes layers.

    Raises:
        ConfigError: there are none.
    """
    found = [x for path, x in leaves_with_paths(intermediates) if WEIGHTS in path.split("/")]
    if not found:
        raise ConfigError(
            f"flax_attention: no {WEIGHTS!r} among {[path for path, _ in leaves_with_paths(intermediates)]}; call the "
            'attention with sow_weights=True and apply with mutable=["cache", "intermediates"]'
        )
    return jnp.concatenate([jnp.sum(x.reshape(-1, *x.shape[-4:]), axis=-2, dtype=jnp.float32) for x in found])


def _layers(cache: PyTree) -> list[tuple[Any, Any, Any]]:
    """Keys, values `[stacked, batch, slots, heads, head_dim]` and indices `[stacked]`, in the order of the tree."""
    leaves = dict(leaves_with_paths(cache))
    found = []
    for path, k in leaves.items():
        node, name = path[: -len(KEY)], path.split("/")[-1]
        if name != KEY:
            continue
        v, index = leaves.get(node + VALUE), leaves.get(node + INDEX)
        if v is None or index is None:
            raise ConfigError(f"{path}: {VALUE} or {INDEX} is not beside it; give the whole cache of the model")
        if k.ndim - index.ndim != 4 or index.ndim > 1 or v.shape != k.shape:
            raise ConfigError(
                f"{path}: shape {k.shape} with values {v.shape} and an index of shape {index.shape}; expected "
                "[batch, slots, heads, head_dim], or one more axis in front of all three where layers are stacked"
            )
        found.append((k, v, index) if index.ndim else (_lead(k), _lead(v), _lead(index)))
    if not found:
        raise ConfigError(f"no {KEY!r} among {list(leaves)}; give the cache collection of a model that decodes")
    if len(shapes := {k.shape[1:] for k, _, _ in found}) > 1:
        raise ConfigError(f"layers of different shapes: {sorted(shapes)}; read each with from_flax by itself")
    return found


def _lead(x: Any) -> Any:
    return jax.ShapeDtypeStruct((1, *x.shape), x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x[None]
