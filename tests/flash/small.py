"""Decoders small enough to compile in a moment, with ReLUs that leave most neurons at rest, and their predictors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from effjax.sparsity.predictor import init_predictor

OPT = DecoderConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=70,
    num_hidden_layers=2,
    num_attention_heads=2,
    model_type="opt",
    max_position_embeddings=64,
    tie_word_embeddings=True,
    relu_shift=0.6,
)
LLAMA = dataclasses.replace(
    OPT, model_type="llama", hidden_act="relu", tie_word_embeddings=False, mlp_bias=True, relu_shift=0.4
)


def make(config, seed=0):
    """Parameters with biases that are not zero."""
    tokens = jnp.zeros((1, 3), jnp.int32)
    params = jax.jit(Decoder(config).init)(jax.random.key(seed), tokens)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)


def predictors(config, seed=1):
    keys = jax.random.split(jax.random.key(seed), config.num_hidden_layers)
    return [init_predictor(key, config.hidden_size, 6, config.intermediate_size) for key in keys]
