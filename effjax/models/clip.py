"""CLIP in plain JAX: a tower for images, one for texts, and how close the two are (Radford et al., ICML 2021)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import ConfigError
from effjax.models.transformer import apply_blocks, dense, init_blocks, init_dense, init_norm, layer_norm, unit
from effjax.models.vit import Pooling, ViT, apply_vit, init_vit, pool

Params = dict[str, Any]
MAX_LOG_SCALE = math.log(100)  # as in the paper: larger scales are not stable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """Sizes of both towers.

    Attributes:
        image: the tower of images.
        pooling: of its patches.
        vocab: words; word 0 fills up short texts and is not looked at.
        length: words of a text.
        width: of a word.
        layers: blocks of the tower of texts.
        heads: of their attention.
        dim: of the space that both towers meet in.

    Raises:
        ConfigError: heads that do not divide the width, or a size below 1.
    """

    image: ViT = dataclasses.field(default_factory=ViT)
    pooling: Pooling = "mean"
    vocab: int = 40
    length: int = 12
    width: int = 64
    layers: int = 2
    heads: int = 4
    dim: int = 64

    def __post_init__(self) -> None:
        if min(self.vocab, self.length, self.width, self.layers, self.heads, self.dim) < 1 or self.width % self.heads:
            raise ConfigError(f"{self}: sizes must be positive, and heads divide the width")


def init_clip(key: jax.Array, config: Clip) -> Params:
    """Parameters: "image", "text", and the logarithm of the scale, `ln(1 / 0.07)` at first."""
    of_vit, of_image, of_words, of_blocks, of_text = jax.random.split(key, 5)
    return {
        "image": {"vit": init_vit(of_vit, config.image), "out": init_dense(of_image, config.image.width, config.dim)},
        "text": {
            "words": {"embedding": jax.random.normal(of_words, (config.vocab, config.width))},
            "positions": jnp.zeros((config.length, config.width)),
            **init_blocks(of_blocks, config.width, config.layers),
            "norm": init_norm(config.width),
            "out": init_dense(of_text, config.width, config.dim),
        },
        "log_scale": jnp.asarray(math.log(1 / 0.07)),
    }


def encode_image(
    config: Clip, params: Params, images: Float[Array, "batch height width channels"]
) -> tuple[Float[Array, "batch dim"], Float[Array, "batch rows columns features"]]:
    """Embeddings of length 1, and the grid of patch features that they are pooled from.

    Raises:
        ConfigError: images that do not fit; see `effjax.models.vit.apply_vit`.

    Example:
        >>> config = Clip(image=ViT(size=(8, 8), width=8, layers=1, heads=2), width=8, heads=2, dim=4)
        >>> params = init_clip(jax.random.key(0), config)
        >>> u, grid = encode_image(config, params, jnp.ones((3, 8, 8, 3)))
        >>> v = encode_text(config, params, jnp.array([[1, 2] + 10 * [0]] * 3))
        >>> u.shape, grid.shape, v.shape, round(float(scale(params)), 2)
        ((3, 4), (3, 2, 2, 8), (3, 4), 14.29)
    """
    grid = apply_vit(config.image, params["image"]["vit"], images)
    return unit(dense(params["image"]["out"], pool(grid, config.pooling))), grid


def encode_text(config: Clip, params: Params, words: Int[Array, "batch length"]) -> Float[Array, "batch dim"]:
    """Embeddings of length 1.

    Raises:
        ConfigError: texts of another length.
    """
    if words.shape[1] != config.length:
        raise ConfigError(f"texts {list(words.shape)}: fill them up with 0 to {config.length} words")
    text, seen = params["text"], words > 0
    x = text["words"]["embedding"][words] + text["positions"]
    x = layer_norm(text["norm"], apply_blocks(text, x, config.heads, seen))
    weights = seen / jnp.maximum(seen.sum(-1, keepdims=True), 1)
    pooled = (x * weights[..., None].astype(x.dtype)).sum(-2)
    return unit(dense(text["out"], pooled))


def scale(params: Params) -> Float[Array, ""]:
    """What cosines are multiplied by, at most 100."""
    return jnp.exp(jnp.minimum(params["log_scale"].astype(jnp.float32), MAX_LOG_SCALE))
