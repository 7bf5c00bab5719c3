"""Queries of label tables: the native kernel, every variant, against loops of Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_cpu import _native, label_top_k, variants
from tests.ops.label_oracle import laid_out, operands, top_k

RUNNABLE = variants.runnable("label_top_k", label_top_k.VARIANTS)
# batch, d, hashes, tables, labels, fallback, k: sizes of one, odd ones, whole vectors, more labels than wait at once.
SHAPES = [
    (1, 1, 1, 1, 1, 0, 1),
    (3, 7, 4, 3, 90, 2, 3),
    (2, 16, 2, 5, 200, 0, 5),
    (4, 35, 3, 24, 333, 4, 1),
    (5, 64, 9, 7, 64, 3, 64),
    (3, 5, 12, 2, 40, 6, 4),
    (0, 5, 2, 1, 4, 1, 2),
    (20, 7, 4, 3, 90, 2, 3),  # from 16 queries on by maps of bits
    (17, 8, 2, 6, 64, 1, 60),
    (20, 5, 12, 2, 400, 6, 4),  # for which there are too many buckets
]


def arrays_of(shape, seed=0, dtype=jnp.float32):
    h, directions, buckets, weights, bias, fallback = operands(shape, seed)
    ids, offsets = laid_out(buckets)
    arrays = [jnp.asarray(a) for a in (h, directions, ids, offsets, weights, bias, fallback)]
    arrays[4] = arrays[4].astype(dtype)  # exact: the numbers have few bits
    return arrays, top_k(h, directions, buckets, weights, bias, fallback, shape[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_oracle(shape, dtype):
    arrays, want = arrays_of(shape, dtype=dtype)
    for variant in RUNNABLE:
        values, labels, scored = label_top_k.label_top_k(*arrays, k=shape[-1], variant=variant)
        assert (values.dtype, labels.dtype, scored.dtype) == (jnp.float32, jnp.int32, jnp.int32)
        np.testing.assert_allclose(values, want[0], atol=1e-5)
        np.testing.assert_array_equal(labels, want[1])
        np.testing.assert_array_equal(scored, want[2])


def test_many_queries_on_several_threads():
    """Each part of the queries has marks of its own, which its queries leave clean."""
    shape = (200, 16, 3, 8, 500, 0, 2)
    arrays, want = arrays_of(shape, seed=3)
    for _ in range(3):
        values, labels, scored = label_top_k.label_top_k(*arrays, k=2)
        np.testing.assert_array_equal(labels, want[1])
        np.testing.assert_array_equal(scored, want[2])
        np.testing.assert_allclose(values, want[0], atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 7, 4, 3, 90, 2, 3), (20, 7, 4, 3, 90, 2, 3)], ids=str)
def test_ids_and_offsets_out_of_range_are_passed_over(shape):
    arrays, _ = arrays_of(shape)
    ids, offsets, fallback = arrays[2], arrays[3], arrays[6]
    for wrong in (ids.at[:, ::2].set(-5), ids.at[:, ::3].set(90), ids.at[:].set(2**31 - 1)):
        _, labels, _ = label_top_k.label_top_k(*arrays[:2], wrong, *arrays[3:], k=3)
        assert bool(((labels >= -1) & (labels < 90)).all())
    for wrong in (offsets - 1000, offsets + 1000, -offsets):
        _, labels, scored = label_top_k.label_top_k(*arrays[:3], wrong, *arrays[4:], k=3)
        assert bool(((labels >= -1) & (labels < 90)).all()) and bool((scored <= 90).all())
    _, _, scored = label_top_k.label_top_k(*arrays[:3], offsets * 0, *arrays[4:6], fallback * 0 - 1, k=3)
    np.testing.assert_array_equal(scored, 0)


def test_limits_and_variants_are_named():
    assert "24 hashes a table and 2048 in all, found 25 in each of 1" in label_top_k.why_not(25, 1)
    assert "found 20 in each of 103" in label_top_k.why_not(20, 103)
    arrays, _ = arrays_of(SHAPES[0])
    with pytest.raises(ValueError, match="unknown variant 'avx9'"):
        label_top_k.label_top_k(*arrays, k=1, variant="avx9")


def test_the_handler_itself_refuses_wrong_shapes():
    arrays, _ = arrays_of(SHAPES[1])
    results = [
        jax.ShapeDtypeStruct((3, 3), jnp.float32),
        jax.ShapeDtypeStruct((3, 3), jnp.int32),
        jax.ShapeDtypeStruct((3,), jnp.int32),
    ]
    kernel = jax.ffi.ffi_call(_native.NATIVE.target("EffjaxLabelTopK"), results)
    jax.block_until_ready(kernel(*arrays, variant=np.int64(0)))
    for i in range(len(arrays) - 1):  # any number of fallback labels is right
        wrong = arrays[:i] + [arrays[i][..., :-1]] + arrays[i + 1 :]
        with pytest.raises(jax.errors.JaxRuntimeError, match="label_top_k"):
            jax.block_until_ready(kernel(*wrong, variant=np.int64(0)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="float32 or bfloat16"):
        half = [*arrays[:4], arrays[4].astype(jnp.float16), *arrays[5:]]
        jax.block_until_ready(kernel(*half, variant=np.int64(0)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="k and hashes must be positive"):
        none = [jax.ShapeDtypeStruct((3, 0), r.dtype) for r in results[:2]]
        jax.block_until_ready(jax.ffi.ffi_call("EffjaxLabelTopK", [*none, results[2]])(*arrays, variant=np.int64(0)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="variant 9 does not run"):
        jax.block_until_ready(kernel(*arrays, variant=np.int64(9)))
