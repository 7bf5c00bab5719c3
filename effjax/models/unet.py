"""A small U-Net in plain JAX, with an output a pixel: what labels images in experiments (Ronneberger et al., 2015)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import ConfigError
from effjax.models.cnn import conv, init_conv


def init_unet(key: jax.Array, channels: int, outputs: int, widths: Sequence[int] = (12, 24, 32)) -> dict[str, Any]:
    """3 x 3 convolutions, He-normal: one a width on the way down, one on the way up, and a linear output.

    Example:
        >>> params = init_unet(jax.random.key(0), 3, 5)
        >>> apply_unet(params, jnp.ones((2, 8, 12, 3))).shape
        (2, 8, 12, 5)
    """
    ways = {f"down_{i}": pair for i, pair in enumerate(zip((channels, *widths), widths, strict=False))}
    ways |= {f"up_{i}": (n + m, n) for i, (n, m) in enumerate(zip(widths, widths[1:], strict=False))}
    params: dict[str, Any] = {
        name: init_conv(k, n, m)
        for (name, (n, m)), k in zip(ways.items(), jax.random.split(key, len(ways)), strict=True)
    }
    return params | {"out": init_conv(jax.random.fold_in(key, 1), widths[0], outputs, size=1)}


def apply_unet(
    params: dict[str, Any], images: Float[Array, "batch height width channels"]
) -> Float[Array, "batch height width outputs"]:
    """Halves the sides at every width but the first, and comes back up beside what it saw on the way down.

    Raises:
        ConfigError: sides that cannot be halved so often.
    """
    levels = sum(name.startswith("down_") for name in params)
    if any(side % 2 ** (levels - 1) for side in images.shape[1:3]):
        raise ConfigError(f"images {list(images.shape)}: sides must be multiples of {2 ** (levels - 1)}")
    x, seen = images, []
    for i in range(levels):
        x = jax.nn.relu(conv(params[f"down_{i}"], x, 1 if i == 0 else 2))
        seen.append(x)
    for i in reversed(range(levels - 1)):
        x = jnp.concatenate([seen[i], x.repeat(2, 1).repeat(2, 2)], -1)
        x = jax.nn.relu(conv(params[f"up_{i}"], x))
    return conv(params["out"], x)
