"""A compressed matrix under another shape: attention kernels with head axes, embeddings, torch's transposed weights."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.arrays.base import CompressedArray, Spec, register, static
from effjax.errors import LeafError


def _resolve(dims: tuple[int, ...], size: int) -> tuple[int, ...]:
    """`dims` with its leading -1 replaced by what makes the product `size`."""
    return (size // math.prod(dims[1:]), *dims[1:])


@register
class View(CompressedArray):
    """A compressed `[*L, in, out]` seen as `[*L, *dims]`, where inputs and outputs may be several axes in any order.

    Attributes:
        array: the compressed matrix.
        in_dims: the axes that `in` is made of; the first is -1 and follows from the array, so that a shard of the array
            has the shape of the shard.
        out_dims: likewise for `out`.
        order: for every trailing axis of the view, which axis of `(*in_dims, *out_dims)` it is.

    Example: the query kernel `[model, heads, head_dim]` of Flax's attention has `in_dims=(-1,)`,
    `out_dims=(-1, head_dim)`, `order=(0, 1, 2)`; an embedding `[vocab, model]`, contracted over `model`, has
    `in_dims=(-1,)`, `out_dims=(-1,)`, `order=(1, 0)`.
    """

    array: CompressedArray
    in_dims: tuple[int, ...] = static(default=(-1,))
    out_dims: tuple[int, ...] = static(default=(-1,))
    order: tuple[int, ...] = static(default=(0, 1))

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.array.dtype

    def astype(self, dtype: Any) -> "View":
        return self.replace(array=self.array.astype(dtype))

    @property
    def split_dims(self) -> tuple[int, ...]:
        """Sizes of `(*in_dims, *out_dims)`."""
        *_, rows, out = self.array.shape
        return (*_resolve(self.in_dims, rows), *_resolve(self.out_dims, out))

    @property
    def shape(self) -> tuple[int, ...]:
        dims = self.split_dims
        return (*self.array.shape[:-2], *(dims[axis] for axis in self.order))

    def materialize(self) -> jax.Array:
        return self.unfold(self.array.materialize())

    def unfold(self, matrix: Float[Array, "*L in out"]) -> Float[Array, "..."]:
        """Gives a dense `[*L, in, out]` the shape of this view."""
        lead = matrix.shape[:-2]
        split = matrix.reshape(*lead, *self.split_dims)
        return jnp.transpose(split, (*range(len(lead)), *(len(lead) + axis for axis in self.order)))

    def logical_spec(self) -> Spec:
        *lead, rows, out = self.array.logical_spec()
        split = [None] * len(self.order)
        split[0], split[len(self.in_dims)] = rows, out
        return (*lead, *(split[axis] for axis in self.order))

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        lead = len(spec) - len(self.order)
        split = [None] * len(self.order)
        for position, axis in enumerate(self.order):
            split[axis] = spec[lead + position]
        # Only the major axis of `in` and of `out` can be sharded: the minor ones interleave.
        inner = (*spec[:lead], split[0], split[len(self.in_dims)])
        return {"array": self.array.replace(**self.array.field_specs(inner))}


def fold(w: Float[Array, "..."], in_axes: tuple[int, ...], out_axes: tuple[int, ...]) -> Float[Array, "*L in out"]:
    """Brings a dense weight to `[*L, in, out]`; the axes are negative, `L` is what they leave over, in front.

    Raises:
        LeafError: the axes are not exactly the trailing ones.
    """
    shape = folded_shape(w.shape, in_axes, out_axes)
    lead = len(shape) - 2
    return jnp.transpose(w, (*range(lead), *(w.ndim + axis for axis in (*in_axes, *out_axes)))).reshape(shape)


def folded_shape(shape: tuple[int, ...], in_axes: tuple[int, ...], out_axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that `fold` gives, and its errors.

    Example:
        >>> folded_shape((3, 64, 4, 16), (-3,), (-2, -1))
        (3, 64, 64)
    """
    trailing = len(in_axes) + len(out_axes)
    if sorted((*in_axes, *out_axes)) != list(range(-trailing, 0)) or len(shape) < trailing:
        raise LeafError(
            f"in_axes={in_axes} and out_axes={out_axes} are not the trailing axes of a weight of shape {shape}"
        )
    rows, out = (math.prod(shape[axis] for axis in axes) for axes in (in_axes, out_axes))
    return (*shape[: len(shape) - trailing], rows, out)


def unfold(
    array: CompressedArray, shape: tuple[int, ...], in_axes: tuple[int, ...], out_axes: tuple[int, ...]
) -> CompressedArray:
    """Inverse of `fold` for a compressed matrix: a `View` of the weight's `shape`, or `array` where that has it."""
    order = [0] * (len(in_axes) + len(out_axes))
    for split_axis, axis in enumerate((*in_axes, *out_axes)):
        order[len(order) + axis] = split_axis
    if order == [0, 1]:
        return array
    return View(
        array=array,
        in_dims=(-1, *(shape[axis] for axis in in_axes[1:])),
        out_dims=(-1, *(shape[axis] for axis in out_axes[1:])),
        order=tuple(order),
    )
