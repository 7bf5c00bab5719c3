"""Mixed precision to a budget: the method of every leaf that costs least in all, a multiple-choice knapsack."""

import dataclasses
import math
from collections.abc import Sequence
from glob import escape
from typing import Any, NamedTuple

import numpy as np

from effjax.errors import ConfigError
from effjax.quantize.sensitivity import LeafChoices, Sensitivity

CELLS = 2**26  # leaves times units of the budget up to which a table is made (a byte a cell)
SPREAD = 1e4  # losses are scaled to this range, which puts the solver's absolute gap of 1e-6 at 1e-10 of it
ROUNDS = 1000


def allocate(
    sensitivity: Sensitivity, *, budget_bits: float | None = None, budget_bytes: int | None = None
) -> list[tuple[str, Any]]:
    """Chooses one candidate a leaf so that the bytes stay within the budget and the expected loss is least.

    Exact (a multiple-choice knapsack, solved by dynamic programming, or by `scipy.optimize.milp` where the table would
    be too large), so never worse than any uniform choice that fits, and never worse with more bytes; the same input
    gives the same rules.

    Args:
        sensitivity: from `effjax.quantize.sensitivity`.
        budget_bits: container bits a weight, on average over the taken leaves; scales and tables count.
        budget_bytes: or container bytes of the taken leaves.

    Returns:
        Rules `(path, method)` for `quantize_params`, `calibrate` users and `Recipe`; leaves that were not taken are in
        no rule.

    Raises:
        ValueError: not exactly one budget, or one that is not positive.
        ConfigError: a budget below the least possible bytes, or a table of sizes alone.

    Example:
        >>> import effjax as ej, jax
        >>> a, b = jax.random.normal(jax.random.key(0), (2, 64, 8))
        >>> params = {"a": {"kernel": 9 * a}, "b": {"kernel": b}}
        >>> methods = [ej.quantize.RTN(bits=bits, group_size=32) for bits in (2, 3, 4)]
        >>> table = ej.quantize.sensitivity(params, methods)
        >>> rules = ej.quantize.allocate(table, budget_bits=3.7)
        >>> [(path, method.bits) for path, method in rules], table.bits(rules)
        ([('a/kernel', 4), ('b/kernel', 2)], 3.625)
    """
    if (budget_bits is None) == (budget_bytes is None):
        raise ValueError("pass exactly one of budget_bits= and budget_bytes=")
    given = budget_bits if budget_bytes is None else budget_bytes
    assert given is not None
    if not given > 0:
        raise ValueError(f"a budget of {given}: choose a positive number")
    budget = math.floor(given if budget_bytes is not None else given * sensitivity.weights / 8)
    if sensitivity.measure == "sizes":
        raise ConfigError("this table holds sizes alone: measure it on weights, sensitivity(params, candidates)")
    least = sensitivity.least_bytes
    if budget < least:
        bits = 8 * least / sensitivity.weights
        raise ConfigError(
            f"a budget of {budget:,} bytes ({8 * budget / sensitivity.weights:.3f} bits a weight) is below the least "
            f"possible, {least:,} bytes ({bits:.3f} bits a weight): raise it, or add candidates of fewer bytes"
        )
    index = _solve(sensitivity.leaves, budget)
    return [(escape(leaf.path), leaf.choices[i].method) for leaf, i in zip(sensitivity.leaves, index, strict=True)]


def family(method: Any, bits: Sequence[int] = (2, 3, 4, 5, 6, 8)) -> list[Any]:
    """One method at several widths: the usual candidates. Widths that it refuses are left out.

    Raises:
        ConfigError: it has no field `bits`, or takes none of them.

    Example:
        >>> import effjax as ej
        >>> [method.bits for method in ej.quantize.family(ej.quantize.RTN(group_size=32), (2, 4, 16))]
        [2, 4]
    """
    if not dataclasses.is_dataclass(method) or "bits" not in {f.name for f in dataclasses.fields(method)}:
        raise ConfigError(f"{type(method).__name__} has no field bits to choose: take RTN or another method of widths")
    found = []
    for width in bits:
        try:
            found.append(dataclasses.replace(method, bits=width))  # type: ignore[type-var]
        except ValueError:
            continue
    if not found:
        raise ConfigError(f"{type(method).__name__} takes none of the widths {list(bits)}")
    return found


