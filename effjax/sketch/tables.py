"""The tables of sketched weights, apart from all that stays frozen when they are fine-tuned."""

import jax
import jax.numpy as jnp
import optax

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


def scale_by_spread() -> optax.GradientTransformation:
    """Steps in units of the tables: each update times the root mean square of its output's tables, as they began.

    Outputs differ in the size of their weights, and Adam's steps do not: one learning rate then moves the tables of
    small outputs too far and those of large ones too little. Goes behind the optimizer, whose learning rate becomes the
    share of an output's spread that a step moves its entries by; 0.02 was best on the models measured.

    Example:
        >>> import optax
        >>> optimizer = optax.chain(optax.adam(0.02), scale_by_spread())
        >>> tables = {"kernel": jnp.array([[[3.0, -3.0], [0.1, -0.1]]])}  # [groups, out, entries]
        >>> updates, _ = optimizer.update(tables, optimizer.init(tables), tables)
        >>> [round(float(x), 3) for x in updates["kernel"][0, :, 0]]
        [-0.06, -0.002]
    """

    def init(params: optax.Params) -> optax.OptState:
        return jax.tree.map(lambda t: jnp.sqrt(jnp.square(t).mean((-3, -1), keepdims=True)), params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        return jax.tree.map(jnp.multiply, updates, state), state

    return optax.GradientTransformation(init, update)


def is_codebook(x: object) -> bool:
    """Whether `x` has tables."""
    return isinstance(x, Codebook)
