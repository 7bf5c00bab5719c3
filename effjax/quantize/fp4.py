"""Four-bit floats: plain FP4 with a scale a block, NVFP4 with scales on two levels, MXFP4 with powers of two."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.float_values import E2M1, E2M1_MAX, e2m1_codes, float8_max
from effjax.quantize.blocks import Blockwise, Coded, scales_of
from effjax.quantize.checks import check_choice, check_floating

# The FP4 of bitsandbytes by code, with the sign in the highest bit; like NF4 it is scaled by the largest magnitude.
BITSANDBYTES = tuple(sign * x / 12 for sign in (1, -1) for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))

_E4M3_SMALLEST = 2.0**-9  # the smallest positive float8_e4m3fn
_E8M0_RANGE = (-126, 127)  # exponents of float8_e8m0fnu that are normal float32 numbers too


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP4(Blockwise):
    """Four-bit floats scaled by the largest magnitude of a block (QLoRA, Dettmers et al. 2023, compares NF4 with it).

    Attributes:
        block_size: consecutive inputs of a column that share a scale; None is the whole column.
        levels: "e2m1" is 0, 0.5, 1, 1.5, 2, 3, 4, 6 with sign (OCP Microscaling Formats v1.0), "bitsandbytes" the table
            of that package, whose smallest level is 128 times nearer to zero than its second.
        scale_dtype: dtype of the stored scales.

    Example:
        >>> q = FP4(block_size=None).quantize(jnp.array([[6.0], [-3.2], [0.1]]))
        >>> q.materialize().ravel().tolist()
        [6.0, -3.0, 0.0]
    """

    block_size: int | None = 64
    levels: Literal["e2m1", "bitsandbytes"] = "e2m1"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        self.check_block_size()
        check_choice(("e2m1", "bitsandbytes"), levels=self.levels)
        check_floating(scale_dtype=self.scale_dtype)

    def _blocks(self, blocks: jax.Array, largest: jax.Array) -> Coded:
        table, top = (E2M1, E2M1_MAX) if self.levels == "e2m1" else (BITSANDBYTES, 1.0)
        scales = scales_of(largest / top, self.scale_dtype)
        ratios = blocks / scales.astype(jnp.float32)
        codes = e2m1_codes(ratios) if self.levels == "e2m1" else _nearest(ratios, table)
        return codes, table, scales, None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NVFP4(Blockwise):
    """e2m1 in blocks of 16 whose scales are e4m3 floats, relative to one float32 number a matrix (NVIDIA 2025).

    That number puts the scale of the largest block at the top of e4m3: `global_scale = 448 * 6 / max|W|`, and a block
    has the scale `e4m3(max|block| / 6 * global_scale)`. As in compressed-tensors, scales are divided by `global_scale`.

    Attributes:
        block_size: consecutive inputs of a column that share a scale; the format has 16.

    Example:
        >>> q = NVFP4().quantize(jnp.eye(32))
        >>> q.scales.dtype.name, q.scales.shape, float(q.global_scale[0, 0])
        ('float8_e4m3fn', (2, 32), 2688.0)
    """

    block_size: int = 16

    def __post_init__(self) -> None:
        self.check_block_size()

    def _blocks(self, blocks: jax.Array, largest: jax.Array) -> Coded:
        top = float8_max("float8_e4m3fn")
        whole = largest.max((-3, -1), keepdims=True)  # [*L, 1, 1, 1]
        # A matrix of zeros, or one so small that the number would overflow, keeps 1.
        tiny = whole < 4 * top * E2M1_MAX / float(jnp.finfo(jnp.float32).max)
        global_scale = jnp.where(tiny, 1.0, top * E2M1_MAX / jnp.where(tiny, 1.0, whole))
        wanted = largest / E2M1_MAX * global_scale
        scales = jnp.clip(wanted, _E4M3_SMALLEST, top).astype(jnp.float8_e4m3fn)
        codes = e2m1_codes(blocks / (scales.astype(jnp.float32) / global_scale))
        return codes, E2M1, scales, global_scale[..., 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MXFP4(Blockwise):
    """e2m1 in blocks of 32 whose scale is a power of two (OCP Microscaling Formats v1.0, sections 5.2 and 6.3).

    Attributes:
        block_size: consecutive inputs of a column that share a scale; the format has 32.
        exponent: of a block's scale. "floor" is the specification's `floor(log2(max|block|)) - 2`, which saturates what
            lies above 6 times the scale; "ceil" is the smallest power of two that saturates nothing, at a coarser grid.

    Example:
        >>> q = MXFP4().quantize(8 * jnp.eye(32))
        >>> q.scales.dtype.name, float(q.scales[0, 0]), float(q.materialize()[0, 0])
        ('float8_e8m0fnu', 2.0, 8.0)
    """

    block_size: int = 32
    exponent: Literal["floor", "ceil"] = "floor"

    def __post_init__(self) -> None:
        self.check_block_size()
        check_choice(("floor", "ceil"), exponent=self.exponent)

    def _blocks(self, blocks: jax.Array, largest: jax.Array) -> Coded:
        fraction, exponent = jnp.frexp(largest)  # largest = fraction * 2**exponent, fraction in [1/2, 1)
        exponent -= 3
        if self.exponent == "ceil":
            exponent += fraction > E2M1_MAX / 8
        exponent = jnp.where(largest > 0, jnp.clip(exponent, *_E8M0_RANGE), 0)
        scales = jnp.ldexp(jnp.ones_like(largest), exponent)
        return e2m1_codes(blocks / scales), E2M1, scales.astype(jnp.float8_e8m0fnu), None


def _nearest(x: jax.Array, table: tuple[float, ...]) -> jax.Array:
    """Codes of the nearest values of a table in any order; of two equal values the first stands for both."""
    values, codes = np.unique(np.asarray(table, np.float32), return_index=True)
    found = jnp.searchsorted(jnp.asarray((values[1:] + values[:-1]) / 2), x)
    return jnp.asarray(codes.astype(np.uint8))[found]
