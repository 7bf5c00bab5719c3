"""Allocation of widths to a budget against brute force, and the tables of costs against plain numpy."""

import dataclasses
import itertools
import math
import sys

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.errors import CalibrationError, ConfigError, LeafError
from effjax.paths import map_with_paths
from effjax.quantize import RTN, allocate, family, sensitivity
from effjax.quantize.sensitivity import Choice, LeafChoices, Sensitivity
from effjax.recipe import Recipe, apply_recipe
from tests.common.cases import assert_same_bytes

WIDTHS = [RTN(bits=bits, group_size=None) for bits in (2, 3, 4, 8)]


def table_of(nbytes, losses, measure="weights"):
    """A table of made-up costs; every leaf has the same candidates."""
    leaves = [
        LeafChoices(
            path=f"layer_{i}/kernel",
            shape=(4, 4),
            choices=tuple(
                Choice(method=method, nbytes=int(b), loss=float(c))
                for method, b, c in zip(WIDTHS, sizes, costs, strict=False)
            ),
        )
        for i, (sizes, costs) in enumerate(zip(nbytes, losses, strict=True))
    ]
    return Sensitivity(measure=measure, leaves=tuple(leaves))


def brute_force(table, budget):
    """The least loss of all combinations within the budget, or None."""
    best = None
    for choices in itertools.product(*(leaf.choices for leaf in table.leaves)):
        if sum(c.nbytes for c in choices) <= budget:
            loss = math.fsum(c.loss for c in choices)
            best = loss if best is None else min(best, loss)
    return best


@st.composite
def tables(draw, most=5):
    """Small problems: bytes from a handful to billions, losses over many decades, ties, and losses below zero."""
    leaves, candidates = draw(st.integers(1, most)), draw(st.integers(1, 4))
    unit = draw(st.sampled_from([1, 3, 1000, 1_056_768]))
    counts = st.lists(st.integers(0, 60), min_size=candidates, max_size=candidates)
    costs = st.lists(
        st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(-0.01, 10.0, allow_subnormal=False)),
        min_size=candidates,
        max_size=candidates,
    )
    nbytes = [[unit * (1 + n) for n in draw(counts)] for _ in range(leaves)]
    return table_of(nbytes, [draw(costs) for _ in range(leaves)])


@settings(max_examples=40)
@given(tables(), st.floats(0, 1), st.booleans())
def test_equals_brute_force_and_respects_the_budget(table, share, by_table):
    budget = table.least_bytes + int(share * (table.most_bytes - table.least_bytes))
    with pytest.MonkeyPatch.context() as patch:
        if not by_table:
            patch.setattr(sys.modules[allocate.__module__], "CELLS", -1)
        rules = allocate(table, budget_bytes=budget)
    assert [path for path, _ in rules] == [leaf.path for leaf in table.leaves]
    assert table.nbytes(rules) <= budget
    spread = max(abs(c.loss) for leaf in table.leaves for c in leaf.choices)
    assert table.loss(rules) <= brute_force(table, budget) + 1e-9 * spread
    assert by_table is False or allocate(table, budget_bytes=budget) == rules


@settings(max_examples=8)
@given(st.integers(0, 2**32 - 1), st.integers(6, 24))
def test_never_worse_than_uniform_and_monotone_in_the_budget(seed, leaves):
    """Costs as weights have them: losses that fall by four a bit, with other factors for every leaf."""
    rng = np.random.default_rng(seed)
    bits = np.array([method.bits for method in WIDTHS])
    rows = rng.integers(1, 50, (leaves, 1))
    nbytes = rows * 128 * bits + rng.integers(0, 3, (leaves, 4)) * 7
    table = table_of(nbytes, rng.lognormal(0, 2, (leaves, 1)) * 4.0**-bits * rng.lognormal(0, 0.2, (leaves, 4)))
    losses = []
    for method in WIDTHS:
        uniform = table.uniform(method)
        rules = allocate(table, budget_bytes=table.nbytes(uniform))
        assert table.nbytes(rules) <= table.nbytes(uniform)
        assert table.loss(rules) <= table.loss(uniform) * (1 + 1e-9)
        losses.append(table.loss(rules))
    for share in (0.2, 0.5, 0.9):
        losses.append(
            table.loss(allocate(table, budget_bytes=int(table.most_bytes * share + table.least_bytes * (1 - share))))
        )
    sizes = [table.nbytes(table.uniform(m)) for m in WIDTHS]
    sizes += [int(table.most_bytes * s + table.least_bytes * (1 - s)) for s in (0.2, 0.5, 0.9)]
    by_size = [loss for _, loss in sorted(zip(sizes, losses, strict=True))]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(by_size))


