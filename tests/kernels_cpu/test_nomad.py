"""The kernels of NoMAD against plain jnp, for every variant that this processor runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels_cpu
from effjax.kv import nomad, nomad_attention
from kernels_cpu import nomad as native
from kernels_cpu._native import NATIVE, NativeLibrary
from kernels_cpu.variants import runnable

RUNNABLE = runnable("nomad", native.VARIANTS)
lookup_sums, code_keys = jax.jit(nomad.lookup_sums), jax.jit(nomad_attention.code_keys)
reference = jax.jit(nomad_attention._attend_reference, static_argnames="with_received")


def test_there_is_a_variant():
    assert "portable" in RUNNABLE, kernels_cpu.why_not()


@settings(max_examples=8)
@given(
    subs=st.sampled_from([1, 2, 3, 4, 7, 33]),
    group=st.sampled_from([1, 2, 3, 4, 7]),
    blocks=st.sampled_from([0, 1, 3, 6]),
    seed=st.integers(0, 99),
)
def test_sums_are_the_same_integers(subs, group, blocks, seed):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 256, (2, group, subs, 16), np.uint8)
    codes = rng.integers(0, 256, (2, blocks, subs, 16), np.uint8)
    scale, bias = np.full((2, group), 0.5, np.float32), rng.integers(-9, 9, (2, group)).astype(np.float32)
    expected = 2 * np.asarray(lookup_sums(table, codes)) + bias[..., None]  # exact in float32
    for variant in RUNNABLE:
        found = native.lookup_logits(table, scale, bias, codes, variant=variant)
        assert found.shape == (2, group, 32 * blocks) and found.dtype == jnp.float32
        np.testing.assert_array_equal(found, expected, err_msg=variant)


@pytest.mark.parametrize("variant", RUNNABLE)
def test_the_largest_sum_does_not_overflow(variant):
    table, codes = np.full((1, 2, 257, 16), 255, np.uint8), np.full((1, 5, 257, 16), 0xF0, np.uint8)
    table[:, :, :, 0] = 254  # of the first sixteen keys
    found = np.asarray(native.lookup_logits(table, np.ones((1, 2)), np.zeros((1, 2)), codes, variant=variant))
    halves = found.reshape(2, 5, 2, 16)
    assert (halves[:, :, 0] == 257 * 254).all() and (halves[:, :, 1] == 65_535).all()


def problem(*, batch, heads, group, head_dim, d_sub, slots, width, dtype="float32", seed=0):
    """Queries and centres are small multiples of 1/16, so that their products are exact in any order."""
    rng = np.random.default_rng(seed)

    def eighths(*shape):
        return (rng.integers(-16, 17, shape) / 16).astype(np.float32)

    lengths = rng.integers(0, slots + 1, (batch, heads)).astype(np.int32)
    lengths.flat[:3] = [0, slots, slots // 32 * 32][: lengths.size]
    books = eighths(heads, head_dim // d_sub, 16, d_sub)
    keys = code_keys(eighths(batch, heads, slots, head_dim), lengths, books)
    v = jnp.asarray(rng.standard_normal((batch, heads, slots, width)), dtype)
    seen = rng.random((batch, heads, slots)) < 0.5
    return (eighths(batch, heads, group, head_dim), keys.codes, keys.recent, v, lengths, books), seen


@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 2, "heads": 2, "group": 3, "head_dim": 20, "d_sub": 4, "slots": 70, "width": 7},
        {"batch": 1, "heads": 1, "group": 1, "head_dim": 7, "d_sub": 1, "slots": 33, "width": 1},
        {"batch": 3, "heads": 2, "group": 4, "head_dim": 128, "d_sub": 1, "slots": 300, "width": 136},
        {"batch": 1, "heads": 3, "group": 11, "head_dim": 64, "d_sub": 2, "slots": 257, "width": 68},
        {"batch": 2, "heads": 1, "group": 2, "head_dim": 36, "d_sub": 4, "slots": 31, "width": 40, "dtype": "bfloat16"},
        {"batch": 1, "heads": 2, "group": 1, "head_dim": 6, "d_sub": 2, "slots": 160, "width": 99, "dtype": "float16"},
    ],
    ids=lambda shape: "-".join(str(part) for part in shape.values()),
)
def test_attention_is_that_of_the_reference(shape):
    arrays, seen = problem(**shape)
    arrays = tuple(jnp.asarray(x) for x in arrays)
    for mask in (jnp.zeros((0,), bool), jnp.asarray(seen)):
        expected = reference(*arrays, mask, with_received=True)
        for variant in RUNNABLE:
            found = native.attend(*arrays, mask, with_received=True, variant=variant)
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-5, err_msg=variant)
        short = native.attend(*arrays, mask)
        assert short.shape[-1] == shape["group"] * shape["width"]
        np.testing.assert_allclose(short, expected[..., : short.shape[-1]], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("variant", RUNNABLE)
def test_one_row_with_nan_spoils_no_other(variant):
    (q, *rest), _ = problem(batch=2, heads=1, group=2, head_dim=8, d_sub=2, slots=40, width=5, seed=3)
    rest[3] = np.full((2, 1), 40, np.int32)
    q[0, 0, 1, 3] = np.nan
    arrays = tuple(jnp.asarray(x) for x in (q, *rest))
    y = np.asarray(native.attend(*arrays, jnp.zeros((0,), bool), variant=variant)).reshape(2, 2, 5)
    assert np.isnan(y[0, 1]).all() and np.isfinite(y[0, 0]).all() and np.isfinite(y[1]).all()


@pytest.mark.parametrize("variant", RUNNABLE)
def test_a_peak_far_above_the_rest(variant):
    """Logits of thousands do not overflow, whether the peak comes first or last."""
    for place in (0, 299):
        k = np.zeros((1, 1, 300, 4), np.float32)
        k[0, 0, place] = 1.0
        books = np.zeros((1, 4, 16, 1), np.float32)
        books[:, :, 1] = 1.0
        lengths, v = np.full((1, 1), 300, np.int32), np.arange(300, dtype=np.float32).reshape(1, 1, 300, 1)
        keys = code_keys(k, lengths, books)
        q = jnp.full((1, 1, 1, 4), 2000.0)
        y = native.attend(q, keys.codes, keys.recent, jnp.asarray(v), lengths, books, jnp.zeros(0, bool))
        assert float(y[0, 0, 0]) == place


def test_compiled_program_calls_the_native_kernel():
    (q, codes, recent, v, lengths, books), _ = problem(
        batch=1, heads=1, group=1, head_dim=4, d_sub=2, slots=40, width=3
    )
    keys = nomad_attention.NomadKeys(codes=codes, recent=recent)
    text = jax.jit(nomad_attention.nomad_attention).lower(q, keys, v, lengths, books).as_text()
    assert ("EffjaxNomadAttend" in text) == kernels_cpu.available()


def test_without_the_library_plain_jax_runs_and_says_so(tmp_path, monkeypatch):
    (q, codes, recent, v, lengths, books), _ = problem(
        batch=1, heads=1, group=1, head_dim=4, d_sub=2, slots=40, width=3
    )
    tables = nomad.query_table(q, books)
    logits = nomad.lookup_logits(tables, codes)
    arrays = tuple(jnp.asarray(x) for x in (q, codes, recent, v, lengths, books, np.zeros(0, bool)))
    expected = reference(*arrays, with_received=False)
    for module in (nomad, nomad_attention):
        monkeypatch.setattr(module, "NATIVE", NativeLibrary(tmp_path))
    with pytest.warns(kernels_cpu.NativeKernelWarning, match="nomad.lookup_logits runs as plain jax"):
        found = nomad._lookup_cpu(tables.table, tables.scale, tables.bias, codes)
    np.testing.assert_allclose(found, logits, rtol=1e-6)
    with pytest.warns(kernels_cpu.NativeKernelWarning, match="nomad.attend runs as plain jax"):
        np.testing.assert_allclose(nomad_attention._attend_cpu(*arrays, with_received=False), expected, atol=1e-6)


def test_unknown_variants_are_refused():
    table, codes = jnp.zeros((1, 1, 2, 16), jnp.uint8), jnp.zeros((1, 1, 2, 16), jnp.uint8)
    with pytest.raises(ValueError, match="unknown variant 'i8mm'; choose one of auto, portable, avx2, avx512"):
        native.lookup_logits(table, jnp.ones((1, 1)), jnp.zeros((1, 1)), codes, variant="i8mm")


def test_the_handlers_themselves_refuse_wrong_shapes():
    """The C++ side must not trust its caller: a wrong buffer is an error, never a read past the end."""
    one = jnp.ones((1, 1))

    def lookup(table, codes, out, variant=0):
        call = jax.ffi.ffi_call(NATIVE.target("EffjaxNomadLookup"), jax.ShapeDtypeStruct(out, jnp.float32))
        return jax.block_until_ready(
            call(jnp.zeros(table, jnp.uint8), one, one, jnp.zeros(codes, jnp.uint8), variant=np.int64(variant))
        )

    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit together"):
        lookup((1, 1, 2, 16), (1, 3, 1, 16), (1, 1, 96))
    with pytest.raises(jax.errors.JaxRuntimeError, match="hold 257 sub-quantizers, found 258"):
        lookup((1, 1, 258, 16), (1, 1, 258, 16), (1, 1, 32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="variant 9 does not run"):
        lookup((1, 1, 2, 16), (1, 1, 2, 16), (1, 1, 32), variant=9)

    def attend(scratch, slots):
        (q, codes, recent, _, lengths, books), _ = problem(
            batch=1, heads=1, group=1, head_dim=4, d_sub=2, slots=40, width=3
        )
        results = (jax.ShapeDtypeStruct((1, 1, 3), jnp.float32), jax.ShapeDtypeStruct((scratch,), jnp.float32))
        call = jax.ffi.ffi_call(NATIVE.target("EffjaxNomadAttend"), results)
        mask, v = jnp.zeros((0,), bool), jnp.zeros((1, 1, slots, 3))
        flags = {"received": np.int64(0), "variant": np.int64(0)}
        return jax.block_until_ready(call(q, codes, recent, v, lengths, books, mask, **flags))

    with pytest.raises(jax.errors.JaxRuntimeError, match="scratch buffer is too small"):
        attend(10, 40)
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit together"):
        attend(1000, 65)
