"""`lift`: makes any function accept compressed arrays wherever it accepts dense ones."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from effjax import _compat
from effjax.arrays.base import dense_struct, is_compressed
from effjax.lift.control_flow import control_flow_rules
from effjax.lift.coverage import Coverage, CoverageWarning, OnMaterialize, Policy
from effjax.lift.interpreter import Interpreter
from effjax.lift.operand import operand
from effjax.lift.rules import structural_rules
from effjax.paths import path_str

LARGE_CONSTANT = 2**20  # bytes of a closed-over array above which it was probably meant to be compressed


def lift(fn: Callable[..., Any], *, on_materialize: OnMaterialize = "error", limit: int = 2**20) -> Callable[..., Any]:
    """A function like `fn` that also takes compressed arrays anywhere in its arguments.

    `fn` is traced on the dense shapes, so it never sees a compressed array: Linen's shape checks, dtype promotion,
    dropout, remat and scan work as written. The trace is then evaluated with the compressed operands: contractions call
    `effjax.ops.matmul`, transposes, reshapes, slices, stacking and lookups keep the leaf compressed, control flow is
    emitted again through jax's public functions. Use it under `jax.jit`; without compressed arguments it calls `fn`.

    Args:
        fn: any function of pytrees: `model.apply`, an NNX function, a loss.
        on_materialize: what to do when an operation has no rule and needs the dense weight: "error", "warn", "allow".
        limit: bytes of a dense copy that never count.

    Returns:
        The lifted function. Its attribute `coverage(*args, **kwargs)` reports, without computing, which leaf stays
        compressed in which operation.

    Raises:
        MaterializeError: when called, under `on_materialize="error"`.

    Example:
        >>> import effjax as ej, jax, jax.numpy as jnp
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
        >>> model = lambda params, x: x @ params["kernel"]
        >>> qparams = ej.quantize_params(params, ej.quantize.RTN(bits=8, group_size=None))
        >>> jax.jit(ej.lift(model))(qparams, jnp.ones((2, 64))).shape
        (2, 32)
    """
    policy = Policy(on_materialize=on_materialize, limit=limit)

    @functools.wraps(fn)
    def lifted(*args: Any, **kwargs: Any) -> Any:
        return _evaluate(fn, policy, args, kwargs)[0]

    def coverage(*args: Any, **kwargs: Any) -> Coverage:
        found: list[Coverage] = []

        def trace(args: Any, kwargs: Any) -> Any:
            outputs, uses = _evaluate(fn, policy, args, kwargs)
            found.append(Coverage(tuple(uses)))
            return outputs

        arrays, rebuild = _split((args, kwargs))
        jax.eval_shape(lambda arrays: trace(*rebuild(arrays)), arrays)
        return found[0]

    lifted.coverage = coverage  # type: ignore[attr-defined]
    return lifted


def _evaluate(fn: Callable[..., Any], policy: Policy, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
    if not any(map(is_compressed, jax.tree.leaves((args, kwargs), is_leaf=is_compressed))):
        return fn(*args, **kwargs), []
    interp = Interpreter(rules={**structural_rules(), **control_flow_rules()}, policy=policy)
    outputs = interpret(fn, interp, args, kwargs)
    return outputs, interp.uses


def interpret(
    fn: Callable[..., Any],
    interp: Interpreter,
    args: Any,
    kwargs: Any,
    wrap: Callable[[str, Any], Any] = lambda path, leaf: leaf,
) -> Any:
    """Traces `fn` on dense shapes and evaluates the trace with `interp`.

    Args:
        wrap: `wrap(path, leaf)` may put an operand in place of a dense leaf (calibration watches some of them).
    """
    arrays, rebuild = _split((args, kwargs))
    paths = _paths((args, kwargs))
    structs = [_dense_aval(leaf) for leaf in arrays]
    closed, shape = jax.make_jaxpr(lambda dense: _call(fn, rebuild(dense)), return_shape=True)(structs)
    _warn_of_constants(closed.consts)
    inputs = [operand(x, path) if is_compressed(x) else wrap(path, x) for path, x in zip(paths, arrays, strict=True)]
    outputs = interp.dense(interp.run(closed, inputs), "output")
    return jax.tree.unflatten(jax.tree.structure(shape), outputs)


def _call(fn: Callable[..., Any], arguments: tuple[Any, Any]) -> Any:
    args, kwargs = arguments
    return fn(*args, **kwargs)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct) or is_compressed(x)


def _split(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays of `tree`, and a function that puts others in their place; flags and names stay as they are."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_compressed)
    is_data = [_is_array(leaf) for leaf in leaves]

    def rebuild(arrays: list[Any]) -> Any:
        data = iter(arrays)
        return treedef.unflatten([next(data) if flag else leaf for flag, leaf in zip(is_data, leaves, strict=True)])

    return [leaf for flag, leaf in zip(is_data, leaves, strict=True) if flag], rebuild


def _paths(tree: Any) -> list[str]:
    """Names of the arrays of `(args, kwargs)`, without the position of the argument."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_compressed)
    return [path_str(path[2:]) or path_str(path[1:]) for path, leaf in flat if _is_array(leaf)]


def _dense_aval(leaf: Any) -> Any:
    """What the model sees of an argument; a compressed leaf keeps the sharding type of its stored matrix."""
    if not is_compressed(leaf):
        return leaf
    struct = dense_struct(leaf)
    sharding = leaf.logical_sharding()
    return struct if sharding is None else jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)


def _warn_of_constants(consts: Any) -> None:
    for const in consts:
        size = math.prod(getattr(const, "shape", ())) * getattr(getattr(const, "dtype", None), "itemsize", 1)
        if size > LARGE_CONSTANT and not _compat.is_tracer(const):
            warnings.warn(
                f"the function closes over an array of shape {const.shape} ({size / 2**20:.1f} MiB), which stays "
                "dense: pass it as an argument to have it compressed",
                CoverageWarning,
                stacklevel=4,
            )
