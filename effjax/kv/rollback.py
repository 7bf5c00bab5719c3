"""A cache without its last tokens, as if they had never been written."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from effjax.errors import ConfigError
from effjax.kv.cache import KVCache


def drop_last(cache: KVCache, count: Int[Array, " batch"]) -> KVCache:
    """Takes the last `count[b]` tokens of row `b` back; what attention they gave stays in the scores.

    Keys and values are not touched: their slots count as empty, and the next tokens overwrite them.

    Args:
        cache: with all its tokens in order, not evicted: its last slots then hold its last tokens. Not coded.
        count: at most the tokens that a row holds, which cannot be checked under `jit`.

    Raises:
        ConfigError: a cache that holds codes, whose tables may have seen the tokens.

    Example:
        >>> from effjax.kv.cache import init_cache
        >>> cache = init_cache(layers=1, batch=1, kv_heads=1, slots=4, head_dim=2)
        >>> full = cache.replace(positions=jnp.arange(4).reshape(1, 1, 1, 4), length=cache.length + 4,
        ...                      offset=cache.offset + 4)
        >>> back = drop_last(full, jnp.array([3]))
        >>> back.positions.tolist(), back.length.tolist(), back.offset.tolist()
        ([[[[0, -1, -1, -1]]]], [[[1]]], [1])
    """
    if cache.is_coded:
        raise ConfigError("drop_last: a cache that holds codes cannot take tokens back; make it without coders")
    length = cache.length - count[None, :, None]

    def rows(values: Any, empty: float) -> Any:
        if isinstance(values, tuple):
            return tuple(_cut(x, n, empty) for x, n in zip(values, length, strict=True))
        return _cut(values, length, empty)

    return dataclasses.replace(
        cache,
        positions=rows(cache.positions, -1),
        scores=rows(cache.scores, 0),
        length=length,
        offset=cache.offset - count,
    )


def _cut(values: Any, length: Any, empty: float) -> Any:
    return jnp.where(jnp.arange(values.shape[-1]) < length[..., None], values, empty)
