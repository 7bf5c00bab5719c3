"""Families of integer hashes: exact values, uniformity and independence, on keys that break weak ones."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.hashing.integers import MultiplyShift, Murmur, Tabulation, multiply_high, murmur3, to_range

FAMILIES = [MultiplyShift, Tabulation, Murmur]
N = 4096
KEYS = {
    "progression": np.arange(N) * 1000,
    "large progression": np.arange(N, dtype=np.int64) * 0x9E3779B1,
    "dense block": np.arange(N) + 12345,
    "upper bits": np.arange(N, dtype=np.int64) << 20,
    "two blocks of bits": (np.arange(N) & 63) | ((np.arange(N) >> 6) << 26),
    "random": np.random.default_rng(0).integers(0, 2**32, N),
}
KEYS = {name: (keys % 2**32).astype(np.uint32) for name, keys in KEYS.items()}
POWERS = np.concatenate([2 ** np.arange(32, dtype=np.uint64), 2 ** np.arange(32, dtype=np.uint64) - 1])
POWERS = np.unique(POWERS).astype(np.uint32)


@functools.cache
def hasher(family):
    return jax.jit(lambda key, keys: family.make(key, functions=(64,))(keys))


def hashes(family, keys, seed=0):
    return np.asarray(hasher(family)(jax.random.key(seed), jnp.asarray(keys)))


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_multiply_high_is_exact(x, y):
    assert int(multiply_high(jnp.uint32(x), jnp.uint32(y))) == x * y >> 32


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(1, 2**31))
def test_to_range_is_exact(x, buckets):
    assert int(to_range(jnp.uint32(x), buckets)) == x * buckets >> 32


@pytest.mark.parametrize(
    ("words", "seed", "want"),
    [  # of the reference implementation's verification lists
        ([], 0, 0), ([], 1, 0x514E28B7), ([], 0xFFFFFFFF, 0x81F16F39),
        ([0xFFFFFFFF], 0, 0x76293B50), ([0x87654321], 0, 0xF55B516B), ([0], 0, 0x2362F9DE),
        ([0x87654321], 0x5082EDEE, 0x2362F9DE), ([0x61616161], 0x9747B28C, 0x5A97808A),
    ],
)  # fmt: skip
def test_murmur3_is_the_published_one(words, seed, want):
    assert int(murmur3(jnp.array(words, jnp.uint32), jnp.uint32(seed))) == want


def test_multiply_shift_is_its_formula():
    family = MultiplyShift.make(jax.random.key(3), functions=(2, 5), words=3)
    keys = np.random.default_rng(0).integers(0, 2**32, (7, 2, 5, 3), dtype=np.uint64)
    got = jax.jit(lambda f, k: f.of_words(k))(family, jnp.asarray(keys, jnp.uint32))
    a, b = (np.asarray(x).astype(object) for x in (family.multiplier, family.addend))
    a, b = a[..., 0] + (a[..., 1] << 32), b[..., 0] + (b[..., 1] << 32)
    want = (((a * keys.astype(object)).sum(-1) + b) % 2**64) >> 32
    np.testing.assert_array_equal(np.asarray(got).astype(object), want)


def test_tabulation_is_its_formula():
    family = Tabulation.make(jax.random.key(3), functions=(2, 3))
    keys = np.random.default_rng(0).integers(0, 2**32, (4, 5), dtype=np.uint32)
    tables, got = np.asarray(family.tables), np.asarray(family(jnp.asarray(keys)))
    assert got.shape == (4, 5, 2, 3)
    for place in np.ndindex(4, 5):
        parts = [tables[:, :, i, (int(keys[place]) >> 8 * i) & 255] for i in range(4)]
        np.testing.assert_array_equal(got[place], functools.reduce(np.bitwise_xor, parts))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_cells_are_uniform_on_structured_keys(family):
    """Chi-square of 64 functions, over its degrees of freedom.

    Multiply-shift promises pairs alone, hence a mean of 1 over all functions: on progressions most are far more even
    than random and a few are far less, as many as Markov's inequality allows.
    """
    for name, keys in KEYS.items():
        for buckets in (64, 100):
            cells = np.asarray(to_range(jnp.asarray(hashes(family, keys)), buckets))
            counts = np.stack([np.bincount(column, minlength=buckets) for column in cells.T])
            expected = N / buckets
            statistic = ((counts - expected) ** 2 / expected).sum(1) / (buckets - 1)
            if family is MultiplyShift:
                assert np.median(statistic) < 1.3 and (statistic > 4).mean() < 1 / 4, (name, buckets)
            else:
                assert 0.85 < statistic.mean() < 1.15 and statistic.max() < 2.5, (name, buckets)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_pairs_are_independent(family):
    """Two different keys share one of 16 cells with probability 1/16, and are in each pair of cells equally often.

    Over 2,048 functions the share of one pair of keys has a deviation of 0.0053; the keys include all powers of two.
    """
    drawn = np.concatenate([hashes(family, POWERS, seed) for seed in range(32)], axis=1)
    cells = drawn >> 28
    shares = (cells[:, None] == cells[None]).mean(-1)[np.triu_indices(len(POWERS), 1)]
    assert abs(shares.mean() - 1 / 16) < 0.001
    assert np.abs(shares - 1 / 16).max() < 5.5 * 0.0054
    joint = np.zeros((16, 16))
    for i in range(len(POWERS) - 1):
        np.add.at(joint, (cells[i], cells[i + 1]), 1)
    joint /= joint.sum()
    assert np.abs(joint * 256 - 1).max() < 0.25


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_vmap_over_functions_and_keys(family):
    made = family.make(jax.random.key(0), functions=(3,))
    keys = jnp.arange(10, dtype=jnp.uint32) * 77
    want = made(keys)
    assert want.dtype == jnp.uint32
    np.testing.assert_array_equal(jax.vmap(made)(keys), want)
    np.testing.assert_array_equal(jax.vmap(lambda f: f(keys), out_axes=-1)(made), want)
    assert jax.eval_shape(made, keys).shape == (10, 3)
    other = family.make(jax.random.key(1), functions=(3,))(keys)
    assert not np.array_equal(want, other)


def test_wrong_options():
    with pytest.raises(ValueError, match="^buckets=0: between 1 and 2"):
        to_range(jnp.uint32(1), 0)
    with pytest.raises(ValueError, match="^words=0: a key has at least 1 word$"):
        MultiplyShift.make(jax.random.key(0), words=0)
