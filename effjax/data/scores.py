"""Scores of examples early in training: EL2N, the length of the error, and GraNd, the length of the gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.errors import ConfigError


def el2n(logits: Float[Array, "*batch labels"], labels: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """`|softmax(logits) - onehot(label)|` (Paul, Ganguli and Dziugaite, NeurIPS 2021): high for hard examples.

    Take it a few epochs into training, and the mean over several networks: one alone is noisy.

    Example:
        >>> [f"{x:.3f}" for x in el2n(jnp.array([[0.0, 0.0], [9.0, 0.0]]), jnp.array([0, 1]))]
        ['0.707', '1.414']
    """
    error = jax.nn.softmax(logits.astype(jnp.float32)) - jax.nn.one_hot(labels, logits.shape[-1])
    return jnp.linalg.norm(error, axis=-1)


def grand(loss: Callable[[Any, Any], jax.Array], params: Any, examples: Any, *, batch: int = 32) -> Float[Array, " n"]:
    """The length of each example's gradient (GraNd, the same paper): the most that a step on it can change.

    Args:
        loss: `(params, example) -> scalar` of one example, without a leading axis.
        params: parameters.
        examples: a pytree of `[n, ...]`.
        batch: examples whose gradients are held at once.

    Example:
        >>> grand(lambda w, x: w * x**2, 3.0, jnp.array([1.0, -2.0, 3.0])).tolist()
        [1.0, 4.0, 9.0]
    """

    def length(example: Any) -> jax.Array:
        squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g.astype(jnp.float32))), jax.grad(loss)(params, example))
        return jnp.sqrt(sum(jax.tree.leaves(squares), jnp.float32(0)))

    return jax.lax.map(length, examples, batch_size=batch)


def kept_by_score(scores: Float[Array, " n"], keep: float, *, easiest: bool = False) -> Int[Array, " kept"]:
    """The share `keep` of examples with the highest scores, or the lowest: ascending ids.

    Raises:
        ConfigError: `keep` is not in (0, 1].

    Example:
        >>> kept_by_score(jnp.array([0.1, 0.9, 0.5, 0.7]), 0.5).tolist()
        [1, 3]
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep={keep}: must be above 0 and at most 1")
    count = max(1, round(keep * scores.shape[0]))
    order = jnp.argsort(scores if easiest else -scores, stable=True)
    return jnp.sort(order[:count]).astype(jnp.int32)
