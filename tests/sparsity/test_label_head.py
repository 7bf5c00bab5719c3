"""The sampled output layer: against the dense layer restricted to the buckets, and its loss against full softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.hashing.lsh import SignProjections
from effjax.sparsity import LSS, build_label_head, frequent_labels, sampled_softmax_loss, train_hashes


def layer(d=9, labels=60, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(keys[0], (d, labels)),
        jax.random.normal(keys[1], (labels,)),
        jax.random.normal(keys[2], (7, d)),
    )


@pytest.mark.parametrize("more", [1, 2], ids=["as they are", "of one norm"])
def test_top_k_is_that_of_the_dense_layer_in_the_buckets(more):
    kernel, bias, h = layer()
    lsh = SignProjections.make(jax.random.key(3), dim=9 + more, rows=3, hashes=3)
    head = build_label_head(kernel, bias, lsh, fallback=[4, 5])
    points = np.concatenate([kernel.T, bias[:, None]], 1)
    if more == 2:
        squares = (points**2).sum(1)
        points = np.concatenate([points, np.sqrt(squares.max() - squares)[:, None]], 1)
    theta = np.asarray(lsh.directions)
    queries = np.concatenate([h, np.ones((7, 1)), np.zeros((7, more - 1))], 1)
    sides = [np.einsum("nd,dkt->nkt", x, theta) >= 0 for x in (queries, points)]
    member = (sides[0][:, None] == sides[1][None]).all(2).any(-1)  # [queries, labels]
    few = member.sum(1) < 2
    member[np.ix_(few, [4, 5])] = True
    logits = np.where(member, np.asarray(h @ kernel + bias), -np.inf)
    for run in (head.top_k, jax.jit(head.top_k, static_argnames="k")):
        best = run(h, k=2)
        np.testing.assert_array_equal(best.labels, np.argsort(-logits, 1)[:, :2])
        np.testing.assert_array_equal(best.scored, member.sum(1))
        np.testing.assert_allclose(best.values, -np.sort(-logits, 1)[:, :2], rtol=1e-4, atol=1e-5)
    ids, valid = head.retrieve(h, max_candidates=head.tables.most())
    dense = np.asarray(h @ kernel + bias)
    sampled = np.asarray(head.logits(h, ids, valid))
    for i in range(7):
        real = np.asarray(valid[i])
        np.testing.assert_allclose(sampled[i][real], dense[i][np.asarray(ids[i])[real]], rtol=1e-4, atol=1e-5)
        assert (sampled[i][~real] == -np.inf).all()


def test_one_bucket_that_holds_all_is_the_dense_layer():
    kernel, bias, h = layer()
    lsh = SignProjections(directions=jnp.zeros((10, 1, 1)), rehash=None, buckets=2)
    best = build_label_head(kernel, bias, lsh).top_k(h, k=60)
    np.testing.assert_array_equal(best.scored, 60)
    np.testing.assert_array_equal(best.labels, jnp.argsort(-(h @ kernel + bias), -1))


def test_one_label_no_bias_and_bfloat16():
    lsh = SignProjections.make(jax.random.key(0), dim=4, rows=2, hashes=5)
    head = build_label_head(jnp.ones((3, 1)), None, lsh, fallback=[0], dtype="bfloat16")
    best = head.top_k(jnp.array([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]]), k=1)
    assert best.labels.tolist() == [[0], [0]] and best.values.tolist() == [[6.0], [-6.0]]
    assert head.weights.dtype == jnp.bfloat16 and head.nbytes > head.tables.nbytes


def test_frequent_labels_skip_padding():
    labels = jnp.array([[1, 2, -1], [2, -1, -1], [2, 1, 4]])
    assert frequent_labels(labels, of=5, count=3).tolist() == [2, 1, 4]


def test_with_all_labels_the_loss_is_full_cross_entropy_with_its_gradient():
    kernel, bias, h = layer()
    labels = jnp.array([0, 3, 59, 7, 7, 1, 20])
    ids = jnp.tile(jax.random.permutation(jax.random.key(0), 60), (7, 1))

    def sampled(kernel, bias, h):
        return sampled_softmax_loss(kernel, bias, h, labels, ids, jnp.ones_like(ids, bool)).sum()

    def full(kernel, bias, h):
        return optax.softmax_cross_entropy_with_integer_labels(h @ kernel + bias, labels).sum()

    got, want = (jax.value_and_grad(f, (0, 1, 2))(kernel, bias, h) for f in (sampled, full))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_loss_of_several_labels_is_their_mean_over_the_union():
    kernel, bias, h = layer()
    own = np.array([[2, 5, -1], [1, -1, -1], [-1, -1, -1]])
    ids = np.array([[5, 9, 11, 60], [1, 3, 60, 60], [0, 60, 60, 60]])
    args = (kernel, bias, h[:3], jnp.asarray(own), jnp.asarray(ids), jnp.asarray(ids < 60))
    loss = sampled_softmax_loss(*args)
    logits = np.asarray(h[:3] @ kernel + bias, np.float64)
    for i, union in enumerate([{2, 5, 9, 11}, {1, 3}]):
        total = np.log(np.exp([logits[i, j] for j in union]).sum())
        mine = [j for j in own[i] if j >= 0]
        np.testing.assert_allclose(loss[i], np.mean([total - logits[i, j] for j in mine]), rtol=1e-5)
    assert float(loss[2]) == 0
    gradient = jax.grad(lambda k: sampled_softmax_loss(k, *args[1:]).sum())(kernel)
    touched = jnp.abs(gradient).max(0) > 0
    assert set(np.flatnonzero(touched)) == {1, 2, 3, 5, 9, 11}
    step = 1e-3 * jax.random.normal(jax.random.key(0), kernel.shape)
    ahead, behind = (sampled_softmax_loss(kernel + s * step, *args[1:]).sum() for s in (1, -1))
    np.testing.assert_allclose((ahead - behind) / 2, jnp.vdot(gradient, step), rtol=0.02, atol=1e-5)


def test_training_on_retrieved_labels_learns_the_full_problem():
    kernel, _, _ = layer(labels=200)
    labels = jax.random.randint(jax.random.key(1), (2000,), 0, 200)
    h = kernel.T[labels] + 0.3 * jax.random.normal(jax.random.key(2), (2000, 9))
    lsh = SignProjections.make(jax.random.key(3), dim=10, rows=6, hashes=3)
    params, optimizer = (0.01 * kernel, jnp.zeros(200)), optax.adam(0.05)

    @jax.jit
    def step(carry, _):
        params, state = carry
        ids, valid = build_label_head(*params, lsh).retrieve(h, max_candidates=150)

        def loss(p):
            return sampled_softmax_loss(*p, h, labels, ids, valid).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    def right(p):
        return float((jnp.argmax(h @ p[0] + p[1], -1) == labels).mean())

    (kernel, bias), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=30)[0]
    assert right((kernel, bias)) > 0.8


def test_bad_input_is_named():
    kernel, bias, h = layer()
    lsh = SignProjections.make(jax.random.key(0), dim=9, rows=2, hashes=3)
    with pytest.raises(
        ValueError, match="hash functions of 9 channels, rehashed: False: make SignProjections with dim=10"
    ):
        build_label_head(kernel, bias, lsh)
    with pytest.raises(ValueError, match=r"kernel \(9, 60\) and bias \(59,\): give a dense layer's"):
        build_label_head(kernel, bias[1:], lsh)
    good = SignProjections.make(jax.random.key(0), dim=10, rows=2, hashes=3)
    with pytest.raises(ValueError, match="dtype='float16': choose 'float32' or 'bfloat16'"):
        build_label_head(kernel, bias, good, dtype="float16")
    rehashed = SignProjections.make(jax.random.key(0), dim=10, rows=2, hashes=3, buckets=5)
    with pytest.raises(ValueError, match="rehashed: True: make SignProjections with dim=10 .* without buckets"):
        build_label_head(kernel, bias, rehashed)
    ids = jnp.zeros((7, 2), int)
    with pytest.raises(ValueError, match=r"labels \(6,\), ids .* give a row a query in each"):
        sampled_softmax_loss(kernel, bias, h, jnp.zeros(6, int), ids, ids > 0)
    with pytest.raises(ValueError, match=r"train_hashes: h \(7, 9\), labels \(6,\)"):
        train_hashes(LSS(), jax.random.key(0), h, jnp.zeros(6, int), kernel, bias)
    with pytest.raises(ValueError, match=r"train_hashes: bias \(59,\) does not fit the 60 labels"):
        train_hashes(LSS(), jax.random.key(0), h, jnp.zeros(7, int), kernel, bias[1:])
