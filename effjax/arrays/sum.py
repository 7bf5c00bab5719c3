"""A weight as the sum of parts: quantized plus low rank, a base plus an adapter."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

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

    def columns(self, ids: jax.Array) -> "Sum | None":
        parts = [part.columns(ids) for part in self.parts]
        return None if None in parts else self.replace(parts=tuple(parts))

    def logical_spec(self) -> Spec:
        return self.parts[0].logical_spec()

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        def refused(axis: int) -> bool:
            """Whether a part cannot be cut along `axis`; then none may be, since shards of parts must add up."""
            only = tuple(entry if d == axis else None for d, entry in enumerate(spec))
            cut = [jax.tree.leaves(part.field_specs(only), is_leaf=_is_spec) for part in self.parts]
            return not all(any(spec[axis] in field for field in fields) for fields in cut)

        kept = tuple(None if entry is None or refused(axis) else entry for axis, entry in enumerate(spec))
        return {"parts": tuple(part.replace(**part.field_specs(kept)) for part in self.parts)}


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
