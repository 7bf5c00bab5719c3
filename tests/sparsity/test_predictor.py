"""Predictors: losses and calibration against loops, training on neurons that two thin matrices can name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from effjax.sparsity.predictor import (
    Recorded,
    Training,
    balanced_bce,
    calibrate,
    recall_at,
    train_predictor,
    weighted_bce,
)


def cross_entropy(logit, label):
    p = 1 / (1 + np.exp(-logit))
    return -np.log(p if label else 1 - p)


def test_losses_are_their_sums():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 7)).astype(np.float32), rng.random((5, 7)) < 0.3
    each = np.array(
        [[cross_entropy(z, y) for z, y in zip(*row, strict=True)] for row in zip(logits, labels, strict=True)]
    )
    weights = np.where(labels, 1.0, labels.mean() + 0.005)
    np.testing.assert_allclose(weighted_bce(logits, jnp.asarray(labels)), (weights * each).mean(), rtol=1e-5)
    balanced = 0.5 * (each[labels].mean() + each[~labels].mean())
    np.testing.assert_allclose(balanced_bce(logits, jnp.asarray(labels)), balanced, rtol=1e-5)
    for loss in (weighted_bce, balanced_bce):
        check_grads(lambda z, loss=loss: loss(z, jnp.asarray(labels)), (logits,), order=1, modes=["rev"], rtol=1e-2)


def test_losses_of_one_kind_of_label_are_finite():
    logits = jnp.array([[1.0, -2.0]])
    for labels in (jnp.ones((1, 2), bool), jnp.zeros((1, 2), bool)):
        assert np.isfinite([weighted_bce(logits, labels), balanced_bce(logits, labels)]).all()


def test_labels_are_kept_in_bits():
    labels = np.random.default_rng(0).random((4, 3, 21)) < 0.5
    data = Recorded.make(jnp.ones((4, 3, 2)), jnp.asarray(labels))
    assert len(data) == 12 and data.packed.nbytes == 12 * 3
    np.testing.assert_array_equal(data.labels, labels.reshape(12, 21))
    np.testing.assert_array_equal(data[3:5].labels, labels.reshape(12, 21)[3:5])
    with pytest.raises(ValueError, match=r"queries \[3, 2\] and labels \[4, 5\]: one of each a token"):
        Recorded.make(jnp.ones((3, 2)), jnp.ones((4, 5), bool))


def planted(n, d=8, rank=3, neurons=40, seed=0):
    """Neurons that are active where a product of rank 3 is large."""
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(n, d)).astype(np.float32)
    scores = queries @ rng.normal(size=(d, rank)) @ rng.normal(size=(rank, neurons))
    return Recorded.make(jnp.asarray(queries), jnp.asarray(scores > np.quantile(scores, 0.85)))


@pytest.mark.parametrize("loss", ["weighted_bce", "balanced_bce"])
def test_training_finds_planted_neurons_and_keeps_the_best_epoch(loss):
    data = planted(1200)
    training = Training(rank=4, loss=loss, batch=64, epochs=25, learning_rate=1e-2, held_out=0.2, k=10, patience=3)
    run = jax.jit(train_predictor, static_argnames="training")
    predictor, history = run(jax.random.key(0), data, training=training)
    held = data[960:]
    hits, needed = recall_at(predictor(held.queries), held.labels, 10)
    recalls = np.asarray(history["recall"])
    np.testing.assert_allclose(hits / needed, np.nanmax(recalls), atol=1e-6)
    assert np.nanmax(recalls) > 0.9  # a chance choice has 0.25
    again, _ = run(jax.random.key(0), data, training=training)
    jax.tree.map(np.testing.assert_array_equal, predictor, again)
    # Once it has stopped it stays so.
    stopped = np.isnan(recalls)
    assert (np.diff(stopped.astype(int)) >= 0).all()
    last = int((~stopped).sum()) - 1
    if stopped.any():
        assert recalls[last] > training.enough or np.nanargmax(recalls) == last - training.patience


def test_training_without_a_k_counts_as_many_as_are_needed():
    data = planted(400)
    training = Training(rank=4, batch=64, epochs=2, held_out=0.1)
    predictor, history = train_predictor(jax.random.key(0), data, training)
    held = data[360:]
    logits, labels = np.asarray(predictor(held.queries)), np.asarray(held.labels)
    needed = labels.sum(1).mean()
    places = np.argsort(np.argsort(-logits, axis=1), axis=1)
    np.testing.assert_allclose(
        np.nanmax(history["recall"]), (labels & (places < needed)).sum() / labels.sum(), rtol=1e-5
    )


def test_bad_training_is_named():
    with pytest.raises(ValueError, match="loss='hinge': choose one of weighted_bce, balanced_bce"):
        Training(loss="hinge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sizes are positive"):
        Training(rank=0)
    with pytest.raises(ValueError, match="40 tokens give no batch of 64 beside 2 held out"):
        train_predictor(jax.random.key(0), planted(40), Training(batch=64))


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.sampled_from([(1, 2), (5, 11)]))
def test_calibration_is_the_least_that_reaches_the_recall(seed, target, shape):
    rng = np.random.default_rng(seed)
    n, neurons = shape
    logits, labels = rng.normal(size=(n, neurons)).astype(np.float32), rng.random((n, neurons)) < 0.4
    labels[0, 0] = True

    def reached(k):
        return sum(labels[i, np.argsort(-logits[i])[:k]].sum() for i in range(n)) / labels.sum()

    found = calibrate(jnp.asarray(logits), jnp.asarray(labels), recall=target, most_density=1.0)
    least = next(k for k in range(1, neurons + 1) if reached(k) >= target - 1e-9)
    assert found.k == least and abs(found.recall - reached(least)) < 1e-6 and found.density == least / neurons
    above = logits > np.float32(found.threshold)
    assert labels[above].sum() / labels.sum() >= target - 1e-9
    lowest = np.sort(logits[above & labels])[0]
    assert labels[logits > lowest].sum() / labels.sum() < target  # one needed neuron less is too few
    assert abs(found.threshold_density - above.mean()) < 1e-6


def test_calibration_leaves_a_hopeless_layer_dense():
    logits = jnp.arange(8.0)[None]
    labels = jnp.zeros((1, 8), bool).at[0, 0].set(True)  # the worst score
    found = calibrate(logits, labels, recall=0.9)
    assert found.k is None and found.density == 1.0
    assert calibrate(-logits, labels, recall=0.9, multiple=4).k == 4
    with pytest.raises(ValueError, match="recall=1.5: a share in"):
        calibrate(logits, labels, recall=1.5)
    with pytest.raises(ValueError, match="no token needs a neuron"):
        calibrate(logits, labels & False, recall=0.9)
