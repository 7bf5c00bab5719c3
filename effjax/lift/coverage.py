"""What happened to every compressed leaf: in which operations it stayed compressed, in which it was made dense."""

import dataclasses
import warnings
from typing import Literal

from effjax.errors import MaterializeError
from effjax.lift.operand import Operand

OnMaterialize = Literal["error", "warn", "allow"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What to do when an operation has no rule for a compressed operand.

    Attributes:
        on_materialize: "error", "warn" or "allow" dense copies above the limit.
        limit: bytes of a dense copy that are always allowed.
    """

    on_materialize: OnMaterialize = "error"
    limit: int = 2**20

    def __post_init__(self) -> None:
        if self.on_materialize not in ("error", "warn", "allow"):
            raise ValueError(f"on_materialize={self.on_materialize!r}: choose 'error', 'warn' or 'allow'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """One operation that met a compressed leaf.

    Attributes:
        path: the leaf.
        op: the jax primitive.
        kept: whether the leaf stayed compressed.
        nbytes: bytes of the dense copy that was made, 0 when kept.
    """

    path: str
    op: str
    kept: bool
    nbytes: int = 0


class CoverageWarning(UserWarning):
    """A compressed leaf was made dense, or a dense weight cannot be reached."""


def check(policy: Policy, use: Use, operand: Operand) -> None:
    """Raises or warns when a dense copy is above what the policy allows."""
    if use.kept or use.nbytes <= policy.limit or policy.on_materialize == "allow":
        return
    message = (
        f"{use.path}: `{use.op}` has no rule for {type(operand.array).__name__} and would make a dense copy of "
        f"{list(operand.shape)} {operand.dtype.name} ({use.nbytes / 2**20:.1f} MiB). Leave this leaf out of the "
        f"transform with a rule ({use.path!r}, None), or allow it: effjax.lift(fn, on_materialize='allow')."
    )
    if policy.on_materialize == "error":
        raise MaterializeError(message)
    warnings.warn(message, CoverageWarning, stacklevel=2)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """The uses of all compressed leaves in one trace; prints as a table."""

    uses: tuple[Use, ...]

    @property
    def materialized(self) -> tuple[Use, ...]:
        return tuple(use for use in self.uses if not use.kept)

    def __str__(self) -> str:
        rows = sorted({(u.path, u.op, "kept" if u.kept else f"dense, {u.nbytes:,} bytes") for u in self.uses})
        if not rows:
            return "no compressed leaf was used"
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(f"{path:<{widths[0]}}  {op:<{widths[1]}}  {what}" for path, op, what in rows)
