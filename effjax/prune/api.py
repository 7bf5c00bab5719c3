"""`prune_mask` chooses which weights stay; `apply_mask` zeroes the others, `pack_mask` really drops them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax import _compat
from effjax.arrays.base import PyTree, is_compressed
from effjax.arrays.nm_sparse import NMSparse
from effjax.arrays.view import fold, unfold
from effjax.errors import LeafError
from effjax.lift.calibrate import InputStats
from effjax.paths import Where, leaves_with_paths, map_with_paths
from effjax.prune.pattern import Pattern, keep_highest
from effjax.prune.score import kept_of
from effjax.rules import default_axes
from effjax.transform import Leaf, per_leaf, select


def prune_mask(
    params: PyTree,
    method: Any,
    *,
    stats: PyTree | None = None,
    key: jax.Array | None = None,
    where: Where | None = None,
) -> PyTree:
    """Masks of the weights that stay.

    Arguments, rules and errors are those of `effjax.quantize_params`.

    Returns:
        A tree like `params`: boolean arrays of the weights' shapes (True stays) at selected leaves, None elsewhere.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> params = {"kernel": jnp.arange(8.0).reshape(4, 2)}
        >>> mask = ej.prune_mask(params, ej.prune.Magnitude(sparsity=0.5))
        >>> mask["kernel"].sum().item()
        4
    """
    leaves = select(params, method, where=where, stats=stats, key=key)
    together: dict[Any, dict[str, Leaf]] = {}
    for path, leaf in leaves.items():
        if leaf.method.scope == "global":
            together.setdefault(leaf.method, {})[path] = leaf
    masks = {path: mask for m, group in together.items() for path, mask in _global_masks(m, group).items()}
    return per_leaf(
        lambda leaf: _unfold_mask(leaf, masks[leaf.path] if leaf.path in masks else _mask(leaf)), leaves, params
    )


def _mask(leaf: Leaf) -> jax.Array:
    return _compiled_mask(leaf.method, leaf.fold(leaf.value), leaf.stats, leaf.key)


@partial(jax.jit, static_argnums=0)
def _compiled_mask(method: Any, w: jax.Array, stats: InputStats | None, key: jax.Array | None) -> jax.Array:
    return method.mask(w, stats=stats, key=key)


def _global_masks(method: Any, leaves: dict[str, Leaf]) -> dict[str, jax.Array]:
    """One threshold over the units of all leaves; a block counts by its mean score and its size."""
    pattern = Pattern.parse(method.pattern)
    units = {
        path: pattern.unit_scores(method.scores(leaf.fold(leaf.value), stats=leaf.stats, key=leaf.key))
        for path, leaf in leaves.items()
    }
    flat = jnp.concatenate([u.ravel() for u in units.values()])
    keep = keep_highest(flat, kept_of(flat.size, method.sparsity))
    masks, start = {}, 0
    for path, u in units.items():
        masks[path] = pattern.expand(keep[start : start + u.size].reshape(u.shape))
        start += u.size
    return masks


def _unfold_mask(leaf: Leaf, mask: jax.Array) -> jax.Array:
    """A mask `[*L, in, out]` in the shape of the weight."""
    ndim = leaf.value.ndim
    axes = (*leaf.in_axes, *leaf.out_axes)
    lead = ndim - len(axes)
    split = mask.reshape(*mask.shape[:lead], *(leaf.value.shape[axis] for axis in axes))
    order = [lead + axes.index(axis) for axis in range(-len(axes), 0)]
    return jnp.transpose(split, (*range(lead), *order))


def apply_mask(params: PyTree, mask: PyTree) -> PyTree:
    """Zeroes the weights where the mask is False; dense arrays of the same dtype.

    Raises:
        LeafError: a mask of another shape than its weight, or on a compressed leaf.
    """
    masks = _masks_by_path(params, mask)
    return map_with_paths(
        lambda path, w: jnp.where(masks[path], w, jnp.zeros((), w.dtype)) if path in masks else w, params
    )


def pack_mask(params: PyTree, mask: PyTree) -> PyTree:
    """Keeps only the values under an n:m mask: `NMSparse` leaves, whose dropped bytes are really gone.

    The pattern is the smallest n:m of m in 4, 8, 16, 2 that covers the mask, on concrete masks; a mask that no such
    pattern makes smaller is refused.

    Raises:
        LeafError: a mask of another shape, one under a trace, or one without an n:m structure.

    Example:
        >>> import effjax as ej, jax
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
        >>> packed = ej.pack_mask(params, ej.prune_mask(params, ej.prune.Magnitude(pattern="2:4")))
        >>> packed["kernel"].n, packed["kernel"].m, ej.nbytes(packed)
        (2, 4, 4352)
    """
    masks = _masks_by_path(params, mask)
    patterns = {path: _pattern_of(path, m, dict(leaves_with_paths(params))[path]) for path, m in masks.items()}

    def pack(path: str, w: Any) -> Any:
        if path not in masks:
            return w
        in_axes, out_axes = default_axes(path, w.ndim)
        n, m = patterns[path]
        packed = _compiled_pack(fold(w, in_axes, out_axes), fold(masks[path], in_axes, out_axes), n, m)
        return unfold(packed, w.shape, in_axes, out_axes)

    return map_with_paths(pack, params)


@partial(jax.jit, static_argnums=(2, 3))
def _compiled_pack(w: jax.Array, mask: jax.Array, n: int, m: int) -> NMSparse:
    return NMSparse.from_dense(w, mask, n=n, m=m)


def _pattern_of(path: str, mask: Any, w: Any) -> tuple[int, int]:
    if _compat.is_tracer(mask):
        raise LeafError(f"{path}: pack_mask looks at the mask to find its n:m pattern: call it outside of jit")
    rows = np.asarray(fold(mask, *default_axes(path, w.ndim)))
    for m in (4, 8, 16, 2):
        if rows.shape[-2] % m == 0:
            kept = rows.reshape(*rows.shape[:-2], rows.shape[-2] // m, m, rows.shape[-1]).sum(-2)
            n = int(kept.max())
            index_bits = (m - 1).bit_length()
            if 0 < n < m and n * (8 * w.dtype.itemsize + index_bits) < m * 8 * w.dtype.itemsize:
                return n, m
    raise LeafError(
        f"{path} {list(w.shape)}: the mask has no n:m pattern (m = 2, 4, 8, 16) that would save bytes; use apply_mask, "
        "or prune with pattern='2:4'"
    )


def _masks_by_path(params: PyTree, mask: PyTree) -> dict[str, Any]:
    weights = dict(leaves_with_paths(params))
    masks = dict(leaves_with_paths(mask))
    for path, m in masks.items():
        if path not in weights:
            raise LeafError(f"the mask has {path!r}, the parameters do not: masks are trees like the parameters")
        w = weights[path]
        if is_compressed(w):
            raise LeafError(f"{path} is compressed already ({w}): prune before other transforms")
        if m.shape != w.shape:
            raise LeafError(f"{path}: the mask is {list(m.shape)}, the weight {list(w.shape)}")
    return masks
