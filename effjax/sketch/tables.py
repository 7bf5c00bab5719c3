"""The tables of sketched weights, apart from all that stays frozen when they are fine-tuned."""

import jax

from effjax.arrays.base import PyTree
from effjax.arrays.codebook import Codebook
from effjax.errors import LeafError


def partition_tables(params: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree into the tables of its codebooks (to train) and everything else, norms and embeddings included.

    Each has None in the other's places; `effjax.combine` joins them. The first is what a user's fine-tuning is: what
    checkpoints hold, and what `stack_tables` lays over shared codes.

    Raises:
        LeafError: no leaf has tables.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> params = {"kernel": jnp.eye(16), "scale": jnp.ones(16)}
        >>> sketched = ej.sketch_params(params, ej.sketch.SpaLLM(bits=2, calibrated=False))
        >>> tables, frozen = ej.sketch.partition_tables(sketched)
        >>> [x.shape for x in jax.tree.leaves(tables)], len(jax.tree.leaves(frozen))
        ([(1, 16, 4)], 2)
    """
    if not any(isinstance(x, Codebook) for x in jax.tree.leaves(params, is_leaf=is_codebook)):
        raise LeafError("no leaf has tables: sketch first, e.g. ej.sketch_params(params, ej.sketch.SpaLLM(bits=4))")
    nothing = jax.tree.map(lambda _: None, params)
    tables = jax.tree.map(
        lambda x, empty: empty.replace(tables=x.tables) if is_codebook(x) else None,
        params,
        nothing,
        is_leaf=is_codebook,
    )
    rest = jax.tree.map(lambda x: x.replace(tables=None) if is_codebook(x) else x, params, is_leaf=is_codebook)
    return tables, rest


def is_codebook(x: object) -> bool:
    """Whether `x` has tables."""
    return isinstance(x, Codebook)
