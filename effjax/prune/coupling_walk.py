"""The walk over a jaxpr that finds coupled axes, into loops, branches and nested functions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from effjax import _compat
from effjax.prune.coupling import Coupling, Value, dims_of, fixed
from effjax.prune.coupling_rules import RULES, Rule, merged, shapes_of, unknown


def walk(coupling: Coupling, jaxpr: Any, args: Sequence[Value]) -> list[Value]:
    """The outputs of a (closed or open) jaxpr."""
    jaxpr, consts = _compat.open_jaxpr(jaxpr)
    env: dict[Any, Value] = {}

    def read(atom: Any) -> Value:
        return _constant(atom.val) if _compat.is_literal(atom) else env[atom]

    if consts:
        env.update(zip(jaxpr.constvars, map(_constant, consts), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        name, line = eqn.primitive.name, _compat.source_line(eqn)
        rule = _RULES.get(name, unknown)
        outputs = rule(coupling, eqn, [read(atom) for atom in eqn.invars], f"{name} ({line})" if line else name)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _constant(x: Any) -> Value:
    shape = np.shape(x)
    return Value(shape, fixed(shape))


def nested(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    p = eqn.params
    return walk(c, next(p[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in p), inputs)


def scan(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    """The same entries go in every step; what is carried around is cut alike before and after it."""
    p = eqn.params
    consts, carry, xs = _compat.scan_groups(p, inputs)
    steps = [_without_first(c.fix(x, [0], f"{why} runs along them")) for x in xs]
    before = len(c.work)
    outputs = _loop(c, lambda state: walk(c, p["jaxpr"], [*consts, *state, *steps]), carry, before, why)
    c.work[before:] = [(p["length"] * work, factors) for work, factors in c.work[before:]]
    shapes = shapes_of(eqn)
    stacked = [
        Value(shape, (*(f[None] for f in y.factors), *fixed(shape, [0])), y.from_data, y.vanishes)
        for y, shape in zip(outputs[len(carry) :], shapes[len(carry) :], strict=True)
    ]
    return [*outputs[: len(carry)], *stacked]


def _without_first(value: Value) -> Value:
    factors = [f[0] for f in value.factors if f.shape[0] == 1]
    return value.with_factors(factors, value.shape[1:])


def _loop(c: Coupling, body: Any, carry: list[Value], before: int, why: str) -> list[Value]:
    """Outputs of a body for a carry that has the labels of what comes back."""
    while True:
        outputs = body(carry)
        after = [merged(c, pair, why) for pair in zip(carry, outputs, strict=False)]
        if all(_covered(a) == _covered(b) and a.from_data == b.from_data for a, b in zip(after, carry, strict=True)):
            return [*after, *outputs[len(carry) :]]
        del c.work[before:]
        carry = after


def _covered(value: Value) -> set[int]:
    return {d for f in value.factors for d in dims_of(f)}


def while_loop(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond, body, carry = inputs[:n_cond], inputs[n_cond : n_cond + n_body], inputs[n_cond + n_body :]
    outputs = _loop(c, lambda state: walk(c, p["body_jaxpr"], [*body, *state]), carry, len(c.work), why)
    walk(c, p["cond_jaxpr"], [*cond, *outputs])
    return outputs


def cond(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    results = [walk(c, branch, inputs[1:]) for branch in eqn.params["branches"]]
    return [merged(c, values, why) for values in zip(*results, strict=True)]


_RULES: dict[str, Rule] = {
    **RULES,
    **dict.fromkeys(
        "jit pjit closed_call core_call checkpoint remat remat2 composite custom_jvp_call custom_vjp_call".split(),
        nested,
    ),
    "scan": scan,
    "while": while_loop,
    "cond": cond,
}
