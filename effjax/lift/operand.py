"""A compressed leaf on its way through the interpreter: the stored array and the layout the model sees it in."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.base import CompressedArray, Spec
from effjax.arrays.view import View
from effjax.lift.layout import Layout


@dataclasses.dataclass(frozen=True)
class Operand:
    """What a jaxpr variable holds in place of a dense weight.

    Attributes:
        array: a compressed `[*L, in, out]`, or a `Probe`.
        layout: the dimensions of the variable in terms of the array's axes.
        path: the parameter's name, for reports and errors.
    """

    array: CompressedArray
    layout: Layout
    path: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def ndim(self) -> int:
        return len(self.layout.dims)

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def dense_nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def with_layout(self, layout: Layout | None) -> "Operand | None":
        return None if layout is None else dataclasses.replace(self, layout=layout)

    def materialize(self) -> jax.Array:
        """The dense array in the model's dimensions."""
        dense = self.array.materialize()
        if self.layout.is_identity:
            return dense
        split = dense.reshape([size for sizes in self.layout.axes for size in sizes])
        index = {}
        for axis, sizes in enumerate(self.layout.axes):
            for position in range(len(sizes)):
                index[axis, position] = len(index)
        order = [index[atom] for dim in self.layout.dims for atom in dim]
        ones = [i for i in range(len(index)) if i not in order]
        return jnp.transpose(split, [*order, *ones]).reshape(self.shape)


jax.tree_util.register_dataclass(Operand, data_fields=["array"], meta_fields=["layout", "path"])


@dataclasses.dataclass(frozen=True)
class Probe(CompressedArray):
    """A dense weight that calibration watches; it has no inputs and outputs until an operation contracts it."""

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.value.dtype

    def astype(self, dtype: Any) -> "Probe":
        return Probe(self.value.astype(dtype))

    def materialize(self) -> jax.Array:
        return self.value

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        return {"value": jax.sharding.PartitionSpec(*spec)}


jax.tree_util.register_dataclass(Probe, data_fields=["value"], meta_fields=[])


def is_operand(x: Any) -> bool:
    return isinstance(x, Operand)


def operand(array: CompressedArray, path: str) -> Operand:
    """The operand of a leaf: views become layouts over the matrix they show."""
    if not isinstance(array, View):
        return Operand(array, Layout.of_shape(array.shape), path)
    lead = array.array.shape[:-2]
    sizes = array.split_dims
    n_in = len(array.in_dims)
    base = Layout.of_shape((*lead, math.prod(sizes[:n_in]), math.prod(sizes[n_in:])))
    split = base.reshape((*lead, *sizes))
    assert split is not None  # the split dims multiply to the axes by construction
    order = (*range(len(lead)), *(len(lead) + axis for axis in array.order))
    return Operand(array.array, split.transpose(order), path)
