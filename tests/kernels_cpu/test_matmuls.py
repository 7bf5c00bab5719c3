"""The native products against float64 numpy: every width, variant and precision of activations, odd shapes, errors."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.arrays import Codebook, NMSparse, Quantized
from effjax.errors import LeafError
from effjax.ops import matmul
from kernels_cpu import codebook_matmul, nm_matmul, quant_matmul, variants

QUANT = variants.runnable("quant_matmul")
LOOKUP = variants.runnable("codebook_matmul", codebook_matmul.AMONG)
NO_AVX512 = variants.why_not("nm_matmul", "avx512", nm_matmul.AMONG)
# Of the sum of magnitudes: half a step of a block's largest activation, with room for the rounding of float32.
TOLERANCE = {8: 0.03, 16: 2e-4, 24: 5e-6}


def random(seed):
    return np.random.default_rng(seed)


def quantized(rng, n, out, groups, bits, zeros="packed", scales="float32"):
    """A leaf, and its dense matrix computed by numpy from the codes."""
    codes = rng.integers(0, 2**bits, (n, out)).astype(np.uint8)
    steps = np.asarray(jnp.asarray(rng.standard_normal((groups, out)), scales), np.float64)
    points = {
        "none": None,
        "packed": rng.integers(0, 2**bits, (groups, out)).astype(np.uint8),
        "real": rng.uniform(0, 2**bits, (groups, out)).astype(np.float32),
    }[zeros]
    centre = np.float64(0.5 if bits == 1 else 2 ** (bits - 1))
    shift = np.broadcast_to(centre if points is None else points.astype(np.float64), (groups, out))
    size = n // groups
    dense = np.repeat(steps, size, 0) * (codes - np.repeat(shift, size, 0))
    magnitude = np.repeat(np.abs(steps), size, 0) * (codes + np.abs(np.repeat(shift, size, 0)))
    leaf = Quantized.from_codes(
        jnp.asarray(codes),
        jnp.asarray(steps, scales),
        None if points is None else jnp.asarray(points),
        bits=bits,
        dtype=jnp.float32,
    )
    return leaf, dense, magnitude


@pytest.mark.parametrize("variant", QUANT)
@settings(max_examples=8)
@given(
    bits=st.integers(1, 8),
    groups=st.integers(1, 3),
    units=st.integers(1, 20),
    odd=st.integers(0, 7),
    out=st.integers(1, 140),
    rows=st.integers(1, 9),
    zeros=st.sampled_from(["none", "packed", "real"]),
    scales=st.sampled_from(["float32", "float16", "bfloat16"]),
    seed=st.integers(0, 2**16),
)
def test_quantized_product_is_that_of_numpy(variant, bits, groups, units, odd, out, rows, zeros, scales, seed):
    run = quant_matmul.run_of(bits)
    size = units * run + (odd if groups == 1 else 0)  # one group may end anywhere, also in the middle of a byte
    rng = random(seed)
    w, dense, magnitude = quantized(rng, groups * size, out, groups, bits, zeros, scales)
    assert quant_matmul.why_not(w) == ""
    x = rng.standard_normal((rows, groups * size)).astype(np.float32)
    for activation_bits, tolerance in TOLERANCE.items():
        y = quant_matmul.quant_matmul(x, w, activation_bits=activation_bits, variant=variant)
        np.testing.assert_array_less(np.abs(y - x @ dense), tolerance * (np.abs(x) @ magnitude) + 1e-30)


@pytest.mark.parametrize("variant", LOOKUP)
@settings(max_examples=8)
@given(
    bits=st.integers(1, 8),
    groups=st.integers(1, 3),
    units=st.integers(1, 9),
    out=st.integers(1, 90),
    rows=st.sampled_from([1, 2, 7, 65]),
    by_column=st.booleans(),
    scaled=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_looked_up_product_is_that_of_numpy(variant, bits, groups, units, out, rows, by_column, scaled, seed):
    rng = random(seed)
    n = groups * units * codebook_matmul.fields_of(bits)
    entries = int(rng.integers(2 ** (bits - 1) + 1, 2**bits + 1))
    codes = rng.integers(0, entries, (n, out))
    tables = rng.standard_normal((1, out if by_column else 1, entries)).astype(np.float32)
    scales = rng.standard_normal((groups, out)).astype(np.float32) if scaled else None
    dense = np.take_along_axis(np.broadcast_to(tables[0], (out, entries)).T, codes, 0).astype(np.float64)
    if scales is not None:
        dense = dense * np.repeat(scales, n // groups, 0)
    w = Codebook.from_codes(
        jnp.asarray(codes), jnp.asarray(tables), None if scales is None else jnp.asarray(scales), dtype=jnp.float32
    )
    x = rng.standard_normal((rows, n)).astype(np.float32)
    orders = [(w, 0)]
    if 8 % bits == 0:
        orders.append((ej.prepare({"w": w})["w"].array, 1))
    for stored, tile in orders:
        y = codebook_matmul.codebook_matmul(x, stored, variant=variant, tile=tile)
        np.testing.assert_array_less(np.abs(y - x @ dense), 5e-6 * (np.abs(x) @ np.abs(dense)) + 1e-30)


def test_tables_for_groups_of_inputs():
    rng = random(3)
    tables = rng.standard_normal((2, 1, 16)).astype(np.float32)
    codes = rng.integers(0, 16, (256, 40))
    w = Codebook.from_codes(jnp.asarray(codes), jnp.asarray(tables), dtype=jnp.float32)
    dense = tables[np.arange(256)[:, None] // 128, 0, codes]
    for rows in (1, 3):
        x = rng.standard_normal((rows, 256)).astype(np.float32)
        np.testing.assert_allclose(codebook_matmul.codebook_matmul(x, w), x @ dense, rtol=1e-4, atol=1e-4)
    half = Codebook.from_codes(jnp.asarray(codes[:128]), jnp.asarray(tables), dtype=jnp.float32)
    assert codebook_matmul.why_not(half) == "tables of 64 inputs are no whole chunks of 128"


def sparse(rng, n, out, group_size):
    params = {"kernel": jnp.asarray(rng.standard_normal((n, out)), jnp.float32)}
    packed = ej.pack_mask(params, ej.prune_mask(params, ej.prune.Magnitude(sparsity=0.5, pattern="2:4")))
    method = ej.quantize.RTN(bits=4, group_size=group_size, symmetric=True)
    return ej.quantize.quantize_kept(packed, method)["kernel"]


@pytest.mark.skipif(bool(NO_AVX512), reason=NO_AVX512)
@settings(max_examples=5)
@given(
    groups=st.integers(1, 3),
    group_size=st.sampled_from([8, 16, 40, 136]),
    out=st.integers(1, 140),
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_sparse_product_is_that_of_its_dense_matrix(groups, group_size, out, rows, seed):
    rng = random(seed)
    w = sparse(rng, 2 * groups * group_size, out, group_size)
    dense = np.asarray(w.materialize(), np.float64)
    x = rng.standard_normal((rows, dense.shape[0])).astype(np.float32)
    magnitude = np.abs(x) @ np.maximum(np.abs(dense), np.abs(dense).max(0))
    for activation_bits, tolerance in TOLERANCE.items():
        y = nm_matmul.nm_matmul(x, w, activation_bits=activation_bits)
        np.testing.assert_array_less(np.abs(y - x @ dense), tolerance * magnitude + 1e-30)


@pytest.mark.parametrize("kind", ["quantized", "codebook", "sparse"])
def test_gradients_are_those_of_the_dense_matrix(kind):
    rng = random(5)
    w = {
        "quantized": lambda: quantized(rng, 64, 24, 2, 4)[0],
        "codebook": lambda: ej.quantize.NF4(block_size=32).quantize(jnp.asarray(rng.standard_normal((64, 24)))),
        "sparse": lambda: sparse(rng, 64, 24, 16),
    }[kind]()
    x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
    trainable, frozen = ej.partition(w)

    def loss(product):
        def of(trainable, x):
            return jnp.square(product(x, ej.combine(trainable, frozen))).sum()

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1)))(trainable, x)

    (value, (dw, dx)), (expected, (dense_dw, dense_dx)) = loss(matmul), loss(lambda x, w: x @ w.materialize())
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(dx, dense_dx, rtol=1e-3, atol=1e-3 * float(jnp.abs(dense_dx).max()))
    for got, wanted in zip(jax.tree.leaves(dw), jax.tree.leaves(dense_dw), strict=True):
        got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-3 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("out", [192, 40])
@pytest.mark.parametrize("kind", ["q4", "q3 real", "q2 packed", "codebook", "nf4", "sparse"])
def test_prepared_products_are_the_same_and_come_back_to_the_byte(kind, out):
    rng = random(16)
    w = {
        "q4": lambda: quantized(rng, 128, out, 4, 4, "none", "float16")[0],
        "q3 real": lambda: quantized(rng, 96, out, 3, 3, "real")[0],
        "q2 packed": lambda: quantized(rng, 128, out, 4, 2, "packed", "bfloat16")[0],
        "codebook": lambda: ej.quantize.NF4(block_size=32).quantize(jnp.asarray(rng.standard_normal((64, out)))),
        "nf4": lambda: ej.quantize.NF4(block_size=64).quantize(jnp.asarray(rng.standard_normal((128, out)))),
        "sparse": lambda: sparse(rng, 64, out, 16),
    }[kind]()
    ready = ej.prepare({"w": w})["w"]
    by_column = kind in ("codebook", "nf4")
    assert ready.tile == (1 if by_column else 64 if out % 64 == 0 else 0) and ready.nbytes >= w.nbytes
    for rows in (1, 5):
        x = jnp.asarray(rng.standard_normal((rows, w.shape[0])), jnp.float32)
        # The same sums; those of a codebook's column are added up in another order.
        tolerance = 1e-5 if by_column else 0
        np.testing.assert_allclose(matmul(x, ready), matmul(x, w), rtol=tolerance, atol=tolerance)
        y = jnp.asarray(rng.standard_normal((rows, out)), jnp.float32)
        np.testing.assert_allclose(matmul(y, ready, transpose=True), matmul(y, w, transpose=True), rtol=1e-4, atol=1e-3)
    back = ej.restore({"w": ready})["w"]
    assert type(back) is type(w)
    for old, new in zip(jax.tree.leaves(w), jax.tree.leaves(back), strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(old, new)


def test_prepare_asks_for_int8_activations_and_says_what_it_cannot_take():
    w, dense, _ = quantized(random(17), 64, 64, 2, 4)
    x = random(18).standard_normal((3, 64)).astype(np.float32)
    rough = matmul(jnp.asarray(x), ej.prepare({"w": w}, activation_bits=8)["w"])
    np.testing.assert_array_equal(rough, matmul(jnp.asarray(x), w, activation_bits=8))
    assert not np.allclose(rough, x @ dense, rtol=1e-5, atol=1e-5)
    with pytest.raises(LeafError, match="none of the 1 leaves is quantized, a codebook or n:m sparse"):
        ej.prepare({"w": jnp.ones((4, 4))})
    with pytest.raises(LeafError, match=r"prepared already; call ej.restore\(params\) first"):
        ej.prepare(ej.prepare({"w": w}))
    with pytest.raises(ValueError, match="activation_bits must be None, 8, 16 or 24, found 4"):
        ej.prepare({"w": w}, activation_bits=4)


def test_stacked_matrices_and_batches_of_any_rank():
    rng = random(6)
    stack = ej.quantize.RTN(bits=4, group_size=32).quantize(jnp.asarray(rng.standard_normal((3, 64, 24)), jnp.float32))
    x = jnp.asarray(rng.standard_normal((3, 2, 5, 64)), jnp.float32)
    got = jax.jit(jax.vmap(lambda x, w: matmul(x, w, implementation="cpu")))(x, stack)
    np.testing.assert_allclose(got, jnp.einsum("ebcd,edf->ebcf", x, stack.materialize()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(0, 64), (3, 64)])
def test_no_rows_and_no_columns(size):
    w, _, _ = quantized(random(7), 64, 8, 2, 4)
    x = jnp.ones(size)
    assert quant_matmul.quant_matmul(x, w).shape == (size[0], 8)
    assert quant_matmul.quant_matmul(x, w.columns(jnp.arange(0))).shape == (size[0], 0)


def test_what_is_no_number_stays_none_and_its_neighbours_stay_exact():
    w, dense, _ = quantized(random(8), 64, 8, 2, 4, zeros="none")
    x = np.ones((4, 64), np.float32)
    x[1, 3], x[2, 60] = np.nan, np.inf
    x[3] = 0
    y = np.asarray(quant_matmul.quant_matmul(x, w))
    assert np.isnan(y[1:3]).all()
    np.testing.assert_allclose(y[0], dense.sum(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(y[3], 0)


@pytest.mark.parametrize("magnitude", [1e-37, 1e-20, 1e20, 1e37])
def test_activations_of_any_magnitude(magnitude):
    w, dense, size = quantized(random(9), 64, 8, 2, 4, zeros="none")
    x = (random(10).standard_normal((2, 64)) * magnitude / 8).astype(np.float32)
    y = np.asarray(quant_matmul.quant_matmul(x, w), np.float64)
    # Below 1e-30 activations count as zero; that is their error then.
    floor = 1e-30 * 64 * size.max()
    np.testing.assert_array_less(np.abs(y - x @ dense), 5e-6 * (np.abs(x).astype(np.float64) @ size) + floor)


def test_threads_follow_omp_num_threads(monkeypatch):
    w, _, _ = quantized(random(11), 512, 1024, 4, 4)
    x = random(12).standard_normal((3, 512)).astype(np.float32)
    results = []
    for threads in ("1", "2", "64"):
        monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", threads)
        results.append(np.asarray(quant_matmul.quant_matmul(x, w)))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])  # sums do not depend on how columns are shared out


def test_errors_name_the_reason():
    w, _, _ = quantized(random(13), 64, 8, 2, 4)
    with pytest.raises(ValueError, match=r"quant_matmul: x \[1, 63\] does not fit a matrix of \[64, 8\]"):
        quant_matmul.quant_matmul(jnp.ones((1, 63)), w)
    with pytest.raises(ValueError, match="activation_bits must be 8, 16 or 24, found 12"):
        quant_matmul.quant_matmul(jnp.ones((1, 64)), w, activation_bits=12)
    with pytest.raises(ValueError, match="quant_matmul: unknown variant 'sse'; choose one of auto, portable, avx2"):
        quant_matmul.quant_matmul(jnp.ones((1, 64)), w, variant="sse")
    small = quantized(random(13), 64, 8, 16, 4)[0]
    with pytest.raises(ValueError, match="groups of 4 inputs do not fill whole runs of 8 codes of 4 bits"):
        quant_matmul.quant_matmul(jnp.ones((1, 64)), small)
    with pytest.raises(ValueError, match="implementation='cpu' does not take this: groups of 4 inputs do not fill"):
        matmul(jnp.ones((1, 64)), small, implementation="cpu")
    with pytest.raises(ValueError, match="multiplies by W, not by its transpose"):
        matmul(jnp.ones((1, 8)), w, transpose=True, implementation="cpu")
    assert "2:4 patterns of values quantized to 4 bits" in nm_matmul.why_not(
        NMSparse.from_dense(jnp.ones((16, 4)), jnp.ones((16, 4), bool), n=2, m=4)
    )


def test_what_the_kernel_refuses_is_multiplied_all_the_same():
    w, dense, _ = quantized(random(14), 64, 8, 16, 4)
    x = random(15).standard_normal((2, 64)).astype(np.float32)
    np.testing.assert_allclose(matmul(jnp.asarray(x), w), x @ dense, rtol=1e-4, atol=1e-3)
