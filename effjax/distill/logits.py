"""Distillation by outputs: a student's distribution over labels comes to match the teacher's, all of it or its top."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def kl_divergence(
    teacher: Float[Array, "*batch labels"], student: Float[Array, "*batch labels"], *, temperature: float = 1.0
) -> Float[Array, "*batch"]:
    """`T**2 KL(softmax(teacher / T) || softmax(student / T))`, float32, in nats.

    The factor keeps the size of the gradient where `T` changes (Hinton et al., Distilling the Knowledge in a Neural
    Network, 2015, section 2.1).

    Args:
        teacher: logits; no gradient flows to them.
        student: logits of the same labels.
        temperature: `T`; the higher, the more the small probabilities count.

    Example:
        >>> logits = jnp.array([0.0, 2.0])
        >>> float(kl_divergence(logits, logits)), round(float(kl_divergence(logits, -logits)), 4)
        (0.0, 1.5232)
    """
    log_p, log_q = (jax.nn.log_softmax(z.astype(jnp.float32) / temperature) for z in (teacher, student))
    log_p = jax.lax.stop_gradient(log_p)
    return temperature**2 * jnp.sum(_weighed(log_p, log_p - log_q), axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TopK:
    """The head of a distribution over many labels, and what all the others have together.

    Attributes:
        labels: `int[*batch, k]`, the most probable ones, best first.
        log_probs: `float[*batch, k]`, their log-probabilities among all labels.
        tail: `float[*batch]`, the logarithm of the remaining mass; `-inf` where nothing remains.
        temperature: by which the logits were divided.
    """

    labels: Int[Array, "*batch k"]
    log_probs: Float[Array, "*batch k"]
    tail: Float[Array, "*batch"]
    temperature: float = dataclasses.field(default=1.0, metadata={"static": True})


def top_k_targets(teacher: Float[Array, "*batch labels"], *, k: int, temperature: float = 1.0) -> TopK:
    """The `k` best labels of a teacher: what is worth keeping of a wide output.

    Args:
        teacher: logits.
        k: at most the number of labels.
        temperature: of the distribution; the tail of one cannot be had from that of another.

    Raises:
        ValueError: `k` is out of range.

    Example:
        >>> top = top_k_targets(jnp.log(jnp.array([0.1, 0.6, 0.3])), k=2)
        >>> top.labels.tolist(), round(float(jnp.exp(top.tail)), 4)
        ([1, 2], 0.1)
    """
    count = teacher.shape[-1]
    if not 1 <= k <= count:
        raise ValueError(f"top_k_targets: k={k} of {count} labels: choose 1 to {count}")
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    best, labels = jax.lax.top_k(log_p, k)
    # Summed from what remains, not as 1 less the head: a tail of 1e-9 would be rounded away.
    tail = jax.nn.logsumexp(_without(log_p, labels), axis=-1)
    return TopK(labels=labels, log_probs=best, tail=tail, temperature=temperature)


def top_k_divergence(teacher: TopK, student: Float[Array, "*batch labels"]) -> Float[Array, "*batch"]:
    """`T**2 KL` between teacher and student, all labels but the teacher's `k` best taken as one.

    Joining labels never makes a divergence larger, so it is a lower bound of `kl_divergence`, and equal to it where `k`
    is the number of labels.

    Args:
        teacher: from `top_k_targets`, or rows of a store; no gradient flows to it.
        student: logits of all labels.

    Returns:
        float32, in nats.

    Example:
        >>> teacher, student = jnp.array([1.0, 3.0, 2.0]), jnp.array([2.0, 2.0, 0.0])
        >>> whole = top_k_divergence(top_k_targets(teacher, k=3), student)
        >>> bool(abs(whole - kl_divergence(teacher, student)) < 1e-6)
        True
        >>> bool(top_k_divergence(top_k_targets(teacher, k=1), student) < whole)
        True
    """
    log_p = teacher.log_probs.astype(jnp.float32)
    all_q = jax.nn.log_softmax(student.astype(jnp.float32) / teacher.temperature)
    log_q = jnp.take_along_axis(all_q, teacher.labels, axis=-1)
    if teacher.labels.shape[-1] < student.shape[-1]:  # without a tail, its logarithm would have no gradient
        log_p = jnp.concatenate([log_p, teacher.tail[..., None].astype(jnp.float32)], axis=-1)
        rest = jax.nn.logsumexp(_without(all_q, teacher.labels), axis=-1, keepdims=True)
        log_q = jnp.concatenate([log_q, rest], axis=-1)
    log_p = jax.lax.stop_gradient(log_p)
    return teacher.temperature**2 * jnp.sum(_weighed(log_p, log_p - log_q), axis=-1)


def _weighed(log_p: jax.Array, ratio: jax.Array) -> jax.Array:
    """`p * ratio`, zero where `p` is: of masked logits both logarithms are `-inf`."""
    return jnp.exp(log_p) * jnp.where(jnp.isneginf(log_p), 0.0, ratio)


def _without(log_p: jax.Array, labels: jax.Array) -> jax.Array:
    """`-inf` at the given labels."""
    return jnp.put_along_axis(log_p, labels, -jnp.inf, axis=-1, inplace=False)
