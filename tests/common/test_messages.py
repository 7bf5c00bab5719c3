"""The text of errors: the path, the shape or value, and what to write instead; raised before anything is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.errors import CalibrationError, LeafError, RuleError
from tests.common.cases import ARRAYS, METHODS, example, method_params

every_method = pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
RTN = ej.quantize.RTN(bits=4, group_size=16)
transforms = pytest.mark.parametrize(
    ("transform", "method"),
    [
        (ej.quantize_params, RTN),
        (ej.sketch_params, ej.sketch.LowRank(rank=2)),
        (ej.prune_mask, ej.prune.Magnitude(sparsity=0.5)),
    ],
    ids=["quantize", "sketch", "prune"],
)


def fails(error, text, transform, *args, **kwargs):
    with pytest.raises(error) as found:
        transform(*args, **kwargs)
    assert str(found.value) == text


@transforms
def test_rule_that_matches_nothing(transform, method):
    fails(
        RuleError,
        "rule 1 ('*/mpl/*') matches no leaf; the tree has embed/embedding, mlp/bias, mlp/kernel, out/kernel",
        transform,
        method_params(),
        [("*/kernel", method), ("*/mpl/*", method)],
    )


@transforms
def test_default_that_matches_nothing(transform, method):
    fails(
        RuleError,
        "is_dense_matrix matches none of the 1 leaves (scale): pass rules, e.g. [('*/kernel', method)]",
        transform,
        {"scale": jnp.ones((4, 4))},
        method,
    )


@transforms
def test_shadowed_rule(transform, method):
    fails(
        RuleError,
        "rule 1 ('mlp/kernel') never applies: earlier rules take all its leaves; move it up",
        transform,
        method_params(),
        [("*/kernel", method), ("mlp/kernel", method)],
    )


@transforms
def test_empty_rules_and_two_ways_at_once(transform, method):
    fails(RuleError, "the list of rules is empty: pass at least one (where, method)", transform, method_params(), [])
    fails(
        RuleError,
        "where= and a list of rules exclude each other: put the pattern into the rules",
        transform,
        method_params(),
        [("*/kernel", method)],
        where="*/kernel",
    )


def test_group_that_does_not_divide():
    fails(
        LeafError,
        "out/kernel [24, 8]: group_size=32 does not divide its 24 inputs: choose group_size from [8, 4] or None (per "
        "channel) for this leaf with a rule",
        ej.quantize_params,
        {"out": {"kernel": jnp.ones((24, 8))}},
        ej.quantize.RTN(group_size=32),
    )
    fails(
        LeafError,
        "out/kernel [23, 8]: group_size=64 does not divide its 23 inputs: choose group_size=None for this leaf with a "
        "rule",
        ej.quantize_params,
        {"out": {"kernel": jnp.ones((23, 8))}},
        ej.quantize.NF4(),
    )


def test_shapes_that_other_methods_refuse():
    params = {"out": {"kernel": jnp.ones((23, 8))}}
    fails(
        LeafError,
        "out/kernel [23, 8]: rank=9 is above the full rank 8: choose a smaller rank or a ratio",
        ej.sketch_params,
        params,
        ej.sketch.LowRank(rank=9),
    )
    fails(
        LeafError,
        "out/kernel [23, 8]: ratio=100 leaves fewer slots than a block of 4: choose a smaller one",
        ej.sketch_params,
        params,
        ej.sketch.Hashed(ratio=100, block=4),
        key=jax.random.key(0),
    )
    fails(
        LeafError,
        "out/kernel [23, 8]: pattern 2:4 needs inputs divisible by 4, not 23: choose another for it",
        ej.prune_mask,
        params,
        ej.prune.Magnitude(pattern="2:4"),
    )
    fails(
        LeafError,
        "out/kernel [23, 8]: blocks of 4x4 do not divide a matrix of 23x8: choose others for it",
        ej.prune_mask,
        params,
        ej.prune.Magnitude(sparsity=0.5, pattern="4x4"),
    )


@transforms
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_weight(transform, method, value):
    params = {"mlp": {"kernel": jnp.ones((2, 64, 32)).at[1, 5, 3].set(value).at[1, 7, 0].set(value)}}
    fails(
        LeafError,
        "mlp/kernel has 2 non-finite values, the first at [1, 5, 3]: repair the checkpoint",
        transform,
        params,
        method,
    )


@transforms
def test_leaves_of_a_wrong_kind(transform, method):
    name = type(method).__name__
    fails(
        LeafError,
        f"steps is int32[4, 4]: {name} takes floating weights [*L, in, out]",
        transform,
        {"steps": jnp.ones((4, 4), jnp.int32)},
        [("steps", method)],
    )
    fails(
        LeafError,
        f"mlp/bias is float32[32]: {name} takes floating weights [*L, in, out]",
        transform,
        method_params(),
        method,
        where="mlp/bias",
    )


@transforms
@pytest.mark.parametrize("case", ARRAYS, ids=lambda case: case.name)
def test_compressed_leaf(transform, method, case):
    w = example(case)
    fails(
        LeafError,
        f"mlp/kernel is compressed already ({w}): materialize it first, or leave it out with a rule",
        transform,
        {"mlp": {"kernel": w}},
        [("*/kernel", method)],
    )
    fails(
        RuleError,
        "is_dense_matrix matches none of the 1 leaves (mlp/kernel (compressed)): pass rules, e.g. [('*/kernel', "
        "method)]",
        transform,
        {"mlp": {"kernel": w}},
        method,
    )


@every_method
def test_missing_key_and_statistics(case):
    name = type(case.method).__name__
    if case.draws:
        text = f"mlp/kernel: {name} draws random numbers: pass key=jax.random.key(seed)"
        fails(LeafError, text, case.transform, method_params(), case.method)
    elif case.method.needs:
        text = (
            f"mlp/kernel: {name} needs {sorted(case.method.needs)} of its inputs: pass "
            "stats=effjax.calibrate(fn, params, batches, needs=method.needs)"
        )
        fails(CalibrationError, text, case.transform, method_params(), case.method)
    else:  # neither is needed, so neither may matter
        params = method_params()
        plain, with_key = (case.transform(params, case.method, key=k) for k in (None, jax.random.key(0)))
        assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (plain, with_key)), strict=True))


def test_scales_that_overflow():
    """float16 ends at 65504: an infinite scale is refused with what to write instead, and that works."""
    params = {"mlp": {"kernel": jnp.full((16, 4), 1e7)}}
    text = (
        "mlp/kernel [16, 4]: {} gives values that overflow float16: write scale_dtype='float32' for this leaf with a "
        "rule"
    )
    fails(LeafError, text.format("RTN"), ej.quantize_params, params, RTN)
    fails(LeafError, text.format("NF4"), ej.quantize_params, params, ej.quantize.NF4(block_size=16))
    for method in (
        ej.quantize.RTN(bits=4, group_size=16, scale_dtype="float32"),
        ej.quantize.NF4(block_size=16, scale_dtype="float32"),
    ):
        w = ej.quantize_params(params, method)["mlp"]["kernel"].materialize()
        np.testing.assert_allclose(w, 1e7, rtol=1e-6)


def test_error_before_any_work(monkeypatch):
    """The last of two leaves is wrong: the first is not compressed either."""
    calls = []
    monkeypatch.setattr(ej.quantize.RTN, "compress", lambda *args, **kwargs: calls.append(1))
    params = {"a": {"kernel": jnp.ones((32, 8))}, "z": {"kernel": jnp.ones((33, 8))}}
    with pytest.raises(LeafError, match=r"^z/kernel \[33, 8\]"):
        ej.quantize_params(params, RTN)
    assert calls == []
