"""KVQuant against its definition in plain numpy: ranges, levels, exact entries, moments, bytes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.kv import KVQuant
from effjax.kv.coding import fit


def vectors(shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[-1])) + 1).astype(np.float32)


def nearest(z, levels):
    return np.abs(z[..., None] - levels.astype(np.float64)).argmin(-1)


@pytest.mark.parametrize("outliers", [0, 1])
@pytest.mark.parametrize("bits", [1, 3])
def test_keys_equal_the_definition(bits, outliers):
    x, grads, new = vectors((2, 300, 8)), vectors((2, 300, 8), 1), vectors((2, 20, 8), 2)
    coder = fit(KVQuant(bits=bits, head_dim=8, outliers=outliers).keys, jnp.asarray(x), jnp.asarray(grads))
    share = outliers / 8
    low, high = np.quantile(x, [share / 2, 1 - share / 2], axis=1)
    zero, half = (np.asarray(coder.tables[name], np.float64)[:, 0] for name in ("zero", "half"))
    np.testing.assert_allclose(zero, (low + high) / 2, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(half, (high - low) / 2, rtol=2e-3)
    levels = np.asarray(coder.tables["levels"])
    z = (new - zero[:, None]) / half[:, None]
    wanted = zero[:, None] + half[:, None] * levels[nearest(z, levels)]
    for h, t in np.ndindex(2, 20):
        for c in np.argsort(-np.abs(z[h, t]))[:outliers]:
            wanted[h, t, c] = np.float16(new[h, t, c])
    found = np.asarray(coder.decode(coder.encode(jnp.asarray(new))))
    assert np.isclose(found, wanted, atol=1e-3).mean() > 0.99
    assert coder.encode(jnp.asarray(new)).nbytes == 2 * 20 * (bits + 3 * outliers)
    assert coder.nbytes == 2 * (2 * 2**bits + 2 * 2 * 8)


@pytest.mark.parametrize("outliers", [0, 2])
def test_values_equal_the_definition(outliers):
    x, grads, new = vectors((2, 300, 8)), vectors((2, 300, 8), 1), vectors((2, 20, 8), 2)
    coder = fit(KVQuant(bits=2, head_dim=8, outliers=outliers).values, jnp.asarray(x), jnp.asarray(grads))
    levels = np.asarray(coder.tables["levels"])
    wanted = new.astype(np.float64)
    for h, t in np.ndindex(2, 20):
        vector = new[h, t]
        far = set(np.argsort(-np.abs(vector - vector.mean()))[:outliers].tolist())
        rest = np.array([c not in far for c in range(8)])
        zero = float(np.float16((vector[rest].min() + vector[rest].max()) / 2))
        half = float(np.float16(np.ptp(vector[rest]) / 2))
        values = zero + half * levels[nearest((vector - zero) / half, levels)]
        wanted[h, t] = np.where(rest, values, np.float16(vector))
    found = np.asarray(coder.decode(coder.encode(jnp.asarray(new))))
    assert np.isclose(found, wanted, atol=2e-3).mean() > 0.99
    assert coder.encode(jnp.asarray(new)).nbytes == 2 * 20 * (2 + 4 + 3 * outliers)


def test_levels_are_weighted_means_of_their_numbers():
    """The levels are a fixed point of Lloyd's steps under squared gradients times squared ranges."""
    x, grads = vectors((2, 400, 4)), vectors((2, 400, 4), 1) * np.array([1, 2, 3, 10], np.float32)
    tables = KVQuant(bits=2, head_dim=4, iterations=200).keys.learn(jnp.asarray(x), jnp.asarray(grads))
    zero, half, levels = (np.asarray(tables[name], np.float64) for name in ("zero", "half", "levels"))
    z, weights = ((x - zero) / half).ravel(), np.square(grads * half).ravel()
    codes = nearest(z, levels)
    means = [np.average(z[codes == k], weights=weights[codes == k]) for k in range(4)]
    np.testing.assert_allclose(levels, means, atol=3e-3)
    plain = KVQuant(bits=2, head_dim=4, fisher=False).keys.learn(jnp.asarray(x))
    assert not np.allclose(np.asarray(plain["levels"], np.float64), levels, atol=0.01)


def test_q_norm_keeps_mean_and_deviation():
    x = jnp.asarray(vectors((1, 2000, 4)))
    plain, norm = (
        fit(KVQuant(bits=2, head_dim=4, fisher=False, q_norm=q_norm).keys, x, key=None) for q_norm in (False, True)
    )
    zero, half = (np.asarray(norm.tables[name], np.float64) for name in ("zero", "half"))
    z = (np.asarray(x) - zero) / half
    found = {
        name: (np.asarray(coder.decode(coder.encode(x))) - zero) / half
        for name, coder in (("plain", plain), ("norm", norm))
    }
    assert abs(found["norm"].mean() - z.mean()) < 2e-3 and abs(found["norm"].std() - z.std()) < 2e-3
    assert found["plain"].std() < z.std() - 5e-3, "means of intervals spread less than what they stand for"
    chex.assert_trees_all_equal(plain.encode(x), norm.encode(x))


def test_outliers_stay_exact():
    x = vectors((2, 50, 8))
    spiked = x.copy()
    spiked[:, ::2, 3] = 500.0
    method = KVQuant(bits=2, head_dim=8, outliers=1, fisher=False)
    for coding in (method.keys, method.values):
        coder = fit(coding, jnp.asarray(x))
        back = np.asarray(coder.decode(coder.encode(jnp.asarray(spiked))))
        np.testing.assert_array_equal(back[:, ::2, 3], 500.0)
        others = [c for c in range(8) if c != 3]
        assert np.abs(back - spiked)[..., others].max() < np.ptp(x)


def test_slots_move_and_everything_compiles():
    x = jnp.asarray(vectors((2, 50, 8)))
    slots = jnp.asarray([[3, 1, 49], [0, 7, 7]])
    method = KVQuant(bits=3, head_dim=8, outliers=1, fisher=False, q_norm=True)
    for coding in (method.keys, method.values):
        coder = fit(coding, x)
        coded = coder.encode(x)
        chex.assert_trees_all_equal(jax.jit(lambda c, x: c.encode(x))(coder, x), coded)
        moved = jnp.take_along_axis(coder.decode(coded), slots[..., None], 1)
        chex.assert_trees_all_equal(coder.decode(coded.take(slots)), moved)
        assert coder.bits_per_channel((1, 2, 50, 8), tables=False) == 8 * coded.nbytes / x.size
        shapes = jax.eval_shape(lambda y, c=coding: c.learn(y), x)
        chex.assert_trees_all_equal_shapes_and_dtypes(shapes, coder.tables)


def test_refused():
    with pytest.raises(ConfigError, match="needs the gradients .*or write fisher=False"):
        KVQuant(head_dim=8).keys.learn(jnp.zeros((2, 10, 8)))
    with pytest.raises(ConfigError, match=r"the vectors have shape \(2, 10, 4\); write head_dim=4"):
        KVQuant(head_dim=8, fisher=False).values.learn(jnp.zeros((2, 10, 4)))
    for fields, message in (
        ({"outliers": 8}, "outliers=8: choose fewer than head_dim=8"),
        ({"outliers": -1}, "outliers=-1: choose a whole number of at least 0"),
        ({"bits": 0}, "bits=0: choose 1 to 8"),
        ({"iterations": 1.5}, "iterations=1.5: choose a whole number of at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            KVQuant(**{"head_dim": 8} | fields)
