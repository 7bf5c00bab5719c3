"""Persistence of importance against sets, and budgets of layers from it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import ConfigError
from effjax.kv import layer_budgets, persistence


def by_sets(attention, split, multiple):
    before, later = set(), set()
    for t, row in enumerate(attention):
        pivotal = {j for j in range(t + 1) if row[j] > multiple / (t + 1)}
        (before if t < split else later).update(pivotal)
    later = {j for j in later if j < split}
    return len(before & later) / len(later) if later else np.nan, len(before) / split


@settings(max_examples=25)
@given(
    length=st.integers(4, 12), seed=st.integers(0, 99), sharpness=st.floats(0.5, 6), multiple=st.sampled_from([1, 1.5])
)
def test_equals_sets(length, seed, sharpness, multiple):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((2, length, length)) * sharpness
    weights = np.where(np.tril(np.ones((length, length), bool)), np.exp(logits), 0)
    weights = (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
    split = length // 2
    ratio, share = persistence(weights, split, multiple=multiple)
    expected = [by_sets(rows, split, multiple) for rows in weights]
    np.testing.assert_allclose(np.stack([ratio, share], 1), expected, rtol=1e-6)


def test_refused():
    with pytest.raises(ConfigError, match="split must be from 1 to 3, found 4"):
        persistence(np.eye(4, dtype=np.float32), 4)
    with pytest.raises(ConfigError, match="one number from 0 to 1 a layer, found \\[1.5\\]"):
        layer_budgets([1.5], 8)
    with pytest.raises(ConfigError, match="a budget of 2 gives a layer nothing: \\[4, 0\\]; raise even"):
        layer_budgets([0.5, 1.0], 2, even=0.0)


@given(ratios=st.lists(st.floats(0, 1), min_size=1, max_size=6), budget=st.integers(8, 99), even=st.floats(0.2, 1))
@settings(max_examples=50)
def test_budgets_sum_up_and_follow_the_ratios(ratios, budget, even):
    found = layer_budgets(ratios, budget, even=even)
    assert sum(found) == budget * len(ratios) and min(found) >= 1
    order = np.argsort(ratios, kind="stable")
    assert all(found[a] >= found[b] - 1 for a, b in zip(order, order[1:], strict=False))
