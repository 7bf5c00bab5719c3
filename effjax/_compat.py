"""The only file that may touch jax internals: evaluating one equation as `jax.core.eval_jaxpr` does.

Written for jax 0.10.2 to 0.12: `get_bind_params` returns one dict, subfunctions inside, since 0.10; `Jaxpr` and
`ClosedJaxpr` are one class since 0.12, hence `open_jaxpr`.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from jax._src import core, source_info_util
from jax.sharding import PartitionSpec


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on `args`; always a list of results."""
    result = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(result) if eqn.primitive.multiple_results else [result]


def equation_context(eqn: Any, here: Any) -> AbstractContextManager[Any]:
    """The name stack, source line and compute context that the equation was traced in.

    Args:
        here: `current_context()` where the equation is evaluated. Contexts are interned, and mostly the same: then only
            the name stack and the source line are set, at half the cost.
    """
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    source = source_info_util.user_context(eqn.source_info.traceback, name_stack=stack)
    if eqn.ctx is here:
        return source
    both = ExitStack()
    both.enter_context(source)
    both.enter_context(eqn.ctx.manager)
    return both


def source_line(eqn: Any) -> str:
    """The file name and line that an equation was traced from, or an empty string."""
    frame = source_info_util.user_frame(eqn.source_info.traceback)
    return "" if frame is None else f"{os.path.basename(frame.file_name)}:{frame.start_line}"


def current_context() -> Any:
    """The compute context (compute_on, mesh, metadata) of this place."""
    return core.JaxprEqnContext()


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A closed or open jaxpr as `(jaxpr, consts)`; up to jax 0.11 only a closed one has `consts`."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def result_aval(avals: Sequence[Any], shape: tuple[int, ...], dtype: Any) -> Any:
    """The abstract result of an operation on `avals`; in `shard_map` it varies over all axes that they do."""
    varying = varying_axes(avals)
    sharding = core.get_cur_mesh_sharding(PartitionSpec(*(None,) * len(shape)))
    return core.ShapedArray(shape, dtype, sharding=sharding, manual_axis_type=core.ManualAxisType(varying=varying))


def varying_axes(arrays: Sequence[Any]) -> frozenset[str]:
    """The manual mesh axes of `shard_map` over which any of the arrays (or abstract values) varies."""
    avals: Any = (x if isinstance(x, core.AbstractValue) else core.typeof(x) for x in arrays)
    return frozenset().union(*(aval.mat.varying for aval in avals))


def on_one_device(ctx: Any) -> bool:
    """Whether what is being lowered runs on one device: a program for one, or a fully manual body of `shard_map`."""
    axes = ctx.module_context.axis_context
    if hasattr(axes, "num_devices"):
        return axes.num_devices == 1
    return frozenset(axes.mesh.axis_names) == frozenset(axes.manual_axes)


def is_exported(ctx: Any) -> bool:
    """Whether what is being lowered is to run elsewhere (`jax.export`), where our kernels may be missing."""
    return bool(ctx.module_context.lowering_parameters.for_export)


def is_literal(atom: Any) -> bool:
    return isinstance(atom, core.Literal)


def is_tracer(x: Any) -> bool:
    return isinstance(x, core.Tracer)


def scan_groups(params: dict[str, Any], inputs: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The inputs of a scan equation as constants, carry and scanned arrays.

    Counts among the parameters up to jax 0.11, a tree of them since 0.12.
    """
    if "num_consts" in params:
        counts = [params["num_consts"], params["num_carry"]]
    else:
        counts = [len(list(group)) for group in params["ft_in"].unpack()]
    first, second = counts[0], counts[0] + counts[1]
    return list(inputs[:first]), list(inputs[first:second]), list(inputs[second:])
