"""The TPU's `sparse_mlp` in the simulator of a TPU against the reference, and lowered for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.neurons import make_neurons
from effjax.ops.sparse_mlp import sparse_mlp as operation
from kernels_pallas.sparse_mlp.tpu import sparse_mlp, why_not
from tests.kernels_pallas.oracles import mlp_neurons


@pytest.mark.parametrize(
    ("dtype", "block", "gated", "batch"),
    [("float32", 8, False, 1), ("float32", 16, True, 3), ("bfloat16", 16, False, 9)],
)
def test_matches_the_reference(dtype, block, gated, batch):
    neurons = mlp_neurons(128, 96, 256, dtype, gated)
    x = jax.random.normal(jax.random.key(0), (batch, 128)).astype(dtype)
    run = jax.jit(functools.partial(sparse_mlp, block=block, interpret=True))
    for chosen, count in (([2, 0, 5, 1], 4), ([4, 1, 3, 0], 2), ([-1, 5, 99, 1], 4), ([1] * 4, 0), ([], 0)):
        chosen = jnp.asarray(chosen, jnp.int32)
        want = operation(x, neurons, chosen, count, block=block, implementation="reference")
        got = run(x, neurons, chosen, jnp.int32(count))
        assert got.shape == (batch, 256) and got.dtype == jnp.float32
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_lowers_for_a_tpu():
    neurons = mlp_neurons(256, 512, 256, "bfloat16", True)
    run = functools.partial(operation, block=128)
    x, chosen = jnp.ones((2, 256), jnp.bfloat16), jnp.array([0, 3], jnp.int32)
    text = jax.jit(run).trace(x, neurons, chosen).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1 and "sparse_mlp" in text


def test_what_is_refused():
    neurons = mlp_neurons(128, 64, 128, "float32", False)
    with pytest.raises(ValueError, match="block=4: the TPU's kernel brings blocks of a multiple of 8 neurons"):
        sparse_mlp(jnp.ones((1, 128)), neurons, jnp.array([0]), jnp.int32(1), block=4)
    assert why_not(jnp.float64, neurons, 8) == "activations in float64: only bfloat16 and float32"
    assert "only multiples of 128" in why_not(jnp.float32, mlp_neurons(64, 64, 128, "float32", False), 8)
    wide = jax.eval_shape(lambda w: make_neurons(w, w.T), jax.ShapeDtypeStruct((8192, 8192), jnp.float32))
    assert "does not fit the vector memory" in why_not(jnp.float32, wide, 1024)
