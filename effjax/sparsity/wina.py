"""WINA: inputs of a product that count little are dropped, by their size times the length of their row of weights.

Chen et al., "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference", 2025. Nothing is
trained. In front of a down projection the inputs are the neurons of an MLP, so that `ops.sparse_mlp` can use them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.ops.sparse_mlp import top_mask


def row_norms(kernel: Float[Array, "in out"]) -> Float[Array, " in"]:
    """Length of the weights that each input is multiplied by, float32.

    Example:
        >>> row_norms(jnp.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
        [5.0, 1.0]
    """
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=1)


def wina_mask(x: Float[Array, "*batch in"], norms: Float[Array, " in"], k: int) -> Bool[Array, "*batch in"]:
    """The `k` inputs of largest `|x| * norms`, row by row.

    Example:
        >>> wina_mask(jnp.array([1.0, -3.0, 2.0]), jnp.array([9.0, 1.0, 1.0]), 2).tolist()
        [True, True, False]
    """
    return top_mask(jnp.abs(x) * norms, k)


def wina_threshold(x: Float[Array, "n in"], norms: Float[Array, " in"], sparsity: float) -> Float[Array, ""]:
    """The bound on `|x| * norms` below which the wanted share of recorded inputs lies: no sorting when it is used.

    Example:
        >>> float(wina_threshold(jnp.array([[1.0, 2.0, 3.0, 4.0]]), jnp.ones(4), 0.5))
        2.5
    """
    return jnp.quantile(jnp.abs(x) * norms, sparsity)
