"""Dense DKM, the start of its centroids and its post-training form, against oracles in plain numpy."""

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.errors import LeafError
from effjax.quantize.centroids import kmeans, kmeans_vectors, repair
from effjax.quantize.dkm import DKM, dkm_soft, join, split

soft = jax.jit(dkm_soft, static_argnums=3)
cluster = jax.jit(kmeans, static_argnums=1)


def oracle(w, c, tau, iterations):
    """DKM with loops, in float64; vectors along the last axis."""
    w, c = np.asarray(w, np.float64), np.asarray(c, np.float64)
    w, c = (x if x.ndim == 2 else x[:, None] for x in (w, c))
    for _ in range(iterations):
        shares = np.zeros((len(w), len(c)))
        for i, x in enumerate(w):
            logits = -np.square(x - c).sum(-1) / tau
            shares[i] = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        c = np.stack([(shares[:, j, None] * w).sum(0) / shares[:, j].sum() for j in range(len(c))])
    return shares @ c, c


def squared_error(w, c):
    return np.square(np.asarray(w, np.float64)[:, None] - np.asarray(c, np.float64)).min(1).sum()


@given(
    st.sampled_from([(30, 4, 1), (40, 3, 1), (12, 5, 3)]), st.integers(1, 3), st.floats(0.02, 2.0), st.integers(0, 999)
)
@settings(max_examples=12)
def test_oracle(sizes, iterations, tau, seed):
    n, entries, dim = sizes
    rng = np.random.default_rng(seed)
    w, c = rng.standard_normal((n, dim)), rng.standard_normal((entries, dim))
    if dim == 1:
        w, c = w[:, 0], c[:, 0]
    want, moved = oracle(w, c, tau, iterations)
    got, centroids = soft(jnp.asarray(w, jnp.float32), jnp.asarray(c, jnp.float32), tau, iterations)
    # A centroid that gathers next to nothing is the quotient of two tiny numbers.
    np.testing.assert_allclose(np.asarray(got).reshape(want.shape), want, atol=2e-3, rtol=1e-3)
    assert np.median(np.abs(np.asarray(centroids).reshape(moved.shape) - moved)) < 1e-4


