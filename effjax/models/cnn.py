"""A small convolutional network in plain JAX for images of any size: what samplers and sizes are tried on."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def init_conv(key: jax.Array, n: int, m: int, size: int = 3) -> dict[str, Any]:
    """A He-normal kernel `[size, size, n, m]` and a bias of zeros."""
    return {"kernel": jax.random.normal(key, (size, size, n, m)) * (2 / (size**2 * n)) ** 0.5, "bias": jnp.zeros(m)}


def conv(layer: dict[str, Any], x: Float[Array, "batch height width n"], stride: int = 1) -> jax.Array:
    """A convolution that keeps the sides, or divides them by the stride: `[batch, rows, columns, m]`."""
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, layer["kernel"], (stride, stride), "SAME", dimension_numbers=numbers)
    return x + layer["bias"]


def init_cnn(key: jax.Array, channels: int, labels: int, widths: Sequence[int] = (16, 32, 64)) -> dict[str, Any]:
    """3 x 3 convolutions from width to width, He-normal, and a linear head.

    Example:
        >>> params = init_cnn(jax.random.key(0), 3, 10)
        >>> apply_cnn(params, jnp.ones((2, 20, 24, 3))).shape
        (2, 10)
    """
    sizes = (channels, *widths)
    keys = jax.random.split(key, len(sizes))
    params: dict[str, Any] = {
        f"conv_{i}": init_conv(k, n, m) for i, (k, n, m) in enumerate(zip(keys, sizes, sizes[1:], strict=False))
    }
    head = jax.random.normal(keys[-1], (sizes[-1], labels)) * sizes[-1] ** -0.5
    return params | {"head": {"kernel": head, "bias": jnp.zeros(labels)}}


def apply_cnn(
    params: dict[str, Any], images: Float[Array, "batch height width channels"]
) -> Float[Array, "batch labels"]:
    """Logits: each convolution halves the sides, the head reads the mean over what is left."""
    x = images
    for i in range(len(params) - 1):
        x = jax.nn.relu(conv(params[f"conv_{i}"], x, stride=2))
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
