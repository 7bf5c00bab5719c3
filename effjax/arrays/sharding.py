"""Shardings of compressed leaves that follow the dense ones, leaf by leaf."""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from effjax.arrays.base import CompressedArray, PyTree, full_spec, is_compressed


def partition_specs(params: PyTree, dense_specs: PyTree, mesh: Mesh | AbstractMesh | None = None) -> PyTree:
    """`PartitionSpec`s for a tree with compressed leaves, from those of the dense tree.

    A packed matrix is sharded along an axis only where that can cut all its fields between whole bytes and whole
    groups, so that every shard is a smaller compressed array; otherwise the axis is replicated in all of them.

    Args:
        params: tree with compressed leaves (arrays or `ShapeDtypeStruct`s).
        dense_specs: tree of the same structure with one `PartitionSpec` (or None) a leaf, for the dense shapes.
        mesh: where given, an axis that its devices cannot cut so is replicated instead of failing later.

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
            spec = PartitionSpec() if spec is None else spec
            return spec if mesh is None else fit_spec(leaf.shape, spec, mesh)
        entries = full_spec(spec, leaf.ndim)
        if mesh is not None:
            entries = tuple(e if e is None or _divides(leaf, d, e, mesh) else None for d, e in enumerate(entries))
        return leaf.replace(**leaf.field_specs(entries))

    return jax.tree.map(leaf_specs, params, dense_specs, is_leaf=lambda x: is_compressed(x) or x is None)


def fit_spec(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`spec` without the entries whose devices do not divide their dimension of `shape`."""
    entries = full_spec(spec, len(shape))
    return PartitionSpec(
        *(e if e is None or size % _devices(e, mesh) == 0 else None for e, size in zip(entries, shape, strict=True))
    )


def _divides(leaf: CompressedArray, axis: int, entry: Any, mesh: Mesh | AbstractMesh) -> bool:
    """Whether cutting logical `axis` over the devices of `entry` leaves every shard a whole compressed array."""
    devices = _devices(entry, mesh)
    if leaf.shape[axis] % devices:
        return False
    specs = leaf.replace(**leaf.field_specs(tuple(entry if d == axis else None for d in range(leaf.ndim))))
    fields, cuts = jax.tree.leaves(leaf), jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    sizes = [[devices if e == entry else 1 for e in full_spec(s, x.ndim)] for x, s in zip(fields, cuts, strict=True)]
    if any(n % k for x, ks in zip(fields, sizes, strict=True) for n, k in zip(x.shape, ks, strict=True)):
        return False
    local = [
        jax.ShapeDtypeStruct([n // k for n, k in zip(x.shape, ks, strict=True)], x.dtype)
        for x, ks in zip(fields, sizes, strict=True)
    ]
    # A refusal of the array itself leaves the shard whole; a cut inside a group gives a shape that is neither.
    return jax.tree.structure(leaf).unflatten(local).shape[axis] in (leaf.shape[axis], leaf.shape[axis] // devices)


def _devices(entry: Any, mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[name] for name in (entry if isinstance(entry, tuple) else (entry,)))
