"""Evaluates a jaxpr in which some variables hold compressed arrays."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax

from effjax import _compat
from effjax.lift.coverage import Policy, Use, check
from effjax.lift.operand import Operand, Probe, is_operand

Rule = Callable[["Interpreter", Any, list[Any]], list[Any] | None]


@dataclasses.dataclass
class Interpreter:
    """One walk over a traced function.

    A rule takes the interpreter, an equation and its inputs, some of them `Operand`s, and returns the outputs, or None
    when it does not apply; then the operands are materialised as the policy allows and the equation is evaluated as it
    stands.

    Attributes:
        rules: rules by primitive name.
        policy: what to do without a rule.
        uses: every meeting of an equation with a compressed leaf, appended to while walking.
        taps: statistics recorded in the innermost frame, by path; None when not calibrating.
        record: `record(interpreter, operand, inputs)`, called by the dot rule for operands it watches.
    """

    rules: dict[str, Rule]
    policy: Policy
    uses: list[Use] = dataclasses.field(default_factory=list)
    taps: dict[str, Any] = dataclasses.field(default_factory=dict)
    record: Callable[..., None] | None = None

    def run(self, jaxpr: Any, args: Sequence[Any], consts: Sequence[Any] | None = None) -> list[Any]:
        """The outputs of a (closed) jaxpr; outputs may be operands."""
        jaxpr, own = _compat.open_jaxpr(jaxpr)
        env: dict[Any, Any] = {}

        def read(atom: Any) -> Any:
            return atom.val if _compat.is_literal(atom) else env[atom]

        env.update(zip(jaxpr.constvars, own if consts is None else consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        here = _compat.current_context()
        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            with _compat.equation_context(eqn, here):
                outputs = self.evaluate(eqn, inputs) if any(map(is_operand, inputs)) else _compat.bind(eqn, inputs)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def evaluate(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        """One equation with at least one operand among its inputs."""
        name = eqn.primitive.name
        rule = self.rules.get(name)
        outputs = None if rule is None else rule(self, eqn, inputs)
        if outputs is not None:
            return outputs
        return _compat.bind(eqn, self.dense(inputs, name))

    def kept(self, operand: Operand, op: str) -> None:
        self.uses.append(Use(path=operand.path, op=op, kept=True))

    def dense(self, values: Sequence[Any], op: str, *, allowed: bool = False) -> list[Any]:
        """`values` with operands made dense, each reported as done by `op`, and checked unless `allowed`."""
        return [self._dense(value, op, allowed) if is_operand(value) else value for value in values]

    def _dense(self, operand: Operand, op: str, allowed: bool) -> jax.Array:
        if not isinstance(operand.array, Probe):
            use = Use(path=operand.path, op=op, kept=False, nbytes=operand.dense_nbytes)
            if not allowed:
                check(self.policy, use, operand)
            self.uses.append(use)
        return operand.materialize()

    @contextmanager
    def frame(self) -> Iterator[dict[str, Any]]:
        """Collects what is recorded inside, so that control flow can carry it out as outputs."""
        outer, self.taps = self.taps, {}
        try:
            yield self.taps
        finally:
            self.taps = outer

    def tap(self, path: str, statistics: Any) -> None:
        """Adds statistics to those of the same path in this frame."""
        self.taps[path] = self.taps[path] + statistics if path in self.taps else statistics
