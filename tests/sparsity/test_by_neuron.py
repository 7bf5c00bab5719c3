"""Decoders laid out by neuron: the same logits, the neurons that were used, and generation that reuses them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.errors import ConfigError
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder, DecoderApply, new_cache
from effjax.models.generate import generate
from effjax.models.speculative import Model, generate_speculative
from effjax.sparsity.by_neuron import by_neuron, chosen_apply, neuron_apply, used_apply
from effjax.sparsity.generate_reusing import generate_reusing
from effjax.sparsity.neurons import active_neurons, changed_neurons, gate_inputs
from tests.models.small import SMALL

RELU = dataclasses.replace(SMALL, hidden_act="relu", relu_shift=0.5)
OPT = DecoderConfig(
    model_type="opt",
    vocab_size=40,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
BIASED = dataclasses.replace(RELU, mlp_bias=True)
CONFIGS = {
    "silu": SMALL,
    "relu": RELU,
    "biased": BIASED,
    "scanned": dataclasses.replace(RELU, scan_layers=True),
    "opt": OPT,
    "widths": dataclasses.replace(RELU, intermediate_size=(48, 32)),
}
LONGEST = 24
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 7), np.int32)


def init(config):
    tree = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.asarray(TOKENS))["params"]
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), tree)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_decoder(name):
    config = CONFIGS[name]
    params = init(config)
    want = DecoderApply(config)({"params": params}, TOKENS)
    laid = by_neuron(config, params)
    np.testing.assert_allclose(neuron_apply(config)({"params": laid}, TOKENS), want, rtol=1e-4, atol=1e-4)
    got, used = used_apply(config)({"params": laid}, TOKENS)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    if name == "widths":
        assert used.shape == (2, 48) and used[1, :32].any() and not used[1, 32:].any()
        return
    np.testing.assert_array_equal(used, active_neurons(config, params, jnp.asarray(TOKENS)).any((1, 2)))


def test_quantized_kernels_keep_their_codes():
    # Rows of codes are whole runs of 32, which 48 neurons are not.
    config = dataclasses.replace(RELU, intermediate_size=64)
    params = init(config)
    small = ej.quantize_params(params, ej.quantize.RTN(bits=8, group_size=None), where="*/mlp/*")
    laid = by_neuron(config, small)
    assert laid["layers_0"]["mlp"].up.bits == 8
    want = ej.lift(DecoderApply(config))({"params": small}, TOKENS)
    np.testing.assert_allclose(neuron_apply(config)({"params": laid}, TOKENS), want, rtol=1e-3, atol=1e-3)


def prepare(config, batch=2, slots=40):
    params = init(config)
    return params, by_neuron(config, params), new_cache(config, batch=batch, slots=slots, split=not config.scan_layers)


@pytest.mark.parametrize("name", ["scanned", "opt"])
def test_generation_writes_the_same(name):
    config = CONFIGS[name]
    params, laid, cache = prepare(config)
    prompts, lengths = jnp.asarray(TOKENS), jnp.array([7, 3])
    want, _ = generate(DecoderApply(config), params, cache, prompts, lengths, max_new_tokens=10)
    apply = neuron_apply(config)
    got, _ = generate(apply, laid, cache, prompts, lengths, max_new_tokens=10)
    np.testing.assert_array_equal(got, want)
    drafts = Model(DecoderApply(config), params, cache)
    found = generate_speculative(Model(apply, laid, cache), drafts, prompts, lengths, draft_tokens=3, max_new_tokens=10)
    np.testing.assert_array_equal(found.tokens, want)
    assert found.passes.max() < 6


def reusing_by_hand(config, params, prompts, lengths, gamma, new):
    """Token by token over whole texts: masks of every layer and row, unions by sets."""
    rows = [prompts[b, : lengths[b]].tolist() for b in range(len(prompts))]

    def step(allowed):
        """The likeliest next tokens, and the neurons that the last tokens used."""
        texts = np.zeros((len(rows), LONGEST), np.int32)
        last = [len(row) - 1 for row in rows]
        for b, row in enumerate(rows):
            texts[b, : len(row)] = row
            history[:, b, last[b]] = allowed  # and stays: the token's keys and values came of it
        logits, seen = masked(texts, history)
        used = np.asarray(seen)[:, range(len(rows)), last].any(1)
        return [int(jnp.argmax(logits[b, at])) for b, at in enumerate(last)], used

    @jax.jit
    def masked(texts, history):
        seen = []

        def change(layer, h):
            seen.append(h * history[layer] != 0)
            return h * history[layer]

        return changed_neurons(config, change)({"params": params}, texts), jnp.stack(seen)

    layers, neurons = config.num_hidden_layers, config.intermediate_size
    history = np.ones((layers, len(rows), LONGEST, neurons), np.float32)
    every, none = np.ones((layers, neurons), bool), np.zeros((layers, neurons), bool)
    written, shares, allowed = [], [], every
    tokens, _ = step(every)
    union = none
    for n in range(new):
        written.append(tokens)
        if n == new - 1:
            break
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        loads = n // gamma % 2 == 0
        if n % gamma == 0:
            allowed = every if loads else union
            if loads:
                union = none
            else:
                shares.append(union.mean(-1))
        tokens, used = step(allowed)
        if loads:
            union = union | used
    return np.array(written).T, np.mean(shares, axis=0)


@pytest.mark.parametrize(("name", "gamma"), [("relu", 1), ("opt", 1), ("relu", 3)])
def test_every_second_block_reads_the_neurons_of_the_one_before(name, gamma):
    config = CONFIGS[name]
    params, laid, cache = prepare(config)
    lengths = np.array([7, 3])
    want, shares = reusing_by_hand(config, params, TOKENS, lengths, gamma, 12)
    found = generate_reusing(
        config, laid, cache, jnp.asarray(TOKENS), jnp.asarray(lengths), gamma=gamma, max_new_tokens=12
    )
    np.testing.assert_array_equal(found.tokens, want)
    np.testing.assert_allclose(found.share, shares, rtol=1e-5)
    free, _ = generate(neuron_apply(config), laid, cache, jnp.asarray(TOKENS), jnp.asarray(lengths), max_new_tokens=12)
    assert (np.asarray(free) != want).any()  # or the test above shows nothing


def test_neurons_by_number():
    params, laid, _ = prepare(RELU)
    width = RELU.intermediate_size
    chosen = jnp.tile(jnp.arange(width)[::-1], (RELU.num_hidden_layers, 1)).astype(jnp.int32)
    counts = jnp.full(RELU.num_hidden_layers, width // 2)
    got = chosen_apply(RELU)({"params": laid}, TOKENS, chosen=(chosen, counts))
    half = changed_neurons(RELU, lambda layer, h: h.at[..., : width - width // 2].set(0))
    np.testing.assert_allclose(got, half({"params": params}, jnp.asarray(TOKENS)), rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_named():
    params, laid, cache = prepare(RELU)
    prompts, lengths = jnp.asarray(TOKENS), jnp.array([7, 3])
    with pytest.raises(ConfigError, match="gamma=0: must be at least 1"):
        generate_reusing(RELU, laid, cache, prompts, lengths, gamma=0, max_new_tokens=2)
    with pytest.raises(ConfigError, match="hidden_act 'silu' has no neurons at rest"):
        generate_reusing(SMALL, laid, cache, prompts, lengths, gamma=2, max_new_tokens=2)
    with pytest.raises(ConfigError, match="the cache has 40 slots"):
        generate_reusing(RELU, laid, cache, prompts, lengths, gamma=2, max_new_tokens=40)


@pytest.mark.parametrize("name", ["silu", "relu", "opt"])
def test_what_activations_are_applied_to(name):
    config = CONFIGS[name]
    params = init(config)
    gates = gate_inputs(config, params, jnp.asarray(TOKENS))
    shifted = gates - config.relu_shift
    if name == "silu":
        assert gates.shape == (2, 2, 7, config.intermediate_size) and (gates < 0).any()
    else:
        np.testing.assert_array_equal(shifted > 0, active_neurons(config, params, jnp.asarray(TOKENS)))
