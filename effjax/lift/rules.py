"""Rules for structural operations: what keeps a compressed weight compressed without touching its codes."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from effjax import _compat
from effjax.arrays.base import CompressedArray, full_spec
from effjax.arrays.sharding import partition_specs
from effjax.lift.dot import contraction, dot
from effjax.lift.interpreter import Interpreter, Rule
from effjax.lift.layout import Layout
from effjax.lift.operand import Operand, Probe, is_operand


def dot_general(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    lhs, rhs = inputs
    if is_operand(lhs) and is_operand(rhs):
        if lhs.dense_nbytes > rhs.dense_nbytes:
            (rhs,) = interp.dense([rhs], "dot_general")
        else:
            (lhs,) = interp.dense([lhs], "dot_general")
    w, x, w_first = (lhs, rhs, True) if is_operand(lhs) else (rhs, lhs, False)
    c = contraction(w.layout, x.ndim, eqn.params["dimension_numbers"], w_first)
    if c is None:
        return None
    if interp.record is not None:
        interp.record(interp, w, c, x)
    if isinstance(w.array, Probe):
        return None
    out = eqn.outvars[0].aval

    def product_of(array: CompressedArray, x: jax.Array) -> jax.Array | None:
        return dot(Operand(array, w.layout, w.path), x, c, precision=eqn.params["precision"], out_dtype=out.dtype)

    # Sharding types would have to be followed through unpacking and grouping; inside auto_axes the compiler does it.
    multiply: Any = jax.sharding.auto_axes(product_of, out_sharding=out.sharding) if explicit_axes() else product_of
    product = multiply(w.array, x)
    if product is None:
        return None
    interp.kept(w, "dot_general")
    return [product]


def explicit_axes() -> bool:
    """Whether shardings are part of types here."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and jax.sharding.AxisType.Explicit in mesh.axis_types


