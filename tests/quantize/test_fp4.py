"""FP4, NVFP4 and MXFP4 against oracles in plain numpy and ml_dtypes' e2m1, through files too."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.arrays.float_values import E2M1, e2m1_codes
from effjax.errors import LeafError
from effjax.io.formats.exactness import exactness
from effjax.quantize import FP4, FP8, MXFP4, NVFP4

VALUES = np.asarray(E2M1, np.float32)
BITSANDBYTES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / 12
quantized = jax.jit(lambda method, w: method.quantize(w), static_argnums=0)
materialized = jax.jit(lambda q: q.materialize())


def weight(shape, seed, magnitude=1.0):
    """Normal values, with a column of zeros, a constant one and a block that is far smaller than the others."""
    w = (np.random.default_rng(seed).standard_normal(shape) * magnitude).astype(np.float32)
    w[:, 0] = 0
    if shape[1] > 2:
        w[:, 1] = -0.75 * magnitude
        w[: shape[0] // 2, 2] *= 1e-6
    return w


def test_e2m1_is_that_of_ml_dtypes():
    """All sixteen values, all ties, and a million others; only the sign of zero differs: here it is dropped."""
    np.testing.assert_array_equal(
        VALUES, np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    )
    magnitudes = VALUES[:8]
    ties = (magnitudes[1:] + magnitudes[:-1]) / 2
    x = np.concatenate([VALUES, ties, -ties, np.random.default_rng(0).uniform(-8, 8, 1_000_000).astype(np.float32)])
    want = x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(e2m1_codes(jnp.asarray(x)), np.where(want == 8, 0, want))
    np.testing.assert_array_equal(e2m1_codes(jnp.array([1e9, -np.inf])), [7, 15])


shapes = st.sampled_from([(32, 3, 32), (64, 4, 16), (7, 3, 7)])


@given(shapes, st.integers(0, 2**32 - 1), st.sampled_from([1e-2, 1.0, 1e3]), st.sampled_from(["e2m1", "bitsandbytes"]))
@settings(max_examples=12)
def test_fp4_oracle(shape, seed, magnitude, levels):
    """The nearest level of a block's own multiple, found by trying all."""
    n, out, block = shape
    w = weight((n, out), seed, magnitude)
    q = quantized(FP4(block_size=block, levels=levels), w)
    table = VALUES[:8] / 6 if levels == "e2m1" else BITSANDBYTES
    table = np.concatenate([table, -table])
    got, want = np.asarray(materialized(q)), np.zeros_like(w)
    for o in range(out):
        for start in range(0, n, block):
            part = w[start : start + block, o]
            top = np.float32(6 if levels == "e2m1" else 1)
            scale = np.float32(np.float16(np.abs(part).max() / top)) * top
            scale = scale if scale > 0 else top
            nearest = np.abs(part[:, None] / scale - table).argmin(-1)
            want[start : start + block, o] = table[nearest] * scale
    # A value half way between two levels may go either way: then it is as far from one as from the other.
    off = ~np.isclose(got, want, rtol=1e-5, atol=0)
    np.testing.assert_allclose(np.abs(got - w)[off], np.abs(want - w)[off], rtol=1e-4)
    assert off.mean() < 0.05
    np.testing.assert_array_equal(got[:, 0], 0)


def test_codes_are_those_of_files():
    """Sign in the highest bit, then the index of the magnitude: what both packages store."""
    w = jnp.array([[6.0], [-6.0], [0.5], [-1.0], [0.0]])
    np.testing.assert_array_equal(FP4(block_size=None).quantize(w).codes, [[0xF7], [0xA1], [0x00]])
    levels = jnp.asarray([*BITSANDBYTES, *-BITSANDBYTES[1:]])[:, None]
    q = FP4(block_size=None, levels="bitsandbytes").quantize(levels)
    np.testing.assert_array_equal(q.codes[:, 0], [0x10, 0x32, 0x54, 0x76, 0xA9, 0xCB, 0xED, 0x0F])


