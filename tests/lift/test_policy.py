"""What happens where a weight cannot stay compressed: error, warning or permission, limits, texts, the report."""

import warnings

import jax
import jax.numpy as jnp
import pytest

import effjax as ej
from effjax.errors import MaterializeError
from effjax.lift import CoverageWarning
from tests.lift.kinds import assert_close, compress


@pytest.fixture(scope="module")
def params():
    return compress({"mlp": {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}}, "quantized")


def norm_of_rows(params, x):
    w = params["mlp"]["kernel"]
    return x @ (w / jnp.linalg.norm(w, axis=0))


X = jnp.ones((2, 64))


def test_error_names_path_operation_shape_and_remedy(params):
    with pytest.raises(MaterializeError) as error:
        jax.jit(ej.lift(norm_of_rows, limit=1000))(params, X)
    text = str(error.value)
    assert text == (
        f"mlp/kernel: `{text.split('`')[1]}` has no rule for Quantized and would make a dense copy of [64, 32] float32 "
        "(0.0 MiB). Leave this leaf out of the transform with a rule ('mlp/kernel', None), or allow it: "
        "effjax.lift(fn, on_materialize='allow')."
    )
    assert text.split("`")[1] in ("square", "mul", "integer_pow")


def test_small_copies_are_below_the_limit(params):
    assert_close(ej.lift(norm_of_rows)(params, X), norm_of_rows(ej.materialize(params), X))
    assert_close(ej.lift(norm_of_rows, limit=64 * 32 * 4)(params, X), norm_of_rows(ej.materialize(params), X))
    with pytest.raises(MaterializeError):
        ej.lift(norm_of_rows, limit=64 * 32 * 4 - 1)(params, X)


def test_warning(params):
    with pytest.warns(CoverageWarning, match="mlp/kernel: .* dense copy of"):
        actual = ej.lift(norm_of_rows, on_materialize="warn", limit=0)(params, X)
    assert_close(actual, norm_of_rows(ej.materialize(params), X))


def test_allow_is_silent(params):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ej.lift(norm_of_rows, on_materialize="allow", limit=0)(params, X)


def test_unknown_policy():
    with pytest.raises(ValueError, match="on_materialize='ignore': choose 'error', 'warn' or 'allow'"):
        ej.lift(norm_of_rows, on_materialize="ignore")


def test_coverage_report_is_a_table(params):
    def both(params, x):
        return x @ params["mlp"]["kernel"], params["mlp"]["kernel"] + 1

    coverage = ej.lift(both).coverage(params, X)
    assert str(coverage).splitlines() == [
        "mlp/kernel  add          dense, 8,192 bytes",
        "mlp/kernel  dot_general  kept",
    ]
    (dense,) = coverage.materialized
    assert (dense.path, dense.op, dense.nbytes, dense.kept) == ("mlp/kernel", "add", 8192, False)


def test_coverage_of_an_unused_leaf(params):
    assert str(ej.lift(lambda p, x: x).coverage(params, X)) == "no compressed leaf was used"


def test_weight_as_output_is_made_dense_and_listed(params):
    coverage = ej.lift(lambda p: p["mlp"]["kernel"]).coverage(params)
    assert [use.op for use in coverage.materialized] == ["output"]


@pytest.mark.parametrize("constant", ["numpy", "jax"])
def test_large_constant_warns_and_a_small_one_does_not(params, constant):
    large = jnp.ones((1024, 300))
    large = jax.device_get(large) if constant == "numpy" else large

    def closes_over(params, x):
        return (x @ params["mlp"]["kernel"]).sum() + (large * x.sum()).sum()

    with pytest.warns(CoverageWarning, match=r"closes over an array of shape \(1024, 300\) \(1.2 MiB\)"):
        ej.lift(closes_over)(params, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = large[:100]
        ej.lift(lambda p, x: (x @ p["mlp"]["kernel"]).sum() + small.sum())(params, X)


def test_name_and_docstring_are_kept():
    assert ej.lift(norm_of_rows).__name__ == "norm_of_rows"
