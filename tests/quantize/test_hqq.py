"""HQQ against the released optimiser in plain float64 numpy, and floating zero points in the array type."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.errors import LeafError
from effjax.io.formats.exactness import exactness
from effjax.quantize import HQQ, RTN

quantized = jax.jit(lambda method, w: method.quantize(w), static_argnums=0)


@jax.jit
def materialized(q):
    return q.materialize()


def oracle(w, bits, group_size, steps=20, p=0.7, beta=10.0, kappa=1.01):
    """Codes, scales and zero points as the authors' code finds them; stored in float16, used as stored."""
    n, out = w.shape
    size = n if group_size is None else group_size
    groups = w.astype(np.float64).reshape(n // size, size, out)
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
    zero = (-low / scale).astype(np.float16).astype(np.float64)
    best = np.inf
    for _ in range(steps):
        codes = np.round(groups / scale + zero).clip(0, 2**bits - 1)
        error = groups - (codes - zero) * scale
        size_of = np.abs(error)
        power = np.where(size_of > 0, size_of, 1) ** (p - 1)
        kept = np.sign(error) * np.maximum(size_of - np.where(size_of > 0, power, 0) / beta, 0)
        zero = (codes - (groups - kept) / scale).mean(1, keepdims=True)
        beta *= kappa
        if size_of.mean() >= best:
            break
        best = size_of.mean()
    zero = zero.astype(np.float16).astype(np.float64)
    codes = np.round(groups / scale + zero).clip(0, 2**bits - 1)
    return codes.reshape(n, out), scale[:, 0], zero[:, 0], ((codes - zero) * scale).reshape(n, out)


def heavy(n, out, seed):
    """Weights with tails, as trained ones have."""
    return np.random.default_rng(seed).standard_t(4, (n, out)).astype(np.float32)


@given(st.sampled_from([2, 3, 8]), st.sampled_from([(64, 3, 16), (61, 2, None)]), st.integers(0, 2**32 - 1))
@settings(max_examples=12)
def test_oracle(bits, shape, seed):
    """Codes, scales and zero points; a value at a boundary may round the other way."""
    n, out, group_size = shape
    w = heavy(n, out, seed)
    q = quantized(HQQ(bits=bits, group_size=group_size), w)
    codes, scales, zeros, dense = oracle(w, bits, group_size)
    np.testing.assert_allclose(q.scales, scales, rtol=2**-10)
    np.testing.assert_allclose(q.zeros, zeros, rtol=2**-9, atol=2e-2)
    got = np.asarray(materialized(q))
    step = np.repeat(scales, n // len(scales), axis=0)
    assert (np.abs(got - dense) <= 1.03 * step).all()
    assert np.mean(np.abs(got - dense) > 0.03 * step) < 0.1
    assert got.shape == codes.shape


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_layer_error_is_that_of_the_oracle(bits):
    """`tr(D^T H D)` within 1 %, on inputs that the method has not seen."""
    w, rng = heavy(256, 64, bits), np.random.default_rng(0)
    x = rng.standard_normal((512, 256)) * np.exp(rng.standard_normal(256))
    got, want = np.asarray(materialized(quantized(HQQ(bits=bits), w))), oracle(w, bits, 64)[3]
    ours, theirs = (np.square(x @ (dense - w)).sum() for dense in (got, want))
    assert abs(ours / theirs - 1) < 0.01


def test_the_fit_lowers_the_error():
    """Below that of its own start, in the norm it is made for and by more than chance."""
    w = heavy(512, 64, 0)

    def error(method):
        return float((np.abs(np.asarray(materialized(quantized(method, w))) - w) ** 0.7).mean())

    for bits in (2, 3, 4):
        assert error(HQQ(bits=bits)) < 0.98 * error(HQQ(bits=bits, steps=0))


def test_integer_zero_points_would_lose():
    """Why the array type holds real ones: rounded, they undo the fit. So formats of integers are only near."""
    w = heavy(256, 32, 1)
    q = quantized(HQQ(bits=3), w)
    assert exactness(q, "gptq").reason == "its zero points are real numbers, not integers"
    rounded = q.replace(zeros=jnp.round(q.zeros))
    real, integer = (np.abs(np.asarray(materialized(a)) - w).mean() for a in (q, rounded))
    assert integer > 1.1 * real


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_zeros_and_constants(bits, scale_dtype):
    """Exact up to the rounding of what is stored, also in a narrow group that is far from zero."""
    w = np.stack([np.zeros(16), np.full(16, 0.75), np.full(16, -3.0), 5 + 1e-4 * np.arange(16), np.eye(16)[3]], 1)
    q = quantized(HQQ(bits=bits, group_size=16, scale_dtype=scale_dtype), w.astype(np.float32))
    dense = np.asarray(materialized(q))
    np.testing.assert_array_equal(dense[:, 0], 0)
    np.testing.assert_allclose(dense[:, 1:4], w[:, 1:4], rtol=2e-3)
    assert np.isfinite(dense).all() and np.isfinite(np.asarray(q.zeros, np.float32)).all()
    assert np.abs(dense[:, 4] - w[:, 4]).max() <= 1


def test_a_matrix_stops_for_itself():
    """In a stack every matrix has the bytes that it has alone, however long the others go on."""
    stack = jnp.stack([heavy(64, 8, 0), 0.01 * heavy(64, 8, 1), jnp.zeros((64, 8))])
    method = HQQ(bits=3, group_size=32)
    together = quantized(method, stack)
    for i in range(3):
        for a, b in zip(jax.tree.leaves(together[i]), jax.tree.leaves(quantized(method, stack[i])), strict=True):
            np.testing.assert_array_equal(a, b)


def test_bytes_are_counted():
    """Two bytes a group for the real zero point, where an integer one has half a byte."""
    w = jnp.ones((128, 8))
    assert quantized(HQQ(bits=4), w).nbytes == 64 * 8 + 2 * 8 * 2 + 2 * 8 * 2
    assert quantized(RTN(bits=4, group_size=64), w).nbytes == 64 * 8 + 2 * 8 * 2 + 8


def test_large_weights_overflow_float16_and_not_float32():
    w = 1e8 * jax.random.normal(jax.random.key(0), (64, 4))
    with pytest.raises(LeafError, match="HQQ gives values that overflow float16: write scale_dtype='float32'"):
        ej.quantize_params({"kernel": w}, HQQ())
    kept = ej.quantize_params({"kernel": w}, HQQ(bits=8, scale_dtype="float32"))["kernel"]
    np.testing.assert_allclose(kept.materialize(), w, atol=float(np.abs(w).max()) / 100)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 9}, "bits=9: choose 1 to 8"),
        ({"group_size": 0}, "group_size=0: a positive number, or None for one group a column"),
        ({"steps": -1}, r"steps=-1: 0 \(the min-max grid\) or more"),
        ({"p": 1.5}, r"p=1.5: an exponent in \(0, 1\]"),
        ({"beta": 0.0}, "beta=0.0, kappa=1.01: positive numbers"),
        ({"scale_dtype": "int8"}, "scale_dtype='int8' is no floating dtype"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        HQQ(**options)


def test_groups_that_do_not_divide():
    with pytest.raises(LeafError, match=r"^kernel \[40, 8\]: group_size=64 does not divide its 40 inputs: choose"):
        ej.quantize_params({"kernel": jnp.ones((40, 8))}, HQQ())
