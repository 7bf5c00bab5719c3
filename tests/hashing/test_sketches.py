"""CountSketch and RACE: no bias, errors within their bounds, and merging that is addition, also over devices."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from effjax.hashing.count_sketch import CountSketch
from effjax.hashing.lsh import PStable, SignProjections
from effjax.hashing.race import Race

# Values with few bits: sums are exact in any order.
VALUES = np.random.default_rng(0).integers(-8, 9, 300).astype(np.float32)
ADVERSARIAL = (np.arange(300, dtype=np.uint64) << 22).astype(np.uint32)


def vector(keys, values):
    out = {}
    for key, value in zip(keys.tolist(), values.tolist(), strict=True):
        out[key] = out.get(key, 0) + value
    return out


@functools.partial(jax.jit, static_argnames="depth")
def estimates(key, keys, values, *, depth):
    return CountSketch.make(key, depth=depth, width=64).update(keys, values).query(keys)


@pytest.mark.parametrize("keys", [np.arange(300, dtype=np.uint32), ADVERSARIAL], ids=["dense", "upper bits"])
def test_count_sketch_has_no_bias_and_its_variance(keys):
    """Of one row, over 400 draws of the hashes; then the bound of the median of seven rows."""
    draws = jax.random.split(jax.random.key(0), 400)
    one = np.asarray(jax.vmap(lambda k: estimates(k, keys, jnp.asarray(VALUES), depth=1))(draws)) - VALUES
    bound = np.square(VALUES).sum() / 64
    assert abs(one.mean(0)).max() < 4.5 * np.sqrt(bound / 400)
    assert 0.9 * bound < np.square(one).mean() < 1.05 * bound
    seven = np.asarray(jax.vmap(lambda k: estimates(k, keys, jnp.asarray(VALUES), depth=7))(draws[:50])) - VALUES
    # Chebyshev for one row, Chernoff for the median: each row is off by 2 roots with at most 1/4.
    assert (np.abs(seven) > 2 * np.sqrt(bound)).mean() < np.exp(-7 / 24) / 10


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(-9, 9)), min_size=1, max_size=12))
def test_count_sketch_adds_repeated_keys(pairs):
    keys = np.zeros(12, np.uint32)
    values = np.zeros(12, np.float32)
    keys[: len(pairs)], values[: len(pairs)] = zip(*pairs, strict=True)
    got = wide(jax.random.key(1), keys, values)
    truth = vector(keys, values)
    np.testing.assert_array_equal(got, [truth[key] for key in keys.tolist()])


@jax.jit
def wide(key, keys, values):
    return CountSketch.make(key, depth=9, width=1 << 16).update(keys, values).query(keys)


def test_count_sketch_merges_by_addition():
    empty = CountSketch.make(jax.random.key(0), depth=3, width=32)
    keys, values = jnp.asarray(ADVERSARIAL), jnp.asarray(VALUES)
    update = jax.jit(CountSketch.update)
    whole = update(empty, keys, values)
    parts = [update(empty, keys[i::3], values[i::3]) for i in range(3)]
    merged = functools.reduce(CountSketch.merge, parts)
    np.testing.assert_array_equal(merged.table, whole.table)
    twice = jax.jit(jax.vmap(lambda v: empty.update(keys, v).query(keys)))(jnp.stack([values, 2 * values]))
    np.testing.assert_array_equal(twice[1], 2 * twice[0])
    with pytest.raises(ValueError, match=r"tables of \(3, 32\) and \(3, 16\) do not add up"):
        whole.merge(CountSketch.make(jax.random.key(0), depth=3, width=16))
    with pytest.raises(ValueError, match="^depth=0, width=4: at least 1 row"):
        CountSketch.make(jax.random.key(0), depth=0, width=4)


def points(n=64, dim=6):
    rng = np.random.default_rng(2)
    return jnp.asarray(rng.normal(size=(n, dim)), jnp.float32), jnp.asarray(rng.integers(-4, 9, n), jnp.float32)


@functools.cache
def hasher():
    return jax.jit(lambda key: PStable.make(key, dim=6, rows=40, hashes=2, width=4.0, buckets=8))(jax.random.key(0))


@jax.jit
def added(codes, weights):
    return Race.make(rows=40, buckets=8).add(codes, weights)


@pytest.mark.parametrize("kind", ["p-stable", "signs", "signs rehashed"])
def test_race_is_the_kernel_sum(kind):
    """The mean of 6,000 rows is within four standard errors of the sum of kernels: also where few cells are shared."""
    x, weights = points()
    queries, rows, key = x[:9] + 0.3, 6000, jax.random.key(5)
    if kind == "p-stable":
        lsh = PStable.make(key, dim=6, rows=rows, hashes=2, width=4.0, buckets=6)
    else:
        lsh = SignProjections.make(key, dim=6, rows=rows, hashes=4, buckets=None if kind == "signs" else 6)

    @jax.jit
    def ask(lsh):
        race = Race.make(rows=rows, buckets=lsh.buckets, rehashed=kind != "signs").add(lsh(x), weights)
        codes = lsh(queries)
        return race, codes, race.query(codes), race.query(codes, groups=5)

    race, codes, got, median = ask(lsh)
    want = lsh.kernel(queries[:, None], x) @ weights
    hit = np.asarray(race.counts)[np.arange(rows), np.asarray(codes)]
    error = hit.std(1) / np.sqrt(rows) / (1 - 1 / lsh.buckets)
    assert (np.abs(np.asarray(got - want)) < 4 * error).all()
    if kind != "signs":  # without the correction it would be off by far more
        assert (np.abs(hit.mean(1) - want) > 4 * error).any()
    np.testing.assert_allclose(median, want, atol=12 * error.max())


def test_race_error_falls_with_the_root_of_its_rows():
    x, weights = points()
    exact = None

    @functools.partial(jax.jit, static_argnames="rows")
    def query(keys, *, rows):
        def one(key):
            lsh = PStable.make(key, dim=6, rows=rows, hashes=2, width=4.0, buckets=8)
            return Race.make(rows=rows, buckets=8).add(lsh(x), weights).query(lsh(x))

        return jax.lax.map(one, keys)

    exact = np.asarray(hasher().kernel(x[:, None], x) @ weights)
    keys = jax.random.split(jax.random.key(1), 12)
    few, many = (np.sqrt(np.square(np.asarray(query(keys, rows=rows)) - exact).mean()) for rows in (32, 512))
    assert 0.8 * 4 < few / many < 1.2 * 4


def test_median_of_means_is_numpy_s_and_shrugs_off_broken_rows():
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 4, (20, 12)), jnp.int32)
    race = Race.make(rows=12, buckets=4, outputs=(3,)).add(codes, jnp.asarray(rng.normal(size=(20, 3)), jnp.float32))
    hit = np.asarray(race.counts)[np.arange(12), np.asarray(codes)]
    total = np.asarray(race.total)
    want = (np.median(hit.reshape(20, 4, 3, 3).mean(2), 1) - total / 4) / (3 / 4)
    np.testing.assert_allclose(race.query(codes, groups=4), want, atol=1e-5)
    broken = Race(counts=race.counts.at[2].set(1e6), total=race.total)
    assert np.abs(broken.query(codes, groups=4) - want).max() < 10 < np.abs(broken.query(codes) - want).min()
    np.testing.assert_array_equal(jax.vmap(race.query)(codes), race.query(codes))


def test_race_over_devices_merges_by_psum():
    """Eight devices add an eighth of the points each; the sum of their sketches is that of one device, bit by bit."""
    x, weights = points()
    lsh = hasher()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P())
    def spread(x, weights):
        return jax.lax.psum(added(lsh(x), weights), "data")

    codes = jax.jit(lsh)(x)
    alone, together = added(codes, weights), spread(x, weights)
    np.testing.assert_array_equal(together.counts, alone.counts)
    np.testing.assert_array_equal(together.total, alone.total)
    halves = added(codes[:32], weights[:32]).merge(added(codes[32:], weights[32:]))
    np.testing.assert_array_equal(halves.counts, alone.counts)


def test_forgetting_scales_everything():
    x, weights = points()
    codes = jax.jit(hasher())(x)
    race, ask = added(codes, weights), jax.jit(lambda race: race.query(codes))
    np.testing.assert_array_equal(ask(race.scaled(0.5)), 0.5 * ask(race))
    later = race.scaled(0.5).add(codes[:4], weights[:4])
    np.testing.assert_allclose(ask(later), 0.5 * ask(race) + ask(added(codes[:4], weights[:4])), atol=1e-5)


def test_wrong_race():
    race = Race.make(rows=6, buckets=4)
    with pytest.raises(ValueError, match="^groups=4 does not divide 6 rows: choose a divisor"):
        race.query(jnp.zeros((2, 6), jnp.int32), groups=4)
    with pytest.raises(ValueError, match="^rows=6, buckets=1: at least 1 row and 2 buckets$"):
        Race.make(rows=6, buckets=1)
    with pytest.raises(ValueError, match=r"counts of \(6, 4\) and \(6, 5\) do not add up"):
        race.merge(Race.make(rows=6, buckets=5))
