"""A vision transformer in plain JAX: patches to tokens, for images of any size that the patches divide."""

import dataclasses
from typing import Any, Literal

import jax
from jaxtyping import Array, Float

from effjax.errors import ConfigError
from effjax.models.cnn import conv, init_conv
from effjax.models.transformer import apply_blocks, dense, init_blocks, init_dense, init_norm, layer_norm

Pooling = Literal["max", "mean"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViT:
    """Sizes of a vision transformer (Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021; no class token).

    Attributes:
        size: height and width that the position embeddings are made for; others resize them.
        patch: side of a patch.
        channels: of an image.
        width: of a token.
        layers: blocks.
        heads: of attention.
        stem: convolutions that halve the sides, in place of one linear map a patch: small models learn faster (Xiao et
            al., Early Convolutions Help Transformers See Better, NeurIPS 2021).

    Raises:
        ConfigError: a patch that does not divide the sides, heads that do not divide the width, or a stem for a patch
            that is no power of 2.
    """

    size: tuple[int, int] = (32, 32)
    patch: int = 4
    channels: int = 3
    width: int = 96
    layers: int = 6
    heads: int = 4
    stem: bool = False

    def __post_init__(self) -> None:
        if min(*self.size, self.patch, self.channels, self.width, self.layers, self.heads) < 1:
            raise ConfigError(f"{self}: all sizes must be positive")
        self.grid(*self.size)
        if self.width % self.heads:
            raise ConfigError(f"width={self.width} does not divide into heads={self.heads}")
        if self.stem and (self.patch & (self.patch - 1) or self.width % self.patch):
            raise ConfigError(f"patch={self.patch}, width={self.width}: a stem needs a power of 2 dividing the width")

    @property
    def stem_widths(self) -> tuple[int, ...]:
        """Channels of the image and behind each convolution of the stem, which doubles them up to the width."""
        count = self.patch.bit_length() - 1
        return (self.channels, *(self.width >> (count - 1 - i) for i in range(count)))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches down and across.

        Raises:
            ConfigError: the patch does not divide the sides.
        """
        if height % self.patch or width % self.patch:
            raise ConfigError(f"images of {height} x {width} and patch={self.patch}: resize to multiples of the patch")
        return height // self.patch, width // self.patch


def init_vit(key: jax.Array, config: ViT) -> dict[str, Any]:
    """Parameters: "stem" where there is one, "patches", "positions" `[rows, columns, width]`, "block_0" and so on,
    "norm".
    """
    of_patches, of_positions, of_blocks = jax.random.split(key, 3)
    positions = 0.1 * jax.random.normal(of_positions, (*config.grid(*config.size), config.width))
    seen, stem = config.patch**2 * config.channels, {}
    if config.stem:
        widths = config.stem_widths
        keys = jax.random.split(of_patches, len(widths))
        pairs = zip(keys, widths, widths[1:], strict=False)
        seen, stem = widths[-1], {"stem": {f"conv_{i}": init_conv(k, n, m) for i, (k, n, m) in enumerate(pairs)}}
    return {
        **stem,
        "patches": init_dense(of_patches, seen, config.width),
        "positions": positions,
        **init_blocks(of_blocks, config.width, config.layers),
        "norm": init_norm(config.width),
    }


def apply_vit(
    config: ViT, params: dict[str, Any], images: Float[Array, "batch height width channels"]
) -> Float[Array, "batch rows columns features"]:
    """The grid of patch tokens behind the last norm.

    Raises:
        ConfigError: images of other channels, or whose sides the patch does not divide.

    Example:
        >>> import jax.numpy as jnp
        >>> config = ViT(size=(16, 16), width=8, layers=1, heads=2)
        >>> params = init_vit(jax.random.key(0), config)
        >>> apply_vit(config, params, jnp.ones((2, 24, 16, 3))).shape  # of another size than the embeddings
        (2, 6, 4, 8)
    """
    batch, height, width, channels = images.shape
    if channels != config.channels:
        raise ConfigError(f"images {list(images.shape)}: the model takes {config.channels} channels, in the last axis")
    rows, columns = config.grid(height, width)
    if config.stem:
        x = images
        for i in range(len(params["stem"])):
            x = jax.nn.relu(conv(params["stem"][f"conv_{i}"], x, stride=2))
    else:
        p = config.patch
        x = images.reshape(batch, rows, p, columns, p, channels).swapaxes(2, 3).reshape(batch, rows, columns, -1)
    x = dense(params["patches"], x) + resize_positions(params["positions"], rows, columns)
    x = apply_blocks(params, x.reshape(batch, rows * columns, -1), config.heads)
    return layer_norm(params["norm"], x).reshape(batch, rows, columns, -1)


def resize_positions(
    positions: Float[Array, "rows columns width"], rows: int, columns: int
) -> Float[Array, "new_rows new_columns width"]:
    """Position embeddings for another grid, bilinear; the same ones for the same grid."""
    if positions.shape[:2] == (rows, columns):
        return positions
    return jax.image.resize(positions, (rows, columns, positions.shape[-1]), "bilinear")


def pool(grid: Float[Array, "*batch rows columns width"], kind: Pooling) -> Float[Array, "*batch width"]:
    """One vector of all patches. With the maximum a feature answers to one place, so patches learn what they show.

    Example:
        >>> import jax.numpy as jnp
        >>> grid = jnp.arange(4.0).reshape(1, 2, 2, 1)
        >>> pool(grid, "max").tolist(), pool(grid, "mean").tolist()
        ([[3.0]], [[1.5]])
    """
    return grid.max((-3, -2)) if kind == "max" else grid.mean((-3, -2))
