"""Quantizing what n:m sparse leaves keep: half the values, at a few bits each."""

from functools import partial
from typing import Any

import jax

from effjax.arrays.base import PyTree, is_compressed
from effjax.arrays.nm_sparse import NMSparse
from effjax.arrays.quantized import Quantized
from effjax.errors import LeafError
from effjax.paths import Where, map_with_paths, matches


def quantize_kept(params: PyTree, method: Any, *, where: Where | None = None) -> PyTree:
    """Quantizes the kept values of the n:m sparse leaves of a tree (`ej.pack_mask`).

    Groups are of kept values: at 2:4, `group_size=64` is one scale for 128 inputs.

    Args:
        params: pytree, some leaves of which are `NMSparse`; the others stay as they are.
        method: a method that needs no statistics and gives `Quantized` leaves, such as `RTN`.
        where: pattern or predicate; all n:m leaves by default.

    Returns:
        The same tree, the values of its sparse leaves quantized.

    Raises:
        LeafError: no leaf is n:m sparse, one is quantized already, or does not fit the method.

    Example:
        >>> import effjax as ej, jax, jax.numpy as jnp
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
        >>> mask = ej.prune_mask(params, ej.prune.Magnitude(sparsity=0.5, pattern="2:4"))
        >>> sparse = quantize_kept(ej.pack_mask(params, mask), ej.quantize.RTN(bits=4, group_size=32, symmetric=True))
        >>> sparse["kernel"].bits_per_weight
        3.25
    """
    found = []

    def quantize(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, NMSparse) or not (where is None or matches(where, path, leaf)):
            return leaf
        found.append(path)
        if is_compressed(leaf.values):
            raise LeafError(f"{path} holds quantized values already ({leaf.values}): leave it out with where=")
        try:
            method.check(leaf.values.shape)
        except LeafError as error:
            raise LeafError(f"{path} {list(leaf.shape)}, {leaf.values.shape[-2]} kept inputs: {error}") from None
        values = _quantized(leaf.values, method)
        if not isinstance(values, Quantized):
            raise LeafError(
                f"{path}: {type(method).__name__} gives {type(values).__name__} values; use RTN or another "
                "method with uniform grids"
            )
        return leaf.replace(values=values)

    result = map_with_paths(quantize, params)
    if not found:
        raise LeafError("no leaf is n:m sparse: make them with ej.pack_mask(params, mask) first")
    return result


@partial(jax.jit, static_argnums=1)
def _quantized(values: jax.Array, method: Any) -> Any:
    return method.compress(values, stats=None, key=None)
