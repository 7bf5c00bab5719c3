"""Shuffles that are computed: permutations of any size, even in what goes where, and different by seed."""

import collections

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data import Position, of_host, shuffled
from effjax.errors import ConfigError


@pytest.mark.parametrize("n", [1, 2, 3, 17, 1000, 4097])
def test_it_is_a_permutation(n):
    np.testing.assert_array_equal(np.sort(shuffled(jnp.arange(n), n, jnp.uint32(5))), np.arange(n))


def test_every_place_is_equally_likely():
    """Of 12 examples over 3,000 seeds: the counts of (position, example) against even ones, by their chi-square."""
    seeds = jnp.arange(3000, dtype=jnp.uint32)
    found = np.asarray(jax.vmap(lambda s: shuffled(jnp.arange(12), 12, s))(seeds))
    counts = np.array([np.bincount(column, minlength=12) for column in found.T])
    statistic = ((counts - 250) ** 2 / 250).sum()
    assert 70 < statistic < 180  # 121 degrees of freedom, deviation 15.6
    follows = collections.Counter(zip(found[:, :-1].ravel().tolist(), found[:, 1:].ravel().tolist(), strict=True))
    expected = 3000 * 11 / (12 * 11)
    assert len(follows) == 132 and 80 < sum((c - expected) ** 2 / expected for c in follows.values()) < 190


def test_neighbours_part_and_seeds_differ():
    ids = np.asarray(shuffled(jnp.arange(10_000), 10_000, jnp.uint32(0)))
    other = np.asarray(shuffled(jnp.arange(10_000), 10_000, jnp.uint32(1)))
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(ids, other)[0, 1]) < 0.04 and (ids == other).sum() < 12


def test_a_billion_examples_need_no_memory():
    n = 2**30
    take = jax.jit(lambda x, seed: shuffled(x, n, seed))
    lowered = take.lower(jax.ShapeDtypeStruct((64,), jnp.int32), jax.ShapeDtypeStruct((), jnp.uint32)).compile()
    assert lowered.memory_analysis().temp_size_in_bytes < 10_000
    ids = np.asarray(take(jnp.arange(n - 64, n), jnp.uint32(7)))
    assert len(set(ids.tolist())) == 64 and ids.min() >= 0 and ids.max() < n and ids.std() > n / 10
    with pytest.raises(ConfigError, match=r"n=1073741825: between 1 and 2\*\*30 examples; beyond, draw from shards"):
        shuffled(jnp.arange(3), n + 1, jnp.uint32(0))


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.integers(0, 5), st.lists(st.integers(1, 7), min_size=1, max_size=9))
def test_position_takes_epochs_in_turn(seed, counts):
    """Whatever the sizes of the batches, the stream is whole permutations one after another."""
    position, stream = Position.make(7, seed=seed), []
    for count in counts:
        stream += take(position)[:count].tolist()
        position = position.advance(count)
    for start in range(0, len(stream), 7):
        epoch = stream[start : start + 7]
        assert len(set(epoch)) == len(epoch)
    assert int(position.epoch) * 7 + int(position.offset) == sum(counts)


take = jax.jit(lambda position: position.take(7))


def test_epochs_have_their_own_order():
    position = Position.make(50, seed=3)
    first, second = position.take(50), position.advance(50).take(50)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.sort(second), np.arange(50))


def test_bad_sizes():
    with pytest.raises(ConfigError, match="8 of 7 examples at once: draw between 1 and all of them"):
        Position.make(7, seed=0).take(8)
    with pytest.raises(ConfigError, match="n=0: between 1"):
        Position.make(0, seed=0)
    with pytest.raises(ConfigError, match="hosts=4 does not divide a batch of 6: choose a multiple"):
        of_host(jnp.arange(6), 0, 4)
    with pytest.raises(ConfigError, match="host=2 of hosts=2: must be from 0 to 1"):
        of_host(jnp.arange(6), 2, 2)
