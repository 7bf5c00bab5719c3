"""The TPU kernels through the real compiler: bytes held, no dense copy, and the vector memory that the tile states."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies

from effjax.arrays import Codebook, Hashed, NMSparse, Quantized, nbytes
from kernels_pallas.codebook_matmul import tpu as codebook
from kernels_pallas.hashed_matmul import tpu as hashed
from kernels_pallas.nm_matmul import tpu as nm
from kernels_pallas.quant_matmul import tpu as quant
from kernels_pallas.shapes import shape

pytestmark = pytest.mark.aot

TARGETS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
VECTOR_MEMORY = {"v5e": 128 * 2**20, "v5p": 64 * 2**20, "v6e": 128 * 2**20, "7x": 64 * 2**20}
STRUCT = jax.ShapeDtypeStruct
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


@functools.cache
def chip(target):
    device = topologies.get_topology_desc(TARGETS[target], platform="tpu").devices[0]
    return jax.sharding.SingleDeviceSharding(device)


def compile_for(target, f, *args):
    placed = jax.tree.map(lambda x: STRUCT(x.shape, x.dtype, sharding=chip(target)), args)
    return jax.jit(f).lower(*placed).compile()


def quantized(matrix, bits, group, zeros=False):
    n, out = matrix
    groups = 1 if group is None else n // group

    def make():
        points = jnp.zeros((groups, out), jnp.uint8) if zeros else None
        scales = jnp.zeros((groups, out), BF16)
        return Quantized.from_codes(jnp.zeros((n, out), jnp.uint8), scales, points, bits=bits, dtype=BF16)

    return jax.eval_shape(make)


def codebooks(matrix, entries, column, groups):
    n, out = matrix

    def make():
        tables = jnp.zeros((1, out if column else 1, entries), BF16)
        scales = None if groups is None else jnp.zeros((groups, out), BF16)
        return Codebook.from_codes(jnp.zeros((n, out), jnp.uint8), tables, scales, dtype=BF16)

    return jax.eval_shape(make)


def sparse(matrix, n, m):
    return jax.eval_shape(lambda w: NMSparse.from_dense(w, w != 0, n=n, m=m), STRUCT(matrix, BF16))


def table(matrix, slots):
    n, out = matrix
    return Hashed(
        table=STRUCT((slots,), BF16), seed=STRUCT((), jnp.uint32), in_features=n, out_features=out, dtype=BF16
    )


GATE = shape("Llama-3.1-8B", "gate_proj")
SMALL = shape("Qwen3-0.6B", "gate_proj")
# (kernel's module, weights, rows, dtype of activations, transposed)
CASES = {
    "int4, decode": (quant, quantized(GATE, 4, 128, zeros=True), 1, BF16, False),
    "int4 in groups of 32, decode 16": (quant, quantized(shape("Llama-3.1-70B", "o_proj"), 4, 32), 16, BF16, False),
    "int3 per channel, decode in float32": (quant, quantized(SMALL, 3, None), 1, F32, False),
    "int8, prefill": (quant, quantized(shape("TinyLlama-1.1B", "down_proj"), 8, 128), 512, BF16, False),
    "int4, gradient": (quant, quantized(SMALL, 4, 128), 256, BF16, True),
    "nf4, decode": (codebook, codebooks(GATE, 16, False, GATE[0] // 64), 1, BF16, False),
    "a table of 16 a column, decode": (codebook, codebooks(SMALL, 16, True, None), 4, BF16, False),
    "a table of 256 a column, decode": (codebook, codebooks(SMALL, 256, True, None), 1, BF16, False),
    "2:4, decode": (nm, sparse(GATE, 2, 4), 1, BF16, False),
    "hashed": (hashed, table(SMALL, 512), 1, BF16, False),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_compiles_with_the_packed_bytes_and_no_dense_copy(name, target):
    module, w, rows, dtype, transpose = CASES[name]
    (kernel,) = (getattr(module, f) for f in vars(module) if f.endswith("_matmul") and callable(getattr(module, f)))
    x = STRUCT((rows, w.shape[1 if transpose else 0]), dtype)
    assert module.why_not(rows, dtype, w, transpose=transpose) == ""
    compiled = compile_for(target, lambda x, w: kernel(x, w, transpose=transpose), x, w)
    assert "tpu_custom_call" in compiled.as_text()
    memory = compiled.memory_analysis()
    given = nbytes(w) + nbytes(x)
    # Arrays of few rows are padded to whole tiles.
    assert given <= memory.argument_size_in_bytes <= 1.02 * given + 2**14
    # What is left is the activations in another order, and on a v5p the kernel's own vector memory.
    tile = module.choose_tile(rows, dtype, w, transpose=transpose)
    stated = module.vmem_bytes(tile, dtype, w, transpose=transpose)
    result = 4 * rows * w.shape[0 if transpose else 1]
    copies = 2 * (nbytes(x) + result)
    assert copies < 2 * w.size  # too little for a dense copy
    assert memory.temp_size_in_bytes <= copies + (stated if target == "v5p" else 0)
    # The tile's figure is the limit that the compiler was given.
    assert stated <= VECTOR_MEMORY[target] / 2


def test_the_stated_vector_memory_is_a_limit_that_the_compiler_keeps(monkeypatch):
    w = quantized(SMALL, 4, 128)
    x = STRUCT((1, w.shape[0]), BF16)
    monkeypatch.setattr(quant, "vmem_bytes", lambda *args, **kwargs: 2**17)
    with pytest.raises(jax.errors.JaxRuntimeError, match="(?i)vmem"):
        compile_for("v5e", quant.quant_matmul, x, w)


@pytest.mark.parametrize("target", TARGETS)
def test_a_gather_from_vector_memory_is_refused(target):
    """Why `hashed_matmul` looks slots up row by row, and only small tables."""

    def gather(table, slots):
        def kernel(table_ref, slots_ref, out_ref):
            out_ref[...] = jnp.take_along_axis(table_ref[...], slots_ref[...], axis=1, mode="promise_in_bounds")

        return pl.pallas_call(kernel, out_shape=STRUCT(slots.shape, F32))(table, slots)

    with pytest.raises(Exception, match="Multiple source vregs along gather dimension"):
        compile_for(target, gather, STRUCT((8, 256), F32), STRUCT((8, 256), jnp.int32))

    def take(table, slots):
        def kernel(table_ref, slots_ref, out_ref):
            out_ref[...] = jnp.take(table_ref[0, :], slots_ref[...], mode="clip")

        return pl.pallas_call(kernel, out_shape=STRUCT(slots.shape, F32))(table, slots)

    with pytest.raises(Exception, match="Only take_along_axis-like gathers supported"):
        compile_for(target, take, STRUCT((1, 1024), F32), STRUCT((8, 128), jnp.int32))
