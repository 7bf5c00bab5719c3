"""Scissorhands: tokens that were rarely pivotal over a history of queries are evicted."""

import dataclasses

from effjax.errors import ConfigError
from effjax.kv.checks import check_whole
from effjax.kv.importance import Importance
from effjax.kv.method import RankedMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scissorhands(RankedMethod):
    """Keeps, per key head, the tokens that were most often pivotal, besides the newest ones.

    Differences from the paper. A token is pivotal for a query by a threshold relative to the tokens still kept: above a
    quantile of the weights that the query gives (as in the authors' code), or above a multiple of their mean. The `1/t`
    of the text marks nearly every token once many are evicted. The count over the last `history` queries is a decayed
    one, which fades by `1 - 1/history` a query and needs no state besides the scores. A full row loses a sixteenth of
    its budget at a time, not half, of which short texts suffer. Counts are of the query heads of a group together.

    Attributes:
        budget: see `EvictionMethod`; a tuple gives each layer its own, see `effjax.kv.persistence.layer_budgets`.
        recent: newest tokens that always stay (`r` in the paper).
        history: queries that the count looks back on (`w`).
        quantile: of the weights of a query, above which a token is pivotal.
        multiple: of their mean instead; then `quantile` is None.
        peaked: counts a pivotal token by the largest weight of the query, so that queries that attend evenly count
            little. Not in the paper. With `quantile=0.5`, few newest tokens and budgets by layer it keeps more of what
            is looked up later where much is evicted (`benchmarks/results/scissorhands.md`).
        drop: tokens that a full row loses at a time while decoding (`m`), see `RankedMethod`.

    Raises:
        ConfigError: a value out of range, or not one of `quantile` and `multiple`.

    Example:
        >>> Scissorhands(budget=64).importance
        Importance(quantile=0.9, multiple=None, history=400, window=None, peaked=False)

    Source: Liu et al., Scissorhands: persistence of importance (2023), section 4, algorithm 2.
    """

    recent: int = 10
    history: int = 400
    quantile: float | None = 0.9
    multiple: float | None = None
    peaked: bool = False

    def __post_init__(self) -> None:
        check_whole("Scissorhands", "recent", self.recent, 1)
        if (self.quantile is None) == (self.multiple is None):
            raise ConfigError(
                f"Scissorhands: give one of quantile and multiple and leave the other None, found "
                f"quantile={self.quantile!r}, multiple={self.multiple!r}"
            )
        _ = self.importance  # checks the rest
        super().__post_init__()

    @property
    def importance(self) -> Importance:
        return Importance(quantile=self.quantile, multiple=self.multiple, history=self.history, peaked=self.peaked)

    def newest(self, budget: int) -> int:
        return self.recent
