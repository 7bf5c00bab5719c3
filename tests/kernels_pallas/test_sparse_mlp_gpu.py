"""The Hopper kernel of `sparse_mlp` lowers for CUDA without a GPU, and is chosen where it is expected to be fastest."""

import functools
import importlib

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.ops import sparse_mlp as operation
from effjax.ops.neurons import make_neurons
from effjax.ops.sparse_mlp import estimates
from kernels_pallas.shapes import MODELS
from kernels_pallas.sparse_mlp import gpu
from tests.kernels_pallas.gpu_compiler import neurons_struct
from tests.kernels_pallas.oracles import mlp_neurons

S = jax.ShapeDtypeStruct


def lower(neurons, rows, chosen, dtype=jnp.bfloat16, **options):
    run = functools.partial(gpu.sparse_mlp, **{"block": 1} | options)
    x = S((rows, neurons.up.shape[1]), dtype)
    program = jax.jit(run).trace(x, neurons, S((chosen,), jnp.int32), S((), jnp.int32))
    assert program.jaxpr.out_avals == [jax.core.ShapedArray((rows, neurons.down.shape[1]), jnp.float32)]
    assert program.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize("model", MODELS)
def test_every_decoder(model):
    m = MODELS[model]
    lower(neurons_struct(m.hidden, m.intermediate), 1, m.intermediate // 4)


@settings(max_examples=6)
@given(
    inputs=st.integers(1, 20),
    outputs=st.integers(1, 20),
    neurons=st.integers(1, 40),
    rows=st.integers(1, 9),
    block=st.sampled_from([1, 8]),
    dtypes=st.tuples(*[st.sampled_from(["float32", "bfloat16"])] * 2),
    activation=st.sampled_from(["relu", "silu", "gelu"]),
    gated=st.booleans(),
    biased=st.booleans(),
)
def test_odd_shapes(inputs, outputs, neurons, rows, block, dtypes, activation, gated, biased):
    weights = mlp_neurons(
        128 * inputs, 8 * neurons, 128 * outputs, dtypes[0], gated, activation=activation, shift=0.5, biased=biased
    )
    lower(weights, rows, max(1, neurons // 2), dtypes[1], block=block)


def test_the_operation_reaches_it_with_derivatives():
    neurons = mlp_neurons(256, 64, 256, "bfloat16", True)
    run = functools.partial(operation, implementation="gpu")
    x, chosen = jnp.ones((2, 256), jnp.bfloat16), jnp.array([3, 40], jnp.int32)
    text = jax.jit(run).trace(x, neurons, chosen).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    gradient = jax.jit(jax.grad(lambda x: run(x, neurons, chosen).sum()))
    assert gradient.trace(x).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") <= 1
    assert jax.eval_shape(gradient, x).shape == x.shape


def test_a_chosen_tile_fills_the_gpu():
    opt, llama = neurons_struct(2048, 8192, gated=False), neurons_struct(4096, 14336)
    assert gpu.choose_tile(1, opt, 800) == gpu.Tile(shares=100, neurons=8)
    assert gpu.choose_tile(1, llama, 3584) == gpu.Tile(shares=264, neurons=2)  # two blocks for 132 multiprocessors
    assert gpu.choose_tile(4, llama, 3584).shares == 66
    assert gpu.choose_tile(1, neurons_struct(8192, 28672), 1) == gpu.Tile(shares=1, neurons=1)


def test_it_is_chosen_for_few_neurons_and_rows_alone(monkeypatch):
    module = importlib.import_module("effjax.ops.sparse_mlp")  # a function of that name is in its package
    monkeypatch.setattr(module, "no_hopper", lambda: "")
    llama = neurons_struct(4096, 14336)
    found = {
        (rows, share): estimates("cuda", S((rows, 4096), jnp.bfloat16), llama, 14336 // share)
        for rows in (1, 4, 64)
        for share in (1, 4)
    }
    best = {case: min(times, key=lambda name: times[name]) for case, times in found.items()}
    assert [best[1, 4], best[4, 4], best[64, 4]] == ["gpu", "gpu", "dense"]
    assert found[1, 4]["gpu"] == found[1, 1]["gpu"] / 4
    monkeypatch.setattr(module, "no_hopper", lambda: "there is none")
    assert "gpu" not in estimates("cuda", S((1, 4096), jnp.bfloat16), llama, 100)


def test_what_is_refused_says_why():
    neurons = mlp_neurons(64, 64, 128, "float32", False)
    with pytest.raises(ValueError, match="widths 64 and 128: only multiples of 128; use implementation='reference'"):
        gpu.sparse_mlp(jnp.ones((1, 64)), neurons, jnp.array([0]), jnp.int32(1), block=1)
    assert gpu.why_not(jnp.float16, neurons) == "activations in float16: only bfloat16 and float32"
    assert "registers hold 16384 together" in gpu.why_not(jnp.float32, neurons_struct(16384, 128))
    q = ej.quantize.RTN(bits=8, group_size=None).quantize(jnp.eye(128))
    assert gpu.why_not(jnp.float32, make_neurons(q, q)) == "the GPU's kernel reads rows of float32 or bfloat16"
    with pytest.raises(ValueError, match="shares=0, neurons=2: both are at least 1"):
        gpu.Tile(shares=0, neurons=2)
