"""Scales of groups on a table against numpy: exhaustive search before rounding, least squares after it."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.arrays import Codebook
from effjax.quantize import GPTQ, LeanQuant
from effjax.quantize.group_scales import fit_scales, refit_scales, signed_peak
from tests.quantize.second_order import damped, inputs, layer_error, moment
from tests.quantize.test_gptq import compress, dense, statistics, weights

fit = jax.jit(fit_scales, static_argnums=2)


@functools.cache
def refit(passes):
    return jax.jit(functools.partial(refit_scales, dtype="float32", passes=passes))


def rounding_error(w, scale, table):
    """Squared error of one group of one column at the nearest multiples."""
    return float(np.square(w[:, None] - scale * table).min(1).sum())


@given(st.sampled_from([2, 4, 8]), st.integers(0, 50))
@settings(max_examples=15)
def test_fitted_scales_are_near_the_best(entries, seed):
    """Against ten thousand scales of both signs for every group; the stored scale is never zero."""
    rng = np.random.default_rng(seed)
    groups = rng.standard_t(5, (3, 16, 2)).astype(np.float32)
    table = np.sort(rng.uniform(-1, 1, (entries, 2)), axis=0).astype(np.float32)
    table[-1] = 1
    scales = np.asarray(fit(groups, table, "float16"))
    assert scales.shape == (3, 1, 2) and (scales == scales.astype(np.float16)).all() and (scales != 0).all()
    found = best = peak = 0.0
    for g in range(3):
        for o in range(2):
            w, column = groups[g, :, o].astype(np.float64), table[:, o].astype(np.float64)
            tried = np.linspace(-2, 2, 10_001) * np.abs(w).max()
            errors = np.square(w[:, None, None] - tried[:, None] * column).min(2).sum(0)
            found += rounding_error(w, scales[g, 0, o], column)
            best += errors.min()
            peak += rounding_error(w, w[np.abs(w).argmax()], column)
    assert best * 0.999 <= found <= peak * 1.001
    assert found <= 1.15 * best


def test_the_scale_takes_the_sign_of_the_largest_weight():
    groups = jnp.array([[[1.0, 0.0], [-3.0, 0.0]], [[2.0, -0.25], [1.0, 0.25]]])
    np.testing.assert_array_equal(signed_peak(groups, "float16")[:, 0], [[-3.0, 1.0], [2.0, 0.25]])
    # A table that reaches one way only fits a group that reaches the other way by a negative scale.
    table = jnp.array([0.0, 1.0])[:, None]
    assert fit(jnp.array([[-4.0], [0.0], [-4.0]]), table, "float32").tolist() == [[-4.0]]
    # Zeros, and weights too small for the dtype of the scales, leave a scale that can be divided by.
    assert fit(jnp.array([[[0.0], [0.0]], [[1e-9], [-1e-10]]]), table, "float16").ravel().tolist() == [1.0, 1.0]


def problem(groups, size, out, seed):
    rng = np.random.default_rng(seed)
    n = groups * size
    h = damped(moment(inputs(n, seed=seed)), 0.1)
    values = rng.choice([-1.0, -0.3, 0.2, 1.0], (n, out))
    scales = rng.standard_normal((groups, out))
    w = np.repeat(scales, size, 0) * values + 0.3 * rng.standard_normal((n, out))
    return h, values, scales, w


@given(st.sampled_from([(1, 8, 3), (4, 6, 3), (5, 8, 2)]), st.integers(0, 50))
@settings(max_examples=10)
def test_refitted_scales_go_to_the_joint_optimum(shape, seed):
    """Many passes end at the solution of the linear system of all scales of a column; every pass loses less."""
    groups, size, out = shape
    h, values, scales, w = problem(groups, size, out, seed)
    wanted = np.empty_like(scales)
    for o in range(out):
        spread = np.zeros((groups * size, groups))
        spread[np.arange(groups * size), np.arange(groups * size) // size] = values[:, o]
        wanted[:, o] = np.linalg.solve(spread.T @ h @ spread, spread.T @ h @ w[:, o])

    def loss(scales):
        return layer_error(w, np.repeat(np.asarray(scales, np.float64), size, 0) * values, h)

    args = (jnp.asarray(x, jnp.float32) for x in (scales * 1.3, values, w, h))
    start, *rest = args
    found = [loss(refit(passes)(start, *rest)) for passes in (1, 2, 40)]
    assert loss(start) * (1 + 1e-5) >= found[0] >= found[1] * (1 - 1e-5) and found[1] >= found[2] * (1 - 1e-5)
    assert found[2] == pytest.approx(loss(wanted), rel=1e-2)


def test_refitted_scales_are_kept_where_they_would_vanish():
    """A group whose values are all zero has no best scale; a best scale of zero is none; both keep what they had."""
    values = jnp.array([0.0, 0.0, 1.0, 1.0, 1.0, 2.0])[:, None]
    w = jnp.array([1.0, 2.0, 1.0, -1.0, 3.0, 6.0])[:, None]
    scales = refit_scales(jnp.full((3, 1), 0.5), values, w, jnp.eye(6), "float16")
    np.testing.assert_array_equal(scales.ravel(), [0.5, 0.5, 3.0])


@pytest.mark.parametrize("act_order", [False, True])
def test_groups_lose_less(act_order):
    """Less than GPTQ's grids of the same groups, and than a table alone; moving one group's scales makes it worse."""
    w, x = weights(128, 32), inputs(128, rows=600)
    w *= np.exp(np.repeat(np.random.default_rng(3).standard_normal((8, 32)), 16, 0))  # groups that need their scales
    h, stats = moment(x), statistics(x)
    q = compress(LeanQuant(bits=3, group_size=16, act_order=act_order), w, stats)
    assert isinstance(q, Codebook) and q.scales is not None and 0.2 < float((q.scales < 0).mean()) < 0.8
    lean = layer_error(w, dense(q), h)
    grids = GPTQ(bits=3, group_size=16, act_order=act_order, static_groups=act_order)
    assert lean < 0.8 * layer_error(w, dense(compress(grids, w, stats)), h)
    assert lean < 0.8 * layer_error(w, dense(compress(LeanQuant(bits=3, act_order=act_order), w, stats)), h)
    with_damping = damped(h, 0.1)
    least = layer_error(w, dense(q), with_damping)
    for factor in (0.98, 1.02):
        for group in range(8):
            moved = q.replace(scales=q.scales.astype(jnp.float32).at[group].multiply(factor))
            assert layer_error(w, dense(moved), with_damping) > least


def test_products_take_negative_scales():
    """The kernel of the CPU, the reference, and a leaf made ready, against the dense matrix."""
    w, x = weights(64, 48), inputs(64)
    q = compress(LeanQuant(bits=4, group_size=16), w, statistics(x))
    assert float(q.scales.min()) < 0 < float(q.scales.max())
    wanted = x[:5] @ np.asarray(dense(q), np.float64)
    bound = 1e-5 * np.abs(wanted).max()
    for implementation in ("reference", None):
        np.testing.assert_allclose(ej.ops.matmul(x[:5], q, implementation=implementation), wanted, rtol=0, atol=bound)
    ready = ej.prepare({"kernel": q})["kernel"]
    np.testing.assert_allclose(ej.ops.matmul(x[:5], ready), wanted, rtol=0, atol=bound)
