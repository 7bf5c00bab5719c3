"""A decoder whose keys and values are those that their codes stand for: what a coding costs, before any cache."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.kv.capture import Part, changed_kv
from effjax.kv.coders import KVCoders, check_layers
from effjax.models.config import DecoderConfig
from effjax.models.rope import rotary_angles, rotate

PyTree = Any


def apply_coded(
    config: DecoderConfig, params: PyTree, coders: KVCoders, tokens: Int[Array, "batch length"]
) -> Float[Array, "batch length vocab"]:
    """Logits of whole texts, all of whose keys and values were coded and decoded: also those that a prompt reads.

    Raises:
        ConfigError: there is not one coder for each layer.

    Example:
        >>> from effjax.kv.capture import capture_kv
        >>> from effjax.kv.coders import fit_layers
        >>> from effjax.kv.integer import IntKV
        >>> from effjax.models.decoder import Decoder
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> tokens = jnp.arange(24).reshape(3, 8)
        >>> params = Decoder(config).init(jax.random.key(0), tokens)["params"]
        >>> captured = capture_kv(config, params, tokens)
        >>> coders = fit_layers(IntKV(bits=8, head_dim=8), captured, key=jax.random.key(1))
        >>> apply_coded(config, params, coders, tokens).shape
        (3, 8, 256)
    """
    check_layers(coders, config.num_hidden_layers)
    batch, length = tokens.shape
    positions = jax.lax.broadcasted_iota(jnp.int32, (batch, length), 1)
    cos, sin = rotary_angles(config, positions, jnp.full((batch,), length, jnp.int32))

    def turned(x: Array, sin: Array) -> Array:
        return rotate(x.swapaxes(1, 2), cos, sin).swapaxes(1, 2)

    def change(layer: int, part: Part, x: Array) -> Array:
        coder = (coders.keys if part == "keys" else coders.values)[layer]
        if coder is None:
            return x
        y = turned(x, sin) if part == "keys" and coders.rotated else x
        early = jax.lax.broadcasted_iota(jnp.int32, y.shape, 2) < coders.exact
        y = jnp.where(early, y[:, :, coders.exact : coders.exact + 1], y)  # out of ranges that tokens share
        decoded = coder.decode(coder.encode(y)).astype(x.dtype)
        decoded = turned(decoded, -sin) if part == "keys" and coders.rotated else decoded
        return jnp.where(early, x, decoded)

    return changed_kv(config, change)({"params": params}, tokens)
