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
from effjax.paths import Where, leaves_with_paths, map_with_paths
from effjax.prune.pattern import Pattern, keep_highest
from effjax.prune.score import kept_of
from effjax.rules import default_axes
from effjax.transform import How, Inputs, Leaf, on_shards, per_leaf, select


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
    together: dict[Any, list[Leaf]] = {}
    for path, leaf in leaves.items():
        together.setdefault(leaf.method if leaf.method.scope == "global" else path, []).append(leaf)
    masks: dict[str, jax.Array] = {}
    for group in together.values():
        found = on_shards(group, partial(_compiled_masks, tuple(leaf.how for leaf in group)))
        masks.update((leaf.path, mask) for leaf, mask in zip(group, found, strict=True))
    return per_leaf(lambda leaf: masks[leaf.path], leaves, params)


@partial(jax.jit, static_argnums=0)
def _compiled_masks(how: tuple[How, ...], inputs: list[Inputs]) -> list[jax.Array]:
    """The masks of one weight, or of all weights that compare their scores under one method of global scope."""
    method = how[0][0]
    matrices = [(fold(w, *axes), stats, key) for (_, *axes), (w, stats, key) in zip(how, inputs, strict=True)]
    if method.scope != "global":
        masks = [method.mask(w, stats=stats, key=key) for w, stats, key in matrices]
    else:
        masks = _global_masks(method, [method.scores(w, stats=stats, key=key) for w, stats, key in matrices])
    return [unfold_mask(mask, w.shape, *axes) for mask, (_, *axes), (w, _, _) in zip(masks, how, inputs, strict=True)]


def _global_masks(method: Any, scores: list[jax.Array]) -> list[jax.Array]:
    """One threshold over the units of all leaves; a block counts by its mean score."""
    pattern = Pattern.parse(method.pattern)
    units = [pattern.unit_scores(s) for s in scores]
    flat = jnp.concatenate([u.ravel() for u in units])
    keep = keep_highest(flat, kept_of(flat.size, method.sparsity))
    ends = np.cumsum([u.size for u in units])
    return [pattern.expand(keep[end - u.size : end].reshape(u.shape)) for u, end in zip(units, ends, strict=True)]


def unfold_mask(
    mask: jax.Array, shape: tuple[int, ...], in_axes: tuple[int, ...], out_axes: tuple[int, ...]
) -> jax.Array:
    """A matrix `[*L, in, out]` such as a mask in the shape of the weight."""
    axes = (*in_axes, *out_axes)
    lead = len(shape) - len(axes)
    split = mask.reshape(*shape[:lead], *(shape[axis] for axis in axes))
    order = [lead + axes.index(axis) for axis in range(-len(axes), 0)]
    return jnp.transpose(split, (*range(lead), *order))


def apply_mask(params: PyTree, mask: PyTree) -> PyTree:
    """Zeroes the weights where the mask is False; dense arrays of the same dtype.

    Raises:
        LeafError: a mask of another shape than its weight, or on a compressed leaf.
    """
    masks = masks_by_path(params, mask)
    return map_with_paths(
        lambda path, w: jnp.where(masks[path], w, jnp.zeros((), w.dtype)) if path in masks else w, params
    )


def pack_mask(params: PyTree, mask: PyTree) -> PyTree:
    """Keeps only the values under an n:m mask: `NMSparse` leaves, whose dropped bytes are really gone.

    The pattern is the n:m of m up to 16 that covers the mask in the fewest bytes; a mask that none of them makes
    smaller is refused. Masks must be concrete, weights need not be.

    Raises:
        LeafError: a mask of another shape, one under a trace, or one without an n:m structure.

    Example:
        >>> import effjax as ej, jax
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
        >>> packed = ej.pack_mask(params, ej.prune_mask(params, ej.prune.Magnitude(pattern="2:4")))
        >>> packed["kernel"].n, packed["kernel"].m, ej.nbytes(packed)
        (2, 4, 4352)
    """
    masks = masks_by_path(params, mask)
    weights = dict(leaves_with_paths(params))
    patterns = {path: _pattern_of(path, m, weights[path]) for path, m in masks.items()}

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
    bits = 8 * w.dtype.itemsize
    found = []
    for m in range(2, 17):
        if rows.shape[-2] % m == 0:
            kept = rows.reshape(*rows.shape[:-2], rows.shape[-2] // m, m, rows.shape[-1]).sum(-2)
            n = max(1, int(kept.max()))
            found.append((n * (bits + (m - 1).bit_length()) / m, m, n))
    if not found or min(found)[0] >= bits:
        raise LeafError(
            f"{path} {list(w.shape)}: the mask has no n:m pattern (m up to 16) that would save bytes; use apply_mask, "
            "or prune with pattern='2:4'"
        )
    _, m, n = min(found)
    return n, m


def masks_by_path(params: PyTree, mask: PyTree) -> dict[str, Any]:
    """The masks by name, each checked against its weight."""
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
