"""Round to nearest and NF4 against oracles in plain numpy, and at the edges of the number formats."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.errors import LeafError
from effjax.quantize import NF4, RTN
from effjax.quantize.nf4 import LEVELS

quantized = jax.jit(lambda method, w: method.quantize(w), static_argnums=0)


def oracle(w, bits, group_size, symmetric, scale_dtype="float16"):
    """The usual round to nearest, group by group with loops; rounding uses the stored scale."""
    n, out = w.shape
    size = n if group_size is None else group_size
    result = np.zeros_like(w)
    for o in range(out):
        for start in range(0, n, size):
            group = w[start : start + size, o].astype(np.float32)
            if symmetric:
                scale, zero = np.float32(np.abs(group).max() / np.float32(2 ** (bits - 1) - 1)), 2 ** (bits - 1)
            else:
                low, high = min(np.float32(0), group.min()), max(np.float32(0), group.max())
                scale = np.float32((high - low) / np.float32(2**bits - 1))
            scale = np.float32(np.dtype(scale_dtype).type(scale))
            scale = scale if scale > 0 else np.float32(1)
            if not symmetric:
                zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
            codes = np.clip(np.round(group / scale) + zero, 0, 2**bits - 1)
            result[start : start + size, o] = scale * (codes - zero)
    return result


def assert_nearly_all_equal(got, want, step):
    """Equal, but for values at a rounding boundary: there the code may differ by one."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    close = np.isclose(got, want, rtol=1e-5, atol=1e-7 * np.abs(want).max())
    assert np.mean(~close) <= max(0.02, 1 / got.size)
    assert (np.abs(got - want) <= step * 1.01).all()


shapes = st.sampled_from([(8, 1, None), (7, 3, None), (61, 2, None), (12, 5, 4), (30, 3, 5), (32, 4, 16), (9, 4, 3)])


@given(st.integers(2, 8), shapes, st.booleans(), st.integers(0, 2**32 - 1), st.sampled_from([1e-2, 1.0, 300.0]))
@settings(max_examples=40)
def test_oracle(bits, shape, symmetric, seed, magnitude):
    n, out, group_size = shape
    w = (np.random.default_rng(seed).standard_normal((n, out)) * magnitude).astype(np.float32)
    q = quantized(RTN(bits=bits, group_size=group_size, symmetric=symmetric), w)
    assert q.shape == w.shape
    step = float(np.asarray(q.scales, np.float32).max())
    assert_nearly_all_equal(jax.jit(lambda q: q.materialize())(q), oracle(w, bits, group_size, symmetric), step)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_error_is_within_half_a_step(bits, symmetric):
    """No value inside the range is off by more than half a step (and the rounding of the scale to float16)."""
    w = np.asarray(jax.random.normal(jax.random.key(bits), (64, 8)))
    q = quantized(RTN(bits=bits, group_size=16, symmetric=symmetric), w)
    step = np.repeat(np.asarray(q.scales, np.float32), 16, axis=0)
    error = np.abs(np.asarray(q.materialize()) - w)
    assert (error <= step * (0.5 + 2**bits * 2**-11)).all()


def test_one_bit():
    """Two levels: plus and minus the mean magnitude of the group (symmetric), zero and the extreme (asymmetric)."""
    w = np.array([[1.0], [-3.0], [2.0], [-2.0]], np.float32)
    symmetric = RTN(bits=1, group_size=None, symmetric=True).quantize(jnp.asarray(w))
    np.testing.assert_array_equal(symmetric.materialize(), [[2.0], [-2.0], [2.0], [-2.0]])
    asymmetric = RTN(bits=1, group_size=None).quantize(jnp.abs(jnp.asarray(w)))
    np.testing.assert_array_equal(asymmetric.materialize(), [[0.0], [3.0], [3.0], [3.0]])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", ["absmax", "mse"])
def test_zeros_and_constants(bits, symmetric, clip):
    """A group of zeros stays zero; a constant group is exact up to its scale's rounding."""
    w = jnp.stack([jnp.zeros(16), jnp.full(16, 0.75), jnp.full(16, -3.0), jnp.zeros(16).at[3].set(1.0)], axis=1)
    method = RTN(bits=bits, group_size=16, symmetric=symmetric, clip=clip, steps=5)
    out = np.asarray(quantized(method, w).materialize())
    np.testing.assert_array_equal(out[:, 0], 0)
    np.testing.assert_allclose(out[:, 1], 0.75, rtol=2e-3)
    np.testing.assert_allclose(out[:, 2], -3.0, rtol=2e-3)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_clipping_never_has_a_larger_error(bits, symmetric, seed):
    """Group by group: the search starts at the full range."""
    w = np.asarray(jax.random.t(jax.random.key(seed), 3.0, (64, 16)))

    def errors(clip):
        q = quantized(RTN(bits=bits, group_size=32, symmetric=symmetric, clip=clip, steps=12), w)
        return np.square(np.asarray(q.materialize()) - w).reshape(2, 32, 16).sum(1)

    absmax, mse = errors("absmax"), errors("mse")
    assert (mse <= absmax * (1 + 1e-5)).all()
    if bits <= 3:  # heavy tails: clipping them must really pay
        assert mse.sum() < 0.95 * absmax.sum()


