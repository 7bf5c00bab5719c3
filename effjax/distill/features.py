"""Distillation by hidden features: a projection takes the student's to the teacher's width (hints)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Projection = dict[str, jax.Array]


def init_projection(key: jax.Array, student: int, teacher: int) -> Projection:
    """A linear map from the student's features to the teacher's, trained beside the student and then thrown away.

    Args:
        key: of the weights, normal with variance `1 / student`.
        student, teacher: widths.

    Example:
        >>> jax.tree.map(jnp.shape, init_projection(jax.random.key(0), 4, 6))
        {'bias': (6,), 'kernel': (4, 6)}
    """
    return {"kernel": jax.random.normal(key, (student, teacher)) / student**0.5, "bias": jnp.zeros(teacher)}


def project(projection: Projection, features: Float[Array, "*batch student"]) -> Float[Array, "*batch teacher"]:
    """`features @ kernel + bias`."""
    return features @ projection["kernel"] + projection["bias"]


def hint_loss(
    teacher: Float[Array, "*batch teacher"], student: Float[Array, "*batch student"], projection: Projection
) -> Float[Array, "*batch"]:
    """Mean squared distance of the projected student from the teacher (Romero et al., FitNets, ICLR 2015, equation 3).

    Args:
        teacher: features; no gradient flows to them.
        student: features, of another width perhaps.
        projection: from `init_projection`.

    Returns:
        float32, a value a row, averaged over the teacher's width.

    Example:
        >>> same = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
        >>> hint_loss(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1.0, 2.0, 0.0]]), same).tolist()
        [3.0]
    """
    teacher = jax.lax.stop_gradient(teacher).astype(jnp.float32)
    return jnp.square(project(projection, student).astype(jnp.float32) - teacher).mean(axis=-1)
