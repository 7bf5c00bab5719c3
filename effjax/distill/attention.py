"""Attention transfer: the student looks where the teacher looks, whatever their numbers of channels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attention_map(features: Float[Array, "batch *places channels"], *, power: int = 2) -> Float[Array, "batch places"]:
    """Mean of `|activation|**power` over channels, all places of an example joined and scaled to length 1.

    Args:
        features: of a layer; places are pixels, or tokens.
        power: the larger, the more the strongest channels count.

    Returns:
        float32; zeros where all features are.

    Example:
        >>> two_places = jnp.array([[[3.0], [-4.0]]])
        >>> [round(float(x), 4) for x in attention_map(two_places, power=1)[0]]
        [0.6, 0.8]
    """
    strength = jnp.mean(jnp.abs(features.astype(jnp.float32)) ** power, axis=-1).reshape(features.shape[0], -1)
    # Under the root, so that the gradient at zero is zero and no NaN.
    return strength * jax.lax.rsqrt(jnp.sum(jnp.square(strength), axis=-1, keepdims=True) + 1e-24)


def attention_transfer_loss(
    teacher: Float[Array, "batch *places teacher"], student: Float[Array, "batch *places student"], *, power: int = 2
) -> Float[Array, "batch"]:
    """Squared distance of the two maps (Zagoruyko and Komodakis, ICLR 2017, equation 2, with their code's square).

    Args:
        teacher: features; no gradient flows to them.
        student: features of the same places.
        power: of `attention_map`.

    Raises:
        ValueError: other places.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
        >>> attention_transfer_loss(x, 3 * x[..., ::-1]).round(4).tolist()  # other channels, the same places
        [0.0, 0.0]
    """
    if teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"attention_transfer_loss: teacher {list(teacher.shape)} and student {list(student.shape)}: all axes but "
            "the last must agree; resize or pool one of them"
        )
    distance = attention_map(jax.lax.stop_gradient(teacher), power=power) - attention_map(student, power=power)
    return jnp.square(distance).sum(axis=-1)
