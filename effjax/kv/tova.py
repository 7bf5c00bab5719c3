"""TOVA: the tokens to which the last query of the text attends most, one set of them a layer."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.kv.cache import KVCache
from effjax.kv.importance import Importance
from effjax.kv.method import RankedMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(RankedMethod):
    """Keeps the tokens with the largest attention of the last query, summed over all heads of a layer.

    All heads of a layer keep the same tokens, so the cache must have been evicted by this method alone. The newest
    token always stays, as nothing has attended to it before.

    Attributes:
        budget: see `EvictionMethod`.
        drop: see `RankedMethod`; the paper drops one token a step.

    Raises:
        ConfigError: a value out of range.

    Example:
        >>> TOVA(budget=64).importance.window
        1

    Source: Oren et al., Transformers are Multi-State RNNs (2024), section 4.
    """

    @property
    def importance(self) -> Importance:
        return Importance(window=1)

    def newest(self, budget: int) -> int:
        return 1

    def rank_by(self, cache: KVCache, budget: int) -> Float[Array, "layers batch kv_heads slots"]:
        del budget
        return jnp.broadcast_to(jnp.sum(cache.scores, axis=-2, keepdims=True), cache.scores.shape)
