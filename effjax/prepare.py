"""`prepare`: compressed parameters once made ready for the kernels, and `restore` back to what is saved and trained."""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.arrays.base import CompressedArray, PyTree, is_compressed
from effjax.arrays.codebook import Codebook
from effjax.arrays.nm_sparse import NMSparse
from effjax.arrays.permuted import Permuted
from effjax.arrays.prepared import Prepared
from effjax.arrays.row_scaled import RowScaled
from effjax.arrays.sum import Sum
from effjax.errors import LeafError


def prepare(params: PyTree, *, activation_bits: int | None = None) -> PyTree:
    """Compressed leaves in the form that products read fastest; pure, and undone by `restore`.

    Every product works without it. What it changes: tables and scales of codebooks and of sparse weights become
    float32, which they are converted to at every product otherwise; and `activation_bits=8` asks for products that
    quantize their activations to int8, which dense and restored weights never do on their own. Codes stay as they lie:
    the kernels read the packing of the leaves (`docs/kernels-cpu.md`).

    Args:
        params: pytree; dense leaves stay as they are. Works under `jit`, `eval_shape` and `vmap`.
        activation_bits: 8, 16, 24, or None for those of the dtype of the activations (`effjax.ops.matmul`).

    Returns:
        The same tree with `Prepared` leaves, which `lift`, `materialize` and shardings take like any others.

    Raises:
        LeafError: nothing in the tree is compressed, or a leaf is prepared already.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> params = {"kernel": ej.quantize.NF4(block_size=4).quantize(jnp.eye(8))}
        >>> ready = ej.prepare(params)
        >>> ready["kernel"].array.scales.dtype.name, ej.restore(ready)["kernel"].scales.dtype.name
        ('float32', 'float16')
    """
    if activation_bits not in (None, 8, 16, 24):
        raise ValueError(f"prepare: activation_bits must be None, 8, 16 or 24, found {activation_bits!r}")
    leaves = jax.tree.leaves(params, is_leaf=is_compressed)
    if not any(map(is_compressed, leaves)):
        raise LeafError(f"prepare: none of the {len(leaves)} leaves is compressed; quantize_params comes first")
    if any(isinstance(leaf, Prepared) for leaf in leaves):
        raise LeafError("prepare: some leaves are prepared already; call ej.restore(params) first")
    return jax.tree.map(
        lambda leaf: _prepared(leaf, activation_bits) if is_compressed(leaf) else leaf, params, is_leaf=is_compressed
    )


def restore(params: PyTree) -> PyTree:
    """The leaves that `prepare` was given, with the same bytes; a tree without prepared leaves is returned as it is.

    Example:
        >>> import effjax as ej, jax, jax.numpy as jnp
        >>> params = {"kernel": ej.quantize.NF4(block_size=4).quantize(jnp.eye(8))}
        >>> back = ej.restore(ej.prepare(params, activation_bits=8))
        >>> all(map(jnp.array_equal, jax.tree.leaves(back), jax.tree.leaves(params)))
        True
    """
    return jax.tree.map(
        lambda leaf: leaf.restore() if isinstance(leaf, Prepared) else leaf, params, is_leaf=is_compressed
    )


def _prepared(leaf: CompressedArray, activation_bits: int | None) -> Prepared:
    stored = tuple(x.dtype.name for x in jax.tree.leaves(leaf) if jnp.issubdtype(x.dtype, jnp.inexact))
    return Prepared(array=_widened(leaf), stored=stored, activation_bits=activation_bits)


def _widened(leaf: Any) -> Any:
    """Small floating fields in float32, where a kernel would convert them at every product."""
    if isinstance(leaf, Codebook | NMSparse):
        return jax.tree.map(lambda x: x.astype(jnp.float32) if _narrow(leaf, x) else x, leaf)
    if isinstance(leaf, RowScaled | Permuted):
        return leaf.replace(array=_widened(leaf.array))
    if isinstance(leaf, Sum):
        return leaf.replace(parts=tuple(_widened(part) for part in leaf.parts))
    return leaf


def _narrow(leaf: Codebook | NMSparse, field: jax.Array) -> bool:
    # The floating values of a sparse matrix are its bulk, and stay in their dtype.
    bulk = isinstance(leaf, NMSparse) and field is leaf.values
    return jnp.issubdtype(field.dtype, jnp.inexact) and not bulk