def test_vectors_of_one_are_scalars():
    w, c = jax.random.normal(jax.random.key(0), (50,)), jnp.array([-1.0, 0.0, 1.0])
    plain, vectors = soft(w, c, 0.1, 3), soft(w[:, None], c[:, None], 0.1, 3)
    np.testing.assert_allclose(vectors[0][:, 0], plain[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vectors[1][:, 0], plain[1], rtol=1e-5, atol=1e-6)


def test_shares_sum_to_one():
    """Soft weights are means of centroids: adding a number to weights and centroids adds it to the result."""
    w, c = jax.random.normal(jax.random.key(0), (200,)), jnp.array([-1.5, -0.3, 0.2, 2.0])
    here, centroids = soft(w, c, 0.2, 2)
    there, _ = soft(w + 4, c + 4, 0.2, 2)
    np.testing.assert_allclose(there, here + 4, rtol=1e-5)
    assert centroids.min() <= here.min() and here.max() <= centroids.max()


def test_cold_assignment_is_hard():
    """As tau goes to zero: Lloyd's iterations, written in numpy."""
    w, c = np.asarray(jax.random.normal(jax.random.key(1), (500,))), np.array([-2.0, -0.5, 0.1, 1.0], np.float32)
    for _ in range(3):
        owner = np.abs(w[:, None] - c).argmin(1)
        c = np.array([w[owner == j].mean() for j in range(4)], np.float32)
    got, centroids = soft(jnp.asarray(w), jnp.array([-2.0, -0.5, 0.1, 1.0]), 1e-7, 3)
    np.testing.assert_allclose(centroids, c, rtol=1e-5)
    np.testing.assert_allclose(got, c[owner], rtol=1e-5)


def test_enough_centroids_keep_the_weights():
    values = jnp.array([-1.0, -0.25, 0.5, 0.75, 2.0])
    w = jnp.tile(values, 7)
    got, _ = soft(w, cluster(w, 8), 1e-6, 3)
    np.testing.assert_allclose(got, w, rtol=1e-6)


def test_a_centroid_without_weights_stays():
    got, centroids = soft(jnp.array([-1.0, 1.0]), jnp.array([-1.0, 1.0, 1e3]), 1e-2, 3)
    assert centroids.tolist() == [-1.0, 1.0, 1e3] and jnp.isfinite(got).all()
    gradient = jax.grad(lambda c: soft(jnp.array([-1.0, 0.9]), c, 1e-2, 3)[0].sum())(jnp.array([-1.0, 1.0, 1e3]))
    assert jnp.isfinite(gradient).all()


def test_dtypes():
    w = jax.random.normal(jax.random.key(0), (64,), jnp.bfloat16)
    got, centroids = soft(w, jnp.array([-1.0, 1.0]), 0.1, 3)
    assert got.dtype == jnp.bfloat16 and centroids.dtype == jnp.float32
    full, _ = soft(w.astype(jnp.float32), jnp.array([-1.0, 1.0]), 0.1, 3)
    np.testing.assert_array_equal(got, full.astype(jnp.bfloat16))


def test_wrong_calls():
    with pytest.raises(LeafError, match="^iterations=0: at least one$"):
        dkm_soft(jnp.ones(4), jnp.ones(2), 0.1, 0)
    with pytest.raises(LeafError, match=r"^weights \[4, 3\] are no vectors of 2, as the centroids are$"):
        dkm_soft(jnp.ones((4, 3)), jnp.ones((2, 2)), 0.1)


@given(st.sampled_from([1, 2, 8, 9]), st.sampled_from([2, 3]), st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e4]))
@settings(max_examples=20)
def test_kmeans_is_the_best_there_is(n, entries, seed, size):
    """Of all partitions of the sorted weights into at most so many runs, none has a smaller error."""
    rng = np.random.default_rng(seed)
    w = np.sort(rng.choice([rng.standard_normal(n), rng.integers(0, 3, n)]).astype(np.float64) * size)
    best = np.inf
    for cuts in itertools.combinations_with_replacement(range(n + 1), entries - 1):
        runs = np.split(w, cuts)
        best = min(best, sum(np.square(run - run.mean()).sum() for run in runs if len(run)))
    found = squared_error(w, np.asarray(cluster(jnp.asarray(rng.permutation(w), jnp.float32), entries)))
    assert found <= best * 1.0001 + 1e-10 * size**2


