"""A weight as the product of two thin factors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from effjax.arrays.base import CompressedArray, Spec, full_spec, register, static


@register
class LowRank(CompressedArray):
    """`W = a @ b`, both factors trainable.

    Attributes:
        a: `float[*L, in, rank]`.
        b: `float[*L, rank, out]`.
        dtype: dtype of the materialised weight.
    """

    a: Float[Array, "*L in rank"]
    b: Float[Array, "*L rank out"]
    dtype: np.dtype = static(default=np.dtype("float32"))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.a.shape[:-1], self.b.shape[-1])

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def materialize(self) -> jax.Array:
        product = jnp.matmul(self.a, self.b, preferred_element_type=jnp.float32)
        return product.astype(self.dtype)

    def columns(self, ids: jax.Array) -> "LowRank":
        return self.replace(b=jnp.take(self.b, ids, axis=-1))

    def logical_spec(self) -> Spec:
        a, b = (jax.typeof(field).sharding.spec for field in (self.a, self.b))
        return (*full_spec(a, self.ndim)[:-1], full_spec(b, self.ndim)[-1])

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        *lead, rows, out = spec
        return {"a": P(*lead, rows, None), "b": P(*lead, None, out)}
