"""What the float formats share that scale a block of inputs by its largest magnitude."""

from abc import abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.codebook import Codebook
from effjax.quantize.checks import check_groups, check_size
from effjax.quantize.uniform import grouped
from effjax.transform import Method

# Codes, the 16 values they stand for, scales [*L, blocks, 1, out], and a scale [*L, 1, 1] of the whole or None.
Coded = tuple[jax.Array, tuple[float, ...], jax.Array, jax.Array | None]


class Blockwise(Method):
    """A method without data whose scales are one a block of consecutive inputs; subclasses declare the field.

    Attributes:
        block_size: consecutive inputs of a column that share a scale; None is the whole column.
    """

    block_size: int | None

    def check(self, shape: tuple[int, ...]) -> None:
        check_groups(shape, self.block_size)

    def compress(self, w: jax.Array, *, stats: Any = None, key: Any = None) -> Codebook:
        return self.quantize(w)

    def quantize(self, w: Float[Array, "*L in out"]) -> Codebook:
        """Quantizes one weight.

        Raises:
            LeafError: the block size does not divide the inputs.
        """
        self.check(w.shape)
        blocks = grouped(w.astype(jnp.float32), self.block_size)
        codes, table, scales, global_scale = self._blocks(blocks, jnp.abs(blocks).max(-2, keepdims=True))
        tables = jnp.broadcast_to(jnp.asarray(table, jnp.float32), (*w.shape[:-2], 1, 1, 16))
        return Codebook.from_codes(
            codes.reshape(w.shape), tables, scales[..., 0, :], dtype=w.dtype, global_scale=global_scale
        )

    def check_block_size(self) -> None:
        """Raises ValueError for a block size that no matrix could have."""
        check_size("a positive number of inputs that share a scale", block_size=self.block_size)

    @abstractmethod
    def _blocks(self, blocks: Float[Array, "*L blocks size out"], largest: Float[Array, "*L blocks 1 out"]) -> Coded:
        """The codes of blocks with their largest magnitudes, and what they mean."""


def scales_of(wanted: jax.Array, dtype: str) -> jax.Array:
    """Scales as they are stored; a block of zeros gets 1."""
    scales = wanted.astype(dtype)
    return jnp.where(scales > 0, scales, jnp.ones_like(scales))
