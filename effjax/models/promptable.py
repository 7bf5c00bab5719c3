"""A promptable segmenter in the manner of SAM: an encoder of images, and a light head that masks what was clicked."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.models.transformer import apply_blocks, dense, init_blocks, init_dense, init_norm, layer_norm
from effjax.models.vit import ViT, apply_vit, init_vit

Params = dict[str, Any]
BANDS = 4  # frequencies that a distance is told by


def init_promptable(key: jax.Array, config: ViT, *, head_layers: int = 1) -> Params:
    """Parameters of the three parts, after Kirillov et al. (Segment Anything, ICCV 2023).

    Args:
        key: of all.
        config: of the encoder.
        head_layers: blocks of the head.

    Returns:
        "encoder"; "prompt", which tells patches where the click was; "mask_head".
    """
    of_encoder, of_prompt, of_blocks, of_out = jax.random.split(key, 4)
    return {
        "encoder": init_vit(of_encoder, config),
        "prompt": init_dense(of_prompt, 4 * BANDS, config.width),
        "mask_head": {
            **init_blocks(of_blocks, config.width, head_layers),
            "norm": init_norm(config.width),
            "out": init_dense(of_out, config.width, config.patch**2),
        },
    }


def encode_clicks(config: ViT, prompt: Params, points: Int[Array, "n 2"], rows: int, columns: int) -> jax.Array:
    """A vector for every patch, made of sines and cosines of how far the click is from it: `[n, rows, columns, width]`.

    Args:
        config: of the encoder.
        prompt: parameters.
        points: row and column of a pixel.
        rows, columns: patches.
    """
    own = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij"), -1) + 0.5
    away = (points[:, None, None] + 0.5) / config.patch - own
    angles = away[..., None] * (jnp.pi / 2 ** jnp.arange(BANDS))
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*angles.shape[:-2], -1)
    return dense(prompt, waves)


def apply_mask_head(
    config: ViT,
    params: Params,
    grid: Float[Array, "batch rows columns width"],
    points: Int[Array, "batch clicks 2"],
) -> Float[Array, "batch clicks height width"]:
    """Scores of every pixel, above zero where it belongs to what was clicked.

    Args:
        config: of the encoder.
        params: "prompt" and "mask_head".
        grid: what the encoder gave; it runs once for all clicks at an image.
        points: row and column of a pixel, for each click.

    Example:
        >>> config = ViT(size=(8, 8), width=8, layers=1, heads=2)
        >>> params = init_promptable(jax.random.key(0), config)
        >>> apply_promptable(config, params, jnp.ones((2, 8, 12, 3)), jnp.ones((2, 5, 2), jnp.int32)).shape
        (2, 5, 8, 12)
    """
    batch, rows, columns, width = grid.shape
    count, head, p = points.shape[1], params["mask_head"], config.patch
    told = encode_clicks(config, params["prompt"], points.reshape(-1, 2), rows, columns)
    x = grid[:, None] + told.reshape(batch, count, rows, columns, width)
    x = apply_blocks(head, x.reshape(batch * count, rows * columns, width), config.heads)
    scores = dense(head["out"], layer_norm(head["norm"], x))
    scores = scores.reshape(batch, count, rows, columns, p, p).swapaxes(3, 4)
    return scores.reshape(batch, count, rows * p, columns * p)


def apply_promptable(
    config: ViT,
    params: Params,
    images: Float[Array, "batch height width channels"],
    points: Int[Array, "batch clicks 2"],
) -> Float[Array, "batch clicks height width"]:
    """Encoder and head; see `apply_mask_head`."""
    return apply_mask_head(config, params, apply_vit(config, params["encoder"], images), points)