def nvfp4_oracle(w, block=16):
    """As written in compressed-tensors' documentation, with loops; values, block scales, and the matrix' number."""
    number = np.float32(448 * 6) / np.abs(w).max() if np.abs(w).max() > 0 else np.float32(1)
    values, scales = np.zeros_like(w), np.zeros((w.shape[0] // block, w.shape[1]), np.float32)
    for o in range(w.shape[1]):
        for g in range(len(scales)):
            part = w[g * block : (g + 1) * block, o]
            stored = np.float32(np.abs(part).max() / np.float32(6) * number)
            stored = np.float32(np.clip(stored, 2**-9, 448).astype(ml_dtypes.float8_e4m3fn))
            scales[g, o] = stored
            step = stored / number
            codes = (part / step).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
            values[g * block : (g + 1) * block, o] = codes * step
    return values, scales, number


@given(st.sampled_from([(16, 1), (32, 3), (64, 5)]), st.integers(0, 2**32 - 1), st.sampled_from([1e-4, 1.0, 1e4]))
@settings(max_examples=12)
def test_nvfp4_oracle(shape, seed, magnitude):
    w = weight(shape, seed, magnitude)
    q = quantized(NVFP4(), w)
    values, scales, number = nvfp4_oracle(w)
    assert (q.scales.dtype, q.global_scale.dtype) == (jnp.float8_e4m3fn, jnp.float32)
    np.testing.assert_allclose(q.global_scale, number, rtol=1e-6)
    got = np.asarray(q.scales, np.float32)
    assert (np.abs(got - scales) <= scales / 7).all() and np.mean(got != scales) < 0.1  # ties of e4m3, by one step
    same = np.repeat(got == scales, 16, axis=0)
    close = np.isclose(np.asarray(materialized(q)), values, rtol=1e-5, atol=1e-7 * magnitude)
    assert np.mean(close[same]) > 0.99
    np.testing.assert_array_equal(np.asarray(materialized(q))[:, 0], 0)


def test_nvfp4_scales_reach_down_to_the_smallest():
    """The largest block's scale is the top of e4m3; a block 2**19 times smaller keeps the smallest scale, not zero."""
    w = jnp.concatenate([jnp.full((16, 1), 3.0), jnp.full((16, 1), 3.0 * 2**-19), jnp.zeros((16, 1))])
    q = quantized(NVFP4(), w)
    np.testing.assert_array_equal(np.asarray(q.scales, np.float32)[:, 0], [448, 2**-9, 2**-9])
    np.testing.assert_allclose(materialized(q)[:16], 3.0, rtol=1e-6)
    assert not jnp.any(materialized(q)[32:])


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-36])
def test_nvfp4_of_tiny_matrices_is_finite(value):
    q = quantized(NVFP4(), jnp.full((16, 2), value))
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(q))
    assert (np.abs(materialized(q) - value) <= 1.01 * value).all()


def test_stacked_matrices_have_a_number_each():
    w = jnp.stack([jnp.ones((16, 2)), 4 * jnp.ones((16, 2))])
    q = quantized(NVFP4(), w)
    np.testing.assert_allclose(q.global_scale.ravel(), [2688, 672])
    np.testing.assert_allclose(materialized(q), w, rtol=1e-6)


