"""The TPU compiler without a TPU: what a sharded program holds on each chip and what it sends, from the compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

pytestmark = pytest.mark.aot

BATCH, WIDTH, HIDDEN = 64, 1024, 4096


@functools.cache
def chips(topology):
    return topologies.get_topology_desc(topology, platform="tpu").devices


def shape(mesh, dims, dtype, *spec):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def int8_mlp(x, up, up_scale, down, down_scale):
    hidden = jax.nn.relu((x @ up.astype(x.dtype)) * up_scale)
    return (hidden @ down.astype(x.dtype)) * down_scale


def compile_mlp(topology):
    devices = np.array(chips(topology))
    mesh = Mesh(devices, ("model",))
    return (
        jax.jit(int8_mlp, out_shardings=NamedSharding(mesh, PartitionSpec()))
        .lower(
            shape(mesh, (BATCH, WIDTH), jnp.bfloat16),
            shape(mesh, (WIDTH, HIDDEN), jnp.int8, None, "model"),
            shape(mesh, (HIDDEN,), jnp.bfloat16, "model"),
            shape(mesh, (HIDDEN, WIDTH), jnp.int8, "model", None),
            shape(mesh, (WIDTH,), jnp.bfloat16),
        )
        .compile()
    )


@pytest.mark.parametrize(("topology", "count"), [("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v6e:2x4", 8)])
def test_sharded_int8_layer_compiles_with_its_bytes_and_a_reduction(topology, count):
    assert len(chips(topology)) == count
    compiled = compile_mlp(topology)
    weights = 2 * WIDTH * HIDDEN // count
    activations = 2 * BATCH * WIDTH
    scales = 2 * (HIDDEN // count + WIDTH)
    held = compiled.memory_analysis().argument_size_in_bytes
    # Small arrays are padded to whole tiles, so the chip holds a little more than the arithmetic says.
    assert weights + activations + scales <= held <= 1.02 * (weights + activations + scales)
    # The contraction over the split hidden axis is the one thing that must cross chips.
    assert "all-reduce" in compiled.as_text() or "reduce-scatter" in compiled.as_text()


def test_the_compiler_rejects_what_does_not_fit_a_chip():
    chip = jax.sharding.SingleDeviceSharding(chips("v5e:2x2")[0])
    big = jax.ShapeDtypeStruct((2**17, 2**17), jnp.bfloat16, sharding=chip)  # 32 GiB; a v5e holds 16
    with pytest.raises(jax.errors.JaxRuntimeError, match="(?i)RESOURCE_EXHAUSTED|exceed"):
        jax.jit(lambda x: x * 2).lower(big).compile()
