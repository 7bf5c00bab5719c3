"""The TPU's `sparse_mlp` through the real compiler: the bytes of the weights, no copy, the stated vector memory."""

import functools

import jax
import jax.numpy as jnp
import pytest

from effjax.arrays import nbytes
from effjax.ops.neurons import make_neurons
from kernels_pallas.sparse_mlp import tpu
from tests.aot.test_kernels import TARGETS, VECTOR_MEMORY, compile_for

pytestmark = pytest.mark.aot

# (width, neurons, dtype, gated, rows, block)
CASES = {
    "OPT-1.3B, one token": (2048, 8192, jnp.bfloat16, False, 1, 128),
    "OPT-1.3B in float32, four tokens": (2048, 8192, jnp.float32, False, 4, 32),
    "Llama-3.1-8B, one token": (4096, 14336, jnp.bfloat16, True, 1, 128),
    "a register of neurons": (1024, 4096, jnp.bfloat16, False, 1, 16),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_compiles_and_copies_no_weights(name, target):
    width, total, dtype, gated, rows, block = CASES[name]
    up, down = jax.ShapeDtypeStruct((width, total), dtype), jax.ShapeDtypeStruct((total, width), dtype)
    bias = jax.ShapeDtypeStruct((total,), jnp.float32)
    neurons = jax.eval_shape(
        lambda up, down, bias: make_neurons(up, down, gate=up if gated else None, up_bias=bias), up, down, bias
    )
    x, chosen = jax.ShapeDtypeStruct((rows, width), dtype), jax.ShapeDtypeStruct((total // block // 4,), jnp.int32)
    assert tpu.why_not(dtype, neurons, block) == ""
    run = functools.partial(tpu.sparse_mlp, block=block)
    compiled = compile_for(target, run, x, neurons, chosen, jax.ShapeDtypeStruct((), jnp.int32))
    assert "tpu_custom_call" in compiled.as_text()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes <= 1.02 * nbytes((x, neurons)) + 2**18
    stated = tpu.vmem_bytes(rows, neurons, block)
    assert memory.temp_size_in_bytes <= nbytes(neurons) / 8 + (stated if target == "v5p" else 0)
    assert stated <= VECTOR_MEMORY[target] / 2
