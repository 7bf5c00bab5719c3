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
