"""The Hopper kernels on a GPU against the product in float64: what neither the interpreter nor lowering can tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels_pallas.codebook_matmul.gpu as codebook_gpu
import kernels_pallas.nm_matmul.gpu as nm_gpu
import kernels_pallas.quant_matmul.gpu as quant_gpu
from effjax.ops.attention import make_question as question
from kernels_pallas.decode_attention.gpu import Tile as Shares
from kernels_pallas.decode_attention.gpu import decode_attention
from kernels_pallas.gpu_tile import Tile
from kernels_pallas.sparse_mlp.gpu import Tile as Neighbours
from tests.kernels_pallas.gpu_interpreter import error, mlp_error
from tests.kernels_pallas.oracles import codebook, mlp_neurons, nm_sparse, quantized
from tests.ops.attention_oracle import assert_answers, random_case

pytestmark = pytest.mark.gpu

ROWS = (1, 9, 16, 130)


@pytest.fixture(scope="module", autouse=True)
def hopper():
    capability = getattr(jax.devices()[0], "compute_capability", "none")
    if capability != "9.0":
        pytest.skip(f"these kernels are for compute capability 9.0, this machine has {capability}")


def assert_close(kernel, w, rows, dtype, *, rounded=False, **options):
    """Exact but for sums in float32, or with weights (tables) rounded to bf16 or to 16 bits."""
    off = error(kernel, w, rows, dtype, interpreted=False, **options)
    assert off < ({jnp.bfloat16: 4e-3, jnp.float32: 2e-5}[dtype] if rounded else 1e-5), f"off by {off:.2e}"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zeros", ["symmetric", "packed", "real"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_width_group_and_zero_point(bits, zeros, dtype):
    for n, out, group, scale_dtype in ((512, 384, 128, jnp.float16), (500, 330, None, jnp.float32)):
        w = quantized(n, out, bits=bits, group=group, zeros=zeros, scale_dtype=scale_dtype)
        for rows in ROWS:
            assert_close(quant_gpu.quant_matmul, w, rows, dtype)
            if quant_gpu.why_not(rows, dtype, w, transpose=True) == "":
                assert_close(quant_gpu.quant_matmul, w, rows, dtype, transpose=True, rounded=True)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_large_matrix_in_both_directions(dtype):
    w = quantized(4096, 2048, bits=4, group=128, zeros="packed", scale_dtype=jnp.float16)
    for rows in (*ROWS, 600):
        assert_close(quant_gpu.quant_matmul, w, rows, dtype)
        assert_close(quant_gpu.quant_matmul, w, rows, dtype, transpose=True, rounded=True)


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("columns", [128, 256])
def test_every_tile_gives_the_same(splits, stages, columns):
    w = quantized(2048, 1024, bits=4, group=128, zeros="packed", scale_dtype=jnp.float16)
    for rows in (8, 32, 64):
        tile = Tile(rows=rows, columns=columns, splits=splits, stages=stages)
        assert_close(quant_gpu.quant_matmul, w, 70, jnp.bfloat16, tile=tile)


@pytest.mark.parametrize("entries", [2, 5, 16])
@pytest.mark.parametrize("tables", [(1, 1), (1, 320)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_codebooks(entries, tables, dtype):
    for scales in (None, 1, 4):
        w = codebook(512, 320, entries=entries, tables=tables, scales=scales, scale_dtype=jnp.float16)
        for rows in ROWS:
            assert_close(codebook_gpu.codebook_matmul, w, rows, dtype, rounded=True)
            if codebook_gpu.why_not(rows, dtype, w, transpose=True) == "":
                assert_close(codebook_gpu.codebook_matmul, w, rows, dtype, transpose=True, rounded=True)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8)])
@pytest.mark.parametrize("transpose", [False, True])
def test_sparse(n, m, transpose):
    w = nm_sparse(1000, 330, n=n, m=m, dtype=jnp.bfloat16)
    for rows in ROWS:
        assert_close(nm_gpu.nm_matmul, w, rows, jnp.float32, transpose=transpose)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize(("slots", "page"), [(2000, None), (1024, 16), (1024, 64), (1024, 256)])
def test_attention(dtype, head_dim, slots, page):
    """Also the blocks that reach behind the last slot, which the hardware fills with zeros."""
    for group in (1, 4, 9):
        case = random_case(
            batch=4, group=group, slots=slots, head_dim=head_dim, dtype=dtype, page=page, window=group == 4
        )
        assert_answers(case, case.answer("gpu"), {"bfloat16": 8e-3, "float16": 1e-3}[dtype])
        assert_answers(case, case.answer("gpu", asked=False), {"bfloat16": 8e-3, "float16": 1e-3}[dtype])


@pytest.mark.parametrize(
    ("keys", "values", "head_dim", "page"),
    [
        ("channel-8", "token-8", 128, None),
        ("channel-8", "dense", 32, 16),
        ("channel-4", "token-4", 128, None),
        ("channel-4", "token-8", 64, 64),
        ("channel-2", "token-2", 128, None),
    ],
)
def test_attention_to_integers(keys, values, head_dim, page):
    """Queries times the scales of channels are rounded to bf16."""
    for slots in (128, 1984):
        case = random_case(
            batch=3, slots=slots, head_dim=head_dim, dtype="bfloat16", page=page, keys=keys, values=values
        )
        assert_answers(case, case.answer("gpu"), 1.2e-2)


@pytest.mark.parametrize("splits", [1, 3, 40])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_attention_is_the_same_however_slots_are_shared(splits, stages):
    case = random_case(batch=3, slots=1536, head_dim=64, dtype="bfloat16")
    a = question("test", case.q, case.k, case.v, case.length, case.start, case.asked, None, None)
    tile = Shares(splits=splits, stages=stages)
    assert_answers(case, jax.jit(lambda a: decode_attention(a, tile=tile))(a), 8e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("gated", "activation"), [(False, "relu"), (True, "silu"), (True, "gelu")])
def test_some_neurons(dtype, gated, activation):
    """Also widths that allow a thread fewer bytes at a time, and numbers of neurons that are not there."""
    rng = np.random.default_rng(0)
    for d, n, out, block, rows in ((2048, 512, 1024, 1, 1), (384, 1000, 640, 8, 4), (128, 96, 5120, 1, 2)):
        neurons = mlp_neurons(d, n, out, dtype, gated, activation=activation, shift=0.25)
        x = jnp.asarray(rng.standard_normal((rows, d)), dtype)
        chosen = rng.permutation(np.arange(-2, n // block + 2))[: n // block // 2]
        for count in (len(chosen), len(chosen) - 3, 0):
            assert mlp_error(neurons, x, chosen, count, block, interpreted=False) < 5e-6


@pytest.mark.parametrize("shares", [1, 7, 300])
@pytest.mark.parametrize("together", [1, 4, 8])
def test_neurons_are_the_same_however_they_are_shared(shares, together):
    neurons = mlp_neurons(1024, 256, 1024, "bfloat16", True)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 1024)), jnp.bfloat16)
    tile = Neighbours(shares=shares, neurons=together)
    assert mlp_error(neurons, x, np.arange(0, 256, 3), 80, tile=tile, interpreted=False) < 5e-6
