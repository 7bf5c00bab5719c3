"""Shardings of compressed leaves that follow the dense ones, leaf by leaf."""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from effjax.arrays.base import PyTree, full_spec, is_compressed


def partition_specs(params: PyTree, dense_specs: PyTree, mesh: Mesh | AbstractMesh | None = None) -> PyTree:
    """`PartitionSpec`s for a tree with compressed leaves, from those of the dense tree.

    A packed field is sharded along an axis only where the cut falls between whole bytes and whole groups for every
    number of devices the arrays allow; otherwise that axis is replicated.

    Args:
        params: tree with compressed leaves (arrays or `ShapeDtypeStruct`s).
        dense_specs: tree of the same structure with one `PartitionSpec` (or None) a leaf, for the dense shapes.
        mesh: where given, an axis whose size the mesh does not divide is replicated instead of failing later.

    Returns:
        A tree of the structure of `params` with a `PartitionSpec` for each array.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> from jax.sharding import PartitionSpec as P
        >>> params = ej.quantize_params({"kernel": jnp.ones((64, 32))}, ej.quantize.RTN(bits=4, group_size=32))
        >>> specs = ej.partition_specs(params, {"kernel": P(None, "tensor")})
        >>> specs["kernel"].codes
        P(None, 'tensor')
    """

    def leaf_specs(leaf: Any, spec: PartitionSpec | None) -> Any:
        if not is_compressed(leaf):
            return PartitionSpec() if spec is None else spec
        specs = leaf.replace(**leaf.field_specs(full_spec(spec, leaf.ndim)))
        if mesh is None:
            return specs
        return jax.tree.map(lambda array, s: fit_spec(array.shape, s, mesh), leaf, specs, is_leaf=_is_spec)

    return jax.tree.map(leaf_specs, params, dense_specs, is_leaf=lambda x: is_compressed(x) or x is None)


def fit_spec(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`spec` without the entries whose devices do not divide their dimension of `shape`."""

    def devices(entry: Any) -> int:
        names = entry if isinstance(entry, tuple) else (entry,)
        return math.prod(mesh.shape[name] for name in names)

    entries = full_spec(spec, len(shape))
    return PartitionSpec(
        *(e if e is None or size % devices(e) == 0 else None for e, size in zip(entries, shape, strict=True))
    )


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
