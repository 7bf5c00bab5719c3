"""Structured pruning: scores of whole units, and masks of those that stay within a budget."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.base import PyTree
from effjax.errors import LeafError
from effjax.paths import leaves_with_paths, map_with_paths
from effjax.prune.groups import CoupledGroups, Group

Scores = Mapping[str, np.ndarray]  # float32[units] by name of the group


def magnitude_scores(params: PyTree, groups: CoupledGroups, *, norm: Literal[1, 2] = 2) -> Scores:
    """The norm of all weights that go with a unit, matrices and kernels only.

    With `norm=1` the score of Li et al., Pruning Filters for Efficient ConvNets (ICLR 2017), section 3.1, but of the
    kernels that read a channel too; with `norm=2` that of Fang et al., DepGraph (CVPR 2023).

    Example:
        >>> import effjax as ej
        >>> params = {"up": jnp.array([[3.0, 0.0]]), "down": jnp.array([[4.0], [1.0]])}
        >>> groups = ej.prune.coupled_groups(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 1)))
        >>> {name: s.tolist() for name, s in magnitude_scores(params, groups).items()}
        {'down[0]': [5.0, 1.0]}
    """
    powers = jax.tree.map(lambda w: jnp.abs(w.astype(jnp.float32)) ** norm, params)
    return {name: total ** (1 / norm) for name, total in _sums(powers, groups).items()}


def taylor_scores(
    loss: Callable[..., jax.Array], params: PyTree, groups: CoupledGroups, batches: Iterable[tuple[Any, ...]]
) -> Scores:
    """First-order change of the loss when a unit is removed: `mean over batches of (sum of w * dL/dw)**2`.

    Molchanov et al., Importance Estimation for Neural Network Pruning (CVPR 2019), section 3.1; the sum is over the
    weights of one member, and the squares of the members are added; matrices and kernels only.

    Args:
        loss: `loss(params, *batch) -> scalar`.
        params: dense parameters; leaves that are not floating are left out.
        groups: of `coupled_groups`.
        batches: tuples; more batches of fewer examples cancel less.

    Raises:
        LeafError: no batches.
    """

    @jax.jit
    def products(params: PyTree, batch: tuple[Any, ...]) -> PyTree:
        gradient = jax.grad(lambda p: loss(p, *batch), allow_int=True)(params)
        return jax.tree.map(
            lambda w, g: (
                w.astype(jnp.float32) * g.astype(jnp.float32)
                if jnp.issubdtype(w.dtype, jnp.floating)
                else jnp.zeros(w.shape)
            ),
            params,
            gradient,
        )

    total: dict[str, np.ndarray] = {}
    count = 0
    for batch in batches:
        count += 1
        for name, found in _sums(products(params, batch), groups, each=np.square).items():
            total[name] = total.get(name, 0) + found
    if not count:
        raise LeafError("taylor_scores: no batches to take gradients of; at least one is needed")
    return {name: found / count for name, found in total.items()}


def random_scores(groups: CoupledGroups, key: jax.Array) -> Scores:
    """Uniform random numbers: the baseline that every score must beat.

    Example:
        >>> from effjax.prune import CoupledGroups, Group
        >>> groups = CoupledGroups({"a": Group("a", 3, {("a", 0): np.arange(3)[:, None]})})
        >>> random_scores(groups, jax.random.key(0))["a"].shape
        (3,)
    """
    keys = jax.random.split(key, max(1, len(groups.groups)))
    return {g.name: np.asarray(jax.random.uniform(k, (g.units,))) for g, k in zip(groups, keys, strict=False)}


def _sums(tree: PyTree, groups: CoupledGroups, each: Callable[[Any], Any] = lambda x: x) -> dict[str, np.ndarray]:
    """The sum over the members of every unit of `each(sum over its entries)`; of matrices alone where there are."""
    leaves = {path: np.asarray(leaf) for path, leaf in leaves_with_paths(tree)}
    sums: dict[str, np.ndarray] = {}
    for group in groups:
        members = {m: e for m, e in group.members.items() if len(groups.shapes[m[0]]) > 1} or group.members
        total = np.zeros(group.units, np.float32)
        for (path, axis), entries in members.items():
            leaf = leaves[path]
            by_entry = leaf.sum(axis=tuple(d for d in range(leaf.ndim) if d != axis))
            total += each(by_entry[entries].sum(-1))
        sums[group.name] = total
    return sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structured:
    """How much is cut, and how the cut is shared out.

    Attributes:
        sparsity: the share that goes, of the dense model.
        of: what it is a share of: "units" (channels or heads), "weights" (parameters) or "flops" (operations of all
            products, with whatever cannot be cut).
        scope: "group" cuts the same share of every group, "global" the lowest scores wherever they are. With units,
            every group loses `sparsity` of its own, rounded down; else all together meet the budget.
        normalize: divides scores by the mean of their group before they are compared with those of other groups.
        least: units that every group keeps.
        multiple: what a group keeps is rounded up to a multiple of this, such as 8 for channels.

    Example:
        >>> Structured(sparsity=0.5, of="flops", scope="global").of
        'flops'
    """

    sparsity: float
    of: Literal["units", "weights", "flops"] = "units"
    scope: Literal["group", "global"] = "group"
    normalize: bool = True
    least: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity}: a share in [0, 1)")
        if self.of not in ("units", "weights", "flops"):
            raise ValueError(f"of={self.of!r}: choose 'units', 'weights' or 'flops'")
        if self.scope not in ("group", "global"):
            raise ValueError(f"scope={self.scope!r}: choose 'group' or 'global'")
        if self.least < 1 or self.multiple < 1:
            raise ValueError(
                f"least={self.least}, multiple={self.multiple}: at least 1; layers go as a whole elsewhere"
            )


def structured_mask(params: PyTree, groups: CoupledGroups, scores: Scores, method: Structured) -> PyTree:
    """Masks that keep or drop whole units, those of the lowest scores.

    Units go one after the other until the budget is met, so that at most one more than needed is gone (of every group,
    with `scope="group"`); see `Structured`.

    Args:
        params: dense parameters; only their shapes are used.
        groups: of `coupled_groups`, or some of them: `groups.select("*/mlp/*")`. Budgets are shares of the whole model.
        scores: `float[units]` for every group.
        method: the budget.

    Returns:
        A tree like `params`: boolean arrays (True stays) at leaves with units, None elsewhere; for `ej.apply_mask`,
        `ej.prune.sparse_training` and `ej.prune.shrink`.

    Raises:
        LeafError: scores of other groups, not finite or of another shape; no group at all; a budget out of reach.

    Example:
        >>> import effjax as ej
        >>> params = {"up": jnp.array([[3.0, 0.0]]), "down": jnp.array([[4.0], [1.0]])}
        >>> groups = ej.prune.coupled_groups(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 1)))
        >>> scores = ej.prune.magnitude_scores(params, groups)
        >>> mask = structured_mask(params, groups, scores, Structured(sparsity=0.5))
        >>> mask["up"].tolist(), mask["down"].tolist()
        ([[True, False]], [[True], [False]])
    """
    checked = _checked(groups, scores)
    keep = _kept(groups, checked, method)
    masks: dict[str, np.ndarray] = {}
    for group in groups:
        for (path, axis), entries in group.members.items():
            shape = groups.shapes[path]
            mask = masks.setdefault(path, np.ones(shape, bool))
            stays = np.ones(shape[axis], bool)
            stays[entries[~keep[group.name]]] = False
            mask &= stays.reshape(tuple(-1 if d == axis else 1 for d in range(len(shape))))
    _check_shapes(params, groups)
    return map_with_paths(lambda path, _: jnp.asarray(masks[path]) if path in masks else None, params)


def _check_shapes(params: PyTree, groups: CoupledGroups) -> None:
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves_with_paths(params)}
    for path in dict.fromkeys(path for group in groups for path, _ in group.members):
        if shapes.get(path) != groups.shapes[path]:
            raise LeafError(
                f"{path}: the groups are of a parameter {list(groups.shapes[path])}, this one is "
                f"{list(shapes[path]) if path in shapes else 'missing'}: find the groups of these parameters"
            )


def _checked(groups: CoupledGroups, scores: Scores) -> dict[str, np.ndarray]:
    if not groups.groups:
        raise LeafError(f"there is no group to cut: {groups}")
    found = {}
    for group in groups:
        if group.name not in scores:
            raise LeafError(f"{group.name} has no scores: they must be of the same groups, not of {list(scores)}")
        values = np.asarray(scores[group.name], np.float64)
        if values.shape != (group.units,) or not np.isfinite(values).all():
            raise LeafError(f"{group.name}: scores {list(values.shape)} must be {group.units} finite numbers")
        found[group.name] = values
    return found


def _kept(groups: CoupledGroups, scores: Mapping[str, np.ndarray], method: Structured) -> dict[str, np.ndarray]:
    """Which units of every group stay: as many as the budget allows."""
    order = _order(groups, scores, method)
    whole = _size(groups, None, method.of)
    if not whole:
        raise LeafError("of='flops': nothing is known of the operations of these groups; use of='weights'")
    allowed = (1 - method.sparsity) * whole * (1 + 1e-9)

    def keep(gone: int) -> dict[str, np.ndarray]:
        kept = {g.name: np.ones(g.units, bool) for g in groups}
        for _, name, unit in order[:gone]:
            kept[name][unit] = False
        return {g.name: _rounded(g, kept[g.name], scores[g.name], method.multiple) for g in groups}

    if method.of == "units" and method.scope == "group":
        return keep(sum(share <= method.sparsity + 1e-9 for share, _, _ in order))
    low, high = 0, len(order)
    if _size(groups, keep(high), method.of) > allowed:
        most = 1 - _size(groups, keep(high), method.of) / whole
        raise LeafError(
            f"sparsity={method.sparsity} of the {method.of} cannot be had: with {method.least} units left in every "
            f"group, {most:.4f} of them are gone; ask for less, or take more groups"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _size(groups, keep(middle), method.of) <= allowed else (middle + 1, high)
    if method.scope == "group":  # groups of one size lose equally many
        while 0 < low < len(order) and order[low][0] == order[low - 1][0]:
            low += 1
    return keep(low)


def _order(groups: CoupledGroups, scores: Mapping[str, np.ndarray], method: Structured) -> list[tuple[float, str, int]]:
    """The units in the order in which they go, by score or by share; the best `least` of a group are not among them."""
    ranked = []
    for number, group in enumerate(groups):
        values = scores[group.name]
        if method.normalize and values.mean() > 0:
            values = values / values.mean()
        lowest = np.argsort(values, kind="stable")[: max(0, group.units - method.least)]
        for place, unit in enumerate(lowest.tolist()):
            first = (place + 1) / group.units if method.scope == "group" else float(values[unit])
            ranked.append((first, number, place, group.name, unit))
    return [(first, name, unit) for first, _, _, name, unit in sorted(ranked)]


def _rounded(group: Group, keep: np.ndarray, scores: np.ndarray, multiple: int) -> np.ndarray:
    """With the best of those that went back again, until a multiple stays."""
    kept = min(group.units, -(-int(keep.sum()) // multiple) * multiple)
    gone = np.flatnonzero(~keep)
    back = gone[np.argsort(-scores[gone], kind="stable")[: kept - int(keep.sum())]]
    result = keep.copy()
    result[back] = True
    return result


def _size(groups: CoupledGroups, keep: Mapping[str, np.ndarray] | None, of: str) -> float:
    if of == "units":
        return sum(g.units if keep is None else int(keep[g.name].sum()) for g in groups)
    return groups.flops(keep) if of == "flops" else groups.weights(keep)
