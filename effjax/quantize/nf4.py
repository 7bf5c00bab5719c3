"""NF4: 16 levels at the quantiles of a normal distribution, scaled by the largest magnitude of a block."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.codebook import Codebook
from effjax.quantize.rtn import check_groups, grouped
from effjax.transform import Method

# The levels of QLoRA (Dettmers et al. 2023), as bitsandbytes stores them.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4(Method):
    """Four-bit NormalFloat (QLoRA, Dettmers et al. 2023, section 3).

    Attributes:
        block_size: consecutive inputs of a column that share a scale; None is the whole column. (bitsandbytes takes
            blocks of the flattened torch weight, which are runs of inputs too.)
        scale_dtype: dtype of the stored scales.
    """

    by_column = True

    block_size: int | None = 64
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}: a positive number, or None for the whole column")
        if not jnp.issubdtype(jnp.dtype(self.scale_dtype), jnp.floating):
            raise ValueError(f"scale_dtype={self.scale_dtype!r} is no floating dtype")

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
        scales = jnp.abs(blocks).max(-2, keepdims=True).astype(self.scale_dtype).astype(jnp.float32)
        scales = jnp.where(scales > 0, scales, 1.0)
        levels = jnp.asarray(LEVELS, jnp.float32)
        middles = (levels[1:] + levels[:-1]) / 2
        codes = jnp.searchsorted(middles, blocks / scales)
        tables = jnp.broadcast_to(levels, (*w.shape[:-2], 1, 1, 16))
        return Codebook.from_codes(
            codes.reshape(w.shape), tables, scales[..., 0, :].astype(self.scale_dtype), dtype=w.dtype
        )
