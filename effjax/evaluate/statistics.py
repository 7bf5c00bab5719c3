"""The interval and the verdict of a paired comparison: bootstrap over windows, and a rule stated in numbers."""

import dataclasses
import math
from statistics import NormalDist

import numpy as np

from effjax.errors import CalibrationError, ConfigError

VERDICTS = ("indistinguishable", "slightly worse", "inconclusive", "worse", "broken")  # from best to worst


def paired_bootstrap(
    delta: np.ndarray, tokens: np.ndarray, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean difference per token, `sum(delta) / sum(tokens)`, when windows are drawn again.

    Both models read the same windows, so the difference is formed inside each window before anything is resampled:
    how hard a window is cancels out. The percentiles are widened for the number of windows as Hesterberg proposes
    (the plain percentile interval is too narrow for few windows).

    Args:
        delta: float [windows], summed difference of negative log-likelihood in each window.
        tokens: [windows], tokens counted in each window.
        confidence: share of experiments whose interval holds the true mean.
        resamples: number of bootstrap draws.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        `(low, high)`; both NaN when a difference is not finite.

    Raises:
        CalibrationError: fewer than two windows.

    Example:
        >>> low, high = paired_bootstrap(np.full(10, 0.5), np.full(10, 5))
        >>> round(low, 6), round(high, 6)
        (0.1, 0.1)

    References:
        Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69(4), 2015.
    """
    delta, tokens = np.asarray(delta, np.float64), np.asarray(tokens, np.float64)
    windows = delta.shape[0]
    if windows < 2:
        raise CalibrationError(
            f"an interval needs at least 2 windows, got {windows}: give more text or shorter windows"
        )
    if not np.isfinite(delta).all():
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = []
    chunk = max(1, 2_000_000 // windows)  # bounds the memory of the draw counts
    for start in range(0, resamples, chunk):
        counts = rng.multinomial(windows, np.full(windows, 1 / windows), size=min(chunk, resamples - start))
        means.append((counts @ delta) / (counts @ tokens))
    tail = _expanded_tail((1 - confidence) / 2, windows)
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _expanded_tail(tail: float, windows: int) -> float:
    """The tail probability whose normal quantile equals Student's t of `tail`, scaled by sqrt(n / (n - 1))."""
    z, nu = NormalDist().inv_cdf(tail), windows - 1
    t = z + (z**3 + z) / (4 * nu) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * nu**2)  # Cornish-Fisher series of t
    return NormalDist().cdf(math.sqrt(windows / nu) * t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerdictRule:
    """Which verdict a comparison gets, from the interval of ΔNLL and the mean divergence; all bounds in nats per token.

    ΔNLL alone would let a model pass that predicts other things equally badly, so the divergence from the original (the
    loss to expect on text like the original's own) has to stay within the same bounds.

    Attributes:
        margin: the loss that is accepted (non-inferiority margin): 0.02 is 2 % in perplexity.
        slight: the loss that is still called slight: 0.1 is 10.5 % in perplexity.
        broken: a loss at which the model is called broken: 1 is 2.7 times the perplexity.

    Example:
        >>> VerdictRule()(0.001, -0.004, 0.006, kl=0.003)
        'indistinguishable'
        >>> VerdictRule()(0.3, 0.25, 0.35, kl=0.28)
        'worse'
    """

    margin: float = 0.02
    slight: float = 0.1
    broken: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.margin <= self.slight <= self.broken:
            raise ConfigError(
                f"the bounds of a verdict must rise from above 0: margin={self.margin}, slight={self.slight}, "
                f"broken={self.broken}; choose margin <= slight <= broken"
            )

    def __call__(self, delta: float, low: float, high: float, *, kl: float) -> str:
        """The verdict (one of `VERDICTS`) on a difference `delta` with interval `[low, high]` and a mean divergence."""
        if not (math.isfinite(delta) and math.isfinite(kl)) or max(low, kl) >= self.broken:
            return "broken"
        if max(high, kl) <= self.margin:
            return "indistinguishable"
        if max(high, kl) <= self.slight:
            return "slightly worse"
        return "inconclusive" if low <= 0 and kl <= self.slight else "worse"

    def __str__(self) -> str:
        return (
            f"indistinguishable: upper end of the interval of ΔNLL and mean KL at most {self.margin:g} nats per token "
            f"(perplexity +{math.expm1(self.margin):.1%}); slightly worse: both at most {self.slight:g} "
            f"(+{math.expm1(self.slight):.1%}); inconclusive: only the upper end is above that, and the interval "
            f"reaches down to 0 (use more windows); broken: not finite, or lower end or KL at least {self.broken:g}; "
            "worse: the rest"
        )


def at_most(verdict: str, bound: str) -> bool:
    """Whether `verdict` is `bound` or better.

    Example:
        >>> at_most("slightly worse", "worse"), at_most("broken", "worse")
        (True, False)
    """
    return VERDICTS.index(verdict) <= VERDICTS.index(bound)
