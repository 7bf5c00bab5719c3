"""Rotary positions (RoPE, half-split): frequencies with the scalings found on disk, and the rotation itself.

Sources: Su et al., RoFormer (2021); for the scalings `linear` (Chen et al., 2023), `dynamic` (NTK-aware, with growing
text) and `llama3` (Llama 3.1), whose definitions in `transformers` are followed to the rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.models.config import DecoderConfig


def frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians a position for each pair, float32 [head_dim / 2]; for `dynamic`, those of a text that still fits.

    All 0 where positions are learned (OPT): nothing is turned.
    """
    if config.is_opt:
        return np.zeros(config.head_dim // 2, np.float32)
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    freqs = (1.0 / np.float32(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "dynamic":
        return freqs
    if scaling.rope_type == "linear":
        return freqs / np.float32(scaling.factor)
    low, high, original = (
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )
    assert low is not None and high is not None and original is not None  # RopeScaling checked it
    turns = original * freqs / (2 * np.pi)  # full turns within the original length
    ramp = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - ramp) * freqs / scaling.factor + ramp * freqs).astype(np.float32)


def rotary_angles(
    config: DecoderConfig, positions: Int[Array, "batch length"], ends: Int[Array, " batch"]
) -> tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]:
    """Cosine and sine of every pair's angle at `positions`, float32.

    With `dynamic` scaling the base depends on the length of each row's text up to now (`ends`, without padding), so
    keys that a cache took in earlier keep the base of their time, as in `transformers`.
    """
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "dynamic":
        limit = config.max_position_embeddings
        seen = jnp.maximum(ends, limit).astype(jnp.float32)
        stretch = scaling.factor * seen / limit - (scaling.factor - 1)
        dim = config.head_dim
        base = config.rope_theta * stretch ** (dim / (dim - 2))
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        freqs = 1.0 / base[:, None] ** exponents[None, :]
    else:
        freqs = jnp.asarray(frequencies(config))[None, :]
    angles = positions.astype(jnp.float32)[:, :, None] * freqs[:, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch length heads head_dim"],
    cos: Float[Array, "batch length half"],
    sin: Float[Array, "batch length half"],
) -> Float[Array, "batch length heads head_dim"]:
    """Turns the pairs `(x[i], x[i + head_dim / 2])` by their angles, in float32; the dtype of `x` is kept."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jax.lax.concatenate([first * cos - second * sin, second * cos + first * sin], 3).astype(x.dtype)
