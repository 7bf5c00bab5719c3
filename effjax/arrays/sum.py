"""A weight as the sum of parts: quantized plus low rank, a base plus an adapter."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.base import CompressedArray, Spec, register


@register
class Sum(CompressedArray):
    """`W = parts[0] + parts[1] + ...`; each part is a compressed array of the same shape.

    Attributes:
        parts: compressed arrays `[*L, in, out]` of one dtype.
    """

    parts: tuple[CompressedArray, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.parts[0].dtype

    def astype(self, dtype: Any) -> "Sum":
        return self.replace(parts=tuple(part.astype(dtype) for part in self.parts))

    def materialize(self) -> jax.Array:
        total = sum(part.materialize().astype(jnp.float32) for part in self.parts)
        return jnp.asarray(total).astype(self.dtype)

    def rows(self, block: jax.Array | int, size: int) -> jax.Array | None:
        tiles = [part.rows(block, size) for part in self.parts]
        if any(tile is None for tile in tiles):
            return None
        return jnp.asarray(sum(tile.astype(jnp.float32) for tile in tiles)).astype(self.dtype)  # type: ignore[union-attr]

    @property
    def row_multiple(self) -> int:
        return math.lcm(*(part.row_multiple for part in self.parts))

    def columns(self, ids: jax.Array) -> "Sum | None":
        parts = [part.columns(ids) for part in self.parts]
        return None if None in parts else self.replace(parts=tuple(parts))

    def logical_spec(self) -> Spec:
        return self.parts[0].logical_spec()

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        return {"parts": tuple(part.replace(**part.field_specs(spec)) for part in self.parts)}
