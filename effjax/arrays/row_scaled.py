"""A compressed matrix with a factor for each input: what scaling activations against weights leaves behind (AWQ)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from effjax.arrays.base import CompressedArray, Spec, register
from effjax.arrays.wrapping import Wrapping


@register
class RowScaled(Wrapping):
    """`W[i, o] = row_scales[i] * array[i, o]`; a product scales its inputs first.

    Attributes:
        array: compressed `[*L, in, out]`.
        row_scales: `float[*L, in]`.

    Example:
        >>> import effjax as ej
        >>> w = jnp.eye(4)
        >>> array = ej.quantize.RTN(bits=8, group_size=None).quantize(w)
        >>> RowScaled(array=array, row_scales=jnp.arange(4.0)).materialize().diagonal().round(2).tolist()
        [0.0, 1.0, 2.0, 3.0]
    """

    array: CompressedArray
    row_scales: Float[Array, "*L in"]

    def materialize(self) -> jax.Array:
        scaled = self.array.materialize().astype(jnp.float32) * self.row_scales.astype(jnp.float32)[..., None]
        return scaled.astype(self.dtype)

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        *lead, rows, _ = spec
        fields = self.array.replace(**self.array.field_specs(spec))
        cut = jax.tree.leaves(fields, is_leaf=lambda x: isinstance(x, P))
        if rows is not None and not any(rows in field for field in cut):
            rows = None  # the array refuses this cut, so the scales stay whole with it
        return {"array": fields, "row_scales": P(*lead, rows)}
