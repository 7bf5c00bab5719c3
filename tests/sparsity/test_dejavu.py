"""Deja Vu: which query goes with which layer, masks and unions against loops, and the fall back to dense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.neurons import make_neurons
from effjax.ops.sparse_mlp import choose_neurons, mlp, sparse_mlp
from effjax.sparsity.dejavu import (
    Tap,
    collect_sparsity,
    contextual_mlp,
    needed_heads,
    needed_neurons,
    neuron_masks,
    random_scores,
    scan_lookahead,
    static_scores,
    train_predictors,
    union_density,
)
from effjax.sparsity.predictor import Predictor, Recorded, Training, recall_at

D, F, LAYERS = 6, 20, 3


def residual(seed=0):
    rng = np.random.default_rng(seed)
    return [(jnp.asarray(rng.normal(size=(D, F))), jnp.asarray(rng.normal(size=(F, D)) / 9)) for _ in range(LAYERS)]


def apply(params, x, at_mlp=None):
    """Blocks of MLPs alone; what enters each is kept."""
    inputs, taps = [], []
    for i, (up, down) in enumerate(params):
        inputs = [*inputs, x]
        h = jax.nn.relu(x @ up - 1.0)
        taps.append(Tap(query=x, activation=h))
        x = x + (h if at_mlp is None else at_mlp(i, inputs, h)) @ down
    return x, taps


@pytest.mark.parametrize("lookahead", [False, True])
def test_every_layer_is_paired_with_its_query(lookahead):
    params, rng = residual(), np.random.default_rng(1)
    batches = [jnp.asarray(rng.normal(size=(2, 5, D)).astype(np.float32)) for _ in range(3)]
    data = collect_sparsity(params, lambda p, x: apply(p, x)[1], batches, lookahead=lookahead)
    _, taps = apply(params, jnp.concatenate(batches))
    assert [len(d) for d in data] == [30] * LAYERS
    for i, layer in enumerate(data):
        query = taps[max(0, i - lookahead)].query.reshape(-1, D)
        np.testing.assert_allclose(layer.queries, query, rtol=1e-5)
        np.testing.assert_array_equal(layer.labels, (np.asarray(taps[i].activation) > 0).reshape(-1, F))
    with pytest.raises(ValueError, match="no batch"):
        collect_sparsity(params, lambda p, x: apply(p, x)[1], [])


def test_needed_neurons_and_heads_against_sorting():
    rng = np.random.default_rng(0)
    h, norms = rng.normal(size=(7, 10)), rng.random(10) * 5
    want = np.zeros((7, 10), bool)
    for i in range(7):
        want[i, np.argsort(-np.abs(h[i]) * norms)[:3]] = True
    np.testing.assert_array_equal(needed_neurons(jnp.asarray(h), share=0.3, norms=jnp.asarray(norms)), want)
    outputs = rng.normal(size=(4, 6, 5))
    lengths = np.sqrt((outputs**2).sum(-1))
    got = np.asarray(needed_heads(jnp.asarray(outputs), share=0.5))
    assert (got.sum(1) == 3).all() and (lengths[got].reshape(4, 3).min(1) > lengths[~got].reshape(4, 3).max(1)).all()


def test_masks_keep_the_best_scores_of_the_right_query():
    params, x = residual(), jax.random.normal(jax.random.key(0), (4, D))
    seen = []

    def score(layer):
        def run(query):
            seen.append((layer, query))
            return query @ params[layer][0]

        return run

    hook = neuron_masks([score(i) for i in range(LAYERS)], [F, None, 3], lookahead=True)
    apply(params, x, hook)
    taps = apply(params, x)[1]
    assert [layer for layer, _ in seen] == [0, 2]  # a layer without k is left as it is
    np.testing.assert_allclose(seen[0][1], taps[0].query)
    np.testing.assert_allclose(seen[1][1], taps[1].query, rtol=1e-5)
    # Every neuron kept: nothing changes. The oracle's scores: the rest are zero anyway.
    for k in (F, 18):
        kept = neuron_masks([lambda q, i=i: q @ params[i][0] for i in range(LAYERS)], k)
        np.testing.assert_allclose(apply(params, x, kept)[0], apply(params, x)[0], rtol=1e-4, atol=1e-5)


def test_a_predictor_of_the_wrong_block_fails_at_a_tenth():
    """A tap that is off by one block goes unnoticed at half the neurons; not at 10 %."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(1500, 8)).astype(np.float32)
    second = np.roll(first, 1, axis=1) * np.sign(rng.normal(size=8)).astype(np.float32)  # what the block makes of it
    up = rng.normal(size=(8, 100)).astype(np.float32)
    z = second @ up
    data = Recorded.make(jnp.asarray(second), jnp.asarray(z >= np.sort(z, 1)[:, -10:-9]))
    training = Training(rank=8, batch=128, epochs=20, learning_rate=1e-2, k=10)
    (predictor,), _ = train_predictors(jax.random.key(0), [data], training)
    right, wrong = (recall_at(predictor(jnp.asarray(q)), data.labels, 10) for q in (second, first))
    assert right[0] / right[1] > 0.8 and wrong[0] / wrong[1] < 0.4


