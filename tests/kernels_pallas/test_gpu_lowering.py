"""The Hopper kernels lower for CUDA without a GPU: real layouts and errors, over widths, shapes and directions."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import kernels_pallas.codebook_matmul.gpu as codebook_gpu
import kernels_pallas.hashed_matmul.gpu as hashed_gpu
import kernels_pallas.nm_matmul.gpu as nm_gpu
import kernels_pallas.quant_matmul.gpu as quant_gpu
from effjax.arrays import Codebook, NMSparse
from effjax.arrays.packing import packed_size
from kernels_pallas.gpu_packed import exact_terms
from kernels_pallas.gpu_tile import SHARED_BYTES, Tile, choose_tile, stage_bytes
from kernels_pallas.shapes import DECODE_ROWS, MODELS, PREFILL_ROWS, unique_shapes
from tests.kernels_pallas.gpu_compiler import quantized_struct
from tests.kernels_pallas.oracles import codebook, hashed, nm_sparse, quantized

S = jax.ShapeDtypeStruct
MATRICES = sorted({matrix for model in MODELS for matrix in unique_shapes(model)})


def lower(kernel, w, rows, *, transpose=False, dtype=jnp.bfloat16, tile=None):
    n, out = w.shape

    def product(x, w):
        return kernel(x, w, transpose=transpose, tile=tile)

    program = jax.jit(product).trace(S((rows, out if transpose else n), dtype), w)
    assert program.jaxpr.out_avals == [jax.core.ShapedArray((rows, n if transpose else out), jnp.float32)]
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    return text


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda matrix: "x".join(map(str, matrix)))
def test_every_projection_of_every_model_while_decoding(matrix):
    lower(quant_gpu.quant_matmul, quantized_struct(*matrix), rows=1)


@pytest.mark.parametrize("rows", [*DECODE_ROWS, *PREFILL_ROWS])
@pytest.mark.parametrize("transpose", [False, True])
def test_every_number_of_rows(rows, transpose):
    lower(quant_gpu.quant_matmul, quantized_struct(4096, 14336), rows, transpose=transpose)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("transpose", [False, True])
def test_every_width(bits, transpose):
    zeros = (None, "packed", "real")[bits % 3]
    whole = quantized_struct(4096, 4096, bits, None, zeros, jnp.float32)
    lower(quant_gpu.quant_matmul, whole, 16, transpose=transpose, dtype=jnp.float32)
    if not transpose:
        grouped = quantized_struct(4096, 4096, bits, 128, zeros, (jnp.float16, jnp.bfloat16, jnp.float32)[bits % 3])
        lower(quant_gpu.quant_matmul, grouped, 256)


@settings(max_examples=8)
@given(
    bits=st.integers(1, 8),
    group=st.sampled_from([None, 128]),
    zeros=st.sampled_from([None, "packed", "real"]),
    groups=st.integers(1, 5),
    out=st.integers(1, 700),
    rows=st.integers(1, 300),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float32]),
)
def test_odd_shapes(bits, group, zeros, groups, out, rows, dtype):
    n = 128 * groups if group else 77 * groups
    lower(quant_gpu.quant_matmul, quantized_struct(n, out, bits, group, zeros), rows, dtype=dtype)


@pytest.mark.parametrize("rows", [1, 2048])
@pytest.mark.parametrize("tables", ["one", "columns"])
def test_codebooks(tables, rows):
    out = 4096
    scales = S((64, out), jnp.float16) if tables == "one" else None
    w = Codebook(
        codes=S((2048, out), jnp.uint8),
        tables=S((1, 1 if tables == "one" else out, 16), jnp.float32),
        scales=scales,
        bits=4,
        dtype=jnp.dtype(jnp.bfloat16),
    )
    lower(codebook_gpu.codebook_matmul, w, rows)
    lower(codebook_gpu.codebook_matmul, w, rows, dtype=jnp.float32)
    if tables == "one":
        lower(codebook_gpu.codebook_matmul, w.replace(scales=None), rows, transpose=True)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8)])
def test_sparse(n, m, transpose):
    kept, bits = 4096 // m * n, (m - 1).bit_length()
    w = NMSparse(values=S((kept, 4096), jnp.bfloat16), indices=S((packed_size(kept, bits), 4096), jnp.uint8), n=n, m=m)
    lower(nm_gpu.nm_matmul, w, 16, transpose=transpose)


def test_a_chosen_tile_fits_its_multiprocessor():
    for matrix in MATRICES:
        for rows in (*DECODE_ROWS, *PREFILL_ROWS):
            for transpose in (False, True):
                packed = jax.eval_shape(lambda w: quant_gpu.pack(w).planes, quantized_struct(*matrix))
                assert packed[0][0].shape == (matrix[0] // 2, matrix[1] // 2)  # nothing is padded, so nothing copied
                found = []

                def choose(w, rows=rows, transpose=transpose, found=found):
                    packed = quant_gpu.pack(w)
                    tile = choose_tile(rows, packed, transpose=transpose)
                    found.append((tile, stage_bytes(packed, tile, transpose=transpose), packed))

                jax.eval_shape(choose, quantized_struct(*matrix))
                tile, step, packed = found[0]
                assert tile.stages >= 2 and tile.stages * step <= SHARED_BYTES
                assert packed.pairs % (tile.columns // 2) == 0
                assert (packed.pairs // 64 if transpose else packed.runs // packed.step) % tile.splits == 0


def test_float32_is_three_terms():
    x = jnp.asarray([[1 / 3, 3e38, 1e-30, jnp.inf, 0.0, -2.0]], jnp.float32)
    terms = exact_terms(x)
    assert [t.dtype for t in terms] == [jnp.bfloat16] * 3
    assert jnp.array_equal(sum(t.astype(jnp.float32) for t in terms[::-1]), x)


def refused(kernel, w, message, *, rows=1, dtype=jnp.bfloat16, transpose=False, **options):
    with pytest.raises(ValueError, match=message):
        kernel(jnp.ones((rows, w.shape[-1 if transpose else -2]), dtype), w, transpose=transpose, **options)


def test_what_is_refused_says_why():
    product = quant_gpu.quant_matmul
    few = quantized(64, 128, bits=4, group=16)
    refused(product, few, "groups of 16 inputs: a step takes a multiple of 32 inputs of one group .*'reference'")
    some = quantized(64, 128, bits=4, group=32)
    refused(product, some, "groups of 32 inputs: a transposed product takes a multiple of 128", transpose=True)
    refused(product, some, "activations of float16: the GPU kernels take bfloat16 and float32", dtype=jnp.float16)
    stack = jax.tree.map(lambda field: field[None], some)
    assert "a stack of matrices [1, 64, 128]" in quant_gpu.why_not(1, jnp.float32, stack)
    with pytest.raises(ValueError, match=r"x \[1, 63\] does not multiply W of 64x128"):
        product(jnp.ones((1, 63)), some)
    refused(product, some, "splits=3 do not divide the 2 steps", tile=Tile(rows=8, splits=3))
    refused(product, some, "columns=256 do not divide 128 outputs", tile=Tile(rows=8, columns=256))


def test_what_the_other_kernels_refuse_says_why():
    product = codebook_gpu.codebook_matmul
    refused(product, codebook(64, 128, entries=200), "tables of 200 entries: a look-up in registers takes at most 16")
    refused(product, codebook(64, 128, entries=16, tables=(2, 1)), "2 tables along the inputs")
    columns = codebook(64, 128, entries=16, tables=(1, 128))
    refused(product, columns, "128 tables along the outputs: a transposed product takes one", transpose=True)
    refused(nm_gpu.nm_matmul, nm_sparse(64, 128, n=2, m=4), "values of float32: the tensor core takes bfloat16")
    wide = nm_sparse(64, 128, n=3, m=16, dtype=jnp.bfloat16)
    refused(nm_gpu.nm_matmul, wide, "3:16 pattern fills whole bytes only every 32 inputs: the kernel takes at most 16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 12}, "rows=12: a tile has 8 to 256 rows, a multiple of 8"),
        ({"rows": 8, "columns": 64}, "columns=64: a tile has a multiple of 128 outputs"),
        ({"rows": 8, "stages": 0}, "splits=1, stages=0: both are at least 1"),
    ],
)
def test_tiles_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Tile(**options)


def test_mosaic_has_no_gather_for_hashed_weights():
    """The evidence of `hashed_matmul.gpu.why_not`: when this lowers one day, a kernel can be written."""
    reason = hashed_gpu.why_not(1, jnp.float32, hashed(8, 8, slots=16))
    assert "8x8 hashed weights: Mosaic GPU lowers no gather" in reason

    numbers = lax.GatherDimensionNumbers(offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,))

    def kernel(table, places, out):
        out[...] = lax.gather(table[...], places[...], numbers, (1,), mode="promise_in_bounds")

    gather = plgpu.kernel(kernel, out_type=S((128,), jnp.float32))
    traced = jax.jit(gather).trace(S((256,), jnp.float32), S((128, 1), jnp.int32))
    with pytest.raises(NotImplementedError, match="Unimplemented primitive in Pallas Mosaic GPU lowering: gather"):
        traced.lower(lowering_platforms=("cuda",))
