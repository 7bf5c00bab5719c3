"""LeanQuant against numpy: importance, tables, the affine search, the sweep on the learned grid."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.arrays import Codebook, Quantized
from effjax.errors import LeafError
from effjax.quantize import GPTQ, LeanQuant
from effjax.quantize.affine_search import search_affine
from effjax.quantize.leanquant import importance
from effjax.quantize.uniform import UniformGrid
from tests.quantize.second_order import damped, inputs, layer_error, moment, obq
from tests.quantize.test_gptq import compress, dense, statistics, weights
from tests.quantize.test_kmeans import cost, lloyd


def shares(h, p, damping):
    """`U_jj^-p` by the definition of `U`: the inverse Hessian of the inputs from j on."""
    h = damped(h, damping)
    diagonal = np.array([np.linalg.inv(h[j:, j:])[0, 0] for j in range(len(h))])
    return diagonal ** (-p / 2)


def test_importance():
    h = moment(inputs(20))
    u = np.linalg.cholesky(np.linalg.inv(damped(h, 0.1))).T
    for p in (0.0, 2.0, 4.0, 6.0):
        wanted = shares(h, p, 0.1)
        np.testing.assert_allclose(importance(jnp.asarray(u, jnp.float32), p), wanted / wanted.max(), rtol=1e-3)
    huge = jnp.diag(jnp.array([1e-12, 1.0, 1e12]))
    np.testing.assert_array_equal(importance(huge, 4.0), [1, 0, 0])  # 1e48 apart: no overflow


def is_table_of_lloyd(tables, points, weights_):
    """Tables `[out, entries]` as good as those of a plain Lloyd for `points [n, out]`."""
    for o in range(points.shape[1]):
        wanted = cost(points[:, o], weights_[:, o], lloyd(points[:, o], weights_[:, o], tables.shape[1]))
        assert cost(points[:, o], weights_[:, o], tables[o]) <= 1.05 * wanted + 1e-5 * np.ptp(points[:, o]) ** 2


@given(st.sampled_from([(24, 5), (33, 2)]), st.sampled_from([1, 2, 3, 5]), st.integers(0, 5))
@settings(max_examples=4)
def test_columns_oracle(shape, bits, seed):
    """Tables as good as those of a plain Lloyd, then the sweep rounds to the nearest entry of the stored table."""
    n, out = shape
    w, x = weights(n, out, seed), inputs(n, seed=seed)
    q = compress(LeanQuant(bits=bits, start="even"), w, statistics(x))
    assert isinstance(q, Codebook) and q.shape == (n, out) and q.tables.shape == (1, out, 2**bits) and q.scales is None
    tables = np.asarray(q.tables, np.float64)[0]
    is_table_of_lloyd(tables, w, np.repeat(shares(moment(x), 2.0, 0.1)[:, None], out, 1))

    def quantize(j, row, _):
        return tables[np.arange(out), np.abs(row[:, None] - tables).argmin(1)]

    h = moment(x)
    best = layer_error(w, obq(w, h, 0.1, quantize)[0], h)
    assert layer_error(w, dense(q), h) == pytest.approx(best, rel=0.05, abs=1e-6 * np.trace(w.T @ h @ w))


def peaks_of(w, size):
    """The largest weight of every group of every column, with its sign, `[groups, out]`."""
    groups = w.reshape(-1, size, w.shape[1])
    return np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], axis=1)[:, 0].astype(np.float64)


def rounded_in_groups(w, h, tables, size, scales_of, order=None):
    """The sweep on a table a column, each group's scales from its rows by then; then least squares for all scales."""
    n, out = w.shape
    scales, entries, best = {}, np.empty((n, out)), np.empty((n, out))

    def quantize(j, row, current):
        g = j // size
        if g not in scales:
            scales[g] = scales_of((w if order is not None else current)[g * size : (g + 1) * size], g)
        entries[j] = tables[np.arange(out), np.abs(row[:, None] - scales[g][:, None] * tables).argmin(1)]
        return scales[g] * entries[j]

    obq(w, h, 0.1, quantize, order)
    h = damped(h, 0.1)
    for o in range(out):
        spread = np.where(np.arange(n)[:, None] // size == np.arange(n // size), entries[:, o : o + 1], 0)
        best[:, o] = spread @ np.linalg.solve(spread.T @ h @ spread, spread.T @ h @ w[:, o])
    return best


@given(st.integers(0, 20), st.booleans())
@settings(max_examples=6)
def test_groups_oracle(seed, act_order):
    """A table of weights over the largest of their group; scales by exhaustive search; then least squares for all."""
    n, out, size, bits = 48, 4, 16, 2
    w, x = weights(n, out, seed), inputs(n, seed=seed)
    q = compress(LeanQuant(bits=bits, group_size=size, start="even", act_order=act_order), w, statistics(x))
    assert isinstance(q, Codebook) and q.tables.shape == (1, out, 2**bits) and q.scales.shape == (n // size, out)
    h = moment(x)
    order = np.argsort(-np.diag(h), kind="stable") if act_order else None
    s = np.empty(n)
    in_order = np.arange(n) if order is None else order
    s[in_order] = shares(h[np.ix_(in_order, in_order)], 2.0, 0.1)
    peaks = np.repeat(peaks_of(w, size).astype(np.float16).astype(np.float64), size, axis=0)
    tables = np.asarray(q.tables, np.float64)[0]
    is_table_of_lloyd(tables, w / peaks, s[:, None] * peaks**2)
    fractions = np.concatenate([np.linspace(-1.5, -0.2, 300), np.linspace(0.2, 1.5, 300)])

    def searched(rows, _):
        tried = fractions[:, None] * np.abs(rows).max(0)
        errors = np.square(rows[None, :, :, None] - tried[:, None, :, None] * tables).min(-1).sum(1)
        return tried[errors.argmin(0), np.arange(out)]

    best = rounded_in_groups(w, h, tables, size, searched, order)
    assert layer_error(w, dense(q), h) <= 1.2 * layer_error(w, best, h)


def test_scales_are_fitted_in_the_sweep():
    """Where a group has outliers, its fitted scale beats its largest weight, on the same table, both refitted after."""
    found = plain = 0.0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        w = rng.standard_t(3, (96, 24)).astype(np.float32)
        common = rng.standard_normal((96, 12)) @ rng.standard_normal((12, 96))
        x = (rng.standard_normal((600, 96)) @ (np.eye(96) + 0.1 * common)).astype(np.float32)
        q, h = compress(LeanQuant(bits=3, group_size=16), w, statistics(x)), moment(x)
        peaks = peaks_of(w, 16)
        tables = np.asarray(q.tables, np.float64)[0]
        plain += layer_error(w, rounded_in_groups(w, h, tables, 16, lambda _, g, peaks=peaks: peaks[g]), h)
        found += layer_error(w, dense(q), h)
    assert found < 0.93 * plain


@pytest.mark.parametrize("bits", [2, 3])
def test_error_below_that_of_gptq(bits):
    """Free points, then an affine grid, then the grid of the range; on Gaussian weights, which have few outliers."""
    w, x = weights(128, 48), inputs(128, rows=600)
    h = moment(x)
    uniform = layer_error(w, dense(compress(GPTQ(bits=bits, group_size=None), w, statistics(x))), h)
    free = layer_error(w, dense(compress(LeanQuant(bits=bits, p=2.0), w, statistics(x))), h)
    affine = layer_error(w, dense(compress(LeanQuant(bits=bits, grid="affine", p=2.0), w, statistics(x))), h)
    assert free < 0.75 * uniform
    assert free < affine < 0.95 * uniform


def test_weights_matter():
    """The learned grid loses less, by the loss of the sweep, than the same k-means without weights."""
    w, x = weights(64, 32), inputs(64, rows=600)
    h = moment(x)
    errors = [layer_error(w, dense(compress(LeanQuant(bits=3, p=p), w, statistics(x))), h) for p in (0.0, 2.0)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("bits, percent", [(1, 3), (2, 1.5), (4, 0.5)])
def test_coarse_search_ends_near_the_exhaustive_one(bits, percent):
    """No group is worse than its whole range; a single one may end in another valley, so errors are added up."""
    rng = np.random.default_rng(bits)
    groups = rng.standard_t(4, (2, 40, 48)).astype(np.float32)
    weights_ = np.exp(rng.standard_normal((2, 40))).astype(np.float32)
    kind = UniformGrid(bits=bits, scale_dtype="float32")

    def error(grid):
        values = kind.values(kind.round(groups, grid), grid)
        return (weights_[..., None] * np.square(np.asarray(values) - groups)).sum(-2)

    found = error(search_affine(groups, weights_, kind, candidates=64))
    full = error(search_affine(groups, weights_, kind, candidates=64, exhaustive=True))
    plain = error(kind.spanning(groups, groups.min(-2, keepdims=True), groups.max(-2, keepdims=True)))
    assert (full <= found + 1e-4 * plain).all() and (found <= plain * (1 + 1e-5)).all()
    assert found.sum() <= (1 + percent / 100) * full.sum()
    # Of what the exhaustive search gains over the whole range, the coarse one gets nearly all.
    assert (plain - found).sum() >= 0.9 * (plain - full).sum()


def test_exhaustive_search_is_the_loop_over_all_pairs():
    rng = np.random.default_rng(0)
    groups, share = rng.standard_normal((1, 12, 1)).astype(np.float32), rng.random((1, 12)).astype(np.float32)
    kind = UniformGrid(bits=2, scale_dtype="float32")
    scale, zero = search_affine(groups, share, kind, candidates=16, exhaustive=True)
    w, step, best = groups[0, :, 0], np.ptp(groups) / 16, np.inf
    for a in range(8):
        for b in range(8):
            low, high = w.min() + a * step, w.max() - b * step
            s = (high - low) / 3
            z = np.clip(np.round(-low / s), 0, 3)
            best = min(best, (share[0] * np.square(s * (np.clip(np.round(w / s + z), 0, 3) - z) - w)).sum())
    values = kind.values(kind.round(groups, (scale, zero)), (scale, zero))
    assert float((share[..., None] * np.square(values - groups)).sum()) == pytest.approx(best, rel=1e-4)


def test_act_order_and_dead_inputs():
    x = inputs(32)
    x[:, 5] = 0
    w = weights(32, 6)
    w[5] = 1e4
    for options in ({"act_order": True}, {"grid": "affine"}, {"act_order": True, "group_size": 8}):
        q = compress(LeanQuant(bits=4, **options), w, statistics(x))
        assert isinstance(q, Quantized if options.get("grid") == "affine" else Codebook)
        live = np.arange(32) != 5
        h = moment(x)[np.ix_(live, live)]
        assert layer_error(w[live], np.asarray(dense(q))[live], h) < 0.03 * layer_error(w[live], 0 * w[live], h)


def test_bytes():
    """`b + 16 K / in` bits a weight: 4.06 at 4 bits for 4096 inputs, as in the paper."""
    q = jax.eval_shape(
        lambda w, s: LeanQuant(bits=4).compress(w, stats=s),
        jax.ShapeDtypeStruct((4096, 64), jnp.float32),
        jax.eval_shape(statistics, jax.ShapeDtypeStruct((8, 4096), jnp.float32)),
    )
    assert q.bits_per_weight == 4 + 16 * 16 / 4096


def test_gradients_reach_the_tables():
    w, x = weights(16, 4), inputs(16)
    q = compress(LeanQuant(bits=2), w, statistics(x))
    trainable, frozen = ej.partition({"kernel": q})

    def loss(trainable):
        return ej.lift(lambda p: jnp.square(x @ p["kernel"]).sum())(ej.combine(trainable, frozen))

    gradient = jax.grad(loss)(trainable)["kernel"].tables
    of_dense = jax.grad(lambda w: jnp.square(x @ w).sum())(q.materialize())
    codes = ej.arrays.unpack(q.codes, 2, 16)
    for o in range(4):
        for entry in range(4):
            wanted = np.asarray(of_dense)[np.asarray(codes)[:, o] == entry, o].sum()
            assert float(gradient[0, o, entry]) == pytest.approx(float(wanted), rel=2e-2, abs=1.0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": 0}, "bits=0: choose 1 to 8"),
        ({"grid": "free"}, "grid='free': choose 'non_uniform' or 'affine'"),
        ({"start": "random"}, "start='random': choose 'split' or 'even'"),
        ({"iterations": 0}, "iterations=0, candidates=2048, p=2.0: at least one iteration"),
        ({"damping": float("nan")}, "damping=nan: a fraction"),
        ({"group_size": -1}, "group_size=-1: a positive number"),
        ({"table_dtype": "uint8"}, "table_dtype='uint8' is no floating dtype"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        LeanQuant(**fields)


def test_groups_must_divide():
    with pytest.raises(LeafError, match="group_size=7 does not divide its 24 inputs: choose group_size from"):
        LeanQuant(group_size=7).check((24, 3))
