"""The TPU kernels lower for a TPU on a machine without one or its compiler: the errors of Pallas itself show here."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.codebook_matmul.tpu import codebook_matmul
from kernels_pallas.hashed_matmul.tpu import hashed_matmul
from kernels_pallas.nm_matmul.tpu import nm_matmul
from kernels_pallas.quant_matmul.tpu import quant_matmul
from tests.kernels_pallas.oracles import codebook, hashed, nm_sparse, quantized

CASES = {
    "int4": (quant_matmul, lambda: quantized(512, 256, bits=4, group=32, zeros="packed")),
    "int3": (quant_matmul, lambda: quantized(512, 256, bits=3)),
    "int8": (quant_matmul, lambda: quantized(512, 256, bits=8, group=64, zeros="real")),
    "nf4": (codebook_matmul, lambda: codebook(512, 256, entries=16, scales=8)),
    "a table a column": (codebook_matmul, lambda: codebook(512, 256, entries=16, tables=(1, 256))),
    "a large table a column": (codebook_matmul, lambda: codebook(512, 256, entries=256, tables=(1, 256))),
    "2:4": (nm_matmul, lambda: nm_sparse(512, 256, n=2, m=4, dtype=jnp.bfloat16)),
    "hashed": (hashed_matmul, lambda: hashed(512, 256, slots=512)),
}


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_lowers_for_a_tpu(name, transpose):
    kernel, make = CASES[name]
    w = make()
    x = jax.ShapeDtypeStruct((4, 256 if transpose else 512), jnp.bfloat16)
    traced = jax.jit(lambda x, w: kernel(x, w, transpose=transpose)).trace(x, w)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1 and kernel.__name__ in text
