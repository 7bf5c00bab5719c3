"""The Nadaraya-Watson sketch against kernel sums written out, and its sampler against its probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data import NWS, NWSketch, Spec, Uniform
from effjax.errors import ConfigError
from effjax.hashing.lsh import SignProjections

RNG = np.random.default_rng(0)
X, Q = RNG.normal(size=(60, 5)).astype(np.float32), RNG.normal(size=(20, 5)).astype(np.float32)
LOSSES = RNG.exponential(size=60).astype(np.float32)


def kernel(x, y, hashes):
    """The collision probability of two vectors, from their cosine."""
    cosine = x @ y / (np.linalg.norm(x) * np.linalg.norm(y))
    return (1 - np.arccos(np.clip(cosine, -1, 1)) / np.pi) ** hashes


def exact(hashes):
    k = np.array([[kernel(q, x, hashes) for x in X] for q in Q])
    return k @ LOSSES / k.sum(1)


def error(rows, groups=None, seed=0):
    lsh = SignProjections.make(jax.random.key(seed), dim=5, rows=rows, hashes=3)
    sketch = NWSketch.make(rows=rows, cells=8).insert(lsh(X), jnp.asarray(LOSSES))
    return float(np.mean(np.abs(np.asarray(sketch.query(lsh(Q), groups=groups)) / exact(3) - 1)))


def test_estimate_is_the_kernel_regression_and_errors_halve():
    few, many = error(64), error(1024)
    assert many < 0.02 and 2.5 < few / many < 6  # a fourth, for 16 times the rows
    assert error(1024, groups=16) < 0.05


def test_sums_are_those_of_a_loop_and_forgetting_keeps_the_ratio():
    codes = RNG.integers(0, 4, (60, 3))
    sketch = NWSketch.make(rows=3, cells=4)
    truth = np.zeros((3, 4, 2))
    for first in range(0, 60, 20):
        some = slice(first, first + 20)
        sketch = sketch.forget(0.5).insert(jnp.asarray(codes[some]), jnp.asarray(LOSSES[some]))
        truth *= 0.5
        for code, loss in zip(codes[some], LOSSES[some], strict=True):
            for row in range(3):
                truth[row, code[row]] += (loss, 1)
    np.testing.assert_allclose(sketch.sums.counts, truth, rtol=1e-5)
    query = jnp.array([[0, 1, 2]])
    sums = sum(truth[row, query[0, row]] for row in range(3))
    np.testing.assert_allclose(sketch.query(query), [sums[0] / sums[1]], rtol=1e-5)
    np.testing.assert_allclose(sketch.forget(1e-3).query(query), sketch.query(query), rtol=1e-5)


def test_what_was_never_near_has_the_mean():
    empty = NWSketch.make(rows=2, cells=4)
    assert empty.query(jnp.array([[0, 0]])).tolist() == [1.0]
    one_cell = empty.insert(jnp.zeros((2, 2), jnp.int32), jnp.array([1.0, 4.0]))
    assert one_cell.query(jnp.array([[0, 0], [3, 3]])).tolist() == [2.5, 2.5]


def filled(method, n=60, features=X):
    state = method.init(n, Spec(features=features, seed=1))
    ids = jnp.arange(n)
    sketch = state.sketch.insert(np.asarray(state.codes).astype(np.int32), jnp.asarray(LOSSES[ids] ** 3))
    return dataclasses.replace(state, sketch=sketch, steps=jnp.asarray(100))


def test_inclusion_follows_the_estimates_and_weights_undo_it():
    """2,000 draws of 8 of a pool of 32: shares within 4.5 deviations of theory; no bias with weights."""
    method = NWS(rows=32, hashes=4, pool=4, weighted=True)
    state = filled(method)
    pool = np.asarray(state.position.take(32))
    p = np.asarray(method.estimates(state, jnp.asarray(pool)), np.float64)
    p = 8 * (0.7 * p / p.sum() + 0.3 / 32)
    assert p.max() < 1 and p.max() > 3 * p.min()
    keys = jax.random.split(jax.random.key(2), 2000)
    ids, weights = jax.jit(jax.vmap(lambda key: method.draw(state, key, 8)))(keys)
    share = np.array([(np.asarray(ids) == i).sum() / 2000 for i in pool])
    assert (np.abs(share - p) < 4.5 * np.sqrt(p * (1 - p) / 2000)).all()
    means = (np.asarray(weights) * LOSSES[ids]).mean(1)
    assert abs(means.mean() - LOSSES[pool].mean()) < 4.5 * means.std() / np.sqrt(2000)


def test_an_epoch_of_pools_offers_every_example_once():
    method = NWS(rows=4, hashes=2, pool=2, warmup=0)
    state, offered = method.init(60, Spec(features=X)), []

    @jax.jit
    def step(state):
        ids, weights = method.draw(state, jax.random.key(0), 5)
        return state.position.take(10), ids, weights, method.update(state, ids, jnp.ones(5))

    for _ in range(6):
        pool, ids, weights, state = step(state)
        assert set(ids.tolist()) <= set(pool.tolist()) and weights.tolist() == [1] * 5
        offered += pool.tolist()
    assert sorted(offered) == list(range(60)) and int(state.position.epoch) == 1


def test_a_pool_of_one_and_the_warm_up_are_uniform():
    state = NWS(pool=1, rows=4, hashes=2).init(60, Spec(features=X, seed=4))
    ids, weights = jax.jit(NWS(pool=1, rows=4, hashes=2, weighted=True).draw, static_argnums=2)(
        state, jax.random.key(0), 9
    )
    uniform = jax.jit(Uniform().draw, static_argnums=2)(Uniform().init(60, Spec(seed=4)), jax.random.key(0), 9)[0]
    np.testing.assert_array_equal(ids, uniform)
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


def test_features_by_a_function_are_hashed_alike_and_keep_nothing():
    """The same draws from codes that are kept and codes made when needed; 10**8 examples in 400 KB, uniform in 12."""
    table = jnp.asarray(X)
    method = NWS(rows=8, hashes=4, warmup=0)
    states = [method.init(60, Spec(features=f)) for f in (table, lambda ids: table[ids])]

    @jax.jit
    def step(state):
        return method.draw(method.update(state, jnp.arange(8), jnp.asarray(LOSSES[:8])), jax.random.key(3), 6)[0]

    np.testing.assert_array_equal(*map(step, states))

    many = NWS().init(10**8, Spec(features=lambda ids: jnp.sin(ids[:, None] * jnp.arange(1.0, 4.0))))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(many)) < 400_000
    ids, _ = jax.jit(NWS(warmup=0).draw, static_argnums=2)(many, jax.random.key(0), 16)
    assert len(set(ids.tolist())) == 16 and int(ids.max()) > 10**7
    uniform = Uniform().init(10**8, Spec())
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(uniform)) == 12


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: NWS().init(60, Spec()), r"by their features: give Spec\(features=...\), \[n, dim\]"),
        (lambda: NWS().init(61, Spec(features=X)), r"features \[60, 5\] for n=61: must be \[n, dim\]; flatten images"),
        (lambda: NWS(groups=5), "groups=5 does not divide rows=64: choose a divisor, or None"),
        (lambda: NWS(decay=0.0), "decay=0.0, uniform=0.3: above 0 and up to 1"),
        (lambda: NWS(hashes=17), "hashes from 1 to 16"),
    ],
)
def test_bad_settings(make, text):
    with pytest.raises(ConfigError, match=text):
        make()