def _solve(leaves: Sequence[LeafChoices], budget: int) -> list[int]:
    """The index of the chosen candidate of every leaf.

    Bytes are reduced first: the least of each leaf off, divided by what all differences share. Models repeat a few
    shapes, so what is left is usually small enough for a table over all budgets; else branch and bound decides.
    """
    low = [min(c.nbytes for c in leaf.choices) for leaf in leaves]
    unit = math.gcd(*(c.nbytes - least for leaf, least in zip(leaves, low, strict=True) for c in leaf.choices)) or 1
    options = [
        [
            _Option(index=j, units=(c.nbytes - least) // unit, loss=c.loss)
            for j, c in enumerate(leaf.choices)
            if not _dominated(leaf, j)
        ]
        for leaf, least in zip(leaves, low, strict=True)
    ]
    room = min((budget - sum(low)) // unit, sum(max(o.units for o in of_leaf) for of_leaf in options))
    solve = _by_table if room * len(leaves) <= CELLS else _by_branch_and_bound
    return [option.index for option in solve(options, room)]


class _Option(NamedTuple):
    index: int
    units: int
    loss: float


def _by_table(options: list[list[_Option]], room: int) -> list[_Option]:
    """Dynamic programming: the least loss of the leaves so far within every number of units."""
    best = np.zeros(room + 1)
    taken = np.zeros((len(options), room + 1), np.uint8)
    for i, of_leaf in enumerate(options):
        totals = np.full((len(of_leaf), room + 1), np.inf)
        for j, option in enumerate(of_leaf):
            if option.units <= room:
                totals[j, option.units :] = best[: room + 1 - option.units] + option.loss
        taken[i] = totals.argmin(axis=0)
        best = totals.min(axis=0)
    found = []
    for i in reversed(range(len(options))):
        found.append(options[i][taken[i, room]])
        room -= found[-1].units
    return found[::-1]


def _by_branch_and_bound(options: list[list[_Option]], room: int) -> list[_Option]:
    """Integer programming. A solution that breaks the budget in whole numbers, by less than the solver's tolerance, is
    cut off and the rest searched on, so the budget holds to the byte."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [(i, option) for i, of_leaf in enumerate(options) for option in of_leaf]
    columns = np.arange(len(flat))
    cost = np.array([option.loss - min(o.loss for o in options[i]) for i, option in flat])
    cost *= SPREAD / (cost.max() or 1.0)
    one_each = csr_array((np.ones(len(flat)), ([i for i, _ in flat], columns)), shape=(len(options), len(flat)))
    units = np.array([[option.units for _, option in flat]], np.float64)
    scale = max(units.max(), 1)
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(csr_array(units / scale), -np.inf, room / scale),
    ]
    for _ in range(ROUNDS):
        found = milp(
            cost,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0, "presolve": False},
        )
        if found.x is None:
            raise RuntimeError(f"the solver found no allocation: {found.message}")
        chosen = [max((c for c in columns if flat[c][0] == i), key=lambda c: found.x[c]) for i in range(len(options))]
        if sum(flat[c][1].units for c in chosen) <= room:
            return [flat[c][1] for c in chosen]
        ones = csr_array((np.ones(len(chosen)), (np.zeros(len(chosen), int), chosen)), shape=(1, len(flat)))
        constraints.append(LinearConstraint(ones, -np.inf, len(options) - 1))
    raise RuntimeError(f"{ROUNDS} allocations in a row broke the budget by less than the solver's tolerance")


def _dominated(leaf: LeafChoices, index: int) -> bool:
    """Whether another candidate is no larger and no worse, and better in one of them or named earlier."""
    this = leaf.choices[index]
    return any(
        other.nbytes <= this.nbytes
        and other.loss <= this.loss
        and (other.nbytes < this.nbytes or other.loss < this.loss or j < index)
        for j, other in enumerate(leaf.choices)
        if j != index
    )
