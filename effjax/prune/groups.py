"""`coupled_groups`: which axes of which parameters must be cut together, found in the jaxpr of the function."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from effjax.arrays.base import PyTree, is_compressed
from effjax.errors import LeafError
from effjax.paths import Where, leaves_with_paths, matches
from effjax.prune.coupling import FIXED, Coupling, Value, along, fixed
from effjax.prune.coupling_walk import walk

Axis = tuple[str, int]  # path of a parameter and number of its axis


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units that may be cut, each with everything that goes with it.

    Attributes:
        name: path and axis of one member.
        units: how many there are: channels, or heads.
        members: for every axis that is cut, the entries of each unit along it, `int[units, width]`. A width above 1 is
            a block, as the head dimension of a head.
    """

    name: str
    units: int
    members: Mapping[Axis, np.ndarray]

    def matches(self, where: Where | None) -> bool:
        """Whether a pattern, or a predicate `(path, axis) -> bool`, takes any of its members."""
        return where is None or any(matches(where, path, axis) for path, axis in self.members)


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Multiplications of one product.

    Attributes:
        flops: floating-point operations of the whole product.
        axes: for every axis of it that may become shorter, the group and the unit of each entry, `int[size]` twice; -1
            where an entry stays.
    """

    flops: int
    axes: tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class CoupledGroups:
    """What may be cut from the parameters of a function, and what may not; prints as a table.

    Attributes:
        groups: by name.
        pinned: why an axis, or a part of it, stays.
        shapes: of all parameters, by path.
        work: of all products, for budgets of operations; empty where unknown.
    """

    groups: Mapping[str, Group]
    pinned: Mapping[Axis, str] = dataclasses.field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    work: tuple[Work, ...] = ()

    def __iter__(self) -> Any:
        return iter(self.groups.values())

    def select(self, where: Where) -> "CoupledGroups":
        """The groups with a member that `where` takes, a path pattern or a predicate `(path, axis) -> bool`.

        Raises:
            LeafError: there are none.
        """
        found = {name: group for name, group in self.groups.items() if group.matches(where)}
        if not found:
            raise LeafError(f"where={where!r} takes no group; there are {list(self.groups)}")
        numbers = {old: new for new, old in enumerate(i for i, name in enumerate(self.groups) if name in found)}
        moved = np.array([numbers.get(i, -1) for i in range(len(self.groups))] + [-1])
        work = tuple(dataclasses.replace(w, axes=tuple((moved[g], u) for g, u in w.axes)) for w in self.work)
        return dataclasses.replace(self, groups=found, work=work)

    def flops(self, keep: Mapping[str, np.ndarray] | None = None) -> float:
        """Floating-point operations of all products, of the whole model or with the units `keep` (`bool[units]`)."""
        kept = [np.ones(g.units, bool) if keep is None else np.asarray(keep[g.name]) for g in self]
        starts = np.cumsum([0, *(k.size for k in kept)])
        flat = np.concatenate([*kept, [True]])  # the last is for what stays
        return float(
            sum(
                w.flops * math.prod(flat[np.where(g < 0, -1, starts[g] + u)].mean() for g, u in w.axes)
                for w in self.work
            )
        )

    def weights(self, keep: Mapping[str, np.ndarray] | None = None) -> int:
        """Number of parameters, of the whole model or with the units `keep`."""
        sizes = {path: list(shape) for path, shape in self.shapes.items()}
        for group in self:
            gone = 0 if keep is None else int(group.units - np.sum(keep[group.name]))
            for (path, axis), entries in group.members.items():
                sizes[path][axis] -= gone * entries.shape[1]
        return sum(math.prod(shape) for shape in sizes.values())

    def __str__(self) -> str:
        rows = [("group", "units", "cut together (entries a unit)")]
        for group in self:
            members = [_spelled(axis) + (f" ({e.shape[1]})" * (e.shape[1] > 1)) for axis, e in group.members.items()]
            rows.append((group.name, str(group.units), " ".join(members)))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows]
        reasons: dict[str, list[str]] = {}
        for axis, why in self.pinned.items():
            reasons.setdefault(why, []).append(_spelled(axis))
        lines += [f"stay, since {why}: {' '.join(axes)}" for why, axes in reasons.items()]
        return "\n".join(lines)


def _spelled(axis: Axis) -> str:
    return f"{axis[0]}[{axis[1]}]"


def coupled_groups(apply: Callable[..., Any], params: PyTree, *inputs: Any) -> CoupledGroups:
    """Finds what must be cut together, so that a smaller model computes what the masked one does.

    The function is traced on shapes alone and the axes of its parameters are followed through it: an axis that is
    contracted with another one is cut with it, as are axes that are added (residual connections, biases), the heads
    that share keys, or the gate of a feed-forward layer and what it multiplies. Where an axis is split into blocks, as
    queries into heads, whole blocks go. What cannot be cut is pinned, and `pinned` says why: inputs and outputs of the
    function, axes that a norm, a mean or a softmax runs along (removed zeros would still count in them), products of
    activations whose scale may depend on their number, and operations that are unknown here.

    The analysis sees shapes, not the arithmetic that made constants: do not scale by a width that is cut (`x / 64`).

    Args:
        apply: `apply(params, *inputs)`, in the mode of inference, e.g. `model.apply`.
        params: dense arrays or `jax.ShapeDtypeStruct`s; statistics of norms may be among them.
        inputs: example inputs, arrays or shapes of them; sizes above 1, so that axes can be told apart.

    Raises:
        LeafError: a parameter is compressed.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"up": jnp.ones((4, 16)), "bias": jnp.ones(16), "down": jnp.ones((16, 3))}
        >>> apply = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
        >>> groups = coupled_groups(apply, params, jnp.ones((2, 4)))
        >>> for group in groups:
        ...     print(group.name, group.units, list(group.members))
        down[0] 16 [('bias', 0), ('down', 0), ('up', 1)]
        >>> groups.flops(), groups.weights()
        (448.0, 128)
    """
    leaves = leaves_with_paths(params)
    for path, leaf in leaves:
        if is_compressed(leaf):
            raise LeafError(f"{path} is compressed already ({leaf}): shrink first, then apply other transforms")
    structs = jax.eval_shape(lambda *arguments: arguments, params, *inputs)
    closed = jax.make_jaxpr(apply)(*structs)
    axes, labels, values = _labelled(leaves)
    coupling = Coupling()
    data = [Value(tuple(x.shape), fixed(x.shape), from_data=True) for x in jax.tree.leaves(structs[1:])]
    for output in walk(coupling, closed, [*values, *data]):
        for factor in output.factors:
            coupling.pin(factor, "they are outputs of the function")
    component, pinned = coupling.resolve(labels)
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves}
    return _grouped(axes, shapes, component, pinned, coupling.work)


def _labelled(leaves: Sequence[tuple[str, Any]]) -> tuple[dict[Axis, int], int, list[Value]]:
    """The first label of every axis, the number of labels, and the parameters with theirs."""
    axes, end, values = {}, FIXED + 1, []
    for path, leaf in leaves:
        factors = []
        for axis, size in enumerate(leaf.shape):
            if size > 1:
                axes[path, axis] = end
                factors.append(along(np.arange(end, end + size), axis, leaf.ndim))
                end += size
        values.append(Value(tuple(leaf.shape), tuple(factors), vanishes=True))
    return axes, end, values


def _grouped(
    axes: dict[Axis, int],
    shapes: dict[str, tuple[int, ...]],
    component: np.ndarray,
    pinned: dict[int, str],
    work: Sequence[tuple[int, tuple[np.ndarray, ...]]],
) -> CoupledGroups:
    """Components with members in the same axes, equally many in each, are the units of a group."""
    found: dict[int, dict[Axis, list[int]]] = {}
    reasons: dict[Axis, str] = {}
    for (path, axis), start in axes.items():
        for entry, c in enumerate(component[start : start + shapes[path][axis]].tolist()):
            if c in pinned:
                reasons.setdefault((path, axis), pinned[c])
            else:
                found.setdefault(c, {}).setdefault((path, axis), []).append(entry)
    alike: dict[Any, list[int]] = {}
    for c, members in found.items():
        alike.setdefault(tuple((axis, len(entries)) for axis, entries in members.items()), []).append(c)
    groups: dict[str, Group] = {}
    unit_of = np.full((component.max(initial=0) + 1, 2), -1)
    for signature, units in alike.items():
        members = {axis: np.array([found[c][axis] for c in units]) for axis, _ in signature}
        if len(members) < 2 or len(units) < 2:
            for axis in members:
                reasons.setdefault(axis, "nothing goes with them" if len(members) < 2 else "they are one unit")
            continue
        name = _name(members, shapes, groups)
        unit_of[units] = [(len(groups), i) for i in range(len(units))]
        groups[name] = Group(name, len(units), members)
    terms = []
    for flops, factors in work:
        seen = [unit_of[component[f.ravel()]].T * (f.ravel() != FIXED) - (f.ravel() == FIXED) for f in factors]
        terms.append(Work(flops, tuple((g, u) for g, u in seen if (g >= 0).any())))
    return CoupledGroups(groups, reasons, shapes, tuple(terms))


def _name(members: Mapping[Axis, Any], shapes: Mapping[str, tuple[int, ...]], taken: Mapping[str, Any]) -> str:
    """Of the first matrix among the members; with a number where another group has a part of the same axis."""
    path, axis = next((m for m in members if len(shapes[m[0]]) > 1), next(iter(members)))
    names = (f"{path}[{axis}]" + (f"#{i}" if i > 1 else "") for i in range(1, len(taken) + 2))
    return next(name for name in names if name not in taken)
