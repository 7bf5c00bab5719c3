"""Operations whose implementation is chosen when the program is lowered, by platform and number of devices.

`jax.lax.platform_dependent` does the same by tracing every implementation at every call; here only the one that is
lowered is ever traced, once a shape, which keeps the trace of a large model short.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from effjax import _compat

Implementation = Callable[..., Any]


def platform_operation(
    name: str,
    shape: Callable[..., Any],
    default: Implementation,
    one_device: Mapping[str, Implementation],
    static_argnames: tuple[str, ...],
) -> Callable[..., Any]:
    """An operation of arrays with hashable keyword parameters.

    Args:
        name: of the primitive, as it appears in a jaxpr.
        shape: `shape(*structs, **static) -> (shape, dtype)` of the result; a list of such pairs where it has several,
            which implementations then return as a list.
        default: the implementation that the compiler can partition and that an exported program keeps,
            `default(*arrays, **static)`.
        one_device: implementations for a platform ("cpu", "tpu", "cuda", "rocm") where the program runs on one device;
            what they slice may be spread over devices otherwise.
        static_argnames: the keyword parameters.

    Returns:
        `operation(*arrays, **static)`; it can be jitted and vmapped but not differentiated: wrap it in a `custom_vjp`.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def batched(implementation: Implementation) -> Implementation:
        compiled = jax.jit(implementation, static_argnames=static_argnames)  # one trace a shape, not one a lowering

        def run(*arrays: jax.Array, mapped: tuple[tuple[bool, ...], ...], **static: Any) -> list[jax.Array]:
            def call(*slices: jax.Array) -> list[jax.Array]:
                results = compiled(*slices, **static)
                return results if isinstance(results, list) else [results]

            for flags in reversed(mapped):
                call = jax.vmap(call, in_axes=tuple(0 if flag else None for flag in flags))
            return call(*arrays)

        return run

    def abstract(*avals: Any, mapped: tuple[tuple[bool, ...], ...], **static: Any) -> Any:
        shapes = [tuple(aval.shape) for aval in avals]
        lead = []
        for flags in mapped:
            lead.append(next(s[0] for s, flag in zip(shapes, flags, strict=True) if flag))
            shapes = [s[1:] if flag else s for s, flag in zip(shapes, flags, strict=True)]
        structs = [jax.ShapeDtypeStruct(s, aval.dtype) for s, aval in zip(shapes, avals, strict=True)]
        results = shape(*structs, **static)
        each = results if isinstance(results, list) else [results]
        return [_compat.result_aval(avals, (*lead, *inner), dtype) for inner, dtype in each]

    def batch(args: Any, dims: Any, *, mapped: tuple[tuple[bool, ...], ...], **static: Any) -> Any:
        flags = tuple(dim is not None for dim in dims)
        front = [a if dim is None else jax.numpy.moveaxis(a, dim, 0) for a, dim in zip(args, dims, strict=True)]
        results = primitive.bind(*front, mapped=(flags, *mapped), **static)
        return results, [0] * len(results)

    primitive.def_abstract_eval(abstract)
    primitive.def_impl(batched(default))
    batching.primitive_batchers[primitive] = batch
    partitioned = mlir.lower_fun(batched(default), multiple_results=True)
    mlir.register_lowering(primitive, partitioned)
    for platform, implementation in one_device.items():
        single = mlir.lower_fun(batched(implementation), multiple_results=True)

        def lowering(ctx: Any, *args: Any, single: Any = single, **params: Any) -> Any:
            here = _compat.on_one_device(ctx) and not _compat.is_exported(ctx)
            return (single if here else partitioned)(ctx, *args, **params)

        mlir.register_lowering(primitive, lowering, platform=platform)

    def operation(*arrays: jax.Array, **static: Any) -> Any:
        results = primitive.bind(*arrays, mapped=(), **static)
        structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        return results if isinstance(shape(*structs, **static), list) else results[0]

    return operation