@pytest.mark.parametrize(("n", "entries"), [(1024, 4), (1025, 16), (5000, 8)])
def test_kmeans_of_many_weights(n, entries):
    """No worse than four runs of k-means++ and Lloyd in numpy, which may find the same."""
    rng = np.random.default_rng(n)
    w = np.concatenate([rng.standard_normal(n - n // 5), 3 + 0.1 * rng.standard_t(2, n // 5)]).astype(np.float32)
    best = np.inf
    for _ in range(4):
        c = w[rng.integers(n, size=1)]
        while len(c) < entries:
            closest = np.square(w[:, None] - c).min(1)
            c = np.append(c, rng.choice(w, p=closest / closest.sum()))
        for _ in range(60):
            owner = np.abs(w[:, None] - c).argmin(1)
            sizes = np.bincount(owner, minlength=entries)
            c = np.where(sizes > 0, np.bincount(owner, w, minlength=entries) / np.maximum(sizes, 1), c)
        best = min(best, squared_error(w, c))
    assert squared_error(w, cluster(jnp.asarray(w), entries)) <= best * 1.001


@pytest.mark.parametrize("w", [[0.0] * 9, [0.75] * 9, [-3.0] * 9, [1.0, 2.0], [0.1, 0.1, 5.0, 5.0, 5.0], [1e-30] * 3])
@pytest.mark.parametrize("entries", [2, 8])
def test_duplicates_are_repaired(w, entries):
    """The number of centroids stays, all differ also in bfloat16, and what there was is still there."""
    c = np.asarray(cluster(jnp.array(w), entries))
    assert len(np.unique(c)) == len(np.unique(c.astype(jnp.bfloat16))) == entries and (np.diff(c) > 0).all()
    if len(set(w)) <= entries:
        np.testing.assert_allclose(squared_error(np.float32(w), c), 0, atol=1e-12)


def test_repair():
    assert repair(jnp.array([2.0, 1.0, 1.0, 5.0])).tolist() == [1.0, 1.5, 2.0, 5.0]
    untouched = jnp.array([-1.0, 0.0, 0.5])
    np.testing.assert_array_equal(repair(untouched), untouched)


def test_kmeans_of_vectors():
    """Well separated groups are found, and equal vectors do not make NaN."""
    middles = np.array([[0, 0], [9, 0], [0, 9], [9, 9]], np.float32)
    x = np.repeat(middles, 30, axis=0) + np.random.default_rng(0).standard_normal((120, 2)).astype(np.float32)
    c = np.asarray(kmeans_vectors(jnp.asarray(x), 4, jax.random.key(0)))
    want = x.reshape(4, 30, 2).mean(1)
    np.testing.assert_allclose(c[np.lexsort(c.round().T)], want[np.lexsort(want.round().T)], atol=0.3)
    assert jnp.isfinite(kmeans_vectors(jnp.ones((5, 3)), 4, jax.random.key(0))).all()


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_post_training(bits):
    """Codes are of the nearest entries, tables a group of columns; the bytes are those of the codes and tables."""
    w = jax.random.normal(jax.random.key(bits), (61, 8))
    q = DKM(bits=bits, group_columns=4).quantize(w)
    dense = np.asarray(q.materialize())
    for g in range(2):
        part, table = np.asarray(w[:, 4 * g : 4 * g + 4]), np.asarray(q.tables[0, g])
        want = table[np.abs(part[..., None] - table).argmin(-1)]
        np.testing.assert_array_equal(dense[:, 4 * g : 4 * g + 4], want)
    assert q.nbytes == -(-61 * bits // 8) * 8 + 2 * 2**bits * 4


def test_post_training_beats_the_uniform_grid():
    w = jax.random.t(jax.random.key(0), 4.0, (256, 16))
    ours, uniform = (
        float(jnp.square(q.materialize() - w).mean())
        for q in (DKM(bits=3).quantize(w), ej.quantize.RTN(bits=3, group_size=None).quantize(w))
    )
    assert ours < 0.6 * uniform


def test_split_and_join():
    w = jnp.arange(2 * 3 * 8).reshape(2, 3, 8)
    parts = split(w, 4)
    assert parts.shape == (2, 2, 3, 4)
    np.testing.assert_array_equal(parts[1, 1], w[1, :, 4:])
    np.testing.assert_array_equal(join(parts), w)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 0}, "bits=0: choose 1 to 8"),
        ({"bits": 9}, "bits=9: choose 1 to 8"),
        ({"tau": 0.0}, "tau=0.0: a positive temperature"),
        ({"tau": float("nan")}, "tau=nan: a positive temperature"),
        ({"iterations": 0}, "iterations=0: at least one"),
        ({"group_columns": 0}, "group_columns=0: a positive number, or None for one table a matrix"),
        ({"round_to": "float32"}, "round_to='float32': choose 'bfloat16', 'float16' or None"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        DKM(**options)


def test_columns_that_cannot_be_grouped():
    text = (
        r"^mlp/kernel \[8, 12\]: group_columns=5 does not divide its 12 outputs: choose one of \[4, 2\] or None "
        r"\(one table a matrix\) for this leaf with a rule$"
    )
    with pytest.raises(LeafError, match=text):
        ej.quantize_params({"mlp": {"kernel": jnp.ones((8, 12))}}, DKM(group_columns=5))
