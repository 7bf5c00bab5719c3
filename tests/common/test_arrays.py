"""What every array type must do under every transformation of jax, against the dense array it stands for."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from tests.common.cases import (
    ARRAYS,
    STACKED,
    ArrayCase,
    assert_same_bytes,
    dense,
    example,
    inputs,
    materialized,
    multiply,
)

every_type = pytest.mark.parametrize("case", ARRAYS, ids=lambda case: case.name)
LEADS = ((), (STACKED,))


@functools.cache
def lifted(case: ArrayCase):
    """One compiled product a case, and the list of shapes it was traced for."""
    f, traces = ej.lift(multiply(case)), []

    def counted(params, x):
        traces.append(x.dtype.name)
        return f(params, x)

    return jax.jit(counted), traces


def product(case: ArrayCase, x, w) -> np.ndarray:
    return np.einsum(case.einsum, np.asarray(x, np.float32), w)


def assert_close(got, want, share=1e-5):
    """Within `share` of the largest magnitude."""
    want = np.asarray(want, np.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=share, atol=share * np.abs(want).max())


@every_type
@pytest.mark.parametrize("lead", LEADS, ids=["matrix", "stacked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shape_dtype_and_bytes(case, lead, dtype):
    w = example(case, lead, dtype)
    assert (w.shape, w.dtype, w.ndim) == ((*lead, *case.shape), jnp.dtype(dtype), len(lead) + len(case.shape))
    assert w.nbytes == case.nbytes(lead, dtype)
    assert w.nbytes == sum(np.asarray(field).nbytes for field in jax.tree.leaves(w))
    assert w.size == np.prod(w.shape)
    assert w.bits_per_weight == 8 * w.nbytes / w.size
    assert f"{dtype}{list(w.shape)}" in repr(w)


@every_type
@pytest.mark.parametrize("lead", LEADS, ids=["matrix", "stacked"])
def test_materialize_under_jit(case, lead):
    w = example(case, lead)
    out = materialized(w)
    assert (out.shape, out.dtype) == (w.shape, w.dtype)
    assert_close(out, dense(case, lead), 1e-6)
    assert np.abs(dense(case, lead)).max() > 0.1, "a weight of zeros would pass everything"


@every_type
def test_other_dtype(case):
    w = example(case).astype(jnp.bfloat16)
    assert materialized(w).dtype == w.dtype == jnp.bfloat16
    assert_close(materialized(w), dense(case), 2**-8)
    assert_same_bytes(jax.tree.leaves(w), jax.tree.leaves(example(case)))


@every_type
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_compiles_once(case, dtype):
    share = 1e-5 if dtype == "float32" else 2e-2
    compiled, traces = lifted(case)
    for seed in (0, 1):  # the second call has other values and must not trace again
        w, x = example(case, (), dtype, seed), inputs(case, dtype=dtype, seed=seed)
        y = compiled({"w": w}, x)
        assert y.dtype == jnp.dtype(dtype)
        assert_close(y, product(case, x, dense(case, (), dtype, seed)), share)
    assert traces.count(dtype) == 1


@every_type
def test_gradients(case):
    """With respect to the input and to every floating field, as of the function on the materialised weight."""
    x, params = inputs(case), {"w": example(case)}
    trainable, frozen = ej.partition(params)
    f = multiply(case)
    cotangent = jax.random.normal(jax.random.key(9), jax.eval_shape(f, ej.materialize(params), x).shape)

    def loss(f, trainable, x):
        return jnp.vdot(f(ej.combine(trainable, frozen), x), cotangent)

    got = jax.jit(jax.grad(partial(loss, ej.lift(f)), argnums=(0, 1)))(trainable, x)
    want = jax.jit(jax.grad(partial(loss, lambda p, x: f(ej.materialize(p), x)), argnums=(0, 1)))(trainable, x)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert len(jax.tree.leaves(got)) >= 2
    for g, h in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        unnamed = isinstance(example(case), ej.arrays.UserTables) and h.ndim == 4  # of users that have no rows
        assert np.abs(np.asarray(h, np.float32)).max() > 0 or unnamed
        assert_close(g, h, 1e-5 if h.dtype == jnp.float32 else 2e-3)


@every_type
def test_vmap_over_inputs(case):
    x = inputs(case).reshape(4, 2, -1)
    y = jax.jit(jax.vmap(ej.lift(multiply(case)), in_axes=(None, 0)))({"w": example(case)}, x)
    assert_close(y.reshape(8, *y.shape[2:]), product(case, inputs(case), dense(case)))


@every_type
def test_vmap_over_stacked_params(case):
    x, w = inputs(case), example(case, (STACKED,))
    y = jax.jit(jax.vmap(ej.lift(multiply(case)), in_axes=(0, None)))({"w": w}, x)
    assert_close(y, np.stack([product(case, x, layer) for layer in dense(case, (STACKED,))]))


@every_type
def test_scan_slices_are_indexed_slices(case):
    """Every slice is a whole array of its type, and a scan hands out the same ones as an index."""
    w = example(case, (STACKED,))

    def body(i, layer):
        assert layer.shape == case.shape
        return i + 1, (layer, layer.materialize())

    _, (layers, matrices) = jax.lax.scan(body, 0, w)
    assert_same_bytes(layers, w)
    for i in range(STACKED):
        assert_same_bytes(w[i], jax.tree.map(lambda field, i=i: field[i], w))
        assert w[i].shape == case.shape
        assert_close(materialized(w[i]), dense(case, (STACKED,))[i], 1e-6)
        assert_close(matrices[i], dense(case, (STACKED,))[i], 1e-6)


@every_type
def test_scan_inside_a_lifted_function(case):
    x, f = inputs(case), multiply(case)

    def total(params, x):
        shape = jax.eval_shape(f, {"w": params["w"][0]}, x).shape
        return jax.lax.scan(lambda y, w: (y + f({"w": w}, x), None), jnp.zeros(shape), params["w"])[0]

    y = ej.lift(total)({"w": example(case, (STACKED,))}, x)
    assert_close(y, sum(product(case, x, layer) for layer in dense(case, (STACKED,))))


@every_type
@pytest.mark.parametrize("order", ["remat of lift", "lift of remat"])
def test_remat(case, order):
    f, x, params = multiply(case), inputs(case), {"w": example(case)}
    saved = jax.checkpoint(ej.lift(f)) if order == "remat of lift" else ej.lift(jax.checkpoint(f))
    got = jax.grad(lambda x: jnp.square(saved(params, x)).sum())(x)
    w = dense(case)
    y = product(case, x, w)
    want = 2 * np.tensordot(y, np.moveaxis(w, _contracted(case), 0), axes=(range(1, y.ndim), range(1, w.ndim)))
    assert_close(got, want)


def _contracted(case: ArrayCase) -> int:
    return case.einsum.split(",")[1].split("->")[0].index("i")


@every_type
def test_donated_update(case):
    """A tree can be updated in place: same type and metadata, frozen fields passed through, the old buffers gone."""
    params = jax.tree.map(jnp.copy, {"w": example(case), "bias": jnp.ones(3)})
    frozen = [np.asarray(x) for x in jax.tree.leaves(ej.partition(params)[1])]

    @partial(jax.jit, donate_argnums=0)
    def update(params):
        trainable, rest = ej.partition(params)
        return ej.combine(jax.tree.map(lambda x: x * 2, trainable), rest)

    new = update(params)
    assert all(field.is_deleted() for field in jax.tree.leaves(ej.partition(params)[0]))
    assert jax.tree.structure(new["w"]) == jax.tree.structure(example(case))
    for old, x in zip(frozen, jax.tree.leaves(ej.partition(new)[1]), strict=True):
        np.testing.assert_array_equal(old, x)
    factor = {"low rank": 4.0, "adapter": 4.0, "row scaled": 4.0}.get(case.name, 2.0)
    products = (
        "nf4",
        "prepared",
        "codebook per group",
        "codebook odd",
        "q2 plus low rank",
        "q4 real zeros",
    )  # of two fields
    if case.name not in products:
        assert_close(new["w"].materialize(), factor * dense(case), 1e-5)
    np.testing.assert_array_equal(new["bias"], 2 * np.ones(3))


@every_type
@pytest.mark.parametrize("lead", LEADS, ids=["matrix", "stacked"])
def test_abstract_arrays(case, lead):
    """Shapes, dtypes and bytes are known without values."""
    w = example(case, lead)
    struct = jax.eval_shape(lambda w: w, w)
    assert (struct.shape, struct.dtype, struct.nbytes) == (w.shape, w.dtype, w.nbytes)
    made = jax.eval_shape(case.make, jax.ShapeDtypeStruct((*lead, case.inputs, case.outputs), jnp.float32))
    assert jax.tree.structure(made) == jax.tree.structure(w)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(made)] == [(x.shape, x.dtype) for x in jax.tree.leaves(w)]
    out = jax.eval_shape(lambda w: w.materialize(), struct)
    assert (out.shape, out.dtype) == (w.shape, w.dtype)
