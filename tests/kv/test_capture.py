"""Captured keys and values against the cache, their gradients against finite differences, and models that run coded."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import CalibrationError, ConfigError
from effjax.evaluate.loss import next_token_nll
from effjax.kv import CQ, KIVI, IntKV
from effjax.kv.capture import capture_kv, changed_kv
from effjax.kv.coded_apply import apply_coded
from effjax.kv.coders import fit_layers
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder, DecoderApply, new_cache, stack_layers
from effjax.models.rope import rotary_angles, rotate

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
LLAMA = DecoderConfig(**SIZES)
QWEN3 = DecoderConfig(model_type="qwen3", **SIZES)
QWEN2 = DecoderConfig(model_type="qwen2", **SIZES)
CONFIGS = pytest.mark.parametrize("config", [LLAMA, QWEN3, QWEN2], ids=lambda config: config.model_type)
WINDOWS = np.random.Generator(np.random.PCG64(3)).integers(0, 40, (3, 12), np.int32)


@functools.cache
def parameters(config):
    params = jax.jit(Decoder(config).init)(jax.random.key(0), WINDOWS)["params"]
    return jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x + 0.1, params)


@functools.cache
def captured_of(config):
    return capture_kv(config, parameters(config), WINDOWS, batch_size=2)  # the last batch is smaller


def by_window(x):
    """`[layers, kv_heads, windows * length, head_dim]` with windows apart."""
    return np.asarray(x).reshape(2, 2, 3, 12, 8)


@CONFIGS
def test_keys_before_rotation_and_values_are_what_the_cache_holds(config):
    params = parameters(config)
    captured = captured_of(config)
    _, cache = Decoder(config).apply({"params": params}, WINDOWS, cache=new_cache(config, batch=3, slots=12))
    positions = jnp.broadcast_to(jnp.arange(12), (3, 12))
    cos, sin = rotary_angles(config, positions, jnp.full(3, 12))
    keys = by_window(captured.keys)
    for layer in range(2):
        turned = rotate(jnp.asarray(keys[layer].transpose(1, 2, 0, 3)), cos, sin).transpose(0, 2, 1, 3)
        np.testing.assert_allclose(turned, cache.k[layer], atol=2e-5)
        np.testing.assert_allclose(by_window(captured.values)[layer].swapaxes(0, 1), cache.v[layer], atol=2e-5)


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=lambda config: config.model_type)
def test_gradients_equal_finite_differences(config):
    """One number of one key or value is moved, and the loss of all windows computed in float64 sums."""
    params = parameters(config)
    captured = captured_of(config)
    rng = np.random.default_rng(0)
    step = 1e-2

    @jax.jit
    def losses(place, sizes):
        def change(layer, part, x):
            at = place[2], place[3], place[4], place[5]
            here = (place[0] == layer) & (place[1] == (part == "values"))
            return x.at[at].add(jnp.where(here, sizes, 0.0))

        logits = changed_kv(config, change)({"params": params}, WINDOWS)
        return next_token_nll(logits[:, :-1], WINDOWS[:, 1:])

    for part, grads in enumerate((captured.key_grads, captured.value_grads)):
        grads = by_window(grads)
        for _ in range(6):
            layer, window, head, token, channel = (int(rng.integers(0, n)) for n in (2, 3, 2, 10, 8))
            place = jnp.asarray([layer, part, window, head, token, channel])
            up, down = (np.asarray(losses(place, size), np.float64).sum() for size in (step, -step))
            slope = (up - down) / (2 * step)
            assert grads[layer, head, window, token, channel] == pytest.approx(slope, rel=0.02, abs=2e-3)
        assert np.abs(grads).max() > 0.05, "gradients that the tolerance does not cover"
        assert np.abs(grads[:, :, :, -1]).max() == 0, "nothing is predicted from the last token"


def test_gradients_of_a_key_head_gather_its_query_heads():
    """The same model with its key heads repeated, one for each query head: their gradients add up."""
    params = parameters(LLAMA)
    wide = dataclasses.replace(LLAMA, num_key_value_heads=4)
    repeated = jax.tree.map(lambda x: x, params)
    for layer in ("layers_0", "layers_1"):
        for name in ("k_proj", "v_proj"):
            kernel = params[layer]["attention"][name]["kernel"].reshape(32, 2, 1, 8)
            repeated[layer]["attention"][name]["kernel"] = jnp.repeat(kernel, 2, axis=2).reshape(32, 32)
    narrow, wide = captured_of(LLAMA), capture_kv(wide, repeated, WINDOWS)
    for name in ("key_grads", "value_grads"):
        parts = np.asarray(getattr(wide, name)).reshape(2, 2, 2, -1, 8)
        np.testing.assert_allclose(getattr(narrow, name), parts.sum(2), atol=1e-4)


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=lambda config: config.model_type)
def test_passing_all_through_changes_nothing(config):
    params = parameters(config)
    seen = []
    apply = changed_kv(config, lambda layer, part, x: seen.append((layer, part, x.shape)) or x)
    plain = DecoderApply(config)({"params": params}, WINDOWS)
    chex.assert_trees_all_equal(apply({"params": params}, WINDOWS), plain)
    assert sorted(seen) == [(i, part, (3, 2, 12, 8)) for i in (0, 1) for part in ("keys", "values")]
    scanned = dataclasses.replace(config, scan_layers=True, remat=True)
    chex.assert_trees_all_equal(
        changed_kv(scanned, lambda layer, part, x: x)({"params": stack_layers(params)}, WINDOWS), plain
    )


def test_skipped_tokens_are_left_out():
    params = parameters(LLAMA)
    whole, rest = captured_of(LLAMA), capture_kv(LLAMA, params, WINDOWS, batch_size=2, skip=2)
    for name in ("keys", "values", "key_grads", "value_grads"):
        kept = by_window(getattr(whole, name))[:, :, :, 2:]
        np.testing.assert_array_equal(np.asarray(getattr(rest, name)).reshape(2, 2, 3, 10, 8), kept)


def decoded_by_hand(config, params, coders, tokens):
    """Every layer's keys and values replaced from outside, by the function that intercepts them."""

    def change(layer, part, x):
        coder = getattr(coders, part)[layer]
        return coder.decode(coder.encode(x))

    return changed_kv(config, change)({"params": params}, tokens)


