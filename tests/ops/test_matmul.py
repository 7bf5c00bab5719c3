"""`ops.matmul` against the dense product: every array type, direction, precision, implementation and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.ops import matmul
from effjax.ops.dispatch import block_rows
from tests.lift.kinds import KINDS, assert_close, compress


def normal(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def weight(kind, rows=64, columns=24):
    return compress(normal(rows, columns), kind, "*")


@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_any_batch_and_every_implementation(kind):
    batches = ((), (1,), (2, 3))
    xs = [normal(*batch, 64, seed=1) for batch in batches]
    ys = [normal(*batch, 24, seed=2) for batch in batches]

    def products(w, xs, ys):
        def of(implementation):
            forward = [matmul(x, w, implementation=implementation) for x in xs]
            return forward, [matmul(y, w, transpose=True, implementation=implementation) for y in ys]

        dense = w.materialize()
        return [of(name) for name in (None, "reference", "blocked")], (
            [x @ dense for x in xs],
            [y @ dense.T for y in ys],
        )

    actual, expected = jax.jit(products)(weight(kind), xs, ys)
    for implementation in actual:
        assert_close(implementation, expected)


@pytest.mark.parametrize("kind", ["quantized", "nf4", "nm_sparse", "hashed"])
def test_blocked_gradients_equal_reference(kind):
    trainable, frozen = ej.partition(weight(kind))
    x = normal(3, 64, seed=1)

    def loss(implementation):
        def of(trainable, x):
            return jnp.square(matmul(x, ej.combine(trainable, frozen), implementation=implementation)).sum()

        return jax.jit(jax.grad(of, argnums=(0, 1)))(trainable, x)

    def dense(trainable, x):
        return jnp.square(x @ ej.combine(trainable, frozen).materialize()).sum()

    expected = jax.jit(jax.grad(dense, argnums=(0, 1)))(trainable, x)
    for implementation in ("reference", "blocked"):
        assert_close(loss(implementation), expected, tolerance=2e-3 if kind in ("quantized", "nf4") else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_out_dtype_and_accumulation(kind):
    w = weight(kind).astype(jnp.bfloat16)
    x = normal(4, 64, seed=1, dtype=jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(weight(kind).materialize(), np.float64)
    low, high = matmul(x, w), matmul(x, w, out_dtype=jnp.float32)
    assert low.dtype == jnp.bfloat16 and high.dtype == jnp.float32
    for product in (low, high):
        np.testing.assert_allclose(np.asarray(product, np.float64), exact, atol=0.02 * np.abs(exact).max())


@pytest.mark.parametrize("kind", ["quantized"])
def test_vmap_over_rows_and_over_matrices(kind):
    stack = compress(normal(3, 64, 24), kind, "*")
    x = normal(3, 5, 64, seed=1)

    @jax.jit
    def products(stack, x):
        dense = stack.materialize()
        mapped = jax.vmap(matmul)(x, stack), jax.vmap(lambda x: matmul(x, stack[0]))(x)
        return mapped, (jnp.einsum("ebd,edf->ebf", x, dense), x @ dense[0])

    assert_close(*products(stack, x))


@settings(max_examples=6)
@given(
    bits=st.integers(1, 8),
    groups=st.sampled_from([1, 2, 4]),
    group_size=st.sampled_from([4, 8, 24, 32]),
    symmetric=st.booleans(),
    transpose=st.booleans(),
)
def test_blocked_with_any_width_and_group(bits, groups, group_size, symmetric, transpose):
    method = ej.quantize.RTN(bits=bits, group_size=group_size, symmetric=symmetric)
    w = method.quantize(normal(groups * group_size, 5))
    x = normal(2, 5 if transpose else groups * group_size, seed=1)

    @jax.jit
    def products(w, x):
        dense = w.materialize()
        blocked = matmul(x, w, transpose=transpose, implementation="blocked")
        return blocked, x @ (dense.T if transpose else dense)

    if block_rows(w) is None:
        with pytest.raises(ValueError, match="cannot be cut into tiles of whole groups and bytes; use implementation="):
            products(w, x)
    else:
        assert_close(*products(w, x))


def test_tiles_divide_the_matrix_and_hold_whole_groups():
    for bits, group in ((4, 32), (3, 32), (8, None), (4, 128)):
        w = jax.eval_shape(
            lambda b=bits, g=group: ej.quantize.RTN(bits=b, group_size=g).quantize(jnp.ones((4096, 512)))
        )
        rows = block_rows(w)
        assert rows is not None and 4096 % rows == 0 and rows % (group or 8) == 0
    assert block_rows(ej.quantize.RTN(bits=4, group_size=None).quantize(jnp.ones((6, 4)))) is None


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="dot_general"):
        matmul(normal(2, 63), weight("quantized"), implementation="reference")


def test_a_weight_that_is_not_differentiated_costs_no_gradient_of_it():
    """The compiled gradient of the inputs has no product that gives a matrix of the weight's shape."""
    w = weight("quantized")

    def gradient(x):
        return jax.grad(lambda x: jnp.square(matmul(x, w, implementation="reference")).sum())(x)

    text = str(jax.make_jaxpr(gradient)(normal(2, 64)))
    assert "dot_general" in text and "f32[64,24] = dot_general" not in text
