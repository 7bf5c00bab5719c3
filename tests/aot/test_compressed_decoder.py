"""A compressed decoder compiled by the real TPU compiler: the chip holds the packed bytes, and shards of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import effjax as ej
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder, new_cache
from effjax.paths import map_with_paths

pytestmark = pytest.mark.aot

CONFIG = DecoderConfig(
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=8,
    scan_layers=True,
    tie_word_embeddings=True,
    param_dtype="bfloat16",
)


@functools.cache
def chips():
    return topologies.get_topology_desc("v5e:2x2", platform="tpu").devices


def parameters():
    """Shapes of the dense and of the 4-bit decoder."""
    model = Decoder(CONFIG)
    dense = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return dense, jax.eval_shape(lambda p: ej.quantize_params(p, ej.quantize.RTN(bits=4, group_size=64)), dense)


def compile_step(params, shardings, replicated):
    """The donated decode step, for the chips of the shardings."""
    apply = ej.lift(Decoder(CONFIG).apply)
    cache = jax.eval_shape(lambda: new_cache(CONFIG, batch=1, slots=256))

    def step(params, cache, token, lengths):
        return apply({"params": params}, token, cache=cache, lengths=lengths)

    def placed(tree, where):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)

    everywhere = jax.tree.map(lambda _: replicated, cache)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32, sharding=replicated)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=replicated)
    lowered = jax.jit(step, donate_argnums=1).lower(
        placed(params, shardings), placed(cache, everywhere), token, lengths
    )
    return lowered.compile(), ej.nbytes(cache)


def test_one_chip_holds_the_packed_bytes_and_no_dense_stack():
    dense, packed = parameters()
    chip = jax.sharding.SingleDeviceSharding(chips()[0])
    compiled, cache_bytes = compile_step(packed, jax.tree.map(lambda _: chip, packed), chip)
    memory = compiled.memory_analysis()
    expected = ej.nbytes(packed) + cache_bytes
    assert expected <= memory.argument_size_in_bytes <= 1.03 * expected  # small arrays are padded to tiles
    assert memory.temp_size_in_bytes < ej.nbytes(dense["layers"]) / CONFIG.num_hidden_layers


def test_four_chips_hold_a_quarter_of_the_packed_bytes_each():
    dense, packed = parameters()
    mesh = Mesh(np.array(chips()), ("tensor",))

    def dense_spec(path, leaf):
        if path.endswith(("o_proj/kernel", "down_proj/kernel")):
            return P(None, "tensor", None)
        return P(None, None, "tensor") if path.endswith("_proj/kernel") else P()

    specs = ej.partition_specs(packed, map_with_paths(dense_spec, dense), mesh)
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))
    compiled, cache_bytes = compile_step(packed, shardings, NamedSharding(mesh, P()))
    matrices = ej.nbytes(packed["layers"]["attention"]) + ej.nbytes(packed["layers"]["mlp"])
    held = compiled.memory_analysis().argument_size_in_bytes
    expected = matrices / 4 + (ej.nbytes(packed) - matrices) + cache_bytes
    assert held <= 1.05 * expected
    assert "all-reduce" in compiled.as_text() or "reduce-scatter" in compiled.as_text()
