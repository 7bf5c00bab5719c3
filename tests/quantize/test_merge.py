"""Merging adapters into the grid: the same bytes for nothing, an oracle's codes and errors, no worse than dropping."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.adapters import split_adapter
from effjax.arrays import Adapter, Codebook, Hashed, LowRank, Quantized, Sum, View, unpack
from effjax.errors import CalibrationError, LeafError
from effjax.lift.calibrate import InputStats
from effjax.quantize import merge_adapters, regrid
from tests.common.cases import assert_same_bytes
from tests.test_adapters import BASES, KEY, trained, weight

METHODS = {
    "q4": ej.quantize.RTN(bits=4, group_size=16),
    "q3 symmetric": ej.quantize.RTN(bits=3, group_size=None, symmetric=True),
    "q2": ej.quantize.RTN(bits=2, group_size=8),
    "nf4": ej.quantize.NF4(block_size=16),
}


def table_a_column(w):
    """A codebook of seven levels a column, without scales: what LeanQuant and SqueezeLLM leave."""
    levels = jnp.quantile(w, jnp.linspace(0.05, 0.95, 7), axis=-2)
    tables = jnp.moveaxis(levels, 0, -1)[..., None, :, :]
    codes = jnp.argmin(jnp.abs(w[..., None] - tables.mT.swapaxes(-1, -2)), axis=-1)
    return Codebook.from_codes(codes, tables.astype(jnp.float16), dtype=w.dtype)


def two_levels_of_scales(w):
    """Scales of eight bits under one number for the matrix, as NVFP4 has them."""
    top = jnp.full((*w.shape[:-2], 1, 1), 64.0)
    q = ej.quantize.NF4(block_size=16).quantize(w)
    scales = (q.scales.astype(jnp.float32) * top).astype(jnp.float8_e4m3fn)
    return q.replace(scales=scales, global_scale=top)


def real_zeros(w):
    q = ej.quantize.RTN(bits=3, group_size=16).quantize(w)
    return q.replace(zeros=(q.zero_points() + 0.25).astype(jnp.float16))


GRIDS = {
    **{name: make for name, make in BASES.items() if name not in ("quantized", "codebook")},
    **{name: method.quantize for name, method in METHODS.items()},
    "table a column": table_a_column,
    "two levels of scales": two_levels_of_scales,
    "real zeros": real_zeros,
}


def adapted_leaf(base, seed=5, size=0.05):
    return trained(ej.add_lora({"kernel": base}, 4, key=KEY), seed=seed, size=size)


def moment_of(n, lead=(), seed=3):
    x = weight(*lead, 200, n, seed=seed) @ weight(n, n, seed=seed + 1) / np.sqrt(n)
    return InputStats(count=jnp.full(lead, 200.0), outer_sum=x.mT @ x)


def parts(tree):
    leaf = tree["kernel"]
    base, (adapter,) = split_adapter(leaf)
    w = np.asarray(base.materialize(), np.float64)
    return w, w + np.asarray(adapter.a, np.float64) @ np.asarray(adapter.b, np.float64)


@pytest.mark.parametrize(
    "kind, with_stats, refit",
    [(kind, both, both) for kind in GRIDS for both in (False, True)]
    + [(kind, True, False) for kind in ("q4", "table a column")]
    + [(kind, False, True) for kind in ("q4", "row scaled")],
)
def test_an_adapter_of_zero_merges_to_the_same_bytes(kind, with_stats, refit):
    params = {"kernel": jax.jit(GRIDS[kind])(weight(32, 24)), "bias": jnp.zeros(24)}
    stats = {"kernel": moment_of(32), "bias": None} if with_stats else None
    merged, report = merge_adapters(ej.add_lora(params, 4, key=KEY), stats=stats, refit=refit)
    assert_same_bytes(merged, params)
    (row,) = report.leaves
    assert row.error < 1e-6 and (row.adapter, row.moved, row.kept, row.flagged) == (0, 0, 1, False)


def levels_of(q):
    """All values that every weight could have, `[in, out, levels]`, from the fields with loops."""
    *_, n, out = q.shape
    found = np.zeros((n, out, 2**q.bits if isinstance(q, Quantized) else q.tables.shape[-1]))
    scales = None if q.scales is None else np.asarray(q.scales.astype(jnp.float32), np.float64)
    if isinstance(q, Codebook) and q.global_scale is not None:
        scales = scales / float(q.global_scale[0, 0])
    zeros = None
    if isinstance(q, Quantized):
        zeros = np.broadcast_to(np.asarray(q.zero_points(), np.float64), scales.shape)
    for i in range(n):
        for o in range(out):
            if isinstance(q, Quantized):
                g = i // (n // scales.shape[0])
                found[i, o] = scales[g, o] * (np.arange(2**q.bits) - zeros[g, o])
            else:
                a, b, _ = q.tables.shape
                table = np.asarray(q.tables, np.float64)[i // (n // a), o // (out // b)]
                found[i, o] = table if scales is None else table * scales[i // (n // scales.shape[0]), o]
    return found


@pytest.mark.parametrize("kind", [*METHODS, "table a column", "two levels of scales", "real zeros"])
def test_nearest_levels_and_errors_equal_an_oracle(kind):
    params = adapted_leaf(jax.jit(GRIDS[kind])(weight(32, 12)))
    base, target = parts(params)
    merged, report = merge_adapters(params)
    got = np.asarray(merged["kernel"].materialize(), np.float64)
    distance = np.abs(levels_of(merged["kernel"]) - target[..., None]).min(-1)
    np.testing.assert_allclose(np.abs(got - target), distance, atol=1e-5)
    (row,) = report.leaves
    norm = np.linalg.norm(target)
    assert row.adapter == pytest.approx(np.linalg.norm(target - base) / norm, rel=1e-4)
    assert row.error == pytest.approx(np.linalg.norm(got - target) / norm, rel=1e-4)
    assert row.moved == pytest.approx(np.mean(np.abs(got - base) > 1e-6))
    assert row.kept == pytest.approx(1 - (row.error / row.adapter) ** 2)
    assert row.output_error is None and row.nbytes_after == merged["kernel"].nbytes == row.nbytes_before - 4 * 4 * 44
    assert jax.tree.structure(merged["kernel"]) == jax.tree.structure(split_adapter(params["kernel"])[0])


@settings(max_examples=12)
@given(
    st.sampled_from(["q2", "table a column"]),
    st.integers(0, 2**32 - 1),
    st.floats(0.001, 0.5),
    st.booleans(),
)
def test_merging_is_never_worse_than_dropping(kind, seed, size, refit):
    """With statistics in the outputs, without in the weights; the grid, its bits and its bytes stay."""
    params = adapted_leaf(jax.jit(GRIDS[kind])(weight(32, 12)), seed=seed, size=size)
    _, plain = merge_adapters(params, refit=refit)
    merged, weighed = merge_adapters(params, stats={"kernel": moment_of(32)}, refit=refit)
    assert plain.leaves[0].error <= plain.leaves[0].adapter * (1 + 1e-5)
    (row,) = weighed.leaves
    assert row.output_error <= row.output_error_nearest * (1 + 1e-3)
    if not refit:
        assert row.output_error <= row.output_adapter * (1 + 1e-3)
    base = split_adapter(params["kernel"])[0]
    assert jax.tree.structure(merged["kernel"]) == jax.tree.structure(base)
    for x, y in zip(jax.tree.leaves(merged["kernel"]), jax.tree.leaves(base), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


def test_output_errors_equal_an_oracle_and_the_sweep_gains():
    params = adapted_leaf(METHODS["q3 symmetric"].quantize(weight(32, 24)), size=0.2)
    base, target = parts(params)
    stats = moment_of(32)
    moment = np.asarray(stats.second_moment, np.float64)

    def size(delta):
        return np.sqrt(np.trace(delta.T @ moment @ delta) / np.trace(target.T @ moment @ target))

    merged, report = merge_adapters(params, stats={"kernel": stats})
    nearest, _ = merge_adapters(params)
    (row,) = report.leaves
    assert row.output_adapter == pytest.approx(size(target - base), rel=1e-3)
    assert row.output_error == pytest.approx(size(np.asarray(merged["kernel"].materialize()) - target), rel=1e-3)
    assert row.output_error_nearest == pytest.approx(
        size(np.asarray(nearest["kernel"].materialize()) - target), rel=1e-3
    )
    assert row.output_error < 0.95 * row.output_error_nearest
    assert row.output_error < row.output_adapter and not report.flagged


@pytest.mark.parametrize("kind", ["q2", "nf4", "table a column", "two levels of scales", "real zeros"])
def test_refitted_scales_and_tables_lower_the_error(kind):
    """An adapter that scales the weight up leaves the old grid too small."""
    w = weight(32, 12)
    base = jax.jit(GRIDS[kind])(w)
    a, b = jnp.linalg.svd(w, full_matrices=False)[0][:, :4], weight(4, 12, seed=3)
    params = {"kernel": Sum(parts=(base, Adapter(a=4 * a, b=b, dtype=base.dtype)))}
    _, kept = merge_adapters(params)
    merged, fitted = merge_adapters(params, refit=True)
    assert fitted.leaves[0].error < 0.85 * kept.leaves[0].error
    assert merged["kernel"].nbytes == base.nbytes and merged["kernel"].bits == base.bits


@pytest.mark.parametrize("kind", ["quantized", "codebook", "row scaled"])
def test_stacked_leaves_merge_as_their_slices(kind):
    params = adapted_leaf(jax.jit(BASES[kind])(weight(3, 32, 12)))
    stats = moment_of(32, (3,))
    merged, _ = merge_adapters(params, stats={"kernel": stats})
    for i in range(3):
        one = {"kernel": jax.tree.map(lambda x, i=i: x[i], params["kernel"])}
        alone, _ = merge_adapters(one, stats={"kernel": jax.tree.map(lambda x, i=i: x[i], stats)})
        assert_same_bytes(jax.tree.map(lambda x, i=i: x[i], merged["kernel"]), alone["kernel"])


def test_a_view_keeps_its_shape_and_rows_of_other_orders_theirs():
    query = ej.quantize_params({"attention": {"query": {"kernel": weight(32, 4, 8)}}}, METHODS["q4"])
    merged, report = merge_adapters(trained(ej.add_lora(query, 4, key=KEY), size=0.3))
    leaf = merged["attention"]["query"]["kernel"]
    assert isinstance(leaf, View) and isinstance(leaf.array, Quantized) and leaf.shape == (32, 4, 8)
    assert report.leaves[0].kind == "Quantized" and 0 < report.leaves[0].kept < 1


@pytest.mark.parametrize("kind", ["row scaled", "permuted", "sum"])
def test_wrappers_round_what_they_hold(kind):
    """The inner codes are those of the inner grid for the inner weight."""
    params = adapted_leaf(jax.jit(BASES[kind])(weight(32, 12)), size=0.2)
    _, target = parts(params)
    got = merge_adapters(params)[0]["kernel"]
    if kind == "row scaled":
        inner, want = got.array, target / np.asarray(got.row_scales, np.float64)[:, None]
    elif kind == "permuted":
        inner, want = got.array, target[np.asarray(got.order)]
    else:
        inner, want = got.parts[0], target - np.asarray(got.parts[1].materialize(), np.float64)
    distance = np.abs(levels_of(inner) - want[..., None])
    codes = np.asarray(unpack(inner.codes, inner.bits, 32))
    np.testing.assert_allclose(np.take_along_axis(distance, codes[..., None], -1)[..., 0], distance.min(-1), atol=1e-5)


def test_a_small_adapter_is_flagged_as_lost():
    """A step far below half the distance of two levels moves no code: merging is as good as dropping."""
    params = adapted_leaf(METHODS["q2"].quantize(weight(32, 24)), size=1e-3)
    merged, report = merge_adapters(params)
    assert report.flagged == ("kernel",) and report.leaves[0].moved == 0
    assert_same_bytes(merged["kernel"], split_adapter(params["kernel"])[0])
    assert "FLAGGED" in str(report).splitlines()[1] and report.to_dict()["leaves"][0]["flagged"]
    assert report.leaves[0].error == pytest.approx(report.leaves[0].adapter)


def test_a_method_compresses_anew():
    params = adapted_leaf(METHODS["q2"].quantize(weight(32, 24)), size=0.3)
    _, target = parts(params)
    merged, report = merge_adapters(params, method=METHODS["q4"])
    expected = METHODS["q4"].quantize(jnp.asarray(target, jnp.float32))
    np.testing.assert_allclose(merged["kernel"].materialize(), expected.materialize(), atol=0.02)
    assert merged["kernel"].bits == 4 and report.leaves[0].nbytes_after == expected.nbytes


def test_bad_arguments():
    base = {"kernel": METHODS["q4"].quantize(weight(32, 24)), "bias": jnp.zeros(24)}
    adapted = ej.add_lora(base, 4, key=KEY)
    with pytest.raises(LeafError, match="no leaf carries an adapter: there is nothing to merge"):
        merge_adapters(base)
    with pytest.raises(ValueError, match="pass one of them"):
        merge_adapters(adapted, method=METHODS["q4"], refit=True)
    with pytest.raises(CalibrationError, match="kernel has an adapter but no statistics: pass stats="):
        merge_adapters(adapted, stats={"other": moment_of(32)})
    thin = dataclasses.replace(moment_of(32), outer_sum=None, abs_sum=jnp.ones(32))
    with pytest.raises(CalibrationError, match="statistics without second moments"):
        merge_adapters(adapted, stats={"kernel": thin})
    broken = jax.tree.map(lambda x: x * jnp.nan if x.shape == (4, 24) else x, adapted)
    with pytest.raises(LeafError, match=r"kernel \[32, 24\]: its adapter has non-finite values"):
        merge_adapters(broken)
    for part in (LowRank(a=weight(32, 3), b=weight(3, 24)), ej.sketch.Hashed().compress(weight(32, 24), key=KEY)):
        assert isinstance(part, LowRank | Hashed)
        with pytest.raises(LeafError, match=rf"kernel \[32, 24\]: {type(part).__name__} has no levels to round to"):
            merge_adapters(ej.add_lora({"kernel": part}, 2, key=KEY))


def test_scales_of_zero_keep_their_codes():
    q = METHODS["q4"].quantize(weight(32, 4))
    q = q.replace(scales=q.scales.at[0].set(0))
    merged = regrid(q.materialize() + 0.1, q)
    np.testing.assert_array_equal(unpack(merged.codes, 4, 32)[:16], unpack(q.codes, 4, 32)[:16])
