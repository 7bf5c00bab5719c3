"""Eviction from a key-value cache: a method says which tokens stay, this moves them together and frees the rest."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from effjax.errors import ConfigError
from effjax.kv.cache import KVCache


class EvictionMethod(Protocol):
    """What `kv_evict` needs of a method: a frozen dataclass with hyper-parameters and these two."""

    @property
    def budget(self) -> int:
        """The most tokens that a row and head keeps."""
        ...

    def keep(self, cache: KVCache) -> Bool[Array, "layers batch kv_heads slots"]:
        """Which filled slots stay, at most `budget` of each row and head."""
        ...


def kv_evict(cache: KVCache, method: EvictionMethod, *, slots: int | None = None) -> KVCache:
    """Keeps the tokens that `method` chooses, in a cache of `slots` slots.

    Tokens keep their order, their positions (keys stay rotated as they were) and their scores; `offset` does not
    change. The shape of the result is static, so this works under `jit`, `vmap` and `jax.eval_shape`, and the bytes of
    the evicted slots are really gone. Attention over the result equals attention over `cache` with the evicted tokens
    masked.

    Args:
        cache: any cache; rows and heads may hold different numbers of tokens.
        method: such as `SinkWindow(sinks=4, window=1020)`.
        slots: of the result, at least `method.budget`; None means `method.budget`. More leaves room to go on writing.

    Returns:
        The smaller cache; where `cache` had fewer slots than `slots`, empty ones are added.

    Raises:
        ConfigError: `slots` is below the budget.

    Example:
        >>> from effjax.kv.cache import init_cache
        >>> from effjax.kv.sink_window import SinkWindow
        >>> cache = init_cache(layers=2, batch=1, kv_heads=2, slots=64, head_dim=8)
        >>> kv_evict(cache, SinkWindow(sinks=4, window=12), slots=20).k.shape
        (2, 1, 2, 20, 8)
    """
    slots = method.budget if slots is None else slots
    if slots < method.budget:
        raise ConfigError(
            f"kv_evict: slots={slots} cannot hold the budget of {method.budget} tokens that {method} keeps; write "
            f"slots={method.budget} or more, or lower the budget"
        )
    return compact(cache, method.keep(cache), slots)


def compact(cache: KVCache, keep: Bool[Array, "layers batch kv_heads slots"], slots: int) -> KVCache:
    """Moves the kept slots to the front in their order and cuts or pads to `slots`; no row may keep more than that."""
    count = min(slots, cache.slots)
    keep = keep & (cache.positions >= 0)
    order = jnp.argsort(~keep, axis=-1, stable=True)[..., :count]
    filled = jnp.take_along_axis(keep, order, axis=-1)
    extra = slots - count

    def rows(x: Array, empty: Any) -> Array:
        taken = jnp.where(filled, jnp.take_along_axis(x, order, axis=-1), jnp.asarray(empty, x.dtype))
        return _pad(taken, -1, extra, empty)

    def vectors(x: Array) -> Array:
        taken = jnp.take_along_axis(x, order[..., None], axis=-2)
        return _pad(jnp.where(filled[..., None], taken, jnp.zeros((), x.dtype)), -2, extra, 0)

    return cache.replace(
        k=vectors(cache.k),
        v=vectors(cache.v),
        positions=rows(cache.positions, -1),
        scores=rows(cache.scores, 0.0),
        length=jnp.sum(filled, axis=-1, dtype=jnp.int32),
    )


def _pad(x: Array, axis: int, extra: int, empty: Any) -> Array:
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (0, extra, 0)
    return jax.lax.pad(x, jnp.asarray(empty, x.dtype), widths)
