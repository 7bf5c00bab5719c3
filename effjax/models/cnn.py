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
    if stride == 2 and layer["kernel"].shape[:2] == (3, 3):
        return _patches(x) @ layer["kernel"].reshape(-1, layer["bias"].size) + layer["bias"]
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


def cnn_map(params: dict[str, Any], images: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w d"]:
    """What the last convolution gives; each halves the sides."""
    x = images
    for i in range(len(params) - 1):
        x = jax.nn.relu(conv(params[f"conv_{i}"], x, stride=2))
    return x


def cnn_features(
    params: dict[str, Any], images: Float[Array, "batch height width channels"]
) -> Float[Array, "batch d"]:
    """The mean over what is left of height and width: an embedding of each image."""
    return cnn_map(params, images).mean((1, 2))


def apply_cnn(
    params: dict[str, Any], images: Float[Array, "batch height width channels"]
) -> Float[Array, "batch labels"]:
    """Logits: the head reads the embedding."""
    return cnn_features(params, images) @ params["head"]["kernel"] + params["head"]["bias"]


def _patches(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w patch"]:
    """Every second 3 x 3 patch, zeros around the image as "SAME" has them.

    A product with them is the convolution. On a CPU its gradient is 9 times faster than that of a convolution with
    strides, for which XLA has only a plain loop.
    """
    sizes = [-(-side // 2) for side in x.shape[1:3]]
    around = [max(2 * size - 1 + 2 - side, 0) for size, side in zip(sizes, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in around), (0, 0)))
    h, w = (2 * size - 1 for size in sizes)
    return jnp.concatenate([x[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)], axis=-1)
