"""Rules for structural operations: what keeps a compressed weight compressed without touching its codes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from effjax.arrays.base import CompressedArray, full_spec
from effjax.arrays.sharding import fit_spec
from effjax.lift.dot import canonical_input, contraction, dot
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
        interp.record(interp, w, c, lambda: canonical_input(x, w.layout, c))
    if isinstance(w.array, Probe):
        return None
    out = eqn.outvars[0].aval

    def multiply(array: CompressedArray, x: jax.Array) -> jax.Array | None:
        return dot(Operand(array, w.layout, w.path), x, c, precision=eqn.params["precision"], out_dtype=out.dtype)

    if _explicit_axes():
        # Sharding types would have to be followed through unpacking and grouping; inside, the compiler does it.
        multiply = jax.sharding.auto_axes(multiply, out_sharding=out.sharding)
    product = multiply(w.array, x)
    if product is None:
        return None
    interp.kept(w, "dot_general")
    return [product]


def _explicit_axes() -> bool:
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


def _index_stacked(w: Operand, axis: int, take: Any) -> CompressedArray:
    """Applies `take` (along the axis it is given) to every field of the array."""
    return jax.tree.map(lambda field: take(field, axis), w.array)


def _stacked_axis(w: Operand, dim: int) -> int | None:
    """The stored axis that `dim` is, when it is a stacked one (layers, experts)."""
    axis = w.layout.whole_axis(dim)
    stacked = 0 if isinstance(w.array, Probe) else len(w.layout.axes) - 2
    return axis if axis is not None and axis < stacked and len(w.layout.axes[axis]) == 1 else None


def _single_cut(w: Operand, sizes: tuple[int, ...]) -> int | None:
    """The one dimension in which `sizes` differ from the weight's, or None."""
    cut = [d for d, size in enumerate(sizes) if size != w.shape[d]]
    return cut[0] if len(cut) == 1 else None


def _cut(interp: Interpreter, w: Operand, dim: int | None, ids: Any, size: int, op: str) -> list[Any] | None:
    """Entries `ids` of dimension `dim`: a stacked axis stays compressed, of the outputs only those columns are made."""
    if dim is None:
        return None
    axis = _stacked_axis(w, dim)
    if axis is not None:
        array = _index_stacked(w, axis, lambda field, a: jnp.take(field, ids, axis=a, mode="clip"))
        axes = w.layout.axes[:axis] + ((size,),) + w.layout.axes[axis + 1 :]
        dims = tuple(d if i != dim else (((axis, 0),) if size > 1 else ()) for i, d in enumerate(w.layout.dims))
        interp.kept(w, op)
        return [Operand(array, Layout(axes=axes, dims=dims), w.path)]
    if w.layout.whole_axis(dim) != len(w.layout.axes) - 1 or isinstance(w.array, Probe):
        return None
    columns = w.array.columns(ids)
    if columns is None:
        return None
    axes = w.layout.axes[:-1] + ((size,),)
    dims = tuple(d if i != dim else (((len(axes) - 1, 0),) if size > 1 else ()) for i, d in enumerate(w.layout.dims))
    interp.kept(w, op)
    return [Operand(columns, Layout(axes=axes, dims=dims), w.path)]


def slice_(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    (w,) = inputs
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * w.ndim
    sizes = tuple(eqn.outvars[0].aval.shape)
    if sizes == w.shape:
        return [w]
    dim = _single_cut(w, sizes)
    ids = None if dim is None else jnp.arange(starts[dim], limits[dim], strides[dim])
    return _cut(interp, w, dim, ids, 0 if dim is None else sizes[dim], "slice")


def dynamic_slice(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    w, *starts = inputs
    sizes = tuple(eqn.params["slice_sizes"])
    if not is_operand(w):
        return None
    if sizes == w.shape:
        return [w]
    dim = _single_cut(w, sizes)
    if dim is None:
        return None
    first = jnp.clip(starts[dim], 0, w.shape[dim] - sizes[dim])
    return _cut(interp, w, dim, first + jnp.arange(sizes[dim]), sizes[dim], "dynamic_slice")


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
    picked = _cut(interp, w, dim, jnp.clip(ids, 0, w.shape[dim] - 1), ids.size, "gather")
    if picked is None:
        return None
    (rows,) = picked
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
    """Stacking: operands of one kind, joined along a dimension of size 1, become one with a new stacked axis."""
    dim = eqn.params["dimension"]
    if not all(map(is_operand, inputs)) or any(isinstance(w.array, Probe) for w in inputs):
        return None
    first = inputs[0]
    kinds = {(jax.tree.structure(w.array), w.layout, tuple(f.shape for f in jax.tree.leaves(w.array))) for w in inputs}
    if len(kinds) != 1 or first.layout.dims[dim]:
        return None
    array = jax.tree.map(lambda *fields: jnp.stack(fields), *(w.array for w in inputs))
    layout = first.layout.squeeze((dim,)).with_axis_in_front(len(inputs))
    order = list(range(1, len(layout.dims)))
    order.insert(dim, 0)
    for w in inputs:
        interp.kept(w, "concatenate")
    return [Operand(array, layout.transpose(tuple(order)), first.path)]


def convolution(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """A convolution needs its one kernel dense; that copy is small beside its activations, hence always allowed."""
    from effjax import _compat

    return _compat.bind(eqn, interp.dense(inputs, "conv_general_dilated", allowed=True))


def fieldwise(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """Operations that do nothing to values: applied to every field."""
    from effjax import _compat

    def apply(value: Any) -> Any:
        if not is_operand(value):
            return _compat.bind(eqn, [value])[0]
        return jax.tree.map(lambda field: _compat.bind(eqn, [field])[0], value)

    return [apply(value) for value in inputs]


def optimization_barrier(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    return list(jax.lax.optimization_barrier(inputs))


def sharding_constraint(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """Constrains every field as its dimension of the weight is; without a matching stored axis the hint is dropped."""
    (w,) = inputs
    sharding = eqn.params["sharding"]
    if not isinstance(sharding, NamedSharding):
        return [w]
    specs = field_specs(w, sharding.spec)

    def constrain(field: jax.Array, spec: PartitionSpec) -> jax.Array:
        fitting = fit_spec(field.shape, spec, sharding.mesh)
        return jax.lax.with_sharding_constraint(field, NamedSharding(sharding.mesh, fitting))

    return [w if specs is None else Operand(jax.tree.map(constrain, w.array, specs), w.layout, w.path)]


def field_specs(w: Operand, spec: PartitionSpec) -> Any:
    """Specs of the stored fields for a spec of the dimensions; None where a sharded dimension is no major part."""
    entries = full_spec(spec, w.ndim)
    stored: list[Any] = [None] * len(w.layout.axes)
    for atoms, entry in zip(w.layout.dims, entries, strict=True):
        if entry is None:
            continue
        if not atoms or atoms[0] != w.layout.atoms_of(atoms[0][0])[0]:
            return None
        stored[atoms[0][0]] = entry
    return w.array.replace(**w.array.field_specs(tuple(stored)))


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
        "conv_general_dilated": convolution,
        "copy": fieldwise,
        "copy_p": fieldwise,
        "name": fieldwise,
        "pvary": fieldwise,
        "device_put": fieldwise,
        "optimization_barrier": optimization_barrier,
        "sharding_constraint": sharding_constraint,
    }
