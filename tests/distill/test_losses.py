"""Losses of distillation against loops in numpy, their bounds, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from effjax.distill import (
    attention_map,
    attention_transfer_loss,
    contrastive_loss,
    hint_loss,
    init_projection,
    kl_divergence,
    pskd_loss,
    pskd_weight,
    top_k_divergence,
    top_k_targets,
)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 2


def softmax(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z))
    return e / e.sum()


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def grads(loss, *args):
    check_grads(loss, args, order=1, modes=["rev"], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_its_sum(temperature):
    teacher, student = normal(0, 3, 2, 7), normal(1, 3, 2, 7)
    found = kl_divergence(teacher, student, temperature=temperature)
    for at in np.ndindex(3, 2):
        wanted = temperature**2 * kl(softmax(teacher[at] / temperature), softmax(student[at] / temperature))
        np.testing.assert_allclose(found[at], wanted, rtol=1e-4)
    grads(lambda z: kl_divergence(teacher, z, temperature=temperature).sum(), student)
    assert not np.asarray(jax.grad(lambda z: kl_divergence(z, student).sum())(teacher)).any()


def test_masked_labels_count_nothing():
    teacher, student = jnp.array([1.0, -jnp.inf, 0.5]), jnp.array([0.2, -jnp.inf, 0.4])
    wanted = kl(softmax([1.0, 0.5]), softmax([0.2, 0.4]))
    np.testing.assert_allclose(kl_divergence(teacher, student), wanted, rtol=1e-4)
    assert np.isfinite(jax.grad(lambda z: kl_divergence(teacher, z))(student)[jnp.array([0, 2])]).all()
    top = top_k_targets(teacher, k=3)
    np.testing.assert_allclose(top_k_divergence(top, student), wanted, rtol=1e-4)
    assert float(top_k_targets(teacher, k=2).tail) == -np.inf


def test_gradients_keep_their_size_with_the_temperature():
    teacher, student = normal(0, 50, 9), normal(1, 50, 9)
    norms = [
        float(jnp.linalg.norm(jax.grad(lambda z, t=t: kl_divergence(teacher, z, temperature=t).mean())(student)))
        for t in (1.0, 8.0)
    ]
    assert 0.5 < norms[1] / norms[0] < 8


@jax.jit
def several(teacher, student, temperature):
    """The divergence, that of equals, and lower bounds of 1, 3 and all labels."""
    tops = [top_k_targets(teacher / temperature, k=k) for k in (1, 3, 8)]
    bounds = [temperature**2 * top_k_divergence(top, student / temperature) for top in tops]
    return (
        kl_divergence(teacher, student, temperature=temperature),
        kl_divergence(teacher, teacher + 3.0, temperature=temperature),
        jnp.stack(bounds),
    )


@given(seed=st.integers(0, 2**16), scale=st.floats(0.1, 4.0), temperature=st.floats(0.5, 5.0))
@settings(max_examples=40)
def test_divergence_is_never_negative_and_zero_for_equals(seed, scale, temperature):
    whole, same, bounds = several(scale * normal(seed, 8), scale * normal(seed + 1, 8), temperature)
    assert float(whole) > -1e-5 and abs(float(same)) < 1e-3
    np.testing.assert_allclose(bounds[-1], whole, rtol=1e-3, atol=1e-3)
    assert (np.diff(bounds) > -1e-3).all() and float(bounds[0]) > -1e-3  # the more labels, the more is told


def test_top_of_a_distribution():
    teacher, student = normal(0, 4, 11), normal(1, 4, 11)
    top = top_k_targets(teacher, k=3, temperature=1.5)
    found = top_k_divergence(top, student)
    for i in range(4):
        p, q = softmax(teacher[i] / 1.5), softmax(student[i] / 1.5)
        best = np.argsort(-p)[:3]
        np.testing.assert_array_equal(top.labels[i], best)
        np.testing.assert_allclose(np.exp(top.log_probs[i]), p[best], rtol=1e-4)
        np.testing.assert_allclose(np.exp(top.tail[i]), 1 - p[best].sum(), rtol=1e-3)
        wanted = kl([*p[best], 1 - p[best].sum()], [*q[best], 1 - q[best].sum()])
        np.testing.assert_allclose(found[i], 1.5**2 * wanted, rtol=1e-3)
    grads(lambda z: top_k_divergence(top, z).sum(), student)
    whole = top_k_targets(teacher, k=11)
    grads(lambda z: top_k_divergence(whole, z).sum(), student)
    with pytest.raises(ValueError, match="k=12 of 11 labels: choose 1 to 11"):
        top_k_targets(teacher, k=12)


def test_a_tiny_tail_is_not_rounded_away():
    top = top_k_targets(jnp.array([30.0, 0.0, 0.0]), k=1)
    np.testing.assert_allclose(top.tail, np.log(2) - 30, rtol=1e-4)


def test_hints():
    teacher, student = normal(0, 5, 6), normal(1, 5, 4)
    projection = init_projection(jax.random.key(0), 4, 6)
    kernel = np.asarray(projection["kernel"])
    wanted = [np.mean((student[i] @ kernel - teacher[i]) ** 2) for i in range(5)]
    np.testing.assert_allclose(hint_loss(teacher, student, projection), wanted, rtol=1e-4)
    grads(lambda s, p: hint_loss(teacher, s, p).mean(), student, projection)


def test_attention():
    teacher, student = normal(0, 2, 3, 5, 4), normal(1, 2, 3, 5, 7)

    def map_of(x):
        flat = (np.abs(x.astype(np.float64)) ** 3).mean(-1).ravel()
        return flat / np.sqrt((flat**2).sum())

    for i in range(2):
        np.testing.assert_allclose(attention_map(student, power=3)[i], map_of(student[i]), rtol=1e-4)
        wanted = ((map_of(teacher[i]) - map_of(student[i])) ** 2).sum()
        np.testing.assert_allclose(attention_transfer_loss(teacher, student, power=3)[i], wanted, rtol=1e-3)
    grads(lambda s: attention_transfer_loss(teacher, s).sum(), student)
    dead = jnp.zeros((1, 3, 4))
    assert np.isfinite(jax.grad(lambda s: attention_transfer_loss(jnp.ones((1, 3, 2)), s).sum())(dead)).all()
    with pytest.raises(ValueError, match=r"teacher \[2, 3, 5, 4\] and student \[2, 15, 7\]: all axes but the last"):
        attention_transfer_loss(teacher, student.reshape(2, 15, 7))


@pytest.mark.parametrize("extra", [False, True])
def test_contrast(extra):
    teacher, student, others = normal(0, 5, 3), normal(1, 5, 3), normal(2, 4, 3)
    labels = np.array([0, 1, 0, 2, 1])
    options = {"labels": jnp.asarray(labels), "others": others} if extra else {}

    def cosine(a, b):
        return a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)

    found = contrastive_loss(teacher, student, temperature=0.5, **options)
    for i in range(5):
        negatives = [teacher[j] for j in range(5) if j != i and not (extra and labels[j] == labels[i])]
        negatives += list(others) if extra else []
        scores = np.array([cosine(student[i], t) / 0.5 for t in (teacher[i], *negatives)])
        np.testing.assert_allclose(found[i], -np.log(softmax(scores)[0]), rtol=1e-4)
    grads(lambda s: contrastive_loss(teacher, s, temperature=0.5, **options).sum(), student)
    with pytest.raises(ValueError, match=r"teacher \[5, 3\] and student \[5, 2\]: project the student"):
        contrastive_loss(teacher, student[:, :2])


def test_progressive_targets():
    logits, earlier, labels = normal(0, 4, 6), normal(1, 4, 6), np.array([5, 0, 2, 2])
    weight = pskd_weight(30, 100, final=0.5)
    assert float(weight) == pytest.approx(0.15) and float(pskd_weight(500, 100)) == pytest.approx(0.8)
    found = pskd_loss(logits, earlier, jnp.asarray(labels), weight)
    for i in range(4):
        targets = 0.85 * np.eye(6)[labels[i]] + 0.15 * softmax(earlier[i])
        np.testing.assert_allclose(found[i], -(targets * np.log(softmax(logits[i]))).sum(), rtol=1e-4)
    grads(lambda z: pskd_loss(z, earlier, jnp.asarray(labels), weight).sum(), logits)