def test_the_budget_holds_to_the_byte_where_bytes_are_beyond_the_solvers_tolerance():
    """With bytes around 2**40 the solver's feasibility tolerance is a million bytes; ours is none."""
    rng = np.random.default_rng(1)
    nbytes = rng.integers(2**39, 2**40, (6, 4))
    table = table_of(nbytes, rng.random((6, 4)))
    for choices in itertools.islice(itertools.product(*(leaf.choices for leaf in table.leaves)), 0, None, 401):
        budget = sum(c.nbytes for c in choices) - 1  # one byte short of a combination
        if budget < table.least_bytes:
            continue
        rules = allocate(table, budget_bytes=budget)
        assert table.nbytes(rules) <= budget
        assert table.loss(rules) <= brute_force(table, budget) + 1e-9


def test_no_bytes_are_spent_on_nothing():
    """Of equal losses the smaller wins, also under a budget that would allow the larger."""
    table = table_of([[10, 20, 30, 40], [10, 20, 30, 40]], [[1, 0, 0, 0], [0, 0, 0, 0]])
    rules = allocate(table, budget_bytes=80)
    assert [method.bits for _, method in rules] == [3, 2]


@pytest.mark.parametrize(
    "budget, error, message",
    [
        ({}, ValueError, "exactly one of budget_bits= and budget_bytes="),
        ({"budget_bits": 3, "budget_bytes": 9}, ValueError, "exactly one of budget_bits= and budget_bytes="),
        ({"budget_bits": 0}, ValueError, "a budget of 0: choose a positive number"),
        (
            {"budget_bytes": 29},
            ConfigError,
            r"a budget of 29 bytes \(7.250 bits a weight\) is below the least possible, 30 bytes \(7.500 bits",
        ),
        ({"budget_bits": 7.4}, ConfigError, "below the least possible, 30 bytes"),
    ],
)
def test_bad_budgets(budget, error, message):
    table = table_of([[10, 20], [20, 30]], [[1, 0], [1, 0]])
    with pytest.raises(error, match=message):
        allocate(table, **budget)


def test_a_table_of_sizes_is_refused():
    table = dataclasses.replace(table_of([[10, 20]], [[1, 0]]), measure="sizes")
    with pytest.raises(ConfigError, match="sizes alone"):
        allocate(table, budget_bytes=20)


def test_family():
    assert [m.bits for m in family(RTN(group_size=16, clip="mse"), (2, 4, 9))] == [2, 4]
    assert all(m.group_size == 16 and m.clip == "mse" for m in family(RTN(group_size=16, clip="mse")))
    with pytest.raises(ConfigError, match="NF4 has no field bits"):
        family(ej.quantize.NF4())
    with pytest.raises(ConfigError, match=r"takes none of the widths \[9\]"):
        family(RTN(), (9,))


