"""Attention sinks and a recent window: the first few tokens and the last ones stay, all between is evicted."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from effjax.errors import ConfigError
from effjax.kv.cache import KVCache
from effjax.kv.checks import check_whole
from effjax.kv.method import Budget, EvictionMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class SinkWindow(EvictionMethod):
    """StreamingLLM's selection of tokens, for `kv_evict` and `generate`; `effjax.kv.StreamingLLM` is this class.

    Difference from the paper: there, positions are numbered anew inside the cache (the `i`-th kept token gets position
    `i`), so a text may grow beyond the length that the model was trained on. Here kept tokens keep their true
    positions, so the result equals dense attention with the evicted tokens masked, and texts stay bound to the trained
    length.

    Attributes:
        sinks: tokens kept at the beginning of the text.
        window: most recent tokens kept; or a share of a length that is known later, the sinks counted in.

    Raises:
        ConfigError: a negative number of sinks, or a window below 1 that is not a share.

    Example:
        >>> SinkWindow(sinks=4, window=12).budget
        16

    Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks (2024).
    """

    sinks: int = 4
    window: int | float = 1020

    def __post_init__(self) -> None:
        check_whole("SinkWindow", "sinks", self.sinks, 0)
        if not (isinstance(self.window, float) and 0 < self.window < 1):
            check_whole("SinkWindow", "window", self.window, 1)

    @property
    def budget(self) -> int | float:
        return self.window if isinstance(self.window, float) else self.sinks + self.window

    def within(self, budget: Budget) -> "SinkWindow":
        if not isinstance(budget, tuple):
            return dataclasses.replace(self, window=budget if isinstance(budget, float) else budget - self.sinks)
        raise ConfigError(f"SinkWindow: all layers keep the same tokens, so the budget is one number, found {budget}")

    def least_budget(self, budget: int) -> int:
        del budget
        return self.sinks + 1

    def keep(self, cache: KVCache) -> Bool[Array, "layers batch kv_heads slots"]:
        """The first `sinks` and the last `window` filled slots of each row and head (slots are in order of tokens)."""
        (budget,) = set(self.layer_budgets(cache.layers))
        rank = jax.lax.broadcasted_iota(jnp.int32, cache.positions.shape, cache.positions.ndim - 1)
        length = cache.length[..., None]
        return (rank < length) & ((rank < self.sinks) | (rank >= length - (budget - self.sinks)))