def test_coded_model():
    params = parameters(LLAMA)
    captured = captured_of(LLAMA)
    plain = DecoderApply(LLAMA)({"params": params}, WINDOWS)
    fine = fit_layers(IntKV(bits=8, head_dim=8), captured, key=jax.random.key(0))
    coarse = fit_layers(CQ(channels=8, bits=3), captured, key=jax.random.key(0))
    run = jax.jit(lambda p, c, t: apply_coded(LLAMA, p, c, t))
    near, far = (float(jnp.abs(run(params, coders, WINDOWS) - plain).max()) for coders in (fine, coarse))
    assert 0 < near < 0.1 < far
    np.testing.assert_allclose(run(params, coarse, WINDOWS), decoded_by_hand(LLAMA, params, coarse, WINDOWS), atol=1e-4)
    assert coarse.nbytes == 2 * 2 * 2 * 8 * 8 * 2 and coarse.bits_per_channel((1, 2, 8, 8), tables=False) == 1.0


def test_layers_and_tokens_left_alone():
    params = parameters(LLAMA)
    captured = captured_of(LLAMA)
    plain = DecoderApply(LLAMA)({"params": params}, WINDOWS)
    method, key = CQ(channels=8, bits=1), jax.random.key(0)
    none = fit_layers(method, captured, key=key, leave=(0, 1))
    chex.assert_trees_all_equal(apply_coded(LLAMA, params, none, WINDOWS), plain)
    some = fit_layers(method, captured, key=key, exact=4)
    after = apply_coded(LLAMA, params, some, WINDOWS)
    np.testing.assert_allclose(after[:, :4], plain[:, :4], atol=1e-5)
    assert float(jnp.abs(after[:, 5:] - plain[:, 5:]).max()) > 0.1
    with pytest.raises(ConfigError, match=r"leave=\(2,\): the model has layers 0 to 1, not \[2\]"):
        fit_layers(method, captured, key=key, leave=(2,))


def test_rotated_keys_are_coded_as_the_cache_holds_them():
    """KIVI's keys: the decoder with a cache of decoded keys and values gives the same next token."""
    params = parameters(LLAMA)
    method = KIVI(bits=4, head_dim=8, group_size=4, residual=0)
    coders = fit_layers(method, captured_of(LLAMA), key=jax.random.key(0))
    seen = {}

    def change(layer, part, x):
        coder = getattr(coders, part)[layer]
        if part == "values":
            return coder.decode(coder.encode(x))
        positions = jnp.broadcast_to(jnp.arange(12), (3, 12))
        cos, sin = rotary_angles(LLAMA, positions, jnp.full(3, 12))
        turned = rotate(x.swapaxes(1, 2), cos, sin).swapaxes(1, 2)
        seen[layer] = turned
        return rotate(coder.decode(coder.encode(turned)).swapaxes(1, 2), cos, -sin).swapaxes(1, 2)

    by_hand = changed_kv(LLAMA, change)({"params": params}, WINDOWS)
    np.testing.assert_allclose(apply_coded(LLAMA, params, coders, WINDOWS), by_hand, atol=1e-4)
    _, cache = Decoder(LLAMA).apply({"params": params}, WINDOWS, cache=new_cache(LLAMA, batch=3, slots=12))
    np.testing.assert_allclose(seen[0], cache.k[0], atol=1e-5)


def test_refused():
    params = parameters(LLAMA)
    with pytest.raises(CalibrationError, match=r"windows have shape \(3, 1\); give at least one window of at least 2"):
        capture_kv(LLAMA, params, WINDOWS[:, :1])
    with pytest.raises(ConfigError, match="skip=12 leaves no token of windows of 12"):
        capture_kv(LLAMA, params, WINDOWS, skip=12)
    with pytest.raises(ConfigError, match="batch_size=0: use at least 1"):
        capture_kv(LLAMA, params, WINDOWS, batch_size=0)
    broken = jax.tree.map(lambda x: x, params)
    broken["layers_1"]["attention"]["k_proj"]["kernel"] = jnp.full((32, 16), jnp.nan)
    with pytest.raises(CalibrationError, match="keys of layer 1 are not finite; run `effjax verify`"):
        capture_kv(LLAMA, broken, WINDOWS)
    coders = fit_layers(CQ(channels=8, bits=1), captured_of(LLAMA), key=jax.random.key(0))
    longer = dataclasses.replace(LLAMA, num_hidden_layers=3)
    with pytest.raises(ConfigError, match="there are coders for 2 layers, the model has 3; learn them with fit_layers"):
        apply_coded(longer, params, coders, WINDOWS)
