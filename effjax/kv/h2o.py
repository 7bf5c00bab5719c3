"""H2O: heavy hitters, the tokens that received most attention in sum, and the most recent ones."""

import dataclasses

from effjax.kv.checks import check_whole
from effjax.kv.importance import ATTENTION_RECEIVED, Importance
from effjax.kv.method import RankedMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(RankedMethod):
    """Keeps, per key head, the tokens with the largest running sum of attention, besides the newest ones.

    Sums are causal, over the queries that have been; the paper's quality script sums over all queries of a text, later
    ones included. They are of the query heads of a group together. Paper: half the budget is for recent tokens, and one
    token is dropped a step.

    Attributes:
        budget: see `EvictionMethod`.
        recent: newest tokens that always stay; None means half the budget.
        drop: see `RankedMethod`.

    Raises:
        ConfigError: a value out of range.

    Example:
        >>> H2O(budget=64).newest(64), H2O(budget=0.2, recent=8).resolve(1000).budget
        (32, 200)

    Source: Zhang et al., H2O: Heavy-Hitter Oracle (2023), algorithm 1.
    """

    recent: int | None = None

    def __post_init__(self) -> None:
        if self.recent is not None:
            check_whole("H2O", "recent", self.recent, 1)
        super().__post_init__()

    @property
    def importance(self) -> Importance:
        return ATTENTION_RECEIVED

    def least_budget(self, budget: int) -> int:
        return 1 if self.recent is None else super().least_budget(budget)

    def newest(self, budget: int) -> int:
        return max(1, budget // 2) if self.recent is None else self.recent
