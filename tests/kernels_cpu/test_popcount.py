"""The self-check kernel against numpy, for every variant that this processor runs."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_cpu
from kernels_cpu import _native
from kernels_cpu.popcount import MAX_ROW_BYTES, VARIANTS

RUNNABLE = [name for name in VARIANTS if name != "popcnt" or "popcnt" in kernels_cpu.cpu_features()]


def expected(x):
    return np.unpackbits(x, axis=-1).sum(axis=-1, dtype=np.uint32)


@pytest.mark.parametrize("variant", RUNNABLE)
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9,), (4096,), (3, 0), (0, 3), (5, 17), (2, 3, 33)], ids=str)
def test_matches_numpy(variant, shape):
    x = np.random.default_rng(len(shape) + sum(shape)).integers(0, 256, shape, dtype=np.uint8)
    counts = kernels_cpu.popcount(x, variant=variant)
    assert counts.dtype == jnp.uint32
    np.testing.assert_array_equal(counts, expected(x))


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.binary(max_size=300))
def test_matches_numpy_on_any_bytes(data):
    x = np.frombuffer(data, np.uint8)
    assert int(kernels_cpu.popcount(x)) == int(expected(x))


def test_under_jit_and_vmap():
    x = np.random.default_rng(0).integers(0, 256, (3, 4, 11), dtype=np.uint8)
    np.testing.assert_array_equal(jax.jit(kernels_cpu.popcount)(x), expected(x))
    np.testing.assert_array_equal(jax.vmap(kernels_cpu.popcount, in_axes=1, out_axes=1)(x), expected(x))


def test_compiled_program_calls_the_native_kernel():
    hlo = jax.jit(kernels_cpu.popcount).lower(jax.ShapeDtypeStruct((2, 8), jnp.uint8)).as_text()
    assert ("EffjaxPopcount" in hlo) == kernels_cpu.available()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels_cpu.popcount(jnp.zeros(3)), TypeError, "x must be uint8, not float32"),
        (lambda: kernels_cpu.popcount(jnp.uint8(3)), ValueError, r"write x\[None\] for a single byte"),
        (lambda: kernels_cpu.popcount(jnp.zeros(3, jnp.uint8), variant="avx9"), ValueError, "choose one of auto, "),
        (
            lambda: jax.eval_shape(kernels_cpu.popcount, jax.ShapeDtypeStruct((MAX_ROW_BYTES + 1,), jnp.uint8)),
            ValueError,
            "overflows uint32; split it below 536870912",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_handler_itself_refuses_wrong_shapes():
    """The C++ side must not trust its caller: a wrong buffer is an error, never a read past the end."""
    assert kernels_cpu.available(), kernels_cpu.why_not()
    kernel = jax.ffi.ffi_call(_native.NATIVE.target("EffjaxPopcount"), jax.ShapeDtypeStruct((5,), jnp.uint32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="one element for each row"):
        jax.block_until_ready(kernel(jnp.zeros((2, 3), jnp.uint8), variant=np.int64(0)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="variant 9 does not run"):
        right = jax.ffi.ffi_call("EffjaxPopcount", jax.ShapeDtypeStruct((2,), jnp.uint32))
        jax.block_until_ready(right(jnp.zeros((2, 3), jnp.uint8), variant=np.int64(9)))
