"""One step: parts of a batch against the whole, masks, precision, meshes, memory that falls as arithmetic says."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.errors import ConfigError
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from train.config import LoopConfig
from train.program import build
from train.sharding import make_mesh, params_layout
from train.step import init_state, make_step

ROWS, WIDTH = 24, 6
SGD = optax.sgd(0.1)


def params():
    first, second = jax.random.split(jax.random.key(0))
    return {"a": jax.random.normal(first, (WIDTH, 8)), "b": jax.random.normal(second, (8,))}


def loss_fn(params, batch, key):
    del key
    errors = jnp.square(jnp.tanh(batch["x"].astype(params["a"].dtype) @ params["a"]) @ params["b"] - batch["y"])
    errors = errors.astype(jnp.float32)
    return (errors * batch["weight"]).sum(), batch["weight"].sum(), {"hits": ((errors < 1).sum(), errors.size)}


def batch(weight):
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(ROWS, WIDTH)).astype(np.float32),
        "y": rng.normal(size=ROWS).astype(np.float32),
        "weight": np.asarray(weight, np.float32),
    }


def run(rows, loss=loss_fn, **options):
    state = init_state(lambda key: params(), SGD, 0)
    return jax.jit(make_step(loss, SGD, **options))(state, rows)


def oracle(rows):
    """SGD on the weighted mean, by numpy."""
    a, b = (np.asarray(params()[name], np.float64) for name in "ab")
    x, y, w = (rows[name].astype(np.float64) for name in ("x", "y", "weight"))
    h = np.tanh(x @ a)
    back = 2 * (h @ b - y) * w / w.sum()
    return {"a": a - 0.1 * x.T @ (back[:, None] * b * (1 - h**2)), "b": b - 0.1 * h.T @ back}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_that_of_the_weighted_mean_of_the_whole_batch(accumulate, masked):
    weight = np.random.default_rng(1).uniform(0, 2, ROWS)
    if masked:
        weight[::3] = weight[:9] = 0  # the first of three parts, rows 0, 3, ..., counts nothing
    rows = batch(weight)
    state, metrics = run(rows, accumulate=accumulate)
    chex.assert_trees_all_close(state.params, oracle(rows), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"][1], weight.sum(), rtol=1e-6)
    assert metrics["hits"][1] == ROWS


def test_a_batch_that_counts_nothing_moves_nothing():
    state, metrics = run(batch(np.zeros(ROWS)), accumulate=2)
    chex.assert_trees_all_equal(state.params, params())
    assert metrics["loss"] == (0, 0) and metrics["grad_norm"][0] == 0


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32():
    seen = []

    def looking(params, rows, key):
        seen.append(params["a"].dtype)
        return loss_fn(params, rows, key)

    rows = batch(np.ones(ROWS))
    state, metrics = run(rows, looking, accumulate=2, compute_dtype="bfloat16")
    assert set(seen) == {jnp.dtype("bfloat16")}
    assert {x.dtype.name for x in jax.tree.leaves((state.params, metrics["loss"]))} == {"float32"}
    moved, expected = (jax.tree.map(jnp.subtract, tree, params()) for tree in (state.params, oracle(rows)))
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, moved, expected)) / optax.tree.norm(expected)
    assert 1e-5 < difference < 0.02
    with pytest.raises(ConfigError, match="the loss is bfloat16: cast what the model gives to float32 before the loss"):
        run(rows, lambda p, rows, key: (p["a"].sum(), 1.0), compute_dtype="bfloat16")


DECODER = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
)


def program(mesh, **changes):
    model, tokens = Decoder(DECODER), jnp.zeros((1, 4), jnp.int32)

    def loss(params, windows, key):
        del key
        logits = model.apply({"params": params}, windows[:, :-1]).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return losses.sum(), jnp.float32(losses.size)

    config = LoopConfig(steps=10, warmup=1, mesh=mesh, **changes)
    return build(loss, lambda key: model.init(key, tokens)["params"], config, make_mesh(mesh))


def test_every_mesh_loses_the_same_and_memory_of_a_device_falls_as_arithmetic_says():
    windows = np.random.default_rng(0).integers(0, 96, (16, 9)).astype(np.int32)
    losses, taken = {}, {}
    for mesh, parts in (("data=1", 1), ("fsdp=8", 1), ("data=2,fsdp=2,tensor=2", 2)):
        built = program(mesh, accumulate=parts)
        compiled, rows = built.lower(windows).compile(), built.put(windows, False)
        with jax.set_mesh(built.mesh):
            state, losses[mesh] = built.start(), []
            for _ in range(3):
                state, metrics = compiled(state, rows)
                losses[mesh].append(float(metrics["loss"][0]))
        memory, (whole, each) = compiled.memory_analysis(), built.state_bytes
        taken[mesh] = memory.argument_size_in_bytes - rows.addressable_shards[0].data.nbytes
        assert taken[mesh] == each and built.report == []
        assert memory.alias_size_in_bytes >= each, "the donated state comes back in its own place"
    for found in losses.values():
        np.testing.assert_allclose(found, losses["data=1"], rtol=2e-5)
    assert losses["data=1"][2] < losses["data=1"][0]
    assert built.shapes.params["embed"]["embedding"].sharding.spec == P(("fsdp", "tensor"), None)
    small = 3 * 3 * 64 * 4 + 3 * 4 + 8  # three norms and their moments, three counters and a key stay whole
    assert taken["data=1"] == whole == 3 * 4 * (2 * 96 * 64 + 4 * 64 * 64 + 3 * 64 * 128 + 3 * 64) + 3 * 4 + 8
    assert taken["fsdp=8"] == (whole - small) // 8 + small
    assert taken["data=2,fsdp=2,tensor=2"] == (whole - small) // 4 + small
    with pytest.raises(ConfigError, match="a batch of 16 rows does not divide into accumulate=4 parts on 8 devices"):
        program("data=8", accumulate=4).lower(windows)


def test_rules_take_last_dimensions_and_say_what_does_not_divide():
    mesh = make_mesh("fsdp=2,tensor=4")
    tree = {
        "layers": {"up": {"kernel": jax.ShapeDtypeStruct((3, 8, 12), "float32")}},
        "odd": {"kernel": jax.ShapeDtypeStruct((8, 10), "float32")},
        "rest": jax.ShapeDtypeStruct((7, 5), "float32"),
        "scale": jax.ShapeDtypeStruct((8,), "float32"),
    }
    layout, report = params_layout(tree, mesh, [("*/kernel", P("fsdp", "tensor"))])
    assert layout["layers"]["up"]["kernel"] == NamedSharding(mesh, P(None, "fsdp", "tensor"))
    assert layout["odd"]["kernel"].spec == P("fsdp", None) and layout["scale"].spec == layout["rest"].spec == P()
    assert report == [
        "odd/kernel [8, 10]: 10 does not divide by tensor=4, replicated along it",
        "rest [7, 5]: nothing divides by fsdp=2, replicated",
    ]
    for rules, message in (
        ([("*/kernel", P("model"))], r"rule '\*/kernel': .* names 'model', the mesh has data, fsdp, tensor"),
        ([("scale", P("fsdp", None))], r"rule 'scale': .* has more entries than scale \[8\]"),
        ([("*/kernel", P()), ("odd/*", P())], r"rule 'odd/\*' decides for no array; the paths are layers/up/kernel"),
    ):
        with pytest.raises(ConfigError, match=message):
            params_layout(tree, mesh, rules)
