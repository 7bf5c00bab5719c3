"""A compressed matrix whose rows are stored in another order: what quantization in activation order leaves behind."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from effjax.arrays.base import CompressedArray, Spec, register
from effjax.arrays.wrapping import Wrapping


@register
class Permuted(Wrapping):
    """`W[order[i], o] = array[i, o]`: groups are runs of the stored rows, so they may be any rows of `W`.

    A product gathers its inputs first and then runs on the stored order (as kernels for GPTQ's `desc_act` do).

    Attributes:
        array: compressed `[*L, in, out]`, rows in stored order.
        order: `int32[*L, in]`, the input that each stored row belongs to; a permutation.

    Example:
        >>> import effjax as ej
        >>> w = jnp.arange(8.0).reshape(4, 2)
        >>> order = jnp.array([2, 0, 3, 1])
        >>> stored = ej.quantize.RTN(bits=8, group_size=2).quantize(w[order])
        >>> bool(jnp.allclose(Permuted(array=stored, order=order).materialize(), w, atol=0.02))
        True
    """

    array: CompressedArray
    order: Int[Array, "*L in"]

    @property
    def places(self) -> jax.Array:
        """`int32[*L, in]`: the stored row of each input; the inverse of `order`."""
        return jnp.argsort(self.order, axis=-1)

    def materialize(self) -> jax.Array:
        return jnp.take_along_axis(self.array.materialize(), self.places[..., None], axis=-2)

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        *lead, _, out = spec  # a shard of the rows would need inputs of other shards
        return {"array": self.array.replace(**self.array.field_specs((*lead, None, out))), "order": P(*lead, None)}
