"""The values of 4-bit and 8-bit floats by their codes, as tables for `Codebook`, and rounding to those codes."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

Float8 = Literal["float8_e4m3fn", "float8_e5m2"]

# e2m1 (OCP Microscaling Formats v1.0, section 5.3.3): code = sign << 3 | index of the magnitude.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_MAX = 6.0


def e2m1_codes(x: Float[Array, "*any"]) -> UInt8[Array, "*any"]:
    """Codes of the nearest e2m1 value, ties to the even code, saturating; what rounds to zero has code 0.

    Example:
        >>> e2m1_codes(jnp.array([0.25, 0.75, -2.5, 100.0])).tolist()
        [0, 2, 12, 7]
    """
    size = jnp.abs(x)
    index = jnp.zeros(x.shape, jnp.uint8)
    for lower, (below, above) in enumerate(zip(E2M1[:7], E2M1[1:8], strict=True)):
        middle = (below + above) / 2
        passed = size > middle if lower % 2 == 0 else size >= middle
        index += passed.astype(jnp.uint8)
    return jnp.where((x < 0) & (index > 0), index + 8, index).astype(jnp.uint8)


def float8_max(kind: Float8) -> float:
    """The largest finite value: 448 for e4m3, 57344 for e5m2."""
    return float(jnp.finfo(kind).max)


def float8_table(kind: Float8) -> np.ndarray:
    """The values of all 256 codes, `float32[256]`; codes of NaN and infinity hold 0, so that a table is finite.

    Example:
        >>> float8_table("float8_e4m3fn")[[0x00, 0x38, 0x7E, 0x7F, 0xB8]].tolist()
        [0.0, 1.0, 448.0, 0.0, -1.0]
    """
    values = np.arange(256, dtype=np.uint8).view(jnp.dtype(kind)).astype(np.float32)
    return np.where(np.isfinite(values), values, np.float32(0))


def float8_codes(x: Float[Array, "*any"], kind: Float8) -> UInt8[Array, "*any"]:
    """Codes of the nearest float8, ties to even, saturating at the largest finite value.

    Example:
        >>> float8_codes(jnp.array([1.0, -1.0, 1e9]), "float8_e4m3fn").tolist()
        [56, 184, 126]
    """
    top = float8_max(kind)
    return jax.lax.bitcast_convert_type(jnp.clip(x, -top, top).astype(kind), jnp.uint8)
