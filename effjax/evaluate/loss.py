"""The next-token loss: what perplexity is the exponential of, and what Fisher information is the curvature of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

PyTree = Any


def next_token_nll(
    logits: Float[Array, "*batch length vocab"], targets: Int[Array, "*batch length"]
) -> Float[Array, "*batch length"]:
    """Negative log likelihood of every target, float32, in nats.

    Example:
        >>> nll = next_token_nll(jnp.zeros((2, 4)), jnp.array([0, 3]))  # ln 4 each
        >>> f"{nll[0]:.4f}, {nll[1]:.4f}"
        '1.3863, 1.3863'
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


def next_token_loss(apply: Callable[..., Any]) -> Callable[[PyTree, jax.Array], jax.Array]:
    """The loss of a language model on windows of tokens, as `effjax.calibrate(..., loss=...)` and training take it.

    Args:
        apply: `apply({"params": params}, tokens)` gives the logits `[batch, length, vocab]`.

    Returns:
        `loss(params, tokens)`, the mean over all tokens of `tokens int[batch, length]` but the first of each window.

    Example:
        >>> uniform = lambda variables, tokens: jnp.zeros((*tokens.shape, 4)) + variables["params"]
        >>> f"{next_token_loss(uniform)(jnp.zeros(4), jnp.array([[0, 3, 1]])):.4f}"
        '1.3863'
    """

    def loss(params: PyTree, tokens: Int[Array, "batch length"]) -> jax.Array:
        return next_token_nll(apply({"params": params}, tokens[:, :-1]), tokens[:, 1:]).mean()

    return loss
