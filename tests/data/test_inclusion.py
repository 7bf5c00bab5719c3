"""Inclusion probabilities against a loop, and systematic sampling against its theory, unit by unit."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data import inclusion_probabilities, systematic
from effjax.errors import ConfigError


def by_loop(scores, batch, uniform):
    """One example after another is set to 1, the largest first, until no other is above it."""
    p = scores / scores.sum() if scores.sum() > 0 else np.full(len(scores), 1 / len(scores))
    p = (1 - uniform) * p + uniform / len(scores)
    full = np.zeros(len(p), bool)
    while True:
        rest = p[~full].sum()
        scaled = np.where(full, 1.0, p * (batch - full.sum()) / max(rest, 1e-300))
        above = (scaled >= 1) & ~full
        if not above.any():
            return scaled
        full[np.argmax(np.where(above, scaled, -1))] = True


probabilities = jax.jit(inclusion_probabilities, static_argnums=1)


@hypothesis.settings(max_examples=30)
@hypothesis.given(hnp.arrays(np.float32, 9, elements=st.floats(0, 100, width=32)), st.floats(0.01, 1))
def test_probabilities_are_those_of_a_loop(scores, uniform):
    got = np.asarray(probabilities(scores, 4, uniform=uniform))
    np.testing.assert_allclose(got, by_loop(scores.astype(np.float64), 4, uniform), rtol=2e-4, atol=1e-6)
    assert abs(got.sum() - 4) < 1e-4 and got.max() <= 1


def test_odd_scores():
    np.testing.assert_allclose(probabilities(jnp.zeros(5), 2), np.full(5, 0.4), rtol=1e-6)
    found = probabilities(jnp.array([jnp.nan, jnp.inf, -1.0, 1.0, 1.0]), 2, uniform=0.5)
    np.testing.assert_allclose(found, [0.2, 0.2, 0.2, 0.7, 0.7], rtol=1e-6)
    np.testing.assert_array_equal(inclusion_probabilities(jnp.array([3.0, 1.0]), 2), [1, 1])
    with pytest.raises(ConfigError, match="batch=3 of 2 scores: must be between 1 and their number"):
        inclusion_probabilities(jnp.ones(2), 3)


def test_systematic_draws_with_its_probabilities():
    """10,000 draws: the share of each index within 4.5 deviations, its weight exactly the one of its probability."""
    p = inclusion_probabilities(jnp.array([0.2, 5.0, 1.0, 1.0, 0.1, 9.0, 0.7, 0.3]), 3, uniform=0.1)
    keys = jax.random.split(jax.random.key(0), 10_000)
    index, weights = jax.jit(jax.vmap(lambda key: systematic(key, p, 3)))(keys)
    index, p = np.asarray(index), np.asarray(p, np.float64)
    assert (np.diff(index, axis=1) > 0).all()  # no repeats
    share = np.bincount(index.ravel(), minlength=8) / 10_000
    assert (np.abs(share - p) <= 4.5 * np.sqrt(p * (1 - p) / 10_000) + 1e-9).all()
    np.testing.assert_allclose(weights, (3 / 8) / p[index], rtol=1e-5)
    values = np.arange(8.0) ** 2
    means = (np.asarray(weights) * values[index]).mean(1)
    assert abs(means.mean() - values.mean()) < 4.5 * means.std() / 100


def test_systematic_takes_all_and_finds_rare_ones():
    np.testing.assert_array_equal(systematic(jax.random.key(0), jnp.ones(5), 5)[0], np.arange(5))
    p = inclusion_probabilities(jnp.ones(200_000), 64)
    index, weights = systematic(jax.random.key(1), p, 64)
    assert len(set(index.tolist())) == 64
    np.testing.assert_allclose(weights, 1.0, rtol=0.03)  # units are whole: 5369 of each example


@pytest.mark.parametrize("seed", range(3))
def test_systematic_never_repeats(seed):
    scores = np.random.default_rng(seed).exponential(size=33) ** 4
    index = drawn(jax.random.key(seed), jnp.asarray(scores, jnp.float32))
    assert len(set(index.tolist())) == 32


@jax.jit
def drawn(key, scores):
    return systematic(key, inclusion_probabilities(scores, 32), 32)[0]
