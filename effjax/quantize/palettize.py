"""Clustered training over parameter trees: initialise clusters, take soft weights, export hard ones."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.base import PyTree, is_compressed
from effjax.arrays.view import View, fold, unfold
from effjax.errors import LeafError, RuleError
from effjax.paths import Where, leaves_with_paths, map_with_paths, path_str
from effjax.quantize.centroids import kmeans
from effjax.quantize.dkm import harden_matrix, join, map_tables, split
from effjax.rules import default_axes
from effjax.transform import Leaf, per_leaf, select


@partial(jax.tree_util.register_dataclass, data_fields=["centroids", "tau"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Clusters:
    """The buffers of one clustered weight.

    Attributes:
        centroids: `float32[*L, groups, entries]`, as the last step left them.
        tau: `float32[*L, groups]`, temperature in units of squared weights.
    """

    centroids: Float[Array, "*L groups entries"]
    tau: Float[Array, "*L groups"]


def init_clusters(params: PyTree, method: Any, *, where: Where | None = None) -> PyTree:
    """Centroids and temperatures to start training with: those of post-training k-means.

    Args:
        params: pytree of weights `[*L, in, out]`.
        method: `DKM` or `EDKM`, or a list of `(where, method | None)` rules, the first match of which decides.
        where: pattern or predicate for a single method; the matrices of dense layers by default.

    Returns:
        A tree like `params` with `Clusters` at the chosen leaves and None elsewhere: state to keep beside the
        optimizer's, a pytree like any other.

    Raises:
        RuleError: a rule matches nothing.
        LeafError: a leaf does not fit its method, with its path and shape.

    Example:
        >>> import effjax as ej
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32)), "bias": jnp.zeros(32)}
        >>> state = init_clusters(params, ej.quantize.DKM(bits=3, group_columns=16))
        >>> state["kernel"].centroids.shape, state["bias"]
        ((2, 8), None)
    """
    return per_leaf(_init, select(params, method, where=where, stats=None, key=None), params)


def _init(leaf: Leaf) -> Clusters:
    return _init_matrix(leaf.method, fold(leaf.value, leaf.in_axes, leaf.out_axes))


@partial(jax.jit, static_argnums=0)
def _init_matrix(method: Any, w: jax.Array) -> Clusters:
    def init(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        flat = part.astype(jnp.float32).reshape(-1)
        tiny = jnp.finfo(jnp.float32).tiny
        return kmeans(flat, method.entries), method.tau * (jnp.maximum(flat.var(), tiny) if method.relative else 1.0)

    centroids, tau = map_tables(init, split(w, method.group_columns))
    return Clusters(centroids=centroids, tau=jnp.broadcast_to(tau, centroids.shape[:-1]))


def palettize(
    params: PyTree, method: Any, state: PyTree, *, where: Where | None = None, temperature: Any = 1.0
) -> tuple[PyTree, PyTree]:
    """Soft clustered weights in place of the chosen matrices; differentiable with respect to `params`.

    Call it in the loss function, on the parameters that the optimizer updates, and pass the result to the model. The
    gradient flows through assignments and centroids of this step; the centroids that the next step starts from are
    buffers, cut off from the gradient.

    Args:
        params: the parameters that are trained.
        method, where: as given to `init_clusters`.
        state: `Clusters` of `init_clusters` or of the last step.
        temperature: a factor on every `tau`, for a schedule that ends in harder assignments; a number or a scalar.

    Returns:
        The parameters with dense soft weights, of the same shapes and dtypes, and the state for the next step.

    Raises:
        RuleError: a rule matches nothing, or a chosen leaf has no clusters in `state`.
        LeafError: a leaf does not fit its method or its clusters.

    Example:
        >>> import effjax as ej
        >>> params = {"kernel": jnp.array([[-1.0, -0.5], [0.5, 1.0]])}
        >>> method = ej.quantize.EDKM(bits=1, tau=0.01)
        >>> state = init_clusters(params, method)
        >>> soft, state = palettize(params, method, state)
        >>> soft["kernel"].tolist()
        [[-0.75, -0.75], [0.75, 0.75]]
    """
    leaves = select(params, method, where=where, stats=None, key=None)
    clusters = _clusters_by_path(state)
    missing = sorted(leaves.keys() - clusters.keys())
    if missing:
        raise RuleError(
            f"state has no clusters for {', '.join(missing)}: make it with init_clusters and the same rules"
        )
    results = {path: _soften(leaf, clusters[path], temperature) for path, leaf in leaves.items()}

    def at(path: str, old: Any, which: int) -> Any:
        return results[path][which] if path in results else old

    soft = map_with_paths(lambda path, x: at(path, x, 0), params)
    return soft, map_with_paths(lambda path, x: results[path][1] if path in results else clusters.get(path), params)


def _soften(leaf: Leaf, clusters: Clusters, temperature: Any) -> tuple[jax.Array, Clusters]:
    matrix = fold(leaf.value, leaf.in_axes, leaf.out_axes)
    parts = split(matrix, leaf.method.group_columns)
    if clusters.centroids.shape != (*parts.shape[:-2], leaf.method.entries):
        raise LeafError(
            f"{leaf.path} {list(leaf.value.shape)}: its clusters are {list(clusters.centroids.shape)}, "
            f"{leaf.method} wants {[*parts.shape[:-2], leaf.method.entries]}: make them again with init_clusters"
        )
    start = jax.lax.stop_gradient(clusters.centroids)
    soft, centroids = map_tables(leaf.method.soft, parts, start, clusters.tau * temperature)
    dense = _unfold_dense(join(soft), leaf)
    return dense, Clusters(centroids=jax.lax.stop_gradient(centroids), tau=clusters.tau)


def _unfold_dense(matrix: jax.Array, leaf: Leaf) -> jax.Array:
    view: Any = unfold(matrix, leaf.value.shape, leaf.in_axes, leaf.out_axes)  # type: ignore[arg-type]
    return view.unfold(matrix) if isinstance(view, View) else matrix


def harden(params: PyTree, state: PyTree) -> PyTree:
    """Exports clustered weights: every weight with clusters becomes the nearest centroid, as a `Codebook` leaf.

    Args:
        params: the trained parameters (not the soft ones, though these harden to the same where they are not ties).
        state: `Clusters` of the last step.

    Returns:
        The tree with `Codebook` leaves: one table a group of columns, packed codes of `bits` bits.

    Raises:
        RuleError: clusters for leaves that `params` does not have.
        LeafError: clusters that do not fit their leaf.

    Example:
        >>> import effjax as ej
        >>> params = {"kernel": jnp.array([[-1.0, -0.5], [0.5, 1.0]])}
        >>> hard = harden(params, init_clusters(params, ej.quantize.DKM(bits=1)))
        >>> hard["kernel"].materialize().tolist(), hard["kernel"].bits
        ([[-0.75, -0.75], [0.75, 0.75]], 1)
    """
    clusters = _clusters_by_path(state)
    unknown = sorted(clusters.keys() - dict(leaves_with_paths(params)).keys())
    if unknown:
        raise RuleError(f"state has clusters for {', '.join(unknown)}, which params do not have")
    return map_with_paths(lambda path, w: _harden(path, w, clusters[path]) if path in clusters else w, params)


def _harden(path: str, w: Any, clusters: Clusters) -> Any:
    if is_compressed(w):
        raise LeafError(f"{path} is compressed already ({w}): harden the parameters that were trained")
    in_axes, out_axes = default_axes(path, w.ndim)
    matrix = jax.eval_shape(lambda x: fold(x, in_axes, out_axes), w).shape
    *lead, groups, entries = clusters.centroids.shape
    if tuple(lead) != matrix[:-2] or matrix[-1] % groups:
        raise LeafError(f"{path} {list(w.shape)}: clusters {list(clusters.centroids.shape)} are of another weight")
    return unfold(_harden_matrix((in_axes, out_axes), w, clusters.centroids), w.shape, in_axes, out_axes)


@partial(jax.jit, static_argnums=0)
def _harden_matrix(axes: tuple[Any, Any], w: jax.Array, centroids: jax.Array) -> Any:
    return harden_matrix(fold(w, *axes), centroids)


def _clusters_by_path(state: PyTree) -> dict[str, Clusters]:
    found = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, Clusters))
    return {path_str(path): leaf for path, leaf in found if isinstance(leaf, Clusters)}
