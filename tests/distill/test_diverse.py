"""DiverseDistill against a loop over examples and teachers, and the mistakes that make it a no-op."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.distill import (
    Batch,
    Committee,
    Diverse,
    Teacher,
    apply_mlp,
    diverse_init,
    diverse_loss,
    halves,
    init_mlp,
    strip,
)
from effjax.errors import ConfigError

LO, HI = halves(1)
WIDTHS = ((8, 32, 16, 3), (4, 12, 9, 3))  # foundation and complementary teacher


def student_apply(params, x):
    early = LO(params, x)
    return (early, *HI(params, early))


def teacher(i, params=None, **options):
    widths = WIDTHS[i]
    params = init_mlp(jax.random.key(10 + i), widths) if params is None else params
    return Teacher(params=params, apply_lo=LO, apply_hi=HI, split_dim=widths[1], out_dim=widths[2], **options)


@pytest.fixture(scope="module")
def case():
    """Student, two teachers of different inputs, a batch of seven."""
    x = jax.random.normal(jax.random.key(0), (7, 8))
    committee = Committee(teachers=(teacher(0), teacher(1)), embed_dim=5)
    batch = Batch(x=x[:, ::2], y=jnp.arange(7) % 3, seen=committee.observe((x, x[:, ::2])))
    student = init_mlp(jax.random.key(2), (4, 6, 5, 3))
    params = jax.jit(lambda key: diverse_init(key, student, committee, d1=6, d2=5))(jax.random.key(1))
    # Importances that differ, from nearly none to nearly all.
    steep = params["module"]["importance"]["layer_1"]
    steep["kernel"] = 3 * jax.random.normal(jax.random.key(3), steep["kernel"].shape)
    return params, committee, batch


def relu_mlp(layers, x, first=0):
    names = sorted(layers)[first:]
    for name in names:
        x = x @ np.asarray(layers[name]["kernel"], np.float64) + np.asarray(layers[name]["bias"])
        x = x if name == sorted(layers)[-1] else np.maximum(x, 0)
    return x


def log_softmax(z):
    return z - np.log(np.exp(z - z.max()).sum()) - z.max()


def by_hand(params, committee, batch, c):
    """The terms, one example and one teacher after the other."""
    student, module = params["student"], params["module"]
    rows = []
    for b in range(len(batch.y)):
        x = np.asarray(batch.x[b], np.float64)
        h1 = np.maximum(x @ student["layer_0"]["kernel"] + student["layer_0"]["bias"], 0)
        h2 = np.maximum(h1 @ student["layer_1"]["kernel"] + student["layer_1"]["bias"], 0)
        z = h2 @ student["layer_2"]["kernel"] + student["layer_2"]["bias"]
        w = np.exp(log_softmax(relu_mlp(module["importance"], h1)))
        row = {"task": -log_softmax(z)[batch.y[b]], "importance": w, "match": [], "ground": [], "ask": []}
        for k, t in enumerate(committee.teachers):
            own, seen = module[f"teacher_{k}"], batch.seen[k]
            q = relu_mlp(own["question"], np.concatenate([h1, own["vector"]]))
            v = np.maximum(q @ t.params["layer_1"]["kernel"] + t.params["layer_1"]["bias"], 0)
            answer = v @ t.params["layer_2"]["kernel"] + t.params["layer_2"]["bias"]
            r = relu_mlp(own["answer"], v)
            log_p = log_softmax(np.asarray(seen.logits[b], np.float64) / c.temperature)
            divergence = (np.exp(log_p) * (log_p - log_softmax(z / c.temperature))).sum() * c.temperature**2
            row["match"].append(((h2 - r) ** 2).mean() + c.logits * divergence)
            row["ground"].append(((q - seen.middle[b]) ** 2).mean() / (np.asarray(seen.middle) ** 2).mean())
            row["ask"].append(-log_softmax(answer)[batch.y[b]])
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("skip", [False, True])
def test_loss_is_its_steps(case, skip):
    params, committee, batch = case
    config = Diverse(weight=0.7, logits=1.5, ground=0.4, ask=0.6, entropy=0.1, temperature=3.0)
    loss, terms = jax.jit(lambda p: diverse_loss(p, student_apply, committee, batch, config, skip=skip))(params)
    wanted = by_hand(params, committee, batch, config)
    for name, values in wanted.items():
        np.testing.assert_allclose(getattr(terms, name), values, rtol=2e-4, atol=1e-5, err_msg=name)
    w = wanted["importance"]
    kept = w >= 0.25 if skip else np.ones_like(w, bool)
    np.testing.assert_array_equal(terms.kept, kept)
    told = (w * kept * (wanted["match"] + 0.4 * wanted["ground"] + 0.6 * wanted["ask"])).sum(1)
    entropy = -(w * np.log(w)).sum(1)
    np.testing.assert_allclose(loss, (wanted["task"] + 0.7 * told - 0.1 * entropy).mean(), rtol=1e-4)


def test_skipping_is_by_example(case):
    params, committee, batch = case
    loss = jax.jit(lambda batch: diverse_loss(params, student_apply, committee, batch, Diverse(), skip=True))
    terms = loss(batch)[1]
    shares = np.asarray(terms.kept).mean(0)
    assert ((0 < shares) & (shares < 1)).any()  # neither the whole batch nor nothing of it
    assert float(terms.kept_share) == pytest.approx(np.asarray(terms.kept).mean())
    assert terms.kept.any(axis=1).all()  # the threshold is below 1 / K: someone always answers
    # What a skipped teacher would have said moves nothing.
    uneven = batch.seen[0].logits.at[:, 0].add(3.0 * ~terms.kept[:, 0])
    changed = dataclasses.replace(batch, seen=(dataclasses.replace(batch.seen[0], logits=uneven), batch.seen[1]))
    assert float(loss(batch)[0]) == float(loss(changed)[0])


def gradient(case, config):
    params, committee, batch = case
    return jax.jit(jax.grad(lambda p: diverse_loss(p, student_apply, committee, batch, config)[0]))(params)


def test_questions_learn_from_the_match_alone(case):
    """A gradient flows through the frozen teacher; stopped there, questions would stay as they were drawn."""
    found = gradient(case, Diverse(logits=0.0, ground=0.0, ask=0.0, entropy=0.0))
    for name in ("teacher_0", "teacher_1"):
        for part in ("question", "answer", "vector"):
            assert float(optax.tree.norm(found["module"][name][part])) > 1e-6, (name, part)
    assert float(optax.tree.norm(found["module"]["importance"])) > 1e-6
    assert float(optax.tree.norm(found["student"])) > 1e-6


def test_importance_does_not_shape_the_early_state(case):
    """Only the importance net learns from the entropy."""
    params, committee, batch = case

    def entropy(params):
        terms = diverse_loss(params, student_apply, committee, batch, Diverse())[1]
        return jax.scipy.special.entr(terms.importance).sum()

    found = jax.jit(jax.grad(entropy))(params)
    assert float(optax.tree.norm(found["student"])) == 0
    assert float(optax.tree.norm(found["module"]["importance"])) > 0


def test_teachers_do_not_move(case):
    params, committee, batch = case
    found = jax.jit(jax.grad(lambda c: diverse_loss(params, student_apply, c, batch, Diverse())[0]))(committee)
    assert float(optax.tree.norm(found)) == 0


def test_gradient_is_that_of_differences(case):
    params, committee, batch = case
    # Equal importances: the early state, which they are cut off from, does not move them.
    even = jax.tree.map(jnp.zeros_like, params["module"]["importance"]["layer_1"])
    importance = params["module"]["importance"] | {"layer_1": even}
    params = {"student": params["student"], "module": params["module"] | {"importance": importance}}
    direction = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape)), params)

    def along(t):
        moved = jax.tree.map(lambda x, d: x + t * d, params, direction)
        return diverse_loss(moved, student_apply, committee, batch, Diverse())[0]

    step, value = 1e-3, jax.jit(along)
    wanted = (value(step) - value(-step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(along))(0.0), wanted, rtol=2e-2)


def test_without_the_module_the_student_is_the_same(case):
    params, committee, batch = case
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        found = jax.grad(lambda p: diverse_loss(p, student_apply, committee, batch, Diverse())[0])(params)
        updates, state = optimizer.update(found, state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(3):
        params, state = step(params, state)
    logits = jax.jit(lambda p: apply_mlp(p["student"], batch.x))(params)
    np.testing.assert_array_equal(jax.jit(lambda p: apply_mlp(p, batch.x))(strip(params)), logits)
    assert set(strip(params)) == {"layer_0", "layer_1", "layer_2"}


def test_teachers_may_be_compressed(case):
    params, committee, batch = case
    dense = committee.teachers[0].params
    small = ej.quantize_params(dense, ej.quantize.RTN(bits=8, group_size=None))
    assert any(map(ej.is_compressed, jax.tree.leaves(small, is_leaf=ej.is_compressed)))
    held = Committee(teachers=(teacher(0, small), committee.teachers[1]), embed_dim=5)
    like = Committee(teachers=(teacher(0, ej.materialize(small)), committee.teachers[1]), embed_dim=5)
    x = jax.random.normal(jax.random.key(0), (7, 8))
    batches = [dataclasses.replace(batch, seen=c.observe((x, x[:, ::2]))) for c in (held, like)]
    found = [
        jax.jit(jax.value_and_grad(lambda p, c=c, b=b: diverse_loss(p, student_apply, c, b, Diverse())[0]))(params)
        for c, b in zip((held, like), batches, strict=True)
    ]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)
    assert float(optax.tree.norm(found[0][1]["module"]["teacher_0"]["question"])) > 1e-6


def test_a_teacher_of_other_labels_teaches_by_features(case):
    params, committee, batch = case
    apart = Committee(teachers=(teacher(0, shares_labels=False), committee.teachers[1]), embed_dim=5)
    config = Diverse()
    terms = jax.jit(lambda p: diverse_loss(p, student_apply, apart, batch, config)[1])(params)
    wanted = by_hand(params, committee, batch, dataclasses.replace(config, logits=0.0))
    np.testing.assert_allclose(terms.match[:, 0], wanted["match"][:, 0], rtol=1e-4)
    assert not np.asarray(terms.ask[:, 0]).any() and np.asarray(terms.ask[:, 1]).all()


def test_settings_that_cannot_work(case):
    _, committee, batch = case
    with pytest.raises(ConfigError, match=re.escape("weight=-1: must be at least 0")):
        Diverse(weight=-1)
    with pytest.raises(ConfigError, match=re.escape("temperature=0: must be positive")):
        Diverse(temperature=0)
    with pytest.raises(ConfigError, match="1 inputs for 2 teachers: give each its own, in order"):
        committee.observe((batch.x,))
    with pytest.raises(ConfigError, match="the committee has no teacher"):
        diverse_init(jax.random.key(0), {}, Committee(teachers=()), d1=1, d2=1)
