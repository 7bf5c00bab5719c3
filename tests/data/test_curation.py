"""Scores, pruning, selective backprop, windows of losses, reweighting and text selection, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data import (
    DSIR,
    LossReweighting,
    SelectiveBackprop,
    SeTa,
    Spec,
    Subset,
    all_losses,
    el2n,
    grand,
    kept_by_score,
    prototype_distances,
)
from effjax.errors import ConfigError

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def test_el2n_and_grand_are_those_of_a_loop():
    """For a linear model GraNd is EL2N times the length of the input with a one for the bias."""
    x, labels = RNG.normal(size=(7, 4)).astype(np.float32), RNG.integers(0, 3, 7)
    params = {"w": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32), "b": jnp.zeros(3)}

    def loss(params, example):
        logits = example[0] @ params["w"] + params["b"]
        return -jax.nn.log_softmax(logits)[example[1]]

    logits = x @ np.asarray(params["w"])
    expected = []
    for row, label in zip(logits, labels, strict=True):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        p[label] -= 1
        expected.append(np.sqrt((p**2).sum()))
    np.testing.assert_allclose(el2n(jnp.asarray(logits), jnp.asarray(labels)), expected, rtol=1e-5)
    found = grand(loss, params, (jnp.asarray(x), jnp.asarray(labels)), batch=3)
    np.testing.assert_allclose(found, expected * np.sqrt((x**2).sum(1) + 1), rtol=1e-5)


def test_all_losses_pads_nothing():
    for batch in (1, 3, 7, 20):
        found = all_losses(lambda w, x: w * x + x.shape[0] * 0, 2.0, jnp.arange(7.0), batch)
        np.testing.assert_array_equal(found, 2 * np.arange(7))


def test_pruning_keeps_what_it_should_and_each_once_an_epoch():
    scores = jnp.array([5.0, 1, 4, 2, 3, 0])
    assert kept_by_score(scores, 0.5).tolist() == [0, 2, 4]
    assert kept_by_score(scores, 0.5, easiest=True).tolist() == [1, 3, 5]
    sampler = Subset(keep=0.67)
    state, seen = sampler.init(6, Spec(scores=scores)), []

    @jax.jit
    def step(state):
        ids, weights = sampler.draw(state, KEY, 2)
        return ids, weights, sampler.update(state, ids, jnp.zeros(2))

    for _ in range(2):
        ids, weights, state = step(state)
        seen += ids.tolist()
    assert sorted(seen) == [0, 2, 3, 4] and int(state.position.epoch) == 1 and weights.tolist() == [1, 1]


def test_prototypes_find_the_outlier():
    x = np.concatenate([RNG.normal(size=(20, 3)) + 9 * np.eye(3)[c] for c in range(3)])
    x[7] += 4
    distances = np.asarray(prototype_distances(jnp.asarray(x, jnp.float32), 3, key=KEY))
    means = np.stack([x[20 * c : 20 * c + 20].mean(0) for c in range(3)])
    expected = np.array([min(np.linalg.norm(row - m) for m in means) for row in x])
    np.testing.assert_allclose(distances, expected, rtol=1e-3)
    assert distances.argmax() == 7


def test_selective_backprop_chooses_by_rank():
    """4,000 choices of 2 of 8: shares are the squared ranks among recent losses; the oldest are forgotten."""
    sampler = SelectiveBackprop(power=2.0, history=8, weighted=True)
    state = sampler.init(30, Spec())
    state = sampler.update(state, jnp.arange(8), jnp.full(8, 100.0))
    losses = jnp.array([3.0, 1, 7, 5, 2, 8, 4, 6])
    state = sampler.update(state, jnp.arange(8), losses)
    choose = jax.jit(jax.vmap(lambda key: sampler.choose(state, key, losses, 2)))
    places, weights = choose(jax.random.split(KEY, 4000))
    p = np.asarray(losses) ** 2 / (np.arange(1, 9) ** 2).sum() * 2
    share = np.bincount(np.asarray(places).ravel(), minlength=8) / 4000
    assert (np.abs(share - p) < 4.5 * np.sqrt(p * (1 - p) / 4000)).all()
    np.testing.assert_allclose(weights, (2 / 8) / p[places], rtol=1e-4)
    assert int(state.position.offset) == 16 and int(state.next) == 0


def test_seta_slides_from_easy_to_hard_and_ends_with_all():
    sampler = SeTa(keep=0.8, groups=4, window=2, epochs=6, annealing=2)
    state, epochs = sampler.init(50, Spec(scores=jnp.arange(50.0))), []

    @jax.jit
    def step(state):
        ids, _ = sampler.draw(state, KEY, 5)
        return ids, sampler.update(state, ids, ids.astype(jnp.float32))

    for _ in range(6):
        seen = []
        for _ in range(4):
            ids, state = step(state)
            seen += ids.tolist()
        assert len(set(seen)) == 20
        epochs.append(seen)
    centres = [np.mean(seen) for seen in epochs]
    assert centres[0] < 15 and centres[3] > 34 and centres == sorted(centres[:4]) + centres[4:]
    assert max(epochs[0]) < 32 and min(epochs[3]) > 17
    assert all(max(seen) - min(seen) > 40 for seen in epochs[4:])
    assert set(epochs[4]) != set(epochs[5])


@pytest.mark.parametrize("strategy", ["linear", "quadratic", "extremes"])
def test_reweighting_is_its_formula(strategy):
    losses = RNG.exponential(size=9).astype(np.float32)
    scaled = 2 * (losses - losses.min()) / (losses.max() - losses.min()) - 1
    height = {"linear": scaled, "quadratic": 1 - scaled**2, "extremes": abs(scaled)}[strategy]
    expected = np.exp(height / 0.5) / np.exp(height / 0.5).mean()
    method = LossReweighting(strategy=strategy, temperature=0.5)
    np.testing.assert_allclose(method(jnp.asarray(losses)), expected, rtol=1e-4)
    np.testing.assert_allclose(method(jnp.ones(4)), 1, rtol=1e-6)
    gradient = jax.grad(lambda x: (method(x) * x).sum())(jnp.asarray(losses))
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)  # weights have none


def test_dsir_weights_are_ratios_of_shares():
    """With words of their own and no smoothing to speak of, by counting."""
    raw, target = ["a a b", "c d", "b"], ["a b", "b"]
    method = DSIR(buckets=100_000, ngrams=1, smoothing=1e-11)
    wanted = {"a": 1 / 3, "b": 2 / 3}
    have = {"a": 2 / 6, "b": 2 / 6, "c": 1 / 6, "d": 1 / 6}
    found = method.log_weights(raw, target)
    for text, weight in zip(raw, found, strict=True):
        if set(text.split()) <= set(wanted):
            assert weight == pytest.approx(sum(np.log(wanted[w] / have[w]) for w in text.split()), abs=1e-5)
    assert found[1] < -40
    counts = np.zeros(3)
    for seed in range(2000):
        counts[method.select(found, 1, seed=seed)[0]] += 1
    p = np.exp(found) / np.exp(found).sum()
    assert (abs(counts / 2000 - p) < 4.5 * np.sqrt(p * (1 - p) / 2000) + 1e-9).all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Subset().init(4, Spec()), r"scores None for n=4: Subset needs Spec\(scores=...\), one an example"),
        (lambda: Subset(keep=0.0), "keep=0.0: must be above 0 and at most 1"),
        (lambda: kept_by_score(jnp.ones(3), 2.0), "keep=2.0: must be above 0 and at most 1"),
        (lambda: SelectiveBackprop(power=-1.0), "power=-1.0, history=1024: at least 0; at least 1"),
        (lambda: SeTa(window=11), "keep=0.9, window=11: above 0 and up to 1; from 1 to 10"),
        (lambda: SeTa(annealing=20), "annealing=20: at least 0 and below epochs=20"),
        (lambda: SeTa().init(1, Spec()), "n=1: no example is left of keep=0.9 in 5 of 10 groups"),
        (lambda: LossReweighting(strategy="square"), "strategy='square': choose 'linear', 'quadratic' or 'extremes'"),
        (lambda: LossReweighting(temperature=0.0), "temperature=0.0: must be positive"),
        (lambda: DSIR(buckets=1), "at least 2 buckets"),
        (lambda: DSIR().log_weights(["a"], ["", " "]), "the target texts have no words: give texts"),
        (lambda: DSIR().select(np.zeros(3), 4), "count=4 of 3 texts: must be between 1 and their number"),
        (lambda: prototype_distances(jnp.ones((3, 2)), 4, key=KEY), "prototypes=4 for 3 examples: must be between 1"),
    ],
)
def test_bad_settings(make, text):
    with pytest.raises(ConfigError, match=text):
        make()
