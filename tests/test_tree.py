"""Partition, combine, report and summary."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.tree import kind_of
from tests.common.cases import ARRAYS, assert_same_bytes, example

every_type = pytest.mark.parametrize("case", ARRAYS, ids=lambda case: case.name)


@every_type
def test_partition_and_combine(case):
    params = {"w": example(case), "steps": jnp.arange(3), "bias": jnp.ones(2)}
    trainable, frozen = ej.partition(params)
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(trainable))
    assert not any(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(frozen))
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(params))
    assert_same_bytes(ej.combine(trainable, frozen), params)
    assert_same_bytes(ej.combine(frozen, trainable), params)
    assert trainable["steps"] is None and frozen["bias"] is None


def tree():
    w = jax.random.normal(jax.random.key(0), (64, 32))
    return {"mlp": {"kernel": w, "bias": jnp.ones(32)}, "q": {"query": {"kernel": w.reshape(64, 4, 8)}}}


def test_report():
    before = tree()
    after = ej.quantize_params(before, ej.quantize.RTN(bits=4, group_size=32))
    found = ej.report(before, after)
    rows = {leaf.path: leaf for leaf in found.leaves}
    kernel = rows["mlp/kernel"]
    assert (kernel.kind, kernel.shape) == ("Quantized", (64, 32))
    assert rows["q/query/kernel"].kind == "Quantized"  # what a view shows, not the view
    assert (kernel.bytes_before, kernel.bytes_after) == (64 * 32 * 4, 32 * 32 + 2 * 32 * 2 + 32)
    assert kernel.bits_per_weight == 8 * kernel.bytes_after / 2048
    difference = np.asarray(after["mlp"]["kernel"].materialize() - before["mlp"]["kernel"])
    want = np.linalg.norm(difference) / np.linalg.norm(before["mlp"]["kernel"])
    assert kernel.relative_error == pytest.approx(want, rel=1e-5)
    assert (rows["mlp/bias"].kind, rows["mlp/bias"].relative_error) == ("float32", 0.0)
    assert found.bytes_after == ej.nbytes(after) and found.bytes_before == ej.nbytes(before)
    assert found.ratio == ej.nbytes(before) / ej.nbytes(after)
    assert json.loads(json.dumps(found.to_dict()))["leaves"][0]["path"] == "mlp/bias"
    lines = str(found).splitlines()
    assert lines[0].split() == ["leaf", "kind", "bytes", "before", "bits/weight", "rel.", "error"]
    assert len(lines) == 5 and lines[-1].endswith(f"{found.ratio:.2f}x")
    assert len({len(line.rstrip()) for line in lines[:4]}) == 1


def test_report_of_shapes_alone():
    before = tree()
    after = jax.eval_shape(lambda p: ej.quantize_params(p, ej.quantize.RTN(bits=4, group_size=32)), before)
    found = ej.report(before, after)
    assert all(leaf.relative_error is None for leaf in found.leaves)
    assert found.bytes_after == ej.nbytes(after)
    assert "rel. error" in str(found)


def test_report_of_different_trees():
    with pytest.raises(KeyError, match="the trees differ in"):
        ej.report(tree(), {"mlp": tree()["mlp"]})


@every_type
def test_summary(case):
    params = {"layer": {"kernel": example(case)}, "bias": jnp.ones(3, jnp.bfloat16)}
    lines = ej.summary(params).splitlines()
    assert lines[0].split()[:3] == ["bias", "bfloat16", "[3]"]
    assert kind_of(example(case)) in lines[1] and str(list(case.shape)) in lines[1]
    assert lines[-1].split() == ["total", f"{ej.nbytes(params):,}"]


@every_type
def test_materialize_and_bytes_of_trees(case):
    params = {"w": example(case), "bias": jnp.ones(3)}
    dense = ej.materialize(params)
    assert not ej.is_compressed(dense["w"]) and dense["w"].shape == case.shape
    assert dense["bias"] is params["bias"]
    assert ej.nbytes(params) == example(case).nbytes + 12
    assert ej.is_compressed(params["w"]) and not ej.is_compressed(params)
