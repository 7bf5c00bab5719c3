"""Relufied decoders against their definition, and the statistics of zeros against counting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import effjax as ej
from effjax.errors import CalibrationError, ConfigError
from effjax.models.decoder import Decoder, DecoderApply, stack_layers
from effjax.models.intercept import intercepted
from effjax.sparsity.neurons import active_neurons, changed_neurons
from effjax.sparsity.relu import flops_share, relufy, shift_for, zero_shares
from tests.models.small import SMALL

TOKENS = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 7))
PARAMS = jax.tree.map(lambda x: 3 * x, jax.jit(Decoder(SMALL).init)(jax.random.key(1), TOKENS)["params"])


def inputs_of_projections(config):
    """What every projection is called with, by its path."""
    seen = {}

    def see(call, args, kwargs, context):
        if context.method_name == "__call__" and str(context.module.name).endswith("_proj"):
            seen["/".join(context.module.path)] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(see):
        Decoder(config).apply({"params": PARAMS}, TOKENS)
    return seen


@pytest.mark.parametrize("shift", [0.0, 0.7, -0.2])
def test_the_gate_is_a_shifted_relu(shift):
    seen = inputs_of_projections(relufy(SMALL, shift=shift))
    for layer in range(SMALL.num_hidden_layers):
        mlp, x = PARAMS[f"layers_{layer}"]["mlp"], np.asarray(seen[f"layers_{layer}/mlp/gate_proj"], np.float64)
        gate, up = (x @ np.asarray(mlp[name]["kernel"], np.float64) for name in ("gate_proj", "up_proj"))
        expected = np.maximum(gate - shift, 0) * up
        np.testing.assert_allclose(seen[f"layers_{layer}/mlp/down_proj"], expected, rtol=1e-4, atol=1e-4)


def test_stage_two_cuts_after_the_norms_and_stage_one_does_not():
    plain, stage1, stage2 = (inputs_of_projections(c) for c in (SMALL, relufy(SMALL), relufy(SMALL, stage=2)))
    first = "layers_0/attention/q_proj"
    np.testing.assert_array_equal(stage1[first], plain[first])
    np.testing.assert_array_equal(stage2[first], np.maximum(plain[first], 0))
    for path, x in stage2.items():
        if not path.endswith("o_proj"):
            zeros = np.mean(np.asarray(x) == 0)
            assert 0.2 < zeros < 0.8, (path, zeros)
    assert not (np.asarray(stage1["layers_1/mlp/up_proj"]) == 0).any()


def test_relufy_keeps_everything_else_and_can_be_taken_back():
    config = relufy(SMALL, stage=2, shift=1.0)
    back = dataclasses.replace(config, hidden_act="silu", relu_shift=0.0, norm_relu=False)
    assert back == SMALL
    with pytest.raises(ConfigError, match="stage=3: 1 exchanges the activation, 2 also adds ReLUs after the norms"):
        relufy(SMALL, stage=3)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.95])
def test_a_shift_is_the_smallest_that_reaches_its_share(sparsity):
    x = np.random.default_rng(3).normal(size=1000).astype(np.float32)
    shift = shift_for(x, sparsity)
    assert np.mean(x <= shift) >= sparsity > np.mean(x < shift)
    with pytest.raises(ConfigError, match="sparsity=1: must be between 0 and 1"):
        shift_for(x, 1)


def test_zeros_are_counted_per_input():
    config = relufy(SMALL, stage=2)
    stats = ej.calibrate(lambda p, t: Decoder(config).apply({"params": p}, t), PARAMS, [TOKENS], needs={"zeros"})
    shares, seen = zero_shares(stats), inputs_of_projections(config)
    assert set(shares) == {f"{path}/kernel" for path in seen}
    for path, x in seen.items():
        zeros = np.mean(np.asarray(x) == 0, axis=(0, 1))
        leaf = stats
        for part in path.split("/"):
            leaf = leaf[part]
        np.testing.assert_allclose(leaf["kernel"].zeros, zeros, atol=1e-6)
        np.testing.assert_allclose(shares[f"{path}/kernel"], zeros.mean(), atol=1e-6)
    with pytest.raises(CalibrationError, match="these statistics lack 'norm'"):
        _ = leaf["kernel"].norm


def test_the_share_of_work_is_weighted_by_the_weights():
    params = {"a": {"kernel": jnp.ones((4, 6))}, "b": {"kernel": jnp.ones((4, 2))}}
    x = jnp.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])

    def fn(p, x):
        return x @ p["a"]["kernel"], (x + 1) @ p["b"]["kernel"]

    stats = ej.calibrate(fn, params, [x], needs={"zeros"})
    assert zero_shares(stats) == {"a/kernel": 0.5, "b/kernel": 0.0}
    assert flops_share(stats, params) == (24 * 0.5 + 8) / 32


def test_neurons_are_seen_and_changed():
    config = relufy(SMALL, shift=0.5)
    active = active_neurons(config, PARAMS, TOKENS)
    seen = inputs_of_projections(config)
    for layer in range(2):
        np.testing.assert_array_equal(active[layer], np.asarray(seen[f"layers_{layer}/mlp/down_proj"]) != 0)
    plain = DecoderApply(config)({"params": PARAMS}, TOKENS)
    same = changed_neurons(config, lambda layer, h: jnp.where(active[layer], h, 7.0 * (h != 0)))
    np.testing.assert_array_equal(same({"params": PARAMS}, TOKENS), plain)
    none = changed_neurons(config, lambda layer, h: h * (layer == 0))({"params": PARAMS}, TOKENS)
    without = jax.tree.map(lambda x: x, PARAMS)
    without["layers_1"]["mlp"]["down_proj"]["kernel"] = jnp.zeros_like(
        without["layers_1"]["mlp"]["down_proj"]["kernel"]
    )
    np.testing.assert_allclose(none, DecoderApply(config)({"params": without}, TOKENS), atol=1e-5)


def test_stacked_layers_are_seen_alike():
    scanned = dataclasses.replace(relufy(SMALL), scan_layers=True)
    np.testing.assert_array_equal(
        active_neurons(scanned, stack_layers(PARAMS), TOKENS), active_neurons(relufy(SMALL), PARAMS, TOKENS)
    )


def test_an_interceptor_that_does_nothing_changes_nothing():
    apply = intercepted(SMALL, lambda call, args, kwargs, context: call(*args, **kwargs))
    np.testing.assert_array_equal(apply({"params": PARAMS}, TOKENS), DecoderApply(SMALL)({"params": PARAMS}, TOKENS))


def test_gradients_pass_a_shifted_relu():
    config = relufy(SMALL, stage=2, shift=0.3)

    def loss(scale):
        params = jax.tree.map(lambda x: x * scale, PARAMS)
        return jnp.sum(Decoder(config).apply({"params": params}, TOKENS) ** 2)

    step = 1e-3
    slope = (loss(1 + step) - loss(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(1.0), slope, rtol=2e-2)
