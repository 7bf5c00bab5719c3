"""The triangular factor and the sweep against plain optimal brain quantization, which inverts a Hessian a step."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from effjax.quantize.hessian import activation_order, dead_inputs, inverse_factor
from effjax.quantize.one_by_one import one_by_one
from effjax.quantize.sweep import sweep
from tests.quantize.second_order import damped, inputs, moment, obq

factor = jax.jit(inverse_factor, static_argnums=1)


@given(st.sampled_from([1, 2, 17, 40]), st.sampled_from([0.001, 0.01, 0.1]), st.integers(0, 10))
@settings(max_examples=15)
def test_factor(n, damping, seed):
    h = moment(inputs(n, seed=seed))
    u = np.asarray(factor(jnp.asarray(h, jnp.float32), damping), np.float64)
    assert np.all(np.tril(u, -1) == 0) and np.all(np.diag(u) > 0)
    inverse = np.linalg.inv(damped(h, damping))
    np.testing.assert_allclose(u.T @ u, inverse, atol=2e-3 * np.abs(inverse).max())
    for j in range(n):  # the diagonal is that of the inverse Hessian of the inputs from j on
        rest = np.linalg.inv(damped(h, damping)[j:, j:])
        np.testing.assert_allclose(u[j, j] ** 2, rest[0, 0], rtol=5e-3)


def test_dead_inputs_and_order():
    x = inputs(12)
    x[:, [3, 7]] = 0
    h = jnp.asarray(moment(x), jnp.float32)
    assert np.flatnonzero(dead_inputs(h)).tolist() == [3, 7]
    order = activation_order(h)
    assert order[-2:].tolist() == [3, 7] and np.all(np.diff(np.diag(h)[order]) <= 0)
    u = np.asarray(inverse_factor(h, 0.01, order), np.float64)
    wanted = np.linalg.inv(damped(np.asarray(h, np.float64), 0.01)[np.ix_(order, order)])
    np.testing.assert_allclose(u.T @ u, wanted, atol=1e-3 * np.abs(wanted).max())


def test_fewer_rows_than_inputs():
    """A singular Hessian without damping: the damping grows until there is a factor."""
    h = jnp.asarray(moment(inputs(32, rows=4)), jnp.float32)
    u = np.asarray(factor(h, 0.0))
    assert np.isfinite(u).all() and np.all(np.diag(u) > 0)
    np.testing.assert_array_equal(u, factor(h, 0.0))


def round_row(row, step):
    codes = jnp.clip(jnp.round(row / step) + 8, 0, 15)
    return codes.astype(jnp.uint8), step * (codes - 8)


@pytest.mark.parametrize("n, out, block", [(1, 1, 128), (7, 3, 4), (24, 5, 8), (33, 4, 8), (33, 2, 128)])
def test_sweep_is_optimal_brain_quantization(n, out, block):
    """At any block size, also where blocks do not divide the inputs."""
    x, w = inputs(n), np.random.default_rng(1).standard_normal((n, out)).astype(np.float32)
    u = factor(jnp.asarray(moment(x), jnp.float32), 0.01)
    swept = jax.jit(lambda w, u: sweep(w, u, round_row, grid_of_row=lambda j: 0.5, block=block))(w, u)
    values = 0.5 * (np.asarray(swept.codes, np.float64) - 8)
    wanted, loss = obq(w, moment(x), 0.01, lambda j, row, _: 0.5 * np.clip(np.round(row / 0.5), -8, 7))
    np.testing.assert_array_equal(values, wanted)
    np.testing.assert_allclose(swept.loss, loss, rtol=2e-3, atol=1e-5)


def test_grids_of_blocks_see_repaired_weights():
    """A grid made when its block begins knows the errors of the blocks before."""
    n, out, size = 24, 4, 8
    x, w = inputs(n), np.random.default_rng(2).standard_normal((n, out)).astype(np.float32)
    u = factor(jnp.asarray(moment(x), jnp.float32), 0.01)

    def grid(block):
        return jnp.abs(block).max(0) / 7

    swept = jax.jit(lambda w, u: sweep(w, u, round_row, grid_of_block=grid, block=size))(w, u)
    steps = {}

    def quantize(j, row, current):
        if j % size == 0:
            steps[j // size] = np.abs(current[j : j + size]).max(0) / 7
        return steps[j // size] * np.clip(np.round(row / steps[j // size]), -8, 7)

    wanted, _ = obq(w, moment(x), 0.01, quantize)
    np.testing.assert_allclose(swept.grids, np.stack([steps[i] for i in range(3)]), rtol=1e-4)
    values = np.repeat(np.asarray(swept.grids), size, axis=0) * (np.asarray(swept.codes, np.float64) - 8)
    np.testing.assert_allclose(values, wanted, rtol=1e-3, atol=1e-4)


def test_one_by_one_gives_the_bytes_of_one():
    rng = np.random.default_rng(0)
    w, h = rng.standard_normal((2, 3, 40, 8)).astype(np.float32), rng.standard_normal((2, 3, 40, 40))
    h = np.asarray(h @ np.swapaxes(h, -1, -2), np.float32)

    def fn(w, h):
        return {"y": jnp.linalg.cholesky(h + 40 * jnp.eye(40)) @ w}

    stacked = jax.jit(lambda w, h: one_by_one(fn, w, h))(w, h)["y"]
    outer = jax.jit(jax.vmap(lambda w, h: one_by_one(fn, w, h)))(w, h)["y"]
    single = jax.jit(lambda w, h: one_by_one(fn, w, h))
    for i in np.ndindex(2, 3):
        one = np.asarray(single(w[i], h[i])["y"])
        assert one.tobytes() == np.asarray(stacked[i]).tobytes() == np.asarray(outer[i]).tobytes()
