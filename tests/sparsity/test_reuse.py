"""Aggregated sparsity and reuse masks against loops over sets."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import ConfigError
from effjax.sparsity.reuse import (
    independent_unused,
    reuse_mask,
    shuffled_neurons,
    speculative_speedup,
    unused_fraction,
    used_fraction,
)


def masks(seed, batch, length, neurons, rate=0.3):
    return np.random.default_rng(seed).random((*batch, length, neurons)) < rate


@settings(max_examples=8)
@given(seed=st.integers(0, 99), length=st.integers(1, 9), neurons=st.integers(1, 7))
def test_used_neurons_are_the_union(seed, length, neurons):
    active = masks(seed, (2,), length, neurons)
    for b in range(2):
        union = set()
        for t in range(length):
            union |= set(np.flatnonzero(active[b, t]))
            np.testing.assert_allclose(used_fraction(active)[b, t], len(union) / neurons, rtol=1e-6)
    unused = unused_fraction(active)
    np.testing.assert_allclose(unused, 1 - used_fraction(active))
    assert (np.diff(unused, axis=-1) <= 1e-6).all()


def test_independent_tokens_leave_what_their_rates_say():
    rates = np.array([0.02, 0.3, 0.5, 0.9])
    drawn = np.random.default_rng(0).random((4000, 6, 4)) < rates
    np.testing.assert_allclose(independent_unused(rates, 6), unused_fraction(drawn).mean(0), atol=0.02)


@settings(max_examples=8)
@given(seed=st.integers(0, 99), length=st.integers(1, 13), gamma=st.integers(1, 5))
def test_every_second_block_is_left_what_the_one_before_used(seed, length, gamma):
    active = masks(seed, (2,), length, 5)
    found = np.asarray(reuse_mask(active, gamma))
    for t in range(length):
        block = t // gamma
        expected = np.ones((2, 5), bool) if block % 2 == 0 else active[:, (block - 1) * gamma : block * gamma].any(1)
        np.testing.assert_array_equal(found[:, t], expected)


def test_the_control_has_as_many_neurons_and_keeps_them_for_a_block():
    allowed = np.asarray(reuse_mask(masks(5, (3,), 12, 40, rate=0.1), 3))
    control = np.asarray(shuffled_neurons(jax.random.key(0), allowed))
    np.testing.assert_array_equal(control.sum(-1), allowed.sum(-1))
    blocks = control.reshape(3, 4, 3, 40)
    assert (blocks == blocks[:, :, :1]).all()
    assert (control != allowed).any()
    assert (blocks[:, 1, 0] != blocks[:, 3, 0]).any()


def test_a_speed_up_is_none_without_sparsity_and_grows_with_it():
    assert speculative_speedup(0.1, 8, 0.0) == 1
    assert speculative_speedup(0.1, 8, 0.5) > speculative_speedup(0.1, 8, 0.2) > 1
    plain = (1 - 0.8**9) / (1 - 0.8) / 1.8
    assert speculative_speedup(0.1, 8, 0.0, acceptance=0.8) == pytest.approx(plain)
    assert speculative_speedup(0.1, 8, 0.0, acceptance=1) == pytest.approx(9 / 1.8)


def test_blocks_need_tokens():
    with pytest.raises(ConfigError, match="gamma=0: must be at least 1"):
        reuse_mask(np.ones((2, 2), bool), 0)
