"""SqueezeLLM against sklearn-like k-means and against the optimum, in plain float64 numpy."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.errors import CalibrationError
from effjax.lift.calibrate import InputStats
from effjax.quantize import SqueezeLLM
from effjax.quantize.split import split_start


def stats_of(fisher, lead=()):
    return InputStats(count=jnp.ones(lead), fisher_sum=jnp.asarray(fisher), examples=jnp.ones(lead))


@jax.jit
def materialized(q):
    return q.materialize()


started = jax.jit(split_start, static_argnums=2)
compressed = jax.jit(lambda method, w, fisher: method.compress(w, stats=stats_of(fisher)), static_argnums=0)


def optimum(x, weights, entries):
    """The least weighted squared error of any table, by dynamic programming over the sorted points."""
    order = np.argsort(x)
    x, weights = x[order].astype(np.float64), weights[order].astype(np.float64)
    total, first, second = (np.r_[0, np.cumsum(weights * x**power)] for power in range(3))
    mass = total - total[:, None]
    cost = (second - second[:, None]) - np.where(
        mass > 0, (first - first[:, None]) ** 2 / np.where(mass > 0, mass, 1), 0
    )
    cost[np.tril_indices(len(cost), -1)] = np.inf
    best = np.r_[0, np.full(len(x), np.inf)]
    for _ in range(entries):
        best = (best[:, None] + cost).min(0)
    return max(best[-1], 0)


def split_and_lloyd(x, weights, entries, iterations=50):
    """The method itself, point by point with loops."""
    order = np.argsort(x, kind="stable")
    x, weights = x[order].astype(np.float64), weights[order].astype(np.float64)

    def error(a, b):
        mean = np.average(x[a:b], weights=weights[a:b])
        return (weights[a:b] * (x[a:b] - mean) ** 2).sum()

    edges = [0, len(x)]
    for _ in range(entries - 1):
        cuts = [
            (error(a, b) - error(a, i) - error(i, b), i)
            for a, b in zip(edges[:-1], edges[1:], strict=True)
            for i in range(a + 1, b)
        ]
        edges = sorted([*edges, max(cuts)[1]])
    table = np.array([np.average(x[a:b], weights=weights[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)])
    for _ in range(iterations):
        code = np.abs(x[:, None] - table).argmin(1)
        table = np.array(
            [
                np.average(x[code == k], weights=weights[code == k]) if (code == k).any() else table[k]
                for k in range(entries)
            ]
        )
    return table


def loss(w, dense, fisher):
    return (fisher * (np.asarray(dense, np.float64) - w) ** 2).sum(0)


def problem(n, out, seed, spread=1.5):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, out)).astype(np.float32)
    return w, np.exp(spread * rng.standard_normal((n, out))).astype(np.float32)


@pytest.mark.parametrize(("n", "out", "bits"), [(48, 5, 2), (48, 5, 3), (61, 3, 4)])
def test_oracle(n, out, bits):
    """Tables and error of the same algorithm written with loops; the layer's error within 1 %."""
    w, fisher = problem(n, out, bits)
    q = compressed(SqueezeLLM(bits=bits, table_dtype="float32"), w, fisher)
    tables = np.stack([split_and_lloyd(w[:, o], fisher[:, o], 2**bits) for o in range(out)])
    assert (q.tables.shape, q.bits) == ((1, out, 2**bits), bits)
    np.testing.assert_allclose(q.tables[0], tables, rtol=1e-3, atol=1e-4)
    want = np.stack([tables[o][np.abs(w[:, o, None] - tables[o]).argmin(1)] for o in range(out)], 1)
    np.testing.assert_allclose(materialized(q), want, rtol=1e-3, atol=1e-4)
    moment = np.cov(np.random.default_rng(0).standard_normal((n, 3 * n)))
    ours, theirs = (np.trace((d - w).T @ moment @ (d - w)) for d in (np.asarray(materialized(q)), want))
    assert abs(ours / theirs - 1) < 0.01


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3]), st.sampled_from([0.5, 2.0]))
@settings(max_examples=10)
def test_close_to_the_optimum(seed, bits, spread):
    """The error of no column is far above the least possible one, whatever the spread of the weights."""
    w, fisher = problem(64, 8, seed, spread)
    q = compressed(SqueezeLLM(bits=bits, table_dtype="float32"), w, fisher)
    best = np.array([optimum(w[:, o], fisher[:, o], 2**bits) for o in range(8)])
    ratio = loss(w, materialized(q), fisher) / best
    assert ratio.min() > 0.999 and ratio.max() < 1.6 and ratio.mean() < 1.2


