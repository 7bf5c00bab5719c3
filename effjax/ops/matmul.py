"""`x @ W` and `x @ W.T` for a compressed matrix, differentiable, with the compressed leaf as the only residual."""

import math
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
from effjax.arrays.prepared import Prepared
from effjax.arrays.row_scaled import RowScaled
from effjax.arrays.sum import Sum
from effjax.arrays.user_tables import UserTables
from effjax.errors import LeafError
from effjax.ops import dispatch
from effjax.ops.dispatch import block_rows
from effjax.ops.platform import platform_operation

Implementation = Literal["reference", "blocked", "cpu", "tpu", "gpu"]


@partial(jax.jit, static_argnames=("transpose", "precision", "out_dtype", "implementation", "activation_bits"))
def matmul(
    x: Float[Array, "*batch in"],
    w: CompressedArray,
    *,
    transpose: bool = False,
    precision: Any = None,
    out_dtype: Any = None,
    implementation: Implementation | None = None,
    activation_bits: int | None = None,
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
            dense copy exists at any time; "cpu", "tpu" and "gpu" name kernels of `kernels_cpu` and `kernels_pallas`.
            None chooses for the platform that the program is compiled for, see `effjax.ops.dispatch`; where it runs on
            more than one device, reference, which XLA can partition.
        activation_bits: 8 lets a kernel quantize the activations to int8 on the way, which is faster with many rows and
            costs accuracy (`effjax.ops.quant_matmul`); None keeps those of the dtype of `x`. Implementations that
            compute in floating point pay no heed to it.

    Returns:
        `[*batch, out]`, or `[*batch, in]` when `transpose`.

    Raises:
        ValueError: a named implementation does not take these operands; the message says why.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> w = ej.quantize.RTN(bits=8, group_size=None).quantize(jnp.eye(8))
        >>> ej.ops.matmul(jnp.ones((1, 8)), w).shape
        (1, 8)
    """
    out_dtype = jnp.result_type(x, w.dtype) if out_dtype is None else jnp.dtype(out_dtype)
    if activation_bits not in (None, 8, 16, 24):
        raise ValueError(f"matmul: activation_bits must be None, 8, 16 or 24, found {activation_bits!r}")
    if isinstance(w, Prepared):
        activation_bits = activation_bits or w.activation_bits
        w = w if w.tile else w.array
    product = partial(matmul, precision=precision, activation_bits=activation_bits, transpose=transpose)
    if isinstance(w, Sum):
        parts = [product(x, part, out_dtype=jnp.float32) for part in w.parts]
        return jnp.asarray(sum(parts)).astype(out_dtype)
    if isinstance(w, UserTables):
        return _by_user(partial(product, out_dtype=out_dtype, implementation=implementation), x, w)
    if isinstance(w, LowRank):
        first, second = (w.b.mT, w.a.mT) if transpose else (w.a, w.b)
        thin = jnp.matmul(x, first, precision=precision, preferred_element_type=jnp.float32)
        wide = jnp.matmul(thin.astype(x.dtype), second, precision=precision, preferred_element_type=jnp.float32)
        return wide.astype(out_dtype)
    if isinstance(w, RowScaled | Permuted):
        # The inputs are brought to the stored rows before a product, or the results from them after a transposed one.
        if transpose:
            y = product(x, w.array, out_dtype=jnp.float32, implementation=implementation)
            y = y * w.row_scales.astype(jnp.float32) if isinstance(w, RowScaled) else jnp.take(y, w.places, axis=-1)
            return y.astype(out_dtype)
        if isinstance(w, RowScaled):
            x = (x.astype(jnp.float32) * w.row_scales.astype(jnp.float32)).astype(x.dtype)
        else:
            x = jnp.take(x, w.order, axis=-1)
        return product(x, w.array, out_dtype=out_dtype, implementation=implementation)
    return _matmul(x, w, transpose, precision, out_dtype, implementation, activation_bits)


def _by_user(product: Callable[..., jax.Array], x: jax.Array, w: UserTables) -> jax.Array:
    """Entry after entry of the leading axis of `x`, each with the tables of its user and all with the same codes."""
    if w.users is None:
        return product(x, w.array)
    if x.ndim < 2 or len(x) != len(w.users):
        raise LeafError(
            f"{w}: users are named for a batch of {len(w.users)}, but {list(x.shape)} is multiplied: its leading axis "
            "must be that batch (effjax.sketch.for_users)"
        )
    # A slice at a time: gathering the tables of all rows first would copy them once more, element by element.
    return jax.lax.map(lambda row: product(row[0], w.of(row[1])), (x, w.users))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _matmul(
    x: jax.Array,
    w: CompressedArray,
    transpose: bool,
    precision: Any,
    out_dtype: Any,
    implementation: str | None,
    activation_bits: int | None,
) -> jax.Array:
    static = {"transpose": transpose, "precision": precision, "activation_bits": activation_bits}
    if implementation is None:
        fields, treedef = jax.tree.flatten(w)
        product = _chosen(x, *fields, treedef=treedef, **static)
    else:
        rows = math.prod(x.shape[:-1])
        reason = dispatch.why_not(implementation, rows, x.dtype, w, transpose=transpose)
        if reason:
            raise ValueError(f"matmul: implementation={implementation!r} does not take this: {reason}")
        product = _run(implementation, x, w, **static)
    return product.astype(out_dtype)


def _forward(x: Any, w: Any, *static: Any) -> Any:
    trained = any(jax.tree.leaves(jax.tree.map(lambda p: p.perturbed, w, is_leaf=lambda p: hasattr(p, "perturbed"))))
    x, w = custom_vjp_primal_tree_values((x, w))
    # An empty slice stands for x where only its dtype is needed.
    saved = x if trained else jnp.zeros((0,), x.dtype)
    return _matmul(x, w, *static), (saved, w)


def _backward(
    transpose: bool,
    precision: Any,
    out_dtype: Any,
    implementation: str | None,
    activation_bits: int | None,
    residuals: Any,
    g: Any,
) -> tuple[Any, Any]:
    x, w = residuals
    if isinstance(g, SymbolicZero):
        return None, None
    # The kernel named for the product may not do the transposed one, and gradients keep their bits.
    name = implementation if implementation in ("reference", "blocked") else None
    dx = matmul(g, w, transpose=not transpose, precision=precision, out_dtype=x.dtype, implementation=name)
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


def _run(
    name: str,
    x: jax.Array,
    w: CompressedArray,
    *,
    transpose: bool,
    precision: Any,
    activation_bits: int | None,
) -> jax.Array:
    """One implementation; accumulated in float32."""
    if name == "reference":
        return _reference(x, w, transpose=transpose, precision=precision)
    if name == "blocked":
        rows = block_rows(w)
        assert rows is not None  # dispatch.why_not has asked
        return _blocked(x, w, rows=rows, transpose=transpose, precision=precision)
    kernel = dispatch.kernel(name, w)
    assert kernel is not None
    return kernel(x, w, transpose=transpose, activation_bits=activation_bits)


def _chosen_shape(x: Any, *fields: Any, treedef: Any, transpose: bool, **_: Any) -> tuple[tuple[int, ...], Any]:
    w = treedef.unflatten(fields)
    return (*x.shape[:-1], w.shape[-2 if transpose else -1]), _accumulator(x, w)


def _chosen_on(platform: str) -> Callable[..., jax.Array]:
    def run(
        x: jax.Array,
        *fields: jax.Array,
        treedef: Any,
        transpose: bool,
        precision: Any,
        activation_bits: int | None,
    ) -> jax.Array:
        w = treedef.unflatten(fields)
        how: dict[str, Any] = {"transpose": transpose, "activation_bits": activation_bits}
        name = dispatch.choose(platform, math.prod(x.shape[:-1]), x.dtype, w, **how)
        return _run(name, x, w, precision=precision, **how).astype(_accumulator(x, w))

    return run


def _partitioned(x: jax.Array, *fields: jax.Array, treedef: Any, **static: Any) -> jax.Array:
    return _run("reference", x, treedef.unflatten(fields), **static).astype(_accumulator(x, treedef.unflatten(fields)))


_chosen = platform_operation(
    "compressed_matmul",
    _chosen_shape,
    default=_partitioned,
    one_device={platform: _chosen_on(platform) for platform in dispatch.PLATFORMS},
    static_argnames=("treedef", "transpose", "precision", "activation_bits"),
)