def transpose(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    (w,) = inputs
    return [w.with_layout(w.layout.transpose(eqn.params["permutation"]))]


def reshape(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    w, *dynamic = inputs
    if dynamic or not is_operand(w):
        return None
    seen = w.with_layout(w.layout.reshape(tuple(eqn.params["new_sizes"])))
    return None if seen is None else [seen]


def squeeze(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    (w,) = inputs
    return [w.with_layout(w.layout.squeeze(tuple(eqn.params["dimensions"])))]


def broadcast_in_dim(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """New dimensions of size 1 only; anything else repeats the weight."""
    w, *dynamic = inputs
    shape, positions = tuple(eqn.params["shape"]), tuple(eqn.params["broadcast_dimensions"])
    new = tuple(i for i in range(len(shape)) if i not in positions)
    if dynamic or not is_operand(w) or any(shape[i] != 1 for i in new):
        return None
    if tuple(shape[i] for i in positions) != w.shape:
        return None
    return [w.with_layout(w.layout.expand(new))]


def convert_element_type(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    (w,) = inputs
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return [Operand(w.array.astype(dtype), w.layout, w.path)]


def _stacked_axis(w: Operand, dim: int) -> int | None:
    """The stored axis that `dim` is, when it is a stacked one (layers, experts)."""
    axis = w.layout.whole_axis(dim)
    stacked = 0 if isinstance(w.array, Probe) else len(w.layout.axes) - 2
    return axis if axis is not None and axis < stacked and len(w.layout.axes[axis]) == 1 else None


def _cut(w: Operand, dim: int, size: int, take: Any, ids: Any) -> Operand | None:
    """`size` entries of dimension `dim`: a stacked axis stays compressed, of the outputs only those columns are made.

    Args:
        take: `take(field, axis)`, which cuts the entries out of one stored field.
        ids: the entries, as `int[size]`; called only where columns are picked.
    """
    axis = _stacked_axis(w, dim)
    if axis is not None:
        array = jax.tree.map(lambda field: take(field, axis), w.array)
        if size == 1:  # the axis goes: one matrix is multiplied without a batch dimension
            array = jax.tree.map(lambda field: jnp.squeeze(field, axis), array)
            dims = tuple(() if i == dim else d for i, d in enumerate(w.layout.dims))
            layout = Layout(axes=w.layout.axes, dims=dims).without_axis(axis)
        else:
            layout = Layout(axes=(*w.layout.axes[:axis], (size,), *w.layout.axes[axis + 1 :]), dims=w.layout.dims)
    elif w.layout.whole_axis(dim) == len(w.layout.axes) - 1 and not isinstance(w.array, Probe):
        array = w.array.columns(ids())
        if array is None:
            return None
        axis = len(w.layout.axes) - 1
        dims = tuple(d if i != dim else (((axis, 0),) if size > 1 else ()) for i, d in enumerate(w.layout.dims))
        layout = Layout(axes=(*w.layout.axes[:-1], (size,)), dims=dims)
    else:
        return None
    return Operand(array, layout, w.path)


def _static_cut(w: Operand, dim: int, start: int, limit: int, stride: int = 1) -> Operand | None:
    size = len(range(start, limit, stride))

    def take(field: jax.Array, axis: int) -> jax.Array:
        return jax.lax.slice_in_dim(field, start, limit, stride, axis)

    return _cut(w, dim, size, take, lambda: jnp.arange(start, limit, stride))


def _dynamic_cut(w: Operand, dim: int, start: Any, size: int) -> Operand | None:
    first = jnp.clip(start, 0, w.shape[dim] - size)

    def take(field: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(field, first, size, axis)

    return _cut(w, dim, size, take, lambda: first + jnp.arange(size))


def _cuts(interp: Interpreter, w: Operand, sizes: tuple[int, ...], cut: Any, op: str) -> list[Any] | None:
    """`cut(operand, dimension)` in every dimension in which `sizes` are smaller than the weight's."""
    piece: Operand | None = w
    for dim, size in enumerate(sizes):
        if piece is not None and size != w.shape[dim]:
            piece = cut(piece, dim)
    if piece is None:
        return None
    if piece is not w:
        interp.kept(w, op)
    return [piece]


def slice_(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    (w,) = inputs
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * w.ndim
    sizes = tuple(eqn.outvars[0].aval.shape)
    return _cuts(interp, w, sizes, lambda v, d: _static_cut(v, d, starts[d], limits[d], strides[d]), "slice")


def split(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """Pieces along one dimension, as of a fused query-key-value kernel."""
    (w,) = inputs
    ends = list(itertools.accumulate(map(int, eqn.params["sizes"])))
    spans = zip([0, *ends[:-1]], ends, strict=True)
    return _pieces(interp, [_static_cut(w, eqn.params["axis"], *span) for span in spans], "split")


def unstack(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    (w,) = inputs
    dim = eqn.params["axis"]
    pieces = _pieces(interp, [_static_cut(w, dim, i, i + 1) for i in range(w.shape[dim])], "unstack")
    return None if pieces is None else [piece.with_layout(piece.layout.squeeze((dim,))) for piece in pieces]


def _pieces(interp: Interpreter, pieces: list[Any], op: str) -> list[Any] | None:
    if None in pieces:
        return None
    interp.kept(pieces[0], op)
    return pieces


def dynamic_slice(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    w, *starts = inputs
    sizes = tuple(eqn.params["slice_sizes"])
    if not is_operand(w):
        return None
    return _cuts(interp, w, sizes, lambda v, d: _dynamic_cut(v, d, starts[d], sizes[d]), "dynamic_slice")


def gather(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """Lookups along one dimension, as in an embedding or a choice of experts: `w[..., ids, ...]`."""
    w, indices = inputs
    if not is_operand(w):
        return None
    numbers, sizes = eqn.params["dimension_numbers"], tuple(eqn.params["slice_sizes"])
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (dim,) = numbers.start_index_map
    if sizes != tuple(1 if d == dim else size for d, size in enumerate(w.shape)):
        return None
    if tuple(numbers.collapsed_slice_dims) != (dim,):
        return None
    batch_shape = indices.shape[:-1]
    ids = indices.reshape(-1)
    valid = (ids >= 0) & (ids < w.shape[dim])
    inside = jnp.clip(ids, 0, w.shape[dim] - 1)

    def take(field: jax.Array, axis: int) -> jax.Array:
        return jnp.take(field, inside, axis=axis, mode="clip")

    rows = _cut(w, dim, ids.size, take, lambda: inside)
    if rows is None:
        return None
    interp.kept(w, "gather")
    # Looked-up rows are activations from here on: dense, in the order that gather gives them.
    dense = jnp.moveaxis(rows.materialize().reshape([*w.shape[:dim], ids.size, *w.shape[dim + 1 :]]), dim, 0)
    if eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        mask = valid.reshape(-1, *(1,) * (dense.ndim - 1))
        dense = jnp.where(mask, dense, jnp.asarray(jnp.nan if fill is None else fill, dense.dtype))
    dense = dense.reshape([*batch_shape, *dense.shape[1:]])
    ndim = len(batch_shape) + w.ndim - 1
    source = iter(range(len(batch_shape)))
    offsets = iter(range(len(batch_shape), ndim))
    order = [next(offsets) if d in numbers.offset_dims else next(source) for d in range(ndim)]
    return [jnp.transpose(dense, order)]


def concatenate(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """Operands joined along a dimension of size 1: stacking, as jax before 0.10 spells it."""
    dim = eqn.params["dimension"]
    if not all(map(is_operand, inputs)) or inputs[0].layout.dims[dim]:
        return None
    return _stack(interp, [w.with_layout(w.layout.squeeze((dim,))) for w in inputs], dim, "concatenate")


def stack(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    return _stack(interp, inputs, eqn.params["axis"], "stack")


def _stack(interp: Interpreter, inputs: list[Any], dim: int, op: str) -> list[Any] | None:
    """Operands of one kind become one with a new stacked axis, seen as dimension `dim`."""
    if not all(map(is_operand, inputs)) or any(isinstance(w.array, Probe) for w in inputs):
        return None
    first = inputs[0]
    kinds = {(jax.tree.structure(w.array), w.layout, tuple(map(_aval, jax.tree.leaves(w.array)))) for w in inputs}
    if len(kinds) != 1:
        return None
    array = jax.tree.map(lambda *fields: jnp.stack(fields), *(w.array for w in inputs))
    order = list(range(1, first.ndim + 1))
    order.insert(dim, 0)
    for w in inputs:
        interp.kept(w, op)
    layout = first.layout.with_axis_in_front(len(inputs)).transpose(tuple(order))
    return [Operand(array, layout, first.path)]


def _aval(field: Any) -> Any:
    return field.shape, field.dtype


def convolution(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """A convolution needs its one kernel dense; that copy is small beside its activations, hence always allowed."""
    return _compat.bind(eqn, interp.dense(inputs, "conv_general_dilated", allowed=True))


def fieldwise(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """Operations that do nothing to values: applied to every field."""

    def apply(value: Any) -> Any:
        if not is_operand(value):
            return _compat.bind(eqn, [value])[0]
        return jax.tree.map(lambda field: _compat.bind(eqn, [field])[0], value)

    return [apply(value) for value in inputs]


def stop_gradient(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    return list(jax.lax.stop_gradient(inputs))


def optimization_barrier(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    return list(jax.lax.optimization_barrier(inputs))


def device_put(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """Fields go where the weight goes: to the device or memory space, or cut as its dimensions are."""

    def put(value: Any, target: Any) -> Any:
        if isinstance(target, NamedSharding) and is_operand(value):
            specs = field_specs(value, target.spec, target.mesh)
            return (
                value if specs is None else _with_specs(value, specs, lambda s: target.update(spec=s), jax.device_put)
            )
        return jax.device_put(value, target)

    return [put(value, target) for value, target in zip(inputs, eqn.params["devices"], strict=True)]


def sharding_constraint(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """Constrains every field as its dimension of the weight is; without a matching stored axis the hint is dropped."""
    (w,) = inputs
    sharding = eqn.params["sharding"]
    if not isinstance(sharding, NamedSharding):
        return [w]
    specs = field_specs(w, sharding.spec, sharding.mesh)
    if specs is None:
        return [w]
    return [_with_specs(w, specs, lambda s: NamedSharding(sharding.mesh, s), jax.lax.with_sharding_constraint)]


def reshard(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """Explicit axes: fields move as their dimension of the weight does, or stay; a product gets its own type."""
    (w,) = inputs
    sharding = eqn.params["dst_sharding"]
    specs = field_specs(w, sharding.spec, sharding.mesh)
    if specs is None:
        return [w]
    return [_with_specs(w, specs, lambda s: NamedSharding(sharding.mesh, s), jax.sharding.reshard)]


def _with_specs(w: Operand, specs: Any, sharding: Any, apply: Any) -> Operand:
    array = jax.tree.map(lambda field, spec: apply(field, sharding(spec)), w.array, specs)
    return Operand(array, w.layout, w.path)


def field_specs(w: Operand, spec: PartitionSpec, mesh: Any) -> Any:
    """Specs of the stored fields for a spec of the dimensions; None where a sharded dimension is no major part."""
    entries = full_spec(spec, w.ndim)
    stored: list[Any] = [None] * len(w.layout.axes)
    for atoms, entry in zip(w.layout.dims, entries, strict=True):
        if entry is None:
            continue
        if not atoms or atoms[0] != w.layout.atoms_of(atoms[0][0])[0]:
            return None
        stored[atoms[0][0]] = entry
    return partition_specs(w.array, PartitionSpec(*stored), mesh)


def structural_rules() -> dict[str, Rule]:
    """Rules by primitive name."""
    return {
        "dot_general": dot_general,
        "transpose": transpose,
        "reshape": reshape,
        "squeeze": squeeze,
        "expand_dims": broadcast_in_dim,
        "broadcast_in_dim": broadcast_in_dim,
        "convert_element_type": convert_element_type,
        "slice": slice_,
        "dynamic_slice": dynamic_slice,
        "gather": gather,
        "concatenate": concatenate,
        "stack": stack,
        "unstack": unstack,
        "split": split,
        "conv_general_dilated": convolution,
        "copy": fieldwise,
        "name": fieldwise,
        "pvary": fieldwise,
        "stop_gradient": stop_gradient,
        "device_put": device_put,
        "optimization_barrier": optimization_barrier,
        "sharding_constraint": sharding_constraint,
        "reshard": reshard,
    }
