"""FP8: eight-bit floats with a scale for each output."""

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.codebook import Codebook
from effjax.arrays.float_values import Float8, float8_codes, float8_max, float8_table
from effjax.quantize.blocks import scales_of
from effjax.quantize.checks import check_floating
from effjax.transform import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8(Method):
    """Eight-bit floats (Micikevicius et al. 2022), one scale a column: `scale = max|w| / max float8`.

    Attributes:
        kind: "float8_e4m3fn" has 3 bits of mantissa and reaches 448, "float8_e5m2" 2 bits and 57344.
        scale_dtype: dtype of the stored scales; codes are rounded with the stored scale.

    Example:
        >>> q = FP8().quantize(jnp.array([[448.0], [-1.0], [0.07]]))
        >>> q.materialize().ravel().tolist(), q.bits
        ([448.0, -1.0, 0.0703125], 8)
    """

    kind: Float8 = "float8_e4m3fn"
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Float8):
            raise ValueError(f"kind={self.kind!r}: choose of {get_args(Float8)}")
        check_floating(scale_dtype=self.scale_dtype)

    def compress(self, w: jax.Array, *, stats: Any = None, key: Any = None) -> Codebook:
        return self.quantize(w)

    def quantize(self, w: Float[Array, "*L in out"]) -> Codebook:
        """Quantizes one weight."""
        x = w.astype(jnp.float32)
        scales = scales_of(jnp.abs(x).max(-2, keepdims=True) / float8_max(self.kind), self.scale_dtype)
        codes = float8_codes(x / scales.astype(jnp.float32), self.kind)
        tables = jnp.broadcast_to(jnp.asarray(float8_table(self.kind)), (*w.shape[:-2], 1, 1, 256))
        return Codebook.from_codes(codes, tables, scales, dtype=w.dtype)