def test_fisher_decides_where_values_lie():
    """Weights that matter come nearer to their value; a Fisher diagonal of ones is plain k-means."""
    w, _ = problem(256, 8, 0)
    fisher = np.where(np.abs(w) > 1.5, 100.0, 1.0).astype(np.float32)
    large = np.abs(w) > 1.5
    weighted, plain = (
        np.abs(np.asarray(materialized(compressed(SqueezeLLM(bits=2), w, f))) - w) for f in (fisher, np.ones_like(w))
    )
    assert weighted[large].mean() < 0.5 * plain[large].mean()
    assert weighted[~large].mean() > plain[~large].mean()


def test_scale_of_the_fisher_does_not_matter():
    w, fisher = problem(32, 4, 3)
    a, b = (compressed(SqueezeLLM(bits=3), w, f) for f in (fisher, fisher * 2.0**-40))
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.tables, b.tables)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_edges(bits):
    """Zeros, constants, few distinct values, a Fisher diagonal of zeros: exact where a table can be, finite always."""
    w, fisher = problem(24, 6, 0)
    w[:, 0], w[:, 1] = 0, -0.75
    w[:, 2] = np.where(np.arange(24) < 7, 0.25, -3)
    fisher[:, 3], fisher[:12, 4] = 0, 0
    q = compressed(SqueezeLLM(bits=bits), w, fisher)
    dense = np.asarray(materialized(q))
    np.testing.assert_array_equal(dense[:, :3], w[:, :3])
    assert np.isfinite(dense).all() and (np.diff(np.asarray(q.tables, np.float32), axis=-1) >= 0).all()
    plain = np.asarray(materialized(compressed(SqueezeLLM(bits=bits), w, np.ones_like(w))))
    np.testing.assert_array_equal(dense[:, 3], plain[:, 3])
    if bits == 8:  # more entries than weights; only where nothing weighs need no entry be
        np.testing.assert_allclose(dense[fisher > 0], w[fisher > 0], rtol=2**-10)


def test_zeros_do_not_count():
    """A column that is half zeros spends its table on the others."""
    w, fisher = problem(32, 1, 1)
    w[::2] = 0
    dense = np.asarray(materialized(compressed(SqueezeLLM(bits=4), w, fisher)))
    np.testing.assert_allclose(dense[1::2], w[1::2], rtol=2**-10)


@given(st.sampled_from([(1, 1, 1), (7, 2, 3), (33, 1, 2)]), st.integers(0, 2**32 - 1))
@settings(max_examples=10)
def test_start(shape, seed):
    """Sorted, inside the range, and exact with as many centres as distinct points."""
    n, out, bits = shape
    w, fisher = problem(n, out, seed)
    start = np.asarray(started(w, fisher, 2**bits))
    assert (np.diff(start, axis=0) >= 0).all()
    assert (start >= w.min(0)).all() and (start <= w.max(0)).all()
    if 2**bits >= n:
        np.testing.assert_allclose(np.abs(w[:, None] - start).min(1), 0, atol=1e-5)


def test_through_calibration():
    """Gradients of a real loss; the important output keeps its weights better in the metric of the loss."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.standard_normal((32, 4)), jnp.float32)}
    x = jnp.asarray(rng.standard_normal((8, 16, 32)) * np.r_[np.full(4, 20.0), np.ones(28)], jnp.float32)

    def fn(p, x):
        return x @ p["kernel"]

    def half_square(p, x):
        return jnp.square(fn(p, x)).sum() / 2

    method = SqueezeLLM(bits=2)
    stats = ej.calibrate(fn, params, [x], needs=method.needs, loss=half_square)
    error = np.abs(ej.quantize_params(params, method, stats=stats)["kernel"].materialize() - params["kernel"])
    assert error[:4].mean() < 0.5 * error[4:].mean()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 0}, "bits=0: choose 1 to 8"),
        ({"iterations": -1}, r"iterations=-1: 0 \(the start alone\) or more"),
        ({"table_dtype": "int8"}, "table_dtype='int8' is no floating dtype"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        SqueezeLLM(**options)


def test_statistics_that_are_missing():
    params = {"kernel": jnp.ones((8, 4))}
    with pytest.raises(CalibrationError, match=r"^kernel: SqueezeLLM needs \['fisher'\] of its inputs"):
        ej.quantize_params(params, SqueezeLLM())
    with pytest.raises(CalibrationError, match="these statistics lack 'fisher': calibrate with needs={'fisher'}"):
        ej.quantize_params(params, SqueezeLLM(), stats={"kernel": InputStats(count=jnp.float32(4))})