@given(st.sampled_from([(32, 1), (64, 3), (96, 4)]), st.integers(0, 2**32 - 1), st.sampled_from(["floor", "ceil"]))
@settings(max_examples=12)
def test_mxfp4_oracle(shape, seed, exponent):
    """The specification's shared exponent, block by block."""
    w = weight(shape, seed)
    q = quantized(MXFP4(exponent=exponent), w)
    want, scales = np.zeros_like(w), np.ones((shape[0] // 32, shape[1]))
    for o in range(shape[1]):
        for g in range(shape[0] // 32):
            part = w[g * 32 : (g + 1) * 32, o].astype(np.float64)
            if (largest := np.abs(part).max()) > 0:
                scales[g, o] = 2.0 ** (
                    np.floor(np.log2(largest)) - 2 if exponent == "floor" else np.ceil(np.log2(largest / 6))
                )
            codes = (part / scales[g, o]).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
            want[g * 32 : (g + 1) * 32, o] = codes * scales[g, o]
    assert q.scales.dtype == jnp.float8_e8m0fnu
    np.testing.assert_array_equal(np.asarray(q.scales, np.float64), scales)
    np.testing.assert_array_equal(materialized(q), want)


@pytest.mark.parametrize("largest", [6.0, 6.1, 8.0, 2.0**-130, 0.0, 2.0**127])
def test_mxfp4_at_the_edges(largest):
    """What the floor saturates the ceiling does not; scales stay inside e8m0."""
    w = jnp.zeros((32, 1)).at[0].set(largest)
    floor, ceil = (quantized(MXFP4(exponent=e), w) for e in ("floor", "ceil"))
    for q in (floor, ceil):
        assert np.isfinite(np.asarray(q.scales, np.float32)).all() and jnp.isfinite(materialized(q)).all()
        assert (jnp.abs(materialized(q) - w) <= largest / 4).all() or largest < 2.0**-126
    if largest == 6.1:
        assert (float(floor.scales[0, 0]), float(ceil.scales[0, 0])) == (1.0, 2.0)
        assert (float(materialized(floor)[0, 0]), float(materialized(ceil)[0, 0])) == (6.0, 6.0)


@pytest.mark.parametrize("method", [FP4(), NVFP4(), MXFP4()], ids=lambda m: type(m).__name__)
def test_through_a_checkpoint(method, tmp_path):
    """Scales of eight-bit floats, with and without mantissa, are stored as such."""
    params = ej.quantize_params({"kernel": jax.random.normal(jax.random.key(0), (64, 8))}, method)
    ej.io.save_checkpoint(tmp_path / "m", params, config={})
    back = ej.io.load_checkpoint(tmp_path / "m").params
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_file_formats_keep_the_leaves():
    w = jax.random.normal(jax.random.key(0), (64, 8))
    assert exactness(quantized(NVFP4(), w), "nvfp4").exact
    assert exactness(quantized(MXFP4(), w), "mxfp4").exact
    assert exactness(quantized(FP8(), w), "compressed-tensors").exact


def test_smaller_blocks_and_finer_scales_lose_less():
    w = np.random.default_rng(0).standard_t(4, (256, 64)).astype(np.float32)

    def error(method):
        return float(np.square(np.asarray(materialized(quantized(method, w))) - w).mean())

    assert error(FP4(block_size=16)) < error(FP4(block_size=64)) < error(FP4(block_size=None))
    assert error(NVFP4()) < 1.05 * error(FP4(block_size=16)) < error(MXFP4(block_size=16))
    assert error(FP4()) < error(FP4(levels="bitsandbytes"))  # its smallest level is nearly none


@pytest.mark.parametrize("method", [FP4, NVFP4, MXFP4])
def test_wrong_options(method):
    with pytest.raises(ValueError, match="^block_size=0: a positive number of inputs that share a scale$"):
        method(block_size=0)
    with pytest.raises(LeafError, match=r"^kernel \[40, 8\]: group_size=32 does not divide its 40 inputs: choose"):
        ej.quantize_params({"kernel": jnp.ones((40, 8))}, method(block_size=32))


def test_other_wrong_options():
    with pytest.raises(ValueError, match="^levels='e3m0': choose 'e2m1' or 'bitsandbytes'$"):
        FP4(levels="e3m0")
    with pytest.raises(ValueError, match="^scale_dtype='int8' is no floating dtype$"):
        FP4(scale_dtype="int8")
    with pytest.raises(ValueError, match="^exponent='up': choose 'floor' or 'ceil'$"):
        MXFP4(exponent="up")
