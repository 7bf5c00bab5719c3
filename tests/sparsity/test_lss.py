"""Training of label hashes: its loss and negatives against loops, and that the frontier of recall and size moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.hashing.lsh import SignProjections
from effjax.sparsity import LSS, build_label_head, build_tables, train_hashes
from effjax.sparsity.lss import negatives, pair_loss


def test_the_loss_is_its_definition():
    rng = np.random.default_rng(0)
    method = LSS(hashes=3, tables=2, sharpness=2.0, positive_weight=1.5)
    theta, q = rng.normal(size=(5, 3, 2)), rng.normal(size=(4, 5))
    positives, negative = rng.normal(size=(4, 2, 5)), rng.normal(size=(4, 3, 5))
    real, mined = rng.random((4, 2)) < 0.7, rng.random((4, 3)) < 0.7

    def bits(x):
        return np.tanh(2.0 * np.einsum("d,dkt->kt", x / np.linalg.norm(x), theta))

    def mean(vectors, counted, truth):
        losses = []
        for i, j in zip(*np.nonzero(counted), strict=True):
            for t in range(2):
                score = (bits(q[i])[:, t] * bits(vectors[i, j])[:, t]).sum() - 1.5
                chance = 1 / (1 + np.exp(-score))
                losses.append(-np.log(chance if truth else 1 - chance))
        return np.mean(losses)

    want = 1.5 * mean(positives, real, True) + mean(negative, mined, False)
    arrays = (jnp.asarray(x, jnp.float32) for x in (theta, q, positives))
    got = pair_loss(method, *arrays, jnp.asarray(real), jnp.asarray(negative, jnp.float32), jnp.asarray(mined))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_loss_has_the_gradient_of_its_differences():
    keys = jax.random.split(jax.random.key(0), 5)
    method = LSS(hashes=4, tables=3)
    theta, q = jax.random.normal(keys[0], (6, 4, 3)), jax.random.normal(keys[1], (5, 6))
    args = (q, jax.random.normal(keys[2], (5, 1, 6)), jnp.ones((5, 1), bool))
    args = (*args, jax.random.normal(keys[3], (5, 2, 6)), jnp.ones((5, 2), bool))
    step = 1e-2 * jax.random.normal(keys[4], theta.shape)
    loss = jax.jit(lambda theta: pair_loss(method, theta, *args))
    ahead, behind = (loss(theta + s * step) for s in (1, -1))
    slope = jnp.vdot(jax.jit(jax.grad(loss))(theta), step)
    np.testing.assert_allclose((ahead - behind) / 2, slope, rtol=0.02, atol=1e-4)


def test_no_pairs_lose_nothing():
    none = (jnp.zeros((3, 1, 4)), jnp.zeros((3, 1), bool))
    assert float(pair_loss(LSS(hashes=2, tables=1), jnp.ones((4, 2, 1)), jnp.ones((3, 4)), *none, *none)) == 0


def test_negatives_are_retrieved_wrongly_and_small():
    method = LSS(negatives=4)
    rng = np.random.default_rng(0)
    v, q = rng.normal(size=(30, 5)), rng.normal(size=(6, 5))
    codes, queries = rng.integers(0, 4, (30, 2)), rng.integers(0, 5, (6, 2))  # nothing has code 4
    queries[0] = 4
    own = np.array([[0, 1], [2, -1], [3, 4], [5, -1], [6, 7], [8, -1]])
    tables = build_tables(jnp.asarray(codes), 5)
    ids, counted = negatives(
        method,
        jax.random.key(0),
        tables,
        *map(jnp.asarray, (queries, q.astype(np.float32), own, v.astype(np.float32))),
    )
    mined = np.asarray(counted) > 0
    total = sum((codes[None, :, t] == queries[:, None, t]).sum(1) for t in range(2))
    np.testing.assert_array_equal(counted, mined * total[:, None])
    assert ids.shape == mined.shape == (6, 4) and not mined[0].any() and mined[1:].any()
    for i, j in zip(*np.nonzero(mined), strict=True):
        label = int(ids[i, j])
        assert (codes[label] == queries[i]).any() and label not in own[i]
    logits = np.where(mined, np.einsum("nd,nkd->nk", q, v[np.asarray(ids)]), np.inf)
    assert (logits[:, 1:] >= logits[:, :-1]).all()


def task(seed=0):
    """Labels that a few of the channels tell apart, the others being noise: what random projections cannot know."""
    keys = jax.random.split(jax.random.key(seed), 4)
    kernel = jax.random.normal(keys[0], (24, 400)) * jnp.where(jnp.arange(24) < 8, 1.0, 0.05)[:, None]
    labels = jax.random.randint(keys[1], (3000,), 0, 400)
    return kernel.T[labels] + 0.6 * jax.random.normal(keys[2], (3000, 24)), labels, kernel


def recall_and_share(kernel, lsh, h, labels):
    head = build_label_head(kernel, None, lsh)
    met = (head.codes(h) == lsh(jnp.concatenate([kernel.T, jnp.zeros((400, 1))], 1))[labels]).any(-1)
    return float(met.mean()), float(head.top_k(h, k=1).scored.mean() / 400)


def test_training_moves_the_frontier_of_recall_and_size():
    h, labels, kernel = task()
    method = LSS(hashes=5, tables=4, rebuilds=40, queries=300, steps=5)
    trained = train_hashes(method, jax.random.key(0), h[:2000], labels[:2000], kernel)
    recall, share = recall_and_share(kernel, trained[-1], h[2000:], labels[2000:])
    random = []
    for hashes in (1, 3, 5):
        lsh = SignProjections.make(jax.random.key(9), dim=25, rows=4, hashes=hashes)
        random.append(recall_and_share(kernel, lsh, h[2000:], labels[2000:]))
    # No random setting has that recall at less than twice the share.
    assert all(r < recall or s > 2 * share for r, s in random), (recall, share, random)
    # The first state is SimHash.
    first = recall_and_share(kernel, trained[0], h[2000:], labels[2000:])
    assert first[0] < recall


def test_the_same_key_gives_the_same_hashes_and_states_are_as_many_as_rebuilds():
    h, labels, kernel = task()
    method = LSS(hashes=3, tables=2, rebuilds=3, queries=50, steps=2)
    runs = [train_hashes(method, jax.random.key(k), h, labels, kernel) for k in (0, 0, 1)]
    assert runs[0].directions.shape == (4, 25, 3, 2) and runs[0].recall.shape == runs[0].slots.shape == (4,)
    np.testing.assert_array_equal(runs[0].directions, runs[1].directions)
    assert bool((runs[0].directions[0] != runs[2].directions[0]).any())
    assert runs[0][2].buckets == 8
    padded = jnp.concatenate([labels[:, None], jnp.full((3000, 2), -1)], 1)
    same = train_hashes(method, jax.random.key(0), h, padded, kernel)
    np.testing.assert_allclose(same.directions[0], runs[0].directions[0])
    shapes = jax.eval_shape(lambda *a: train_hashes(method, *a), jax.random.key(0), h, labels, kernel)
    assert shapes.directions.shape == (4, 25, 3, 2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hashes", 25, r"hashes=25: choose 1 to 24; a table has 2\*\*hashes buckets"),
        ("tables", 0, "tables=0: a positive number"),
        ("negatives", 0, "negatives=0: a positive number"),
        ("sharpness", 0.0, "sharpness=0.0: a positive number"),
        ("learning_rate", -1.0, "learning_rate=-1.0: a positive number"),
    ],
)
def test_bad_fields_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LSS(), **{field: value})


def test_the_offset_is_half_the_hashes_unless_given():
    assert LSS(hashes=8).middle == 4 and LSS(hashes=8, offset=2.5).middle == 2.5
