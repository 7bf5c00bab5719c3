"""Attention sinks and a recent window: the first few tokens and the last ones stay, all between is evicted."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from effjax.errors import ConfigError
from effjax.kv.cache import KVCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinkWindow:
    """StreamingLLM's selection of tokens, for `kv_evict`.

    Difference from the paper: there, positions are numbered anew inside the cache (the `i`-th kept token gets position
    `i`), so a text may grow beyond the length that the model was trained on. Here kept tokens keep their true
    positions, so the result equals dense attention with the evicted tokens masked, and texts stay bound to the trained
    length.

    Attributes:
        sinks: tokens kept at the beginning of the text.
        window: most recent tokens kept.

    Raises:
        ConfigError: a negative number of sinks, or a window below 1.

    Example:
        >>> SinkWindow(sinks=4, window=12).budget
        16

    Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks (2024).
    """

    sinks: int = 4
    window: int = 1020

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("window", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"SinkWindow: {name} must be a whole number of at least {least}, found {value!r}")

    @property
    def budget(self) -> int:
        return self.sinks + self.window

    def keep(self, cache: KVCache) -> Bool[Array, "layers batch kv_heads slots"]:
        """The first `sinks` and the last `window` filled slots of each row and head (slots are in order of tokens)."""
        rank = jax.lax.broadcasted_iota(jnp.int32, cache.positions.shape, cache.positions.ndim - 1)
        length = cache.length[..., None]
        return (rank < length) & ((rank < self.sinks) | (rank >= length - self.window))