def test_controls():
    data = Recorded.make(jnp.ones((4, 2)), jnp.asarray([[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 1, 1]], bool))
    np.testing.assert_allclose(static_scores(data)(jnp.ones((2, 5, 2)))[1, 3], [0.75, 0.75, 0.25])
    scores = random_scores(jax.random.key(0), 3)
    one = scores(jnp.ones((50, 2)))
    assert one.shape == (50, 3) and len(np.unique(np.argmax(one, 1))) == 3
    np.testing.assert_array_equal(one, scores(jnp.zeros((50, 7))))


def test_union_density_against_sets():
    masks = np.random.default_rng(0).random((11, 9)) < 0.3
    groups = [set(np.nonzero(masks[3 * g : 3 * g + 3].any(0))[0]) for g in range(3)]
    assert union_density(jnp.asarray(masks), 3) == pytest.approx(np.mean([len(g) for g in groups]) / 9)
    assert union_density(jnp.asarray(masks), 1) == pytest.approx(masks.mean())


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return make_neurons(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((D, F), (F, D))))


def test_a_batch_computes_the_union_and_falls_back_to_dense():
    neurons, rng = weights(), np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(3, D)), jnp.float32)
    scores = jnp.asarray(rng.normal(size=(3, F)), jnp.float32)
    run = jax.jit(contextual_mlp, static_argnums=(3,), static_argnames="most_density")
    union = np.zeros(F, bool)
    for row in np.asarray(scores):
        union[np.argsort(-row)[:4]] = True
    assert 0.3 * F < union.sum() < 0.6 * F
    masked, dense = mlp(x, neurons, mask=jnp.asarray(union, jnp.float32)), mlp(x, neurons)
    for most, want in ((1.0, masked), (0.6, masked), (0.3, dense)):
        np.testing.assert_allclose(run(x, neurons, scores, 4, most_density=most), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(x, neurons, scores, None), dense, rtol=1e-4, atol=1e-5)
    few = run(x, neurons, scores, F, threshold=1.0)
    above = jnp.asarray((np.asarray(scores) > 1.0).any(0), jnp.float32)
    assert above.sum() <= F / 2
    np.testing.assert_allclose(few, mlp(x, neurons, mask=above), rtol=1e-4, atol=1e-5)


def test_the_scan_chooses_each_block_from_the_input_of_the_one_before():
    rng = np.random.default_rng(0)
    stack = jax.tree.map(lambda *a: jnp.stack(a), *(weights(i) for i in range(LAYERS)))
    predictors = Predictor(
        reduce=jnp.asarray(rng.normal(size=(LAYERS, D, 3)), jnp.float32),
        expand=jnp.asarray(rng.normal(size=(LAYERS, 3, F)), jnp.float32),
    )
    x = jnp.asarray(rng.normal(size=(2, D)), jnp.float32)

    def block(layer, x, chosen, count):
        return x + 0.1 * sparse_mlp(x, layer, chosen, count)

    got = jax.jit(functools.partial(scan_lookahead, block, k=4))(stack, predictors, x)
    inputs, want = [x], x
    for i in range(LAYERS):
        layer, predictor = (jax.tree.map(lambda a, i=i: a[i], tree) for tree in (stack, predictors))
        chosen, count = choose_neurons(predictor(inputs[max(0, i - 1)]), 4)
        want = block(layer, want, chosen, count)
        inputs.append(want)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
