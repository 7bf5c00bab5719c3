"""SpaLLM against numpy: tables of every column and slice, the sweep on them, counting rules, training of tables."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.arrays import Codebook, unpack
from effjax.errors import CalibrationError, LeafError
from effjax.lift.calibrate import InputStats
from effjax.recipe import parse_method
from effjax.sketch import SpaLLM, scale_by_spread
from tests.quantize.second_order import inputs, layer_error, moment, obq
from tests.quantize.test_gptq import compress, dense, statistics, weights
from tests.quantize.test_leanquant import is_table_of_lloyd, shares


@given(st.sampled_from([((2, 4), False), ((3, 2), True)]), st.integers(0, 20))
@settings(max_examples=8)
def test_oracle(choice, seed):
    """A table of a slice is as good as a plain Lloyd's; then the sweep rounds to the nearest entry of the slice."""
    ((bits, groups), act_order), n, out = choice, 32, 3
    w, x = weights(n, out, seed), inputs(n, seed=seed)
    q = compress(SpaLLM(bits=bits, groups=groups, start="even", act_order=act_order, refit=0), w, statistics(x))
    assert isinstance(q, Codebook) and q.tables.shape == (groups, out, 2**bits) and q.scales is None
    h, size = moment(x), n // groups
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(n)
    weight = np.empty(n)
    weight[order] = shares(h[np.ix_(order, order)], 2.0, 0.1)
    tables = np.asarray(q.tables, np.float64)
    for g in range(groups):
        rows = slice(g * size, (g + 1) * size)
        is_table_of_lloyd(tables[g], w[rows], np.repeat(weight[rows, None], out, 1))

    def quantize(j, row, _):
        table = tables[j // size]
        return table[np.arange(out), np.abs(row[:, None] - table).argmin(1)]

    best = layer_error(w, obq(w, h, 0.1, quantize, order if act_order else None)[0], h)
    assert layer_error(w, dense(q), h) == pytest.approx(best, rel=0.05, abs=1e-6 * np.trace(w.T @ h @ w))


def test_refit_is_the_least_squares_fit():
    """Each column's entries against numpy's solver for the codes that the sweep chose."""
    w, x = weights(32, 3), inputs(32)
    method = SpaLLM(bits=2, groups=2, damping=0.1, refit=20, table_dtype="float32")
    q, h = compress(method, w, statistics(x)), moment(x)
    codes = np.asarray(unpack(q.codes, 2, 32))
    root = np.linalg.cholesky(h + 0.1 * np.diag(h).mean() * np.eye(32)).T
    for o in range(3):
        spread = np.zeros((32, 8))
        spread[np.arange(32), np.arange(32) // 16 * 4 + codes[:, o]] = 1
        best, *_ = np.linalg.lstsq(root @ spread, root @ w[:, o], rcond=None)
        read = spread.any(0)
        np.testing.assert_allclose(np.asarray(q.tables)[:, o].ravel()[read], best[read], rtol=1e-2, atol=1e-3)
    before = layer_error(w, dense(compress(dataclasses.replace(method, refit=0), w, statistics(x))), h)
    assert layer_error(w, dense(q), h) < before


def test_better_sketches():
    """Tables of slices lose less than one a column, and the sweep less than rounding without it."""
    w, x = weights(64, 24), inputs(64, rows=600)
    h = moment(x)
    one, four = (layer_error(w, dense(compress(SpaLLM(bits=2, groups=g), w, statistics(x))), h) for g in (1, 4))
    plain = layer_error(w, dense(compress(SpaLLM(bits=2, calibrated=False), w, None)), h)
    assert four < 0.8 * one < 0.8 * plain


def test_without_calibration():
    """Plain k-means: every weight takes the nearest entry of a table that is as good as a plain Lloyd's."""
    w = weights(32, 3)
    method = SpaLLM(bits=2, groups=2, calibrated=False, start="even")
    q = ej.sketch_params({"kernel": jnp.asarray(w)}, method)["kernel"]
    for g, rows in enumerate((slice(0, 16), slice(16, 32))):
        table = np.asarray(q.tables[g], np.float64)
        is_table_of_lloyd(table, w[rows], np.ones((16, 3)))
        nearest = np.take_along_axis(table, np.abs(w[rows][..., None] - table).argmin(-1).T, axis=1).T
        np.testing.assert_allclose(q.materialize()[rows], nearest)


def test_counting_rules():
    """Trainable `out * groups * entries` a layer, `bits + 16 * groups * entries / in` bits a weight."""
    moments = {n: jax.ShapeDtypeStruct((n, n), jnp.float32) for n in (4096, 11008)}

    def sketch(n, out, method):
        stats = InputStats(count=jnp.float32(1), outer_sum=moments[n])  # type: ignore[arg-type]
        return jax.eval_shape(
            lambda w, s: method.compress(w, stats=s), jax.ShapeDtypeStruct((n, out), jnp.bfloat16), stats
        )

    q = sketch(4096, 256, SpaLLM(bits=4, groups=4))
    assert q.bits_per_weight == 4 + 16 * 4 * 16 / 4096 == 4.25 and q.tables.shape == (4, 256, 16)
    shapes = [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)]  # of a block of Llama-2-7B, which has 32
    trained = {g: 0 for g in (1, 8)}
    for n, out in set(shapes):
        for g in trained:
            layer = sketch(n, out, SpaLLM(bits=4, groups=g))
            tables, _ = ej.partition(layer)
            count = sum(leaf.size for leaf in jax.tree.leaves(tables))
            assert count == out * g * 16
            trained[g] += 32 * shapes.count((n, out)) * count
    assert trained == {1: 21_757_952, 8: 174_063_616}  # the published 21.8 and 174.1 million


def small(bits=2, groups=2, dtype=jnp.float32, table_dtype="float32"):
    w, x = weights(32, 8), inputs(32)
    params = {"kernel": jnp.asarray(w, dtype)}
    stats = {"kernel": statistics(x)}
    return ej.sketch_params(params, SpaLLM(bits=bits, groups=groups, table_dtype=table_dtype), stats=stats), x


APPLY = ej.lift(lambda p, x: x @ p["kernel"])


def test_gradient_of_a_table_is_the_sum_over_its_weights():
    """`dS[g, o, k] = sum of dW[i, o] over inputs i of slice g with code k`, by loops."""
    params, x = small()
    tables, codes = ej.partition(params)
    pull = jax.random.normal(jax.random.key(0), (len(x), 8))
    grads = jax.grad(lambda t: (APPLY(ej.combine(t, codes), x) * pull).sum())(tables)["kernel"].tables
    q, dw = params["kernel"], np.asarray(x, np.float64).T @ np.asarray(pull, np.float64)
    values, table = np.asarray(q.materialize()), np.asarray(q.tables)
    wanted = np.zeros((2, 8, 4))
    for i in range(32):
        for o in range(8):
            wanted[i // 16, o, np.flatnonzero(table[i // 16, o] == values[i, o])[0]] += dw[i, o]
    np.testing.assert_allclose(grads, wanted, rtol=1e-4, atol=1e-3)


def test_gradients_of_tables_add_up_in_float32():
    """A bfloat16 model of many inputs a table: the sum of a table entry has the digits of float32, not bfloat16."""
    n, rows = 2048, 4
    codes = jnp.zeros((n, 2), jnp.int32)
    tables = jnp.array([1.0, 2.0], jnp.float32) * jnp.ones((1, 2, 1))
    params = {"kernel": Codebook.from_codes(codes, tables, dtype=jnp.bfloat16)}
    x = jnp.ones((rows, n), jnp.bfloat16)
    tables, frozen = ej.partition(params)
    grads = jax.grad(lambda t: APPLY(ej.combine(t, frozen), x).astype(jnp.float32).sum())(tables)["kernel"].tables
    assert grads.dtype == jnp.float32
    np.testing.assert_array_equal(grads[0], [[rows * n, 0]] * 2)  # in bfloat16 the sum would stop at 1024


def test_no_dense_residual():
    """The backward pass keeps codes, tables and inputs: fewer bytes than the dense weight has."""
    method, n, out, rows = SpaLLM(bits=4, groups=2), 256, 192, 2
    stats = InputStats(count=jnp.float32(1), outer_sum=jax.ShapeDtypeStruct((n, n), jnp.float32))  # type: ignore[arg-type]
    w = jax.ShapeDtypeStruct((n, out), jnp.float32)
    q = jax.eval_shape(lambda w, s: method.compress(w, stats=s), w, stats)
    tables, codes = ej.partition({"kernel": q})

    def kept(tables, codes, x):
        return jax.vjp(lambda t: APPLY(ej.combine(t, codes), x), tables)[1]

    saved = jax.eval_shape(kept, tables, codes, jax.ShapeDtypeStruct((rows, n), jnp.float32))
    assert ej.nbytes(saved) <= q.nbytes + 4 * rows * n < 0.25 * 4 * n * out


def test_training_moves_tables_alone():
    params, x = small(bits=2, groups=4)
    tables, codes = ej.partition(params)
    assert [leaf.shape for leaf in jax.tree.leaves(tables)] == [(4, 8, 4)]
    y = x @ weights(32, 8)
    optimizer = optax.adam(1e-2)

    def loss(tables):
        return jnp.square(APPLY(ej.combine(tables, codes), x) - y).mean()

    @jax.jit
    def step(tables, state):
        value, grads = jax.value_and_grad(loss)(tables)
        updates, state = optimizer.update(grads, state, tables)
        return optax.apply_updates(tables, updates), state, value

    state, losses = optimizer.init(tables), []
    for _ in range(60):
        tables, state, value = step(tables, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    tuned = ej.combine(tables, codes)
    assert np.array_equal(tuned["kernel"].codes, params["kernel"].codes)
    assert type(tuned["kernel"]) is Codebook


def test_errors_name_what_to_write():
    w = {"kernel": jnp.ones((24, 4))}
    with pytest.raises(CalibrationError, match=r"^kernel: SpaLLM needs \['second_moment'\] of its inputs: pass stats="):
        ej.sketch_params(w, SpaLLM())
    stats = {"kernel": statistics(inputs(24))}
    text = (
        r"^kernel \[24, 4\]: groups=5 must divide its 24 inputs .* at least 4, .*choose groups from \[1, 2, 3, 4, 6\]"
    )
    with pytest.raises(LeafError, match=text):
        ej.sketch_params(w, SpaLLM(bits=2, groups=5), stats=stats)
    with pytest.raises(
        LeafError, match=r"groups=1 must divide its 24 inputs into runs of at least 32.*choose fewer bits"
    ):
        ej.sketch_params(w, SpaLLM(bits=5), stats=stats)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"groups": 0}, "groups=0: tables an output, 1 or more"),
        ({"bits": 9}, "bits=9: choose 1 to 8"),
        (
            {"p": -1.0},
            "iterations=100, refit=10, p=-1.0: at least one iteration, 0 or more steps and an exponent of 0 or more",
        ),
        ({"start": "odd"}, "start='odd': choose 'split' or 'even'"),
        ({"table_dtype": "int8"}, "table_dtype='int8' is no floating dtype"),
        ({"damping": -1.0}, "damping=-1.0: a fraction of the Hessian's mean diagonal, 0 or more"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        SpaLLM(**options)


@pytest.mark.parametrize("name", ["spallm", "SpaLLM", "spa_llm", "spa-llm"])
def test_name(name):
    assert parse_method(name, bits=3, groups=4) == SpaLLM(bits=3, groups=4)


def test_steps_in_units_of_the_spread_do_not_know_the_size_of_an_output():
    """An output whose weights are a hundred times larger moves a hundred times further, its function likewise."""
    tables = {"kernel": jnp.array([[[1.0, -2.0], [100.0, -200.0]], [[3.0, 0.0], [300.0, 0.0]]])}  # two groups
    optimizer = optax.chain(optax.adam(0.1), scale_by_spread())
    grads = jax.tree.map(lambda t: 1 / t.at[1, :, 1].set(jnp.array([1.0, 100.0])), tables)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(tables), tables)
    spread = np.sqrt((1 + 4 + 9 + 0) / 4)
    np.testing.assert_allclose(updates["kernel"][:, 0], -0.1 * spread * np.sign(grads["kernel"][:, 0]), rtol=1e-4)
    np.testing.assert_allclose(updates["kernel"][:, 1], 100 * updates["kernel"][:, 0], rtol=1e-4)
