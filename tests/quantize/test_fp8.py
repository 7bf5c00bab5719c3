"""FP8 per channel against ml_dtypes, code by code."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.arrays.float_values import float8_codes, float8_max, float8_table
from effjax.errors import LeafError
from effjax.quantize import FP8

KINDS = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
kinds = pytest.mark.parametrize("kind", KINDS)
quantized = jax.jit(lambda method, w: method.quantize(w), static_argnums=0)


@kinds
def test_table_and_codes_are_inverse(kind):
    """Every finite value has its own code; NaN and infinity hold zero; what is beyond the range saturates."""
    table, values = float8_table(kind), np.arange(256, dtype=np.uint8).view(KINDS[kind]).astype(np.float32)
    finite = np.isfinite(values)
    assert (~finite).sum() == {"float8_e4m3fn": 2, "float8_e5m2": 8}[kind]
    np.testing.assert_array_equal(table, np.where(finite, values, 0))
    codes = np.asarray(float8_codes(jnp.asarray(values[finite]), kind))
    np.testing.assert_array_equal(codes, np.arange(256)[finite])
    top = float8_max(kind)
    assert top == values[finite].max()
    ends = np.asarray(float8_codes(jnp.array([1.4 * top, -1e30, np.inf]), kind))
    np.testing.assert_array_equal(table[ends], [top, -top, top])


@kinds
def test_ties_go_to_the_even_code(kind):
    """Half way between all neighbours of one sign."""
    positive = float8_table(kind)[: {"float8_e4m3fn": 127, "float8_e5m2": 124}[kind]]
    middles = (positive[1:] + positive[:-1]) / 2
    codes = np.asarray(float8_codes(jnp.asarray(middles), kind))
    assert (codes % 2 == 0).all()
    np.testing.assert_array_equal(codes, middles.astype(KINDS[kind]).view(np.uint8))


@given(
    st.sampled_from([(1, 1), (7, 3), (16, 2), (33, 5)]), st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e4])
)
@settings(max_examples=12)
@kinds
def test_oracle(kind, shape, seed, magnitude):
    """Column by column: the scale brings the largest magnitude to the top, then ml_dtypes rounds."""
    w = (np.random.default_rng(seed).standard_normal(shape) * magnitude).astype(np.float32)
    w[:, -1] *= np.arange(shape[0]) % 2  # half of a column, or all of one, is zero
    q = quantized(FP8(kind=kind), w)
    codes = np.zeros(shape, np.uint8)
    for o in range(shape[1]):
        scale = np.abs(w[:, o]).max() / np.float32(ml_dtypes.finfo(KINDS[kind]).max)
        assert np.isclose(q.scales[0, o], scale if scale > 0 else 1, rtol=1e-6)
        codes[:, o] = (w[:, o] / np.asarray(q.scales)[0, o]).astype(KINDS[kind]).view(np.uint8)
    np.testing.assert_array_equal(q.codes, codes)
    want = codes.view(KINDS[kind]).astype(np.float32) * np.asarray(q.scales)
    np.testing.assert_allclose(jax.jit(lambda q: q.materialize())(q), want, rtol=1e-6)
    assert q.bits == 8 and q.scales.dtype == jnp.float32


@kinds
def test_relative_error_is_within_half_a_step(kind):
    """Normal numbers are off by at most half a unit of the mantissa: that is what floats are for."""
    w = np.exp(np.random.default_rng(0).uniform(-3, 3, (256, 4))).astype(np.float32)
    error = np.abs(np.asarray(FP8(kind=kind).quantize(jnp.asarray(w)).materialize()) - w) / w
    assert error.max() <= {"float8_e4m3fn": 2**-4, "float8_e5m2": 2**-3}[kind] * 1.0001


def test_stored_scales_are_used_and_their_overflow_is_an_error():
    w = jnp.array([[1e-6], [3e-7]])
    half = FP8(scale_dtype="float16").quantize(w)  # a subnormal scale: the codes make up for its rounding
    assert half.scales.dtype == jnp.float16
    np.testing.assert_array_equal(half.materialize(), jnp.zeros_like(w))
    np.testing.assert_allclose(FP8().quantize(w).materialize(), w, rtol=2**-4)
    with pytest.raises(LeafError, match=r"^kernel \[4, 4\]: FP8 gives values that overflow float16: write scale_dtype"):
        ej.quantize_params({"kernel": jnp.full((4, 4), 1e30)}, FP8(scale_dtype="float16"))


def test_wrong_options():
    with pytest.raises(ValueError, match=r"^kind='float8_e4m3': choose of \('float8_e4m3fn', 'float8_e5m2'\)$"):
        FP8(kind="float8_e4m3")
    with pytest.raises(ValueError, match="^scale_dtype='int8' is no floating dtype$"):
        FP8(scale_dtype="int8")
