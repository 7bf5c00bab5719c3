"""dot_general with a compressed operand, in any layout that contracts exactly the matrix's inputs or its outputs."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from effjax.arrays.base import CompressedArray
from effjax.lift.layout import Atom, Layout
from effjax.lift.operand import Operand
from effjax.ops import matmul


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A dot_general seen from the weight's side.

    Attributes:
        axes: stored axes that are contracted.
        batch: stored axes that are batch dimensions.
        free: dimensions of the weight that remain, in order.
        x_contract, x_batch, x_free: dimensions of the other operand; the first two in the order of the weight's.
        w_first: whether the weight is the left operand.
    """

    axes: tuple[int, ...]
    batch: tuple[int, ...]
    w_contract: tuple[int, ...]
    w_batch: tuple[int, ...]
    free: tuple[int, ...]
    x_contract: tuple[int, ...]
    x_batch: tuple[int, ...]
    x_free: tuple[int, ...]
    w_first: bool


def contraction(layout: Layout, x_ndim: int, dimension_numbers: Any, w_first: bool) -> Contraction | None:
    """Reads dimension numbers as a contraction of whole stored axes; None where an axis is cut."""
    contract, batch = dimension_numbers
    w_contract, x_contract = contract if w_first else contract[::-1]
    w_batch, x_batch = batch if w_first else batch[::-1]

    def stored_axes(dims: tuple[int, ...]) -> tuple[int, ...] | None:
        atoms = {atom for d in dims for atom in layout.dims[d]}
        axes = tuple(sorted({axis for axis, _ in atoms}))
        return axes if {a for axis in axes for a in layout.atoms_of(axis)} == atoms else None

    axes, batch_axes = stored_axes(w_contract), stored_axes(w_batch)
    if axes is None or batch_axes is None:
        return None
    return Contraction(
        axes=axes,
        batch=batch_axes,
        w_contract=w_contract,
        w_batch=w_batch,
        free=tuple(d for d in range(len(layout.dims)) if d not in (*w_contract, *w_batch)),
        x_contract=x_contract,
        x_batch=x_batch,
        x_free=tuple(d for d in range(x_ndim) if d not in (*x_contract, *x_batch)),
        w_first=w_first,
    )


def canonical_input(x: jax.Array, layout: Layout, c: Contraction) -> jax.Array:
    """`x` as `[*batch axes in stored order, *free, contracted]`, the last axis in the order of the stored atoms."""
    batch = [atom for d in c.w_batch for atom in layout.dims[d]]
    inner = [atom for d in c.w_contract for atom in layout.dims[d]]
    free = [x.shape[d] for d in c.x_free]
    plain = (*c.x_batch, *c.x_free, *c.x_contract)
    if len(inner) == len(c.x_contract) == 1 and sorted(batch) == batch and len(batch) == len(c.x_batch) == len(c.batch):
        return x if plain == tuple(range(x.ndim)) else jnp.transpose(x, plain)
    split = jnp.transpose(x, plain).reshape([*map(layout.size_of, batch), *free, *map(layout.size_of, inner)])
    first_inner = len(batch) + len(free)
    order = [
        *(batch.index(atom) for atom in sorted(batch)),
        *range(len(batch), first_inner),
        *(first_inner + inner.index(atom) for atom in sorted(inner)),
    ]
    merged = jnp.transpose(split, order)
    batch_sizes = [math.prod(layout.axes[axis]) for axis in c.batch]
    return merged.reshape([*batch_sizes, *free, math.prod(map(layout.size_of, inner))])


def dot(w: Operand, x: jax.Array, c: Contraction, *, precision: Any, out_dtype: Any) -> jax.Array | None:
    """The dot_general, or None where the contraction is neither over the inputs nor over the outputs."""
    layout, stacked = w.layout, len(w.layout.axes) - 2
    transpose = _orientation(layout, c, stacked)
    if transpose is None:
        return None
    inner = canonical_input(x, layout, c)

    def multiply(rows: jax.Array, matrix: CompressedArray) -> jax.Array:
        return matmul(rows, matrix, transpose=transpose, precision=precision, out_dtype=out_dtype)

    for axis in reversed(range(stacked)):
        multiply = jax.vmap(multiply, in_axes=(0 if axis in c.batch else None, 0))
    product = multiply(inner, w.array)
    return _arrange(product, x, layout, c, stacked, kept_axis=stacked if transpose else stacked + 1)


def _orientation(layout: Layout, c: Contraction, stacked: int) -> bool | None:
    """Whether the contraction is over the outputs (True), over the inputs (False), or neither (None)."""
    if any(axis >= stacked for axis in c.batch):
        return None
    rows, columns = layout.atoms_of(stacked), layout.atoms_of(stacked + 1)
    if c.axes == ((stacked,) if rows else ()):
        return False
    if c.axes == ((stacked + 1,) if columns else ()):
        return True
    return None


def _arrange(
    product: jax.Array, x: jax.Array, layout: Layout, c: Contraction, stacked: int, kept_axis: int
) -> jax.Array:
    """Brings `[*stacked, *x free, kept axis]` to the order of dot_general: batch, left free, right free."""
    x_free = [x.shape[d] for d in c.x_free]
    kept: list[tuple[Atom, int]] = []  # every atom of the result, with the axis it has after the split below
    shape: list[int] = []
    for axis in range(stacked):
        for atom in layout.atoms_of(axis):
            kept.append((atom, len(shape)))
            shape.append(layout.size_of(atom))
    first_free = len(shape)
    shape += x_free
    for atom in layout.atoms_of(kept_axis):
        kept.append((atom, len(shape)))
        shape.append(layout.size_of(atom))
    position = dict(kept)
    batch = [position[a] for d in c.w_batch for a in layout.dims[d]]
    w_free = [position[a] for d in c.free for a in layout.dims[d]]
    free = list(range(first_free, first_free + len(x_free)))
    order = [*batch, *w_free, *free] if c.w_first else [*batch, *free, *w_free]
    w_shape = layout.shape
    batch_shape = [w_shape[d] for d in c.w_batch]
    w_free_shape = [w_shape[d] for d in c.free]
    final = [*batch_shape, *w_free_shape, *x_free] if c.w_first else [*batch_shape, *x_free, *w_free_shape]
    if list(product.shape) != shape:
        product = jax.lax.reshape(product, shape)
    if order != list(range(len(shape))):
        product = jax.lax.transpose(product, order)
    return product if list(product.shape) == final else jax.lax.reshape(product, final)