@pytest.mark.parametrize("clip", ["absmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tiny_weights(symmetric, clip):
    """Below what a float16 scale can hold a group becomes zero, never NaN or larger; float32 scales keep it."""
    w = 1e-9 * jax.random.normal(jax.random.key(0), (16, 4))
    for bits in (1, 4):
        out = np.asarray(RTN(bits=bits, group_size=16, symmetric=symmetric, clip=clip).quantize(w).materialize())
        assert np.abs(out).max() <= 2 * np.abs(w).max()
    kept = RTN(bits=8, group_size=16, symmetric=symmetric, clip=clip, scale_dtype="float32").quantize(w)
    np.testing.assert_allclose(kept.materialize(), w, atol=float(np.abs(w).max()) / 100)


def test_large_weights_overflow_float16_and_not_float32():
    w = 1e8 * jax.random.normal(jax.random.key(0), (16, 4))
    with pytest.raises(LeafError, match="scale_dtype='float32'"):
        ej.quantize_params({"kernel": w}, RTN(bits=4, group_size=16))
    kept = ej.quantize_params({"kernel": w}, RTN(bits=8, group_size=16, scale_dtype="float32"))["kernel"]
    np.testing.assert_allclose(kept.materialize(), w, atol=float(np.abs(w).max()) / 100)


@given(st.sampled_from([(16, 3, None), (13, 2, None), (32, 4, 16), (24, 1, 8)]), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_nf4_oracle(shape, seed):
    """The nearest of the 16 levels by trying all of them, times the stored scale."""
    n, out, block = shape
    w = np.random.default_rng(seed).standard_normal((n, out)).astype(np.float32)
    size = n if block is None else block
    scale = np.abs(w.reshape(n // size, size, out)).max(1).astype(np.float16).astype(np.float32)
    normal = w / np.repeat(scale, size, axis=0)
    nearest = np.abs(normal[..., None] - np.asarray(LEVELS, np.float32)).argmin(-1)
    want = np.asarray(LEVELS, np.float32)[nearest] * np.repeat(scale, size, axis=0)
    got = np.asarray(jax.jit(lambda q: q.materialize())(quantized(NF4(block_size=block), w)))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_nf4_levels_are_kept():
    """Every level is its own nearest one; a block of zeros stays zero."""
    w = jnp.stack([jnp.asarray(LEVELS), jnp.zeros(16)], axis=1)
    np.testing.assert_array_equal(NF4(block_size=None).quantize(w).materialize(), w)


def test_bfloat16_weights_are_rounded_in_float32():
    w = jax.random.normal(jax.random.key(0), (64, 8), jnp.bfloat16)
    half, full = (RTN(bits=4, group_size=32).quantize(x) for x in (w, w.astype(jnp.float32)))
    np.testing.assert_array_equal(half.codes, full.codes)
    np.testing.assert_array_equal(half.scales, full.scales)
    assert half.materialize().dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 0}, "bits=0: choose 1 to 8"),
        ({"bits": 9}, "bits=9: choose 1 to 8"),
        ({"group_size": 0}, "group_size=0: a positive number, or None for one group a column"),
        ({"clip": "max"}, "clip='max': choose 'absmax', 'full' or 'mse'"),
        ({"steps": 0}, r"steps=0, smallest=0.4: at least one step, a fraction in \(0, 1\]"),
        ({"smallest": 1.5}, r"steps=40, smallest=1.5: at least one step, a fraction in \(0, 1\]"),
        ({"scale_dtype": "int8"}, "scale_dtype='int8' is no floating dtype"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        RTN(**options)


def test_wrong_options_of_nf4():
    with pytest.raises(ValueError, match="^block_size=0: a positive number, or None for the whole column$"):
        NF4(block_size=0)
    with pytest.raises(ValueError, match="^scale_dtype='int8' is no floating dtype$"):
        NF4(scale_dtype="int8")
