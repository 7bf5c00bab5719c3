"""What the transforms share: statistics found by path, keys by name, other types of trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import effjax as ej
from effjax.errors import CalibrationError
from tests.common.cases import assert_same_bytes, statistics, weight

RTN = ej.quantize.RTN(bits=4, group_size=16)


def test_numpy_weights():
    """Weights read from a file need no copy to a device first."""
    w = weight(32, 8, (), "float32")
    assert_same_bytes(ej.quantize_params({"kernel": np.asarray(w)}, RTN), ej.quantize_params({"kernel": w}, RTN))


def test_nnx_state():
    """An NNX model's state is a tree like any other; the model runs on it under `lift`."""
    model = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    quantized = ej.quantize_params(state, RTN)
    x = jax.random.normal(jax.random.key(0), (4, 32))

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    np.testing.assert_allclose(
        jax.jit(ej.lift(apply))(quantized, x), apply(ej.materialize(quantized), x), rtol=1e-5, atol=1e-6
    )


def test_statistics_of_flax_variables():
    """`calibrate(model.apply, {"params": ...})` names leaves `params/...`; a tree of parameters finds them."""
    params = {"layer": {"kernel": weight(32, 8, (), "float32")}}
    method = ej.sketch.LowRank(rank=2, weighted=True)
    plain = ej.sketch_params(params, method, stats={"layer": {"kernel": statistics(32)}})
    wrapped = ej.sketch_params(params, method, stats={"params": {"layer": {"kernel": statistics(32)}}})
    assert_same_bytes(plain, wrapped)
    with pytest.raises(CalibrationError, match=r"^layer/kernel: LowRank needs \['second_moment'\] of its inputs"):
        ej.sketch_params(params, method, stats={"other": {"kernel": statistics(32)}})


def test_statistics_decide_the_axes():
    """A weight that a model contracts over its last axis is compressed along that axis."""
    params = {"layer": {"kernel": weight(24, 32, (), "float32")}}
    batches = [jax.random.normal(jax.random.key(0), (16, 32))]
    stats = ej.calibrate(lambda p, x: x @ p["layer"]["kernel"].T, params, batches)
    quantized = ej.quantize_params(params, RTN, stats=stats)["layer"]["kernel"]
    assert quantized.shape == (24, 32) and quantized.array.shape == (32, 24)
    transposed = RTN.quantize(params["layer"]["kernel"].T).materialize().T
    np.testing.assert_array_equal(quantized.materialize(), transposed)


def test_one_program_for_equal_leaves():
    """Forty layers of one shape compile once."""
    calls = []

    class Counted(ej.quantize.RTN):
        def compress(self, w, *, stats=None, key=None):
            calls.append(w.shape)
            return super().compress(w, stats=stats, key=key)

    params = {f"layer_{i}": {"kernel": weight(32, 8, (), "float32", i)} for i in range(40)}
    result = ej.quantize_params(params, Counted(bits=4, group_size=16))
    assert calls == [(32, 8)]
    assert_same_bytes(result["layer_7"], ej.quantize_params({"kernel": params["layer_7"]["kernel"]}, RTN))


def test_mixed_rules():
    params = {name: {"kernel": weight(32, 8, (), "float32")} for name in ("up", "down", "gate")}
    rules = [("down/*", ej.quantize.NF4(block_size=16)), ("gate/*", None), ("*/kernel", RTN)]
    result = ej.quantize_params(params, rules)
    assert isinstance(result["down"]["kernel"], ej.arrays.Codebook)
    assert isinstance(result["up"]["kernel"], ej.arrays.Quantized)
    assert result["gate"]["kernel"] is params["gate"]["kernel"]


def test_vmap_over_a_whole_tree():
    """The transform itself under vmap: experts stacked in front come out as stacked compressed leaves."""
    stacked = {"kernel": weight(32, 8, (3,), "float32")}
    together = jax.jit(jax.vmap(lambda p: ej.quantize_params(p, RTN)))(stacked)
    assert_same_bytes(together, ej.quantize_params(stacked, RTN))
    assert together["kernel"].shape == (3, 32, 8)
    keys = jax.random.split(jax.random.key(0), 3)
    method = ej.sketch.Hashed(ratio=4)
    drawn = jax.vmap(lambda p, k: ej.sketch_params(p, method, key=k))(stacked, keys)
    for i in range(3):
        single = ej.sketch_params({"kernel": stacked["kernel"][i]}, method, key=keys[i])
        assert_same_bytes(jax.tree.map(lambda x, i=i: x[i], drawn), single)
    assert jnp.unique(drawn["kernel"].seed).size == 3


def test_what_inputs_share_is_prepared_once():
    """Queries, keys and values of a layer: one factor; layers of one shape: one program."""
    calls = {"prepare": 0, "compress": 0, "run": 0}

    class Counted(ej.quantize.GPTQ):
        def prepare(self, stats):
            calls["prepare"] += 1
            return super().prepare(stats)

        def compress(self, w, *, stats, key=None):
            calls["compress"] += 1
            assert stats.factor is not None and stats.source == ""
            return super().compress(w, stats=stats)

    params = {f"layers_{i}": {n: {"kernel": weight(32, 8, (), "float32", i)} for n in "qkv"} for i in range(5)}

    def fn(p, x):
        for layer in p.values():
            x = x + jnp.tile(sum(x @ layer[n]["kernel"] for n in "qkv"), 4)
        return x

    stats = ej.calibrate(fn, params, [jax.random.normal(jax.random.key(0), (64, 32))])
    result = ej.quantize_params(params, Counted(bits=4, group_size=16), stats=stats)
    assert (calls["prepare"], calls["compress"]) == (1, 1)
    assert_same_bytes(result, ej.quantize_params(params, ej.quantize.GPTQ(bits=4, group_size=16), stats=stats))


def test_joint_methods_get_the_weights_of_one_input_together():
    seen = []

    class Joint(ej.quantize.RTN):
        joint = True

        def compress_jointly(self, weights, *, stats, keys):
            seen.append([w.shape for w in weights])
            return super().compress_jointly(weights, stats=stats, keys=keys)

    params = {n: {"kernel": weight(32, out, (), "float32")} for n, out in (("q", 8), ("k", 4), ("up", 16))}

    def fn(p, x):
        return jnp.concatenate([x @ p["q"]["kernel"], x @ p["k"]["kernel"], (2 * x) @ p["up"]["kernel"]], -1)

    stats = ej.calibrate(fn, params, [jax.random.normal(jax.random.key(0), (64, 32))])
    result = ej.quantize_params(params, Joint(bits=4, group_size=16), stats=stats)
    assert sorted(map(len, seen)) == [1, 2]
    assert_same_bytes(result, ej.quantize_params(params, RTN))
