"""`x @ W` and `x @ W.T` for a compressed matrix, differentiable, with the compressed leaf as the only residual."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import Array, Float

from effjax import _compat
from effjax.arrays.base import CompressedArray
from effjax.arrays.low_rank import LowRank
from effjax.arrays.permuted import Permuted
from effjax.arrays.row_scaled import RowScaled
from effjax.arrays.sum import Sum
from effjax.ops.platform import platform_operation

Implementation = Literal["reference", "blocked"]
BLOCK_WEIGHTS = 2**15  # weights of a dense tile: 128 KiB in float32, well inside the second-level cache


@partial(jax.jit, static_argnames=("transpose", "precision", "out_dtype", "implementation"))
def matmul(
    x: Float[Array, "*batch in"],
    w: CompressedArray,
    *,
    transpose: bool = False,
    precision: Any = None,
    out_dtype: Any = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch out"]:
    """Multiplies by a compressed matrix without keeping a dense copy of it.

    The gradient saves the compressed leaf (and `x` only where `W` itself is differentiated): differentiating a
    dequantise-then-matmul instead would save a dense copy of every weight of a scanned stack.

    Args:
        x: `[*batch, in]`, or `[*batch, out]` when `transpose`.
        w: compressed `[in, out]`.
        transpose: multiply by `W.T`.
        precision: as in `jax.lax.dot_general`.
        out_dtype: dtype of the result; the promoted dtype of `x` and `w` where None. Accumulation is in float32.
        implementation: "reference" dequantises the matrix and multiplies; "blocked" does so tile by tile, so that no
            dense copy exists at any time. None chooses: blocked on a single CPU device, where tiles stay in the cache,
            else reference, which XLA can fuse and partition.

    Returns:
        `[*batch, out]`, or `[*batch, in]` when `transpose`.

    Raises:
        ValueError: "blocked" was asked for and the matrix cannot be cut into tiles of whole groups and bytes.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> w = ej.quantize.RTN(bits=8, group_size=None).quantize(jnp.eye(8))
        >>> ej.ops.matmul(jnp.ones((1, 8)), w).shape
        (1, 8)
    """
    out_dtype = jnp.result_type(x, w.dtype) if out_dtype is None else jnp.dtype(out_dtype)
    if isinstance(w, Sum):
        parts = [matmul(x, p, transpose=transpose, precision=precision, out_dtype=jnp.float32) for p in w.parts]
        return jnp.asarray(sum(parts)).astype(out_dtype)
    if isinstance(w, LowRank):
        first, second = (w.b.mT, w.a.mT) if transpose else (w.a, w.b)
        thin = jnp.matmul(x, first, precision=precision, preferred_element_type=jnp.float32)
        wide = jnp.matmul(thin.astype(x.dtype), second, precision=precision, preferred_element_type=jnp.float32)
        return wide.astype(out_dtype)
    if isinstance(w, RowScaled | Permuted):
        # The inputs are brought to the stored rows before a product, or the results from them after a transposed one.
        if transpose:
            y = matmul(x, w.array, transpose=True, precision=precision, out_dtype=jnp.float32)
            y = y * w.row_scales.astype(jnp.float32) if isinstance(w, RowScaled) else jnp.take(y, w.places, axis=-1)
            return y.astype(out_dtype)
        if isinstance(w, RowScaled):
            x = (x.astype(jnp.float32) * w.row_scales.astype(jnp.float32)).astype(x.dtype)
        else:
            x = jnp.take(x, w.order, axis=-1)
        return matmul(x, w.array, precision=precision, out_dtype=out_dtype, implementation=implementation)
    return _matmul(x, w, transpose, precision, out_dtype, implementation)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _matmul(
    x: jax.Array, w: CompressedArray, transpose: bool, precision: Any, out_dtype: Any, implementation: str | None
) -> jax.Array:
    rows = block_rows(w)
    if implementation == "reference":
        product = _reference(x, w, transpose=transpose, precision=precision)
    elif implementation == "blocked":
        if rows is None:
            raise ValueError(f"{w} cannot be cut into tiles of whole groups and bytes; use implementation='reference'")
        product = _blocked(x, w, rows=rows, transpose=transpose, precision=precision)
    elif rows is None:
        product = _reference(x, w, transpose=transpose, precision=precision)
    else:
        fields, treedef = jax.tree.flatten(w)
        product = _tiled(x, *fields, treedef=treedef, rows=rows, transpose=transpose, precision=precision)
    return product.astype(out_dtype)


def _forward(x: Any, w: Any, transpose: bool, precision: Any, out_dtype: Any, implementation: str | None) -> Any:
    trained = any(jax.tree.leaves(jax.tree.map(lambda p: p.perturbed, w, is_leaf=lambda p: hasattr(p, "perturbed"))))
    x, w = custom_vjp_primal_tree_values((x, w))
    # An empty slice stands for x where only its dtype is needed.
    saved = x if trained else jnp.zeros((0,), x.dtype)
    return _matmul(x, w, transpose, precision, out_dtype, implementation), (saved, w)


def _backward(
    transpose: bool, precision: Any, out_dtype: Any, implementation: str | None, residuals: Any, g: Any
) -> tuple[Any, Any]:
    x, w = residuals
    if isinstance(g, SymbolicZero):
        return None, None
    dx = matmul(g, w, transpose=not transpose, precision=precision, out_dtype=x.dtype, implementation=implementation)
    if x.shape == (0,):
        return dx, None
    batch = tuple(range(x.ndim - 1))
    inputs, outputs = (g, x) if transpose else (x, g)
    dw = jax.lax.dot_general(
        inputs, outputs, ((batch, batch), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    floating, rebuild = _floating_fields(w)
    (grads,) = jax.vjp(lambda fields: rebuild(fields).materialize(), floating)[1](dw.astype(w.dtype))
    return dx, rebuild(grads, integers=False)


_matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def _floating_fields(w: CompressedArray) -> tuple[list[jax.Array], Any]:
    """The trainable arrays of `w`, and a function that puts others in their place (integers stay, or become None)."""
    leaves, treedef = jax.tree.flatten(w)
    trainable = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def rebuild(fields: list[Any], *, integers: bool = True) -> Any:
        rest = iter(fields)
        return treedef.unflatten(
            [next(rest) if t else (leaf if integers else None) for t, leaf in zip(trainable, leaves, strict=True)]
        )

    return [leaf for t, leaf in zip(trainable, leaves, strict=True) if t], rebuild


def _reference(x: jax.Array, w: CompressedArray, *, transpose: bool, precision: Any) -> jax.Array:
    dense = w.materialize()
    return _contract(x, dense, 1 if transpose else 0, precision)


def _blocked(x: jax.Array, w: CompressedArray, *, rows: int, transpose: bool, precision: Any) -> jax.Array:
    """One tile of `rows` inputs after the other; the tile is the only dense weight alive."""
    tiles = w.tiles(rows)
    assert tiles is not None  # block_rows has asked
    parts, dense = tiles
    n, out = w.shape
    count, dtype = n // rows, _accumulator(x, w)

    def zeros(*shape: int) -> jax.Array:
        start = jax.lax.full(shape, 0, dtype)
        axes = _compat.varying_axes(jax.tree.leaves((x, w)))  # a loop's state varies from the start as at the end
        return jax.lax.pcast(start, tuple(axes), to="varying") if axes else start

    def tile(index: jax.Array) -> jax.Array:
        return dense(jax.tree.map(lambda part: _at(part, index), parts))

    if transpose:

        def write(index: jax.Array, blocks: jax.Array) -> jax.Array:
            block = _contract(x, tile(index), 1, precision)
            return jax.lax.dynamic_update_index_in_dim(blocks, block, index, axis=0)

        blocks = _loop(count, write, zeros(count, *x.shape[:-1], rows))
        return jnp.moveaxis(blocks, 0, -2).reshape(*x.shape[:-1], n)

    inputs = jnp.moveaxis(x.reshape(*x.shape[:-1], count, rows), -2, 0)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        return total + _contract(_at(inputs, index), tile(index), 0, precision)

    return _loop(count, add, zeros(*x.shape[:-1], out))


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """Entry `index` of the leading axis."""
    starts = (index, *(0 for _ in x.shape[1:]))
    entry = jax.lax.dynamic_slice(x, starts, (1, *x.shape[1:]), allow_negative_indices=False)
    return jax.lax.squeeze(entry, (0,))


def _loop(count: int, step: Callable[[jax.Array, jax.Array], jax.Array], start: jax.Array) -> jax.Array:
    """`step(index, value)` for all indices: `fori_loop` as the while loop that it is, which lowers in half the time."""

    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, value = state
        return index + 1, step(index, value)

    return jax.lax.while_loop(lambda state: jax.lax.lt(state[0], jnp.int32(count)), body, (jnp.int32(0), start))[1]


def _accumulator(x: Any, w: Any) -> Any:
    return jnp.promote_types(jnp.promote_types(x.dtype, w.dtype), jnp.float32)


def _contract(x: jax.Array, dense: jax.Array, axis: int, precision: Any) -> jax.Array:
    """The last axis of `x` with `axis` of `dense`, accumulated in float32."""
    dims = (((x.ndim - 1,), (axis,)), ((), ()))
    dtype = jnp.promote_types(x.dtype, dense.dtype)
    return jax.lax.dot_general(
        x.astype(dtype),
        dense.astype(dtype),
        dims,
        precision=precision,
        preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )


def _tiled_shape(x: Any, *fields: Any, treedef: Any, transpose: bool, **_: Any) -> tuple[tuple[int, ...], Any]:
    w = treedef.unflatten(fields)
    return (*x.shape[:-1], w.shape[-2 if transpose else -1]), _accumulator(x, w)


def _tiled_on_cpu(x: jax.Array, *fields: jax.Array, treedef: Any, **static: Any) -> jax.Array:
    return _blocked(x, treedef.unflatten(fields), **static)


def _tiled_elsewhere(x: jax.Array, *fields: jax.Array, treedef: Any, rows: int, **static: Any) -> jax.Array:
    return _reference(x, treedef.unflatten(fields), **static)


_tiled = platform_operation(
    "compressed_matmul",
    _tiled_shape,
    default=_tiled_elsewhere,
    one_device={"cpu": _tiled_on_cpu},
    static_argnames=("treedef", "rows", "transpose", "precision"),
)


def block_rows(w: CompressedArray) -> int | None:
    """Inputs a tile: the most that divide the matrix and keep a tile within `BLOCK_WEIGHTS`, or None for no tiling."""
    n, out = w.shape
    multiple = w.row_multiple
    if n % multiple or n == multiple:
        return None
    units = n // multiple
    fitting = [k for k in range(1, units) if units % k == 0 and k * multiple * out <= BLOCK_WEIGHTS]
    return multiple * max(fitting, default=1)
