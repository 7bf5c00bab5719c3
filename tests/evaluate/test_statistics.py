"""The bootstrap interval covers what it promises, and every verdict follows from its rule."""

import math

import numpy as np
import pytest

from effjax.errors import CalibrationError, ConfigError
from effjax.evaluate import VERDICTS, VerdictRule, paired_bootstrap
from effjax.evaluate.statistics import at_most


@pytest.mark.parametrize("windows", [12, 40])
def test_interval_covers_the_true_mean(windows: int) -> None:
    rng = np.random.default_rng(7)
    tokens = np.full(windows, 20)
    experiments = 600
    covered = 0
    for _ in range(experiments):
        delta = rng.normal(0.3, 1.0, windows) * 20
        low, high = paired_bootstrap(delta, tokens, resamples=500)
        covered += low <= 0.3 <= high
    assert 0.92 <= covered / experiments <= 0.98  # 0.95 with a standard error of 0.009; few windows cover slightly less


def test_interval_narrows_with_confidence_and_is_reproducible() -> None:
    delta, tokens = np.random.default_rng(0).normal(size=30), np.ones(30)
    wide, narrow = paired_bootstrap(delta, tokens, confidence=0.99), paired_bootstrap(delta, tokens, confidence=0.5)
    assert wide[0] < narrow[0] < delta.mean() < narrow[1] < wide[1]
    assert paired_bootstrap(delta, tokens, seed=3) == paired_bootstrap(delta, tokens, seed=3)
    assert paired_bootstrap(delta, tokens, seed=3) != paired_bootstrap(delta, tokens, seed=4)


def test_windows_weigh_by_their_tokens() -> None:
    low, high = paired_bootstrap(np.array([1.0, 30.0]), np.array([10, 300]))
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)


def test_zero_difference_has_a_zero_interval() -> None:
    assert paired_bootstrap(np.zeros(5), np.full(5, 9)) == (0.0, 0.0)


def test_interval_of_non_finite_differences_is_nan() -> None:
    assert all(math.isnan(end) for end in paired_bootstrap(np.array([0.0, np.inf]), np.ones(2)))


def test_one_window_is_refused() -> None:
    with pytest.raises(CalibrationError, match="at least 2 windows, got 1"):
        paired_bootstrap(np.zeros(1), np.ones(1))


@pytest.mark.parametrize(
    ("delta", "low", "high", "kl", "verdict"),
    [
        (0.0, 0.0, 0.0, 0.0, "indistinguishable"),
        (-0.3, -0.4, -0.2, 0.01, "indistinguishable"),
        (0.01, 0.005, 0.02, 0.02, "indistinguishable"),
        (0.01, 0.005, 0.021, 0.01, "slightly worse"),
        (0.0, -0.01, 0.01, 0.03, "slightly worse"),
        (0.05, 0.03, 0.1, 0.1, "slightly worse"),
        (0.05, -0.1, 0.2, 0.05, "inconclusive"),
        (0.05, -0.1, 0.2, 0.3, "worse"),
        (0.3, 0.2, 0.4, 0.3, "worse"),
        (0.9, 0.9, 0.95, 0.9, "worse"),
        (1.2, 1.0, 1.5, 0.9, "broken"),
        (0.0, -0.1, 0.1, 1.0, "broken"),
        (math.nan, math.nan, math.nan, 0.0, "broken"),
        (math.inf, math.nan, math.nan, 0.0, "broken"),
        (0.0, 0.0, 0.0, math.nan, "broken"),
    ],
)
def test_verdict(delta: float, low: float, high: float, kl: float, verdict: str) -> None:
    assert VerdictRule()(delta, low, high, kl=kl) == verdict


def test_rule_states_its_numbers_and_refuses_disorder() -> None:
    assert "at most 0.05 nats per token (perplexity +5.1%)" in str(VerdictRule(margin=0.05))
    with pytest.raises(ConfigError, match="margin <= slight <= broken"):
        VerdictRule(margin=0.2)
    with pytest.raises(ConfigError, match="rise from above 0"):
        VerdictRule(margin=0.0)


def test_verdicts_are_ordered() -> None:
    assert [at_most(v, "slightly worse") for v in VERDICTS] == [True, True, False, False, False]
