"""Eviction from a key-value cache: a method says which tokens stay, this moves them together and frees the rest."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from effjax.errors import ConfigError
from effjax.kv.cache import KVCache, join_layers, of_layers, one_layer, slots_of_layers
from effjax.kv.held import take_slots
from effjax.kv.method import EvictionMethod


def kv_evict(cache: KVCache, method: EvictionMethod, *, slots: int | Sequence[int] | None = None) -> KVCache:
    """Keeps the tokens that `method` chooses, in a cache of `slots` slots.

    Tokens keep their order, their positions (keys stay rotated as they were) and their scores; `offset` does not
    change. The shape of the result is static, so this works under `jit`, `vmap` and `jax.eval_shape`, and the bytes of
    the evicted slots are really gone. Attention over the result equals attention over `cache` with the evicted tokens
    masked.

    Args:
        cache: any cache, split or not; rows and heads may hold different numbers of tokens.
        method: such as `Scissorhands(budget=1024)`, with a budget in whole tokens.
        slots: of the result, at least the budget; None means the budget. More leaves room to go on writing. One number
            a layer, or a budget that differs from layer to layer, gives a split cache with that many slots in each.

    Returns:
        The smaller cache; where `cache` had fewer slots than `slots`, empty ones are added.

    Raises:
        ConfigError: `slots` is below the budget, the budget is a share of an unknown length, or the cache's scores do
            not mean what the method reads in them.

    Example:
        >>> from effjax.kv.cache import init_cache
        >>> from effjax.kv.sink_window import SinkWindow
        >>> cache = init_cache(layers=2, batch=1, kv_heads=2, slots=64, head_dim=8)
        >>> kv_evict(cache, SinkWindow(sinks=4, window=12), slots=20).k.shape
        (2, 1, 2, 20, 8)
    """
    check_importance("kv_evict", cache, method)
    budgets = method.layer_budgets(cache.layers)
    each = slots_of_layers("kv_evict", budgets if slots is None else slots, cache.layers)
    for layer, (budget, count) in enumerate(zip(budgets, each, strict=True)):
        if count < budget:
            where = f" of layer {layer}" if len(set(budgets)) + len(set(each)) > 2 else ""
            raise ConfigError(
                f"kv_evict: slots={count}{where} cannot hold the budget of {budget} tokens that {method} keeps; write "
                f"slots={budget} or more, or lower the budget"
            )
    return evict_to(cache, method, budgets, each)


def evict_to(cache: KVCache, method: EvictionMethod, budgets: Sequence[int], slots: Sequence[int]) -> KVCache:
    """`kv_evict` with whole budgets of layers given, each at most its slots, and nothing checked."""

    def chosen(view: KVCache, layer: int) -> Array:
        if budgets[layer] >= view.slots:
            return view.positions >= 0
        return method.of_layer(layer, len(budgets)).within(budgets[layer]).keep(view)

    return _compact_by(cache, chosen, budgets, slots)


def check_importance(where: str, cache: KVCache, method: EvictionMethod) -> None:
    """Refuses a cache whose scores are not what `method` ranks by."""
    if method.importance is not None and method.importance != cache.importance:
        raise ConfigError(
            f"{where}: {type(method).__name__} ranks tokens by {method.importance}, but the scores of this cache are "
            f"{cache.importance}; make the cache with new_cache(..., importance=method.importance)"
        )


def make_room(cache: KVCache, method: EvictionMethod, length: int) -> KVCache:
    """The same cache with a free slot in every row and head: full ones lose some tokens by `method`, others none.

    Where no row is full, nothing is moved. For a step of decoding with one new token a row; a full row keeps as many
    tokens as `method.make_room` says, and whether it is full does not depend on other rows.

    Args:
        cache: of `method`'s importance.
        method: its budgets need not be the slots of the cache, which count here.
        length: of the longest text; a layer with so many slots is never full.
    """
    sizes = cache.layer_slots
    if min(sizes) >= length:
        return cache

    def lighter(view: KVCache, layer: int) -> KVCache:
        full = view.length >= view.slots
        lighter_method = method.of_layer(layer, len(sizes)).within(view.slots).make_room(view.slots)
        keep = jnp.where(full[..., None], lighter_method.keep(view), view.positions >= 0)
        return compact(view, keep, view.slots)

    def moved(view: KVCache, layer: int) -> KVCache:
        full = jnp.any(view.length >= view.slots)
        return jax.lax.cond(full, partial(lighter, layer=layer), lambda view: view, view)

    if cache.is_even:
        return moved(cache, 0)
    # Layers of different sizes are full at different times, and those that are not need not be moved.
    layers = (one_layer(cache, i) for i in range(cache.layers))
    return of_layers([moved(layer, i) if layer.slots < length else layer for i, layer in enumerate(layers)])


def _compact_by(
    cache: KVCache, chosen: Callable[[KVCache, int], Array], budgets: Sequence[int], slots: Sequence[int]
) -> KVCache:
    """Keeps what `chosen(view, layer)` says: of all layers at once where they are alike, else of one after another."""
    if cache.is_even and len(set(budgets)) == 1 and len(set(slots)) == 1:
        return compact(cache, chosen(cache, 0), slots[0])
    layers = []
    for i, count in enumerate(slots):
        layer = one_layer(cache, i)
        layers.append(compact(layer, chosen(layer, i), count))
    kept = of_layers(layers)
    return kept if cache.is_split or not kept.is_even else join_layers(kept)


def compact(cache: KVCache, keep: Bool[Array, "layers batch kv_heads slots"], slots: int) -> KVCache:
    """Moves the kept slots to the front in their order and cuts or pads to `slots`; no row may keep more than that."""
    count = min(slots, cache.slots)
    keep = keep & (cache.positions >= 0)
    order = jnp.argsort(~keep, axis=-1, stable=True)[..., :count]
    filled = jnp.take_along_axis(keep, order, axis=-1)

    def rows(x: Array, empty: Any) -> Array:
        taken = jnp.where(filled, jnp.take_along_axis(x, order, axis=-1), jnp.asarray(empty, x.dtype))
        return jnp.pad(taken, [(0, 0)] * (x.ndim - 1) + [(0, slots - count)], constant_values=empty)

    def moved(x: Any) -> Any:
        if cache.is_split:
            return tuple(take_slots(x[i], order[i], filled[i], cache.length[i], slots) for i in range(cache.layers))
        return take_slots(x, order, filled, cache.length, slots)

    return cache.replace(
        k=moved(cache.k),
        v=moved(cache.v),
        positions=rows(cache.positions, -1),
        scores=rows(cache.scores, 0.0),
        length=jnp.sum(filled, axis=-1, dtype=jnp.int32),
    )
