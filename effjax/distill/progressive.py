"""PS-KD: a model learns from itself of an epoch ago, the more the further it is (progressive self-distillation)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def pskd_weight(step: int | Int[Array, ""], steps: int, *, final: float = 0.8) -> Array:
    """Share of the earlier self in the targets, `final * step / steps` (Kim et al., Self-Knowledge Distillation with
    Progressive Refinement of Targets, ICCV 2021, equation 5).

    Example:
        >>> [round(float(pskd_weight(step, 100)), 2) for step in (0, 50, 100)]
        [0.0, 0.4, 0.8]
    """
    return final * jnp.clip(jnp.asarray(step, jnp.float32) / steps, 0.0, 1.0)


def pskd_loss(
    logits: Float[Array, "*batch labels"],
    earlier: Float[Array, "*batch labels"],
    labels: Int[Array, "*batch"],
    weight: float | Float[Array, ""],
) -> Float[Array, "*batch"]:
    """Cross entropy with the targets `(1 - weight) * one_hot(labels) + weight * softmax(earlier)`.

    Args:
        logits: of the model in training.
        earlier: logits of the model at the end of the epoch before; no gradient flows to them.
        labels: the true ones.
        weight: from `pskd_weight`.

    Returns:
        float32, in nats.

    Example:
        >>> z = jnp.zeros((1, 4))
        >>> round(float(pskd_loss(z, z + jnp.arange(4.0), jnp.array([2]), 0.5)[0]), 4)  # ln 4
        1.3863
    """
    soft = jax.nn.softmax(jax.lax.stop_gradient(earlier).astype(jnp.float32))
    targets = (1 - weight) * jax.nn.one_hot(labels, logits.shape[-1]) + weight * soft
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
