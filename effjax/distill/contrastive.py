"""Contrastive distillation: the student's features of an example find the teacher's of the same one among others."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def contrastive_loss(
    teacher: Float[Array, "batch d"],
    student: Float[Array, "batch d"],
    *,
    temperature: float = 0.1,
    labels: Int[Array, "batch"] | None = None,
    others: Float[Array, "negatives d"] | None = None,
) -> Float[Array, "batch"]:
    """`-log softmax` of the cosine with the own example's teacher, against the teacher's of the rest of the batch.

    The bound on mutual information of van den Oord et al. (InfoNCE, 2018, equation 4) between teacher and student, as
    Tian et al. (Contrastive Representation Distillation, ICLR 2020) use it; they sample many negatives from a memory,
    here the batch and `others` are the negatives.

    Args:
        teacher: features of the examples; no gradient flows to them.
        student: features of the same examples, projected to the same width (`effjax.distill.project`).
        temperature: by which cosines are divided.
        labels: where given, examples of the same class are no negatives.
        others: the teacher's features of further examples, all negatives, such as those of earlier batches.

    Returns:
        float32, in nats.

    Raises:
        ValueError: features of different shapes.

    Example:
        >>> x = jnp.eye(4)
        >>> bool((contrastive_loss(x, x) < 0.01).all()), bool((contrastive_loss(x, x[::-1]) > 9).all())
        (True, True)
    """
    if teacher.shape != student.shape:
        raise ValueError(
            f"contrastive_loss: teacher {list(teacher.shape)} and student {list(student.shape)}: project the student "
            "to the teacher's width first"
        )
    keys, queries = _unit(jax.lax.stop_gradient(teacher)), _unit(student)
    own = jnp.eye(len(keys), dtype=bool)
    cosines = queries @ keys.T
    if labels is not None:
        cosines = jnp.where((labels[:, None] == labels) & ~own, -jnp.inf, cosines)
    if others is not None:
        cosines = jnp.concatenate([cosines, queries @ _unit(jax.lax.stop_gradient(others)).T], axis=1)
    log_probs = jax.nn.log_softmax(cosines / temperature)
    return -jnp.diagonal(log_probs)


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