def model_params(seed=0, lead=()):
    """Two layers of different scale, one of them with attention's head axes, and leaves that are not taken."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "mlp": {"kernel": jax.random.normal(keys[0], (*lead, 32, 24)), "bias": jnp.zeros((*lead, 24))},
        "attention": {"query": {"kernel": 3 * jax.random.normal(keys[1], (*lead, 32, 4, 6))}},
        "embed": {"embedding": jax.random.normal(keys[2], (8, 32))},
    }


def apply(params, x):
    y = jnp.einsum("bi,ihk->bhk", x, params["attention"]["query"]["kernel"])
    return y.reshape(len(x), -1) + jnp.tanh(x @ params["mlp"]["kernel"] + params["mlp"]["bias"])


def squared(params, x):
    return jnp.mean(jnp.square(apply(params, x)))


def inputs(seed=5):
    mixing = jax.random.normal(jax.random.key(seed), (32, 32))
    return [jax.random.normal(jax.random.key(seed + i), (16, 32)) @ mixing / 16 for i in range(1, 4)]


def matrix(w):
    """The query kernel as a matrix; 32 inputs in every case."""
    return np.asarray(w, np.float64).reshape(32, -1)


quantized = jax.jit(lambda method, w: method.quantize(w), static_argnums=0)


def replaced(params, path, w):
    return map_with_paths(lambda p, leaf: w if p == path else leaf, params)


@pytest.mark.parametrize(
    "measure, needs",
    [
        ("weights", None),
        ("layer", {"second_moment"}),
        ("fisher", {"fisher"}),
        ("fisher layer", {"second_moment", "fisher"}),
    ],
)
def test_losses_and_bytes_equal_an_oracle(measure, needs):
    params, xs = model_params(), inputs()
    stats = None if needs is None else ej.calibrate(apply, params, xs, needs=needs, loss=squared)
    table = sensitivity(params, [WIDTHS[0], WIDTHS[2]], stats=stats)
    assert table.measure == measure
    assert [leaf.path for leaf in table.leaves] == ["attention/query/kernel", "mlp/kernel"]
    rows = np.concatenate([np.asarray(x, np.float64) for x in xs])
    moment = rows.T @ rows / len(rows)
    for leaf in table.leaves:
        w = params["mlp"]["kernel"] if leaf.path == "mlp/kernel" else params["attention"]["query"]["kernel"]
        gradient = jax.jit(jax.grad(lambda w, x, path=leaf.path: squared(replaced(params, path, w), x)))
        gradients = []
        for x in rows if needs and "fisher" in needs else []:
            gradients.append(matrix(gradient(w, jnp.asarray(x, jnp.float32)[None])))
        fisher = np.mean(np.square(gradients), axis=0) if gradients else None
        for choice in leaf.choices:
            new = quantized(choice.method, jnp.asarray(matrix(w), jnp.float32))
            assert choice.nbytes == new.nbytes
            delta = matrix(new.materialize()) - matrix(w)
            columns = np.einsum("io,ij,jo->o", delta, moment, delta)
            want = {
                "weights": lambda delta=delta: np.sum(delta**2),
                "layer": lambda columns=columns: columns.sum(),
                "fisher": lambda delta=delta, fisher=fisher: np.sum(fisher * delta**2) / 2,
                "fisher layer": lambda columns=columns, fisher=fisher: (
                    np.sum(fisher.sum(0) / np.trace(moment) * columns) / 2
                ),
            }[measure]()
            assert choice.loss == pytest.approx(want, rel=2e-3)


def test_measured_loss():
    """The change of the loss with one leaf compressed, the others as they were."""
    params, xs = model_params(), inputs()
    table = sensitivity(params, [WIDTHS[0], None], loss=squared, batches=xs)
    assert table.measure == "loss"
    base = np.mean([float(squared(params, x)) for x in xs])
    for leaf in table.leaves:
        assert leaf.choices[1] == Choice(method=None, nbytes=4 * leaf.weights, loss=0.0)
        one = ej.materialize(ej.quantize_params(params, WIDTHS[0], where=leaf.path))
        change = np.mean([float(squared(one, x)) for x in xs]) - base
        assert leaf.choices[0].loss == pytest.approx(change, abs=1e-5 * base)


def test_stacked_leaves_add_up():
    params = model_params(lead=(3,))
    table = sensitivity(params, WIDTHS[:1])
    for leaf in table.leaves:
        alone = [
            sensitivity(jax.tree.map(lambda x, i=i: x[i] if x.ndim > 2 else x, params), WIDTHS[:1], where=leaf.path)
            for i in range(3)
        ]
        for j, choice in enumerate(leaf.choices):
            assert choice.nbytes == sum(t.leaves[0].choices[j].nbytes for t in alone)
            assert choice.loss == pytest.approx(sum(t.leaves[0].choices[j].loss for t in alone), rel=1e-5)


def test_rules_give_the_bytes_that_were_promised():
    params = model_params()
    table = sensitivity(params, WIDTHS)
    rules = allocate(table, budget_bits=3.7)
    assert 3 < table.bits(rules) <= 3.7
    assert len({method.bits for _, method in rules}) > 1
    qparams = ej.quantize_params(params, rules)
    taken = [qparams["mlp"]["kernel"], qparams["attention"]["query"]["kernel"]]
    assert ej.nbytes(taken) == table.nbytes(rules)
    assert not ej.is_compressed(qparams["embed"]["embedding"])
    assert_same_bytes(apply_recipe(params, Recipe(rules=tuple(rules))), qparams)
    lines = table.table(rules).splitlines()
    assert [line.split()[0] for line in lines] == ["leaf", "attention/query/kernel", "mlp/kernel", "total"]
    assert f"{table.bits(rules):.3f}" in lines[-1] and f"{table.nbytes(rules):,}" in lines[-1]


def test_sizes_without_weights():
    params = model_params()
    shapes = jax.eval_shape(lambda p: p, params)
    sizes, table = sensitivity(shapes, [*WIDTHS, None]), sensitivity(params, [*WIDTHS, None])
    assert (sizes.measure, sizes.least_bytes, sizes.most_bytes) == ("sizes", table.least_bytes, table.most_bytes)
    for a, b in zip(sizes.leaves, table.leaves, strict=True):
        assert [(c.method, c.nbytes) for c in a.choices] == [(c.method, c.nbytes) for c in b.choices]
        assert all(math.isnan(c.loss) for c in a.choices)


def test_a_candidate_that_does_not_fit_a_leaf_is_left_out_there():
    params = {"a": {"kernel": jnp.ones((64, 8))}, "b": {"kernel": jnp.ones((40, 8))}}
    table = sensitivity(params, [RTN(bits=2, group_size=64), RTN(bits=3, group_size=None)])
    assert [[c.method.bits for c in leaf.choices] for leaf in table.leaves] == [[2, 3], [3]]
    with pytest.raises(LeafError, match=r"no candidate that fits b/kernel \[40, 8\]"):
        table.uniform(RTN(bits=2, group_size=64))
    with pytest.raises(LeafError, match=r"b/kernel \[40, 8\].*group_size=64 does not divide its 40 inputs"):
        sensitivity(params, [RTN(bits=2, group_size=64)])


def test_bad_arguments():
    params, xs = model_params(), inputs()
    with pytest.raises(ValueError, match="name at least one, and each once"):
        sensitivity(params, [])
    with pytest.raises(ValueError, match="name at least one, and each once"):
        sensitivity(params, [RTN(bits=2), RTN(bits=2)])
    with pytest.raises(ValueError, match="loss= and batches= go together"):
        sensitivity(params, WIDTHS, loss=squared)
    with pytest.raises(CalibrationError, match="no batches to measure the loss on"):
        sensitivity(params, WIDTHS, loss=squared, batches=[])
    stats = ej.calibrate(apply, params, xs, where="mlp/kernel")
    with pytest.raises(CalibrationError, match="attention/query/kernel for the squared error of the weights"):
        sensitivity(params, WIDTHS, stats=stats)
    with pytest.raises(LeafError, match="gives a loss of nan"):
        sensitivity(params, WIDTHS, loss=lambda p, x: squared(p, x) * jnp.nan, batches=xs)
    table = sensitivity(params, WIDTHS)
    with pytest.raises(LeafError, match="the rules give it no candidate of this table"):
        table.nbytes([("mlp/kernel", WIDTHS[0])])


def test_paths_that_read_as_patterns():
    params = {"blocks[0]": {"kernel": jnp.eye(16)}, "blocks[1]": {"kernel": 5 * jnp.eye(16)}}
    table = sensitivity(params, WIDTHS[:2])
    qparams = ej.quantize_params(params, allocate(table, budget_bits=table.bits(table.uniform(WIDTHS[0])) + 0.5))
    assert [leaf.bits for leaf in (qparams["blocks[0]"]["kernel"], qparams["blocks[1]"]["kernel"])] == [2, 3]
