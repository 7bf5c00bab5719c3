"""A compressed matrix made ready for products: tables in the kernels' dtype, and what is done to activations."""

from typing import Any

import jax
import numpy as np

from effjax.arrays.base import CompressedArray, Spec, register, static
from effjax.arrays.wrapping import Wrapping


@register
class Prepared(Wrapping):
    """The same weight as `array`, made by `effjax.prepare` and undone by `effjax.restore`.

    Attributes:
        array: compressed `[*L, in, out]`.
        stored: dtypes that floating fields of `array` had before, in their order, to restore them.
        activation_bits: what products do to their activations, see `effjax.ops.matmul`.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> w = ej.quantize.RTN(bits=8, group_size=None).quantize(jnp.eye(4))
        >>> ej.prepare({"kernel": w}, activation_bits=8)["kernel"].activation_bits
        8
    """

    array: CompressedArray
    stored: tuple[str, ...] = static(default=())
    activation_bits: int | None = static(default=None)

    def materialize(self) -> jax.Array:
        return self.array.materialize()

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        return {"array": self.array.replace(**self.array.field_specs(spec))}

    def restore(self) -> CompressedArray:
        """`array` with its floating fields in the dtypes they had."""
        dtypes = iter(self.stored)
        return jax.tree.map(
            lambda field: field.astype(np.dtype(next(dtypes))) if np.issubdtype(field.dtype, np.inexact) else field,
            self.array,
        )
