"""Deja Vu on the decoder: taps and masks against the model's own modules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from effjax.models.decoder import Block, Decoder, DecoderApply, new_cache
from effjax.sparsity import apply_contextual, decoder_taps, relufy
from effjax.sparsity.decoder import down_norms
from effjax.sparsity.neurons import active_neurons, changed_neurons
from tests.models.small import SMALL

CONFIGS = {
    "silu": SMALL,
    "relu": relufy(SMALL, stage=2, shift=0.1),
    "opt": dataclasses.replace(SMALL, model_type="opt", qkv_bias=True, num_key_value_heads=4, hidden_act="relu"),
}
TOKENS = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 7))


def parameters(config):
    return jax.tree.map(lambda x: 3 * x, jax.jit(Decoder(config).init)(jax.random.key(1), TOKENS)["params"])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tap_is_what_enters_the_block_and_its_down_projection(name):
    config, params = CONFIGS[name], parameters(CONFIGS[name])
    _, state = Decoder(config).apply(
        {"params": params}, TOKENS, capture_intermediates=lambda m, _: isinstance(m, Block), mutable="intermediates"
    )
    outputs = [state["intermediates"][f"layers_{i}"]["__call__"][0][0][0] for i in range(2)]
    seen = []

    def see(call, args, kwargs, context):
        if context.module.name == "down_proj":
            seen.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(see):
        Decoder(config).apply({"params": params}, TOKENS)
    first, second = decoder_taps(config)(params, TOKENS)
    np.testing.assert_array_equal(second.query, outputs[0])
    embedded = params["embed"]["embedding"][TOKENS]
    if name == "opt":
        embedded = embedded + params["embed"]["positions"][2:9]
    np.testing.assert_allclose(first.query, embedded, atol=1e-6)
    for tap, h in zip((first, second), seen, strict=True):
        np.testing.assert_array_equal(tap.activation, h)


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_token_has_the_neurons_of_best_score(lookahead):
    config, params = CONFIGS["relu"], parameters(CONFIGS["relu"])
    w = [jax.random.normal(jax.random.key(i), (32, 48)) for i in range(2)]
    k = (5, None)
    scores = [lambda query, w=w[i]: query @ w for i in range(2)]
    logits = apply_contextual(config, scores, k, lookahead=lookahead)({"params": params}, TOKENS)
    query = np.asarray(params["embed"]["embedding"][TOKENS])  # of the first layer, looking ahead or not
    found = query @ np.asarray(w[0])
    kept = np.argsort(np.argsort(-found, axis=-1), axis=-1) < 5
    masked = changed_neurons(config, lambda layer, h: jnp.where(kept, h, 0) if layer == 0 else h)
    np.testing.assert_allclose(logits, masked({"params": params}, TOKENS), atol=1e-5)


def test_looking_ahead_reads_the_block_before():
    config, params = CONFIGS["relu"], parameters(CONFIGS["relu"])
    seen = []

    def score(query):
        seen.append(query)
        return query @ jnp.ones((32, 48))

    for lookahead in (False, True):
        apply_contextual(config, [score, score], 5, lookahead=lookahead)({"params": params}, TOKENS)
    first = params["embed"]["embedding"][TOKENS]
    assert [bool(np.array_equal(query, first)) for query in seen] == [True, False, True, True]


def test_all_neurons_are_the_dense_model_with_a_cache_too():
    config, params = CONFIGS["silu"], parameters(CONFIGS["silu"])
    scores = [lambda query: query @ jnp.ones((32, 48))] * 2
    apply = apply_contextual(config, scores, 48)
    caches = [new_cache(config, batch=2, slots=8, split=True) for _ in range(2)]
    found, _ = apply({"params": params}, TOKENS, cache=caches[0])
    expected, _ = DecoderApply(config)({"params": params}, TOKENS, cache=caches[1])
    np.testing.assert_array_equal(found, expected)


def test_lengths_of_rows_and_active_neurons():
    config, params = CONFIGS["opt"], parameters(CONFIGS["opt"])
    for i, norms in enumerate(down_norms(config, params)):
        kernel = np.asarray(params[f"layers_{i}"]["mlp"]["down_proj"]["kernel"])
        np.testing.assert_allclose(norms, [np.sqrt((row**2).sum()) for row in kernel], rtol=1e-5)
    taps = decoder_taps(config)(params, TOKENS)
    np.testing.assert_array_equal(active_neurons(config, params, TOKENS)[1], taps[1].activation != 0)
