"""Contrastive distillation: the student's features of an example find the teacher's of the same one among others."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.models.transformer import unit


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
    keys, queries = unit(jax.lax.stop_gradient(teacher)), unit(student)
    own = jnp.eye(len(keys), dtype=bool)
    cosines = queries @ keys.T
    if labels is not None:
        cosines = jnp.where((labels[:, None] == labels) & ~own, -jnp.inf, cosines)
    if others is not None:
        cosines = jnp.concatenate([cosines, queries @ unit(jax.lax.stop_gradient(others)).T], axis=1)
    log_probs = jax.nn.log_softmax(cosines / temperature)
    return -jnp.diagonal(log_probs)


def symmetric_contrastive_loss(
    image: Float[Array, "batch d"], text: Float[Array, "batch d"], *, scale: float | Float[Array, ""] = 10.0
) -> Float[Array, "batch"]:
    """Mean of both directions: an image finds its text, and a text its image (CLIP, Radford et al. 2021, figure 3).

    Both towers are students: gradients flow to image, text and scale.

    Args:
        image: embeddings, of any length.
        text: embeddings of the same pairs.
        scale: by which cosines are multiplied, one over the temperature.

    Returns:
        float32, in nats.

    Raises:
        ValueError: embeddings of different shapes.

    Example:
        >>> x = jnp.eye(4)
        >>> bool((symmetric_contrastive_loss(x, x) < 0.01).all()), symmetric_contrastive_loss(x, x, scale=0.0).shape
        (True, (4,))
    """
    if image.shape != text.shape:
        raise ValueError(
            f"symmetric_contrastive_loss: image {list(image.shape)} and text {list(text.shape)}: give pairs of one "
            "width"
        )
    logits = scale * (unit(image) @ unit(text).T)
    found = jnp.diagonal(jax.nn.log_softmax(logits, axis=1)) + jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
    return -0.5 * found
