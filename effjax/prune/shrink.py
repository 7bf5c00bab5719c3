"""`shrink`: parameters without the entries that a structured mask drops."""

from collections.abc import Mapping
from functools import reduce

import jax.numpy as jnp
import numpy as np

from effjax import _compat
from effjax.arrays.base import PyTree
from effjax.errors import LeafError
from effjax.paths import leaves_with_paths, map_with_paths
from effjax.prune.api import masks_by_path
from effjax.prune.groups import CoupledGroups


def shrink(params: PyTree, mask: PyTree, groups: CoupledGroups) -> PyTree:
    """Smaller parameters that compute what the masked ones do: same paths and dtypes, shorter axes.

    The function that they belong to must take its widths from the shapes, or be made anew for the smaller widths (a
    Flax module is made with other features, see `effjax.prune.decoder` for decoders).

    Args:
        params: dense parameters, as `groups` were found for.
        mask: of `structured_mask`, or any tree of boolean arrays that drops whole units.
        groups: what goes together.

    Raises:
        LeafError: a mask of another shape, one that drops single weights or a part of a unit, or a whole group.

    Example:
        >>> import effjax as ej
        >>> params = {"up": jnp.array([[3.0, 0.0]]), "down": jnp.array([[4.0], [1.0]])}
        >>> groups = ej.prune.coupled_groups(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 1)))
        >>> mask = {"up": jnp.array([[True, False]]), "down": jnp.array([[True], [False]])}
        >>> {name: w.tolist() for name, w in shrink(params, mask, groups).items()}
        {'down': [[4.0]], 'up': [[3.0]]}
    """
    keep = kept_units(params, mask, groups)
    gone: dict[str, dict[int, np.ndarray]] = {}
    for group in groups:
        for (path, axis), entries in group.members.items():
            dropped = gone.setdefault(path, {}).setdefault(axis, np.zeros(groups.shapes[path][axis], bool))
            dropped[entries[~keep[group.name]]] = True

    def smaller(path: str, leaf):
        for axis, dropped in gone.get(path, {}).items():
            if dropped.any():
                leaf = jnp.take(leaf, np.flatnonzero(~dropped), axis=axis)
        return leaf

    return map_with_paths(smaller, params)


def kept_units(params: PyTree, mask: PyTree, groups: CoupledGroups) -> Mapping[str, np.ndarray]:
    """Which units a mask keeps, `bool[units]` by name of the group; for `groups.flops` and `groups.weights`.

    Raises:
        LeafError: see `shrink`.
    """
    masks = {path: _concrete(path, m) for path, m in masks_by_path(params, mask).items()}
    left = {path: _axes_left(m) for path, m in masks.items()}
    for path, m in masks.items():
        whole = [
            stays.reshape([-1 if d == axis else 1 for d in range(m.ndim)]) for axis, stays in enumerate(left[path])
        ]
        if not (reduce(np.logical_and, whole, np.ones(m.shape, bool)) == m).all():
            raise LeafError(
                f"{path} {list(m.shape)}: the mask drops single weights, not whole channels; shrink takes masks of "
                "structured_mask, others are for apply_mask and pack_mask"
            )
    shapes = {path: leaf.shape for path, leaf in leaves_with_paths(params)}
    keep: dict[str, np.ndarray] = {}
    used: dict[str, list[np.ndarray]] = {path: [np.ones(n, bool) for n in m.shape] for path, m in masks.items()}
    for group in groups:
        seen = {}
        for (path, axis), entries in group.members.items():
            if groups.shapes[path] != shapes.get(path):
                raise LeafError(
                    f"{path} {list(shapes.get(path, ()))}: the groups are of shape {list(groups.shapes[path])}; find "
                    "the groups of these parameters"
                )
            stays = left[path][axis] if path in left else np.ones(shapes[path][axis], bool)
            seen[path, axis] = stays[entries]
        whole = np.concatenate(list(seen.values()), axis=1)
        for (path, _), stays in seen.items():
            torn = np.flatnonzero((stays != whole[:, :1]).any(1))
            if torn.size:
                raise LeafError(
                    f"{path} {list(shapes[path])}: unit {torn[0]} of {group.name} is dropped in part; all of "
                    f"{[p for p, _ in group.members]} must drop it together"
                )
        keep[group.name] = whole[:, 0]
        if not keep[group.name].any():
            raise LeafError(f"{group.name}: the mask drops all {group.units} units; keep at least one")
        for (path, axis), entries in group.members.items():
            if path in used:
                used[path][axis][entries[~keep[group.name]]] = False
    for path, axes in used.items():
        for axis, stays in enumerate(axes):
            if (stays != left[path][axis]).any():
                raise LeafError(
                    f"{path} {list(shapes[path])}: the mask drops entries of axis {axis} that are in no group"
                    + (f" ({groups.pinned[path, axis]})" if (path, axis) in groups.pinned else "")
                )
    return keep


def _concrete(path: str, mask) -> np.ndarray:
    if _compat.is_tracer(mask):
        raise LeafError(f"{path}: the shapes of a smaller model depend on the mask: call shrink outside of jit")
    return np.asarray(mask)


def _axes_left(mask: np.ndarray) -> list[np.ndarray]:
    """For every axis, the entries with something left."""
    return [np.asarray(mask.any(axis=tuple(d for d in range(mask.ndim) if d != axis))) for axis in range(mask.ndim)]
