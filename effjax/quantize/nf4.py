"""NF4: 16 levels at the quantiles of a normal distribution, scaled by the largest magnitude of a block."""

import dataclasses

import jax
import jax.numpy as jnp

from effjax.quantize.blocks import Blockwise, Coded, scales_of
from effjax.quantize.checks import check_floating, check_size

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
class NF4(Blockwise):
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
        check_size("a positive number, or None for the whole column", block_size=self.block_size)
        check_floating(scale_dtype=self.scale_dtype)

    def _blocks(self, blocks: jax.Array, largest: jax.Array) -> Coded:
        scales = scales_of(largest, self.scale_dtype)
        levels = jnp.asarray(LEVELS, jnp.float32)
        codes = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, blocks / scales.astype(jnp.float32))
        return codes, LEVELS, scales, None
