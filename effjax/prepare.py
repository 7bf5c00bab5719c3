"""`prepare`: compressed parameters once made ready for the kernels, and `restore` back to what is saved and trained."""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.arrays.base import CompressedArray, PyTree
from effjax.arrays.codebook import Codebook
from effjax.arrays.nm_sparse import NMSparse
from effjax.arrays.prepared import Prepared, is_matrix, to_tiles
from effjax.arrays.quantized import Quantized
from effjax.errors import LeafError

READY = (Quantized, Codebook, NMSparse)  # what there are kernels for


def prepare(params: PyTree, *, activation_bits: int | None = None) -> PyTree:
    """Compressed leaves in the form that products read fastest on the CPU; pure, and undone by `restore`.

    Every product works without it. What it changes: the fields of a matrix whose outputs 64 divides are put in tiles of
    64 columns, which a product of one row reads from one end to the other; those of codebooks are put column by column,
    where lookups need them; tables and scales of codebooks and sparse weights become float32, which they are converted
    to at every product otherwise; and `activation_bits=8` asks for products that quantize their activations to int8,
    which nothing does on its own. Such leaves are for one device and for running: gradients and other platforms undo
    the order at every product.

    Args:
        params: pytree; dense leaves and other compressed ones stay as they are. Works under `jit` and `eval_shape`.
        activation_bits: 8, 16, 24, or None for those of the dtype of the activations (`effjax.ops.matmul`).

    Returns:
        The same tree with `Prepared` leaves, which `lift`, `materialize` and files take like any others.

    Raises:
        LeafError: nothing in the tree can be prepared, or something is already.
        ValueError: activation_bits out of range.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> params = {"kernel": ej.quantize.NF4(block_size=4).quantize(jnp.eye(8))}
        >>> ready = ej.prepare(params)
        >>> ready["kernel"].array.scales.dtype.name, ej.restore(ready)["kernel"].scales.dtype.name
        ('float32', 'float16')
    """
    if activation_bits not in (None, 8, 16, 24):
        raise ValueError(f"prepare: activation_bits must be None, 8, 16 or 24, found {activation_bits!r}")
    leaves = jax.tree.leaves(params, is_leaf=_stops)
    if any(isinstance(leaf, Prepared) for leaf in leaves):
        raise LeafError("prepare: some leaves are prepared already; call ej.restore(params) first")
    if not any(isinstance(leaf, READY) for leaf in leaves):
        raise LeafError(
            f"prepare: none of the {len(leaves)} leaves is quantized, a codebook or n:m sparse; quantize_params comes "
            "first"
        )
    return jax.tree.map(
        lambda leaf: _prepared(leaf, activation_bits) if isinstance(leaf, READY) else leaf, params, is_leaf=_stops
    )


def can_prepare(params: PyTree) -> bool:
    """Whether `prepare` would find something to do, and may.

    Example:
        >>> import jax.numpy as jnp
        >>> can_prepare({"kernel": jnp.eye(8)})
        False
    """
    leaves = jax.tree.leaves(params, is_leaf=_stops)
    return any(isinstance(x, READY) for x in leaves) and not any(isinstance(x, Prepared) for x in leaves)


def restore(params: PyTree) -> PyTree:
    """The leaves that `prepare` was given, with the same bytes; a tree without prepared leaves is returned as it is.

    Example:
        >>> import effjax as ej, jax, jax.numpy as jnp
        >>> params = {"kernel": ej.quantize.NF4(block_size=4).quantize(jnp.eye(8))}
        >>> back = ej.restore(ej.prepare(params, activation_bits=8))
        >>> all(map(jnp.array_equal, jax.tree.leaves(back), jax.tree.leaves(params)))
        True
    """
    return jax.tree.map(lambda leaf: leaf.restore() if isinstance(leaf, Prepared) else leaf, params, is_leaf=_stops)


def _stops(x: Any) -> bool:
    # Also inside of sums, and of leaves that wrap another.
    return isinstance(x, (*READY, Prepared))


def _prepared(leaf: CompressedArray, activation_bits: int | None) -> Prepared:
    tile = _tile(leaf)
    narrow = isinstance(leaf, Codebook | NMSparse)
    bulk = leaf.values if isinstance(leaf, NMSparse) else None  # floating values stay in their dtype

    def ready(field: jax.Array) -> jax.Array:
        if narrow and field is not bulk and jnp.issubdtype(field.dtype, jnp.inexact):
            field = field.astype(jnp.float32)
        return to_tiles(field, tile) if tile and is_matrix(field, leaf) else field

    stored = tuple(x.dtype.name for x in jax.tree.leaves(leaf) if jnp.issubdtype(x.dtype, jnp.inexact))
    return Prepared(array=jax.tree.map(ready, leaf), stored=stored, tile=tile, activation_bits=activation_bits)


def _tile(leaf: CompressedArray) -> int:
    """Columns that the CPU kernel of the leaf wants together."""
    if isinstance(leaf, Codebook) and 8 % leaf.bits == 0:
        return 1
    return 64 if leaf.shape[-1] % 64 == 0 else 0
