"""What every eviction method has: a budget, layers' shares of it, and the choice of the tokens that stay."""

import abc
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.errors import ConfigError
from effjax.kv.cache import KVCache, one_layer
from effjax.kv.checks import check_whole, is_whole
from effjax.kv.importance import Importance
from effjax.kv.order import order_statistic, ordered_bits

Budget = int | float | tuple[int, ...]


class EvictionMethod(abc.ABC):
    """What `kv_evict` and `generate` need of a method: a frozen dataclass of hyper-parameters with these.

    A budget is the most tokens that a row and head keeps: a whole number, one a layer, or a share (below 1) of a length
    that is known later (`resolve`).
    """

    budget: Any

    @property
    def importance(self) -> Importance | None:
        """What the scores of a cache must mean; None where the method does not read them."""
        return None

    @abc.abstractmethod
    def keep(self, cache: KVCache) -> Bool[Array, "layers batch kv_heads slots"]:
        """Which filled slots stay, at most `budget` of each row and head."""

    def within(self, budget: Budget) -> Self:
        """The same method with another budget."""
        return dataclasses.replace(self, budget=budget)  # type: ignore[type-var]

    def layer_budgets(self, layers: int) -> tuple[int, ...]:
        """Whole tokens of each layer.

        Raises:
            ConfigError: the budget is a share, or does not have one number a layer.
        """
        budget = self.budget
        if isinstance(budget, float):
            raise ConfigError(
                f"{type(self).__name__}: a budget of {budget:g} is a share of a length that is not known here; write "
                "method.resolve(length), or a whole number"
            )
        if isinstance(budget, tuple) and len(budget) != layers:
            raise ConfigError(
                f"{type(self).__name__}: the budget {budget} has {len(budget)} numbers but the cache {layers} layers"
            )
        return budget if isinstance(budget, tuple) else (budget,) * layers

    def of_layer(self, layer: int, layers: int) -> "EvictionMethod":
        """The method of one layer out of `layers`, with one whole budget."""
        return self.within(self.layer_budgets(layers)[layer])

    def resolve(self, length: int) -> Self:
        """The same method with a budget in whole tokens, for texts of `length` tokens in all."""
        return self.within(round(self.budget * length)) if isinstance(self.budget, float) else self

    def dropped_at_once(self, budget: int) -> int:
        """Tokens that a full row and head of `budget` slots loses at a time while decoding."""
        return max(1, budget // 16)

    def least_budget(self, budget: int) -> int:
        """The smallest budget that the method can have besides its other settings; `budget` is the present one."""
        del budget
        return 1

    def make_room(self, budget: int) -> "EvictionMethod":
        """The method (of one layer) that leaves a full row of `budget` slots room to go on.

        Raises:
            ConfigError: nothing would be left.
        """
        left = budget - self.dropped_at_once(budget)
        least = self.least_budget(budget)
        if left < least:
            raise ConfigError(
                f"{type(self).__name__}: a row of {budget} slots that loses {budget - left} at once keeps {left}, but "
                f"{least} must stay; give a larger budget or a smaller drop"
            )
        return self.within(left)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankedMethod(EvictionMethod):
    """Keeps the newest tokens and, of the others, those with the best scores; ties go to the newer token.

    Attributes:
        budget: see `EvictionMethod`.
        drop: tokens that a full row loses at a time while decoding; None takes a sixteenth of the budget, so that the
            cache is moved once in many steps.
    """

    budget: Budget
    drop: int | None = None

    def __post_init__(self) -> None:
        name, budget = type(self).__name__, self.budget
        share = isinstance(budget, float) and 0 < budget < 1
        tokens = budget if isinstance(budget, tuple) else (budget,)
        if not share and not (tokens and all(is_whole(count, 1) for count in tokens)):
            raise ConfigError(
                f"{name}: budget must be a whole number of tokens of at least 1, one a layer, or a share between 0 and "
                f"1, found {budget!r}"
            )
        if self.drop is not None:
            check_whole(name, "drop", self.drop, 1)
        for count in () if share else tokens:
            assert isinstance(count, int)
            if count < (least := self.least_budget(count)):
                raise ConfigError(
                    f"{name}: a budget of {count} tokens leaves nothing besides the newest {self.newest(count)} that "
                    f"always stay; give a budget of at least {least}, or protect fewer"
                )

    @abc.abstractmethod
    def newest(self, budget: int) -> int:
        """How many of the newest tokens always stay."""

    def least_budget(self, budget: int) -> int:
        newest = self.newest(budget)
        return newest if newest == 1 else newest + 1

    def rank_by(self, cache: KVCache, budget: int) -> Float[Array, "layers batch kv_heads slots"]:
        """What tokens are ranked by; the scores of the cache unless a method says otherwise."""
        del budget
        return cache.scores

    def dropped_at_once(self, budget: int) -> int:
        if self.drop is not None:
            return self.drop
        return max(1, min(super().dropped_at_once(budget), budget - self.newest(budget) - 1))

    def keep(self, cache: KVCache) -> Bool[Array, "layers batch kv_heads slots"]:
        budgets = self.layer_budgets(cache.layers)
        if len(set(budgets)) > 1:
            parts = [self.of_layer(i, cache.layers).keep(one_layer(cache, i)) for i in range(cache.layers)]
            return jnp.concatenate(parts)
        budget = budgets[0]
        return keep_best(cache, self.rank_by(cache, budget), budget=budget, newest=self.newest(budget))


def keep_best(
    cache: KVCache, scores: Float[Array, "layers batch kv_heads slots"], *, budget: int, newest: int
) -> Bool[Array, "layers batch kv_heads slots"]:
    """The `newest` tokens of each row and head and, up to `budget`, those of the best scores, ties to the newer.

    Example:
        >>> from effjax.kv.cache import init_cache
        >>> cache = init_cache(layers=1, batch=1, kv_heads=1, slots=4, head_dim=2)
        >>> cache = cache.replace(positions=jnp.arange(4).reshape(1, 1, 1, 4), length=jnp.full((1, 1, 1), 4))
        >>> keep_best(cache, jnp.array([[[[0.5, 0.5, 0.1, 0.0]]]]), budget=2, newest=1).tolist()
        [[[[False, True, False, True]]]]
    """
    slots = cache.positions.shape[-1]
    if budget >= slots:
        return cache.positions >= 0
    slot = jax.lax.broadcasted_iota(jnp.int32, cache.positions.shape, cache.positions.ndim - 1)
    filled = cache.positions >= 0
    recent = filled & (slot >= cache.length[..., None] - newest)
    value = ordered_bits(jnp.where(recent, jnp.inf, jnp.where(filled, scores.astype(jnp.float32), -jnp.inf)))
    least = order_statistic(value, jnp.full((*value.shape[:-1], 1), slots - budget, jnp.int32))
    above, ties = value > least, value == least
    room = budget - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    newer = jnp.cumsum(ties[..., ::-1], axis=-1, dtype=jnp.int32)[..., ::-1]  # of the ties, itself among them
    return filled & (above | (ties & (newer <= room)))
