"""The choice of implementation: kernels where they are faster, never one that refuses, and a table that says why."""

import jax
import jax.numpy as jnp
import pytest

import effjax as ej
import kernels_cpu
from effjax.ops import dispatch, explain, matmul

NEEDS_NATIVE = pytest.mark.skipif(not kernels_cpu.available(), reason=kernels_cpu.why_not())


def abstract(method, *shape):
    return jax.eval_shape(method.quantize, jax.ShapeDtypeStruct(shape, jnp.float32))


@NEEDS_NATIVE
@pytest.mark.parametrize("rows", [1, 16, 256, 4096])
@pytest.mark.parametrize("group_size", [128, None])
def test_the_native_kernel_runs_where_groups_are_large(rows, group_size):
    w = abstract(ej.quantize.RTN(bits=4, group_size=group_size), 4096, 4096)
    assert dispatch.choose("cpu", rows, jnp.float32, w) == "cpu"


@NEEDS_NATIVE
def test_the_model_knows_groups_and_the_precision_of_activations():
    def modelled(group_size, **options):
        w = abstract(ej.quantize.RTN(bits=4, group_size=group_size), 2048, 5632)
        return dispatch.estimates("cpu", 512, jnp.float32, w, **options)

    assert modelled(32)["cpu"] > modelled(128)["cpu"] > modelled(128, activation_bits=8)["cpu"]
    assert min(modelled(32), key=modelled(32).get) == "cpu"
    assert "cpu" not in modelled(4)  # groups of half a run of codes
    half = abstract(ej.quantize.RTN(bits=4, group_size=4), 2048, 5632)
    assert dispatch.choose("cpu", 1, jnp.float32, half) == "blocked"
    assert dispatch.choose("cpu", 512, jnp.float32, half) == "reference"  # dequantised once for many rows


@pytest.mark.parametrize("platform", dispatch.PLATFORMS)
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("group_size", [4, 32, None])
def test_what_is_chosen_takes_the_operands(platform, rows, transpose, group_size):
    w = abstract(ej.quantize.RTN(bits=3, group_size=group_size), 96, 80)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float64):
        name = dispatch.choose(platform, rows, dtype, w, transpose=transpose)
        assert dispatch.why_not(name, rows, dtype, w, transpose=transpose) == ""


def test_without_a_hopper_gpu_plain_jax_is_lowered_for_cuda():
    w = abstract(ej.quantize.RTN(bits=4, group_size=128), 1024, 1024)
    x = jax.ShapeDtypeStruct((1, 1024), jnp.bfloat16)
    assert "no GPU is attached" in dispatch.unfit("cuda", w)
    text = jax.jit(matmul).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in text
    named = jax.jit(lambda x, w: matmul(x, w, implementation="gpu"))
    assert "mosaic_gpu" in named.trace(x, w).lower(lowering_platforms=("cuda",)).as_text()


def test_tpu_programs_hold_the_pallas_kernel():
    w = abstract(ej.quantize.RTN(bits=4, group_size=128), 1024, 1024)
    x = jax.ShapeDtypeStruct((1, 1024), jnp.bfloat16)
    assert "tpu_custom_call" in jax.jit(matmul).trace(x, w).lower(lowering_platforms=("tpu",)).as_text()


def test_hashed_products_are_not_dispatched_to_the_tpu_kernel():
    w = ej.sketch.Hashed(ratio=64).compress(jnp.ones((128, 128)), key=jax.random.key(0))
    assert dispatch.choose("tpu", 1, jnp.float32, w) == "reference"
    assert "name implementation='tpu'" in dispatch.unfit("tpu", w)


def test_the_table_names_every_choice_and_every_refusal():
    w = ej.quantize.RTN(bits=4, group_size=4).quantize(jnp.eye(64))
    lines = explain(w, rows=3).splitlines()
    chosen = {line.split()[0] for line in lines[1:] if line.endswith("yes")}
    assert chosen == set(dispatch.PLATFORMS)
    assert any(line.startswith("cpu       cpu") and "whole runs of 8 codes" in line for line in lines)


def test_a_name_without_a_kernel_says_so():
    w = ej.quantize.RTN(bits=4, group_size=None).quantize(jnp.eye(64))
    low_rank = ej.sketch.LowRank(rank=2).compress(jnp.eye(64))
    assert "no kernel 'cpu' for a LowRank" in dispatch.why_not("cpu", 1, jnp.float32, low_rank, transpose=False)
    with pytest.raises(ValueError, match="activation_bits must be None, 8, 16 or 24, found 4"):
        matmul(jnp.ones((1, 64)), w, activation_bits=4)
    with pytest.raises(TypeError, match="codebook_matmul: the matrix must be a Codebook, found Quantized"):
        ej.ops.codebook_matmul(jnp.ones((1, 64)), w)
