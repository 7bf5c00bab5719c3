"""Rules for operations that hold jaxprs: each is emitted again through jax's public function for it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from effjax import _compat
from effjax.arrays.base import full_spec
from effjax.errors import CalibrationError
from effjax.lift.interpreter import Interpreter, Rule
from effjax.lift.operand import Operand, Probe, is_operand
from effjax.lift.rules import field_specs


def _inner(interp: Interpreter, jaxpr: Any, args: Any, op: str) -> tuple[list[Any], dict[str, Any]]:
    """Runs a body: its outputs, dense, and what was recorded inside."""
    with interp.frame() as taps:
        outputs = interp.dense(interp.run(jaxpr, args), f"{op} output")
    return outputs, taps


def jit(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """Evaluated in place: under an outer jit an inner one only names a piece of program."""
    return interp.run(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")), inputs)


def custom_call(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """A user's derivative rule may look at the weight itself, so it gets it dense; see `Policy`.

    Calibration differentiates nothing and looks inside.
    """
    return None if interp.record is None else interp.run(eqn.params["call_jaxpr"], inputs)


def checkpoint(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    def body(*args: Any) -> Any:
        return _inner(interp, eqn.params["jaxpr"], args, "checkpoint")

    remat = jax.checkpoint(body, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    outputs, taps = remat(*inputs)
    _emit(interp, taps)
    return outputs


def scan(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    p = eqn.params
    consts, carry, xs = _compat.scan_groups(p, inputs)
    n_carry = len(carry)
    carry = interp.dense(carry, "scan carry")
    stacked: list[Any] = []
    rebuild: list[Any] = []
    for x in xs:
        sliced = _scanned(x) if is_operand(x) else None
        if is_operand(x) and sliced is None:
            (x,) = interp.dense([x], "scan over a dimension that is not stacked")
        stacked.append(x if sliced is None else sliced[0])
        rebuild.append(None if sliced is None else sliced[1])

    def body(carry: list[Any], xs: list[Any]) -> Any:
        xs = [x if make is None else make(x) for x, make in zip(xs, rebuild, strict=True)]
        outputs, taps = _inner(interp, p["jaxpr"], [*consts, *carry, *xs], "scan")
        return outputs[:n_carry], (outputs[n_carry:], taps)

    extra = {"_split_transpose": True} if p.get("_split_transpose") else {}
    carry, (ys, taps) = jax.lax.scan(
        body, carry, stacked, length=p["length"], reverse=p["reverse"], unroll=p["unroll"], **extra
    )
    over = {x.path for x in xs if is_operand(x)}
    _emit(interp, {path: s if path in over else jax.tree.map(lambda a: a.sum(0), s) for path, s in taps.items()})
    return [*carry, *ys]


def _scanned(w: Operand) -> tuple[Any, Any] | None:
    """An operand whose first dimension is a stacked axis: the array with that axis in front, and how to see a slice."""
    stackable = len(w.layout.axes) - (0 if isinstance(w.array, Probe) else 2)
    axis = w.layout.whole_axis(0)
    if axis is None and w.shape[0] == 1:  # a stack of one: its axis is in no dimension, any such axis will do
        axis = next((a for a in range(stackable) if not w.layout.atoms_of(a)), None)
    if axis is None or axis >= stackable or len(w.layout.axes[axis]) != 1:
        return None
    front = jax.tree.map(lambda field: jnp.moveaxis(field, axis, 0) if axis else field, w.array)
    layout = w.layout.squeeze((0,)).without_axis(axis)
    return front, lambda array: Operand(array, layout, w.path)


def while_loop(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = inputs[:n_cond], inputs[n_cond : n_cond + n_body]
    init = interp.dense(inputs[n_cond + n_body :], "while carry")
    shapes = {}
    if interp.record is not None:  # what is recorded must be in the state from the start
        shapes = jax.eval_shape(lambda *c: _inner(interp, p["body_jaxpr"], [*body_consts, *c], "while")[1], *init)

    def cond(state: Any) -> jax.Array:
        return _inner(interp, p["cond_jaxpr"], [*cond_consts, *state[0]], "while")[0][0]

    def body(state: Any) -> Any:
        outputs, taps = _inner(interp, p["body_jaxpr"], [*body_consts, *state[0]], "while")
        return outputs, jax.tree.map(jnp.add, state[1], taps)

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    outputs, taps = jax.lax.while_loop(cond, body, (init, zeros))
    _emit(interp, taps)
    return outputs


def cond(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    index, *operands = inputs

    def branch(jaxpr: Any) -> Any:
        return lambda *args: _inner(interp, jaxpr, args, "cond")

    branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
    if interp.record is not None:  # branches must return alike: what one records, the others return as zero
        recorded = [jax.eval_shape(b, *operands)[1] for b in branches]
        union = {path: s for taps in recorded for path, s in taps.items()}

        def padded(b: Any) -> Any:
            def run(*args: Any) -> Any:
                outputs, taps = b(*args)
                zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), union)
                return outputs, {**zeros, **taps}

            return run

        branches = [padded(b) for b in branches]
    outputs, taps = jax.lax.switch(index, branches, *operands)
    _emit(interp, taps)
    return outputs


def shard_map(interp: Interpreter, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    p = eqn.params
    manual = p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"]
    specs: list[Any] = []
    values: list[Any] = []
    for value, spec in zip(inputs, p["in_specs"], strict=True):
        inner = _shard_specs(value, spec, p["mesh"]) if is_operand(value) else spec
        if inner is None:
            (value,) = interp.dense([value], "shard_map input")
            inner = spec
        values.append(value)
        specs.append(inner)

    def body(*local: Any) -> Any:
        seen = [
            Operand(x, value.layout.resized(x.shape), value.path) if is_operand(value) else x
            for x, value in zip(local, values, strict=True)
        ]
        outputs, taps = _inner(interp, p["jaxpr"], seen, "shard_map")
        if taps:
            raise CalibrationError(
                f"calibrate cannot look inside shard_map (leaf {sorted(taps)[0]!r}): calibrate the function without "
                "it, or shard it with jax.jit and NamedSharding"
            )
        return outputs

    return list(
        jax.shard_map(
            body,
            mesh=p["mesh"],
            in_specs=tuple(specs),
            out_specs=list(p["out_specs"]),
            axis_names=set(manual),
            check_vma=p["check_vma"],
        )(*(value.array if is_operand(value) else value for value in values))
    )


def _shard_specs(w: Operand, spec: P, mesh: Any) -> Any:
    """Specs of the stored fields that cut the weight as `spec` does; None where a shard would not be compressed."""
    specs = field_specs(w, spec, mesh)
    if specs is None:
        return None

    def local(size: int, entry: Any) -> int:
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        return size // math.prod(mesh.shape[name] for name in names)

    def shard(field: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(map(local, field.shape, full_spec(spec, field.ndim))), field.dtype)

    inside = jax.tree.map(shard, w.array, specs)
    seen = w.layout.resized(inside.shape).shape
    return specs if seen == tuple(map(local, w.shape, full_spec(spec, w.ndim))) else None


def _emit(interp: Interpreter, taps: dict[str, Any]) -> None:
    for path, statistics in taps.items():
        interp.tap(path, statistics)


def control_flow_rules() -> dict[str, Rule]:
    """Rules by primitive name; the older names are those of jax 0.10."""
    return {
        "jit": jit,
        "pjit": jit,
        "closed_call": jit,
        "core_call": jit,
        "checkpoint": checkpoint,
        "remat": checkpoint,
        "remat2": checkpoint,
        "scan": scan,
        "while": while_loop,
        "cond": cond,
        "shard_map": shard_map,
        "composite": jit,
        "custom_jvp_call": custom_call,
        "custom_vjp_call": custom_call,
    }
