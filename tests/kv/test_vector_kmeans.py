"""k-means of vectors against Lloyd's algorithm in plain float64 numpy, from the same start."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from effjax.kv.vector_kmeans import normalised, plus_plus, vector_kmeans

fit = jax.jit(vector_kmeans, static_argnames=("entries", "iterations", "tolerance"))
started = jax.jit(plus_plus, static_argnames="entries")


def objective(points, weights, centres):
    distances = ((points[:, None, :].astype(np.float64) - centres[None].astype(np.float64)) ** 2).sum(-1)
    return float((weights * distances.min(1)).sum())


def lloyd(points, weights, centres, iterations):
    points, centres = points.astype(np.float64), centres.astype(np.float64).copy()
    for _ in range(iterations):
        nearest = ((points[:, None, :] - centres[None]) ** 2).sum(-1).argmin(1)
        for k in range(len(centres)):
            mine = nearest == k
            if weights[mine].sum() > 0:
                centres[k] = np.average(points[mine], axis=0, weights=weights[mine])
    return centres


def example(seed, n=300, channels=3):
    rng = np.random.default_rng(seed)
    points = (rng.standard_normal((n, channels)) + rng.integers(0, 4, (n, 1)) * 5 + 100).astype(np.float32)
    return points, np.exp(2 * rng.standard_normal(n)).astype(np.float32)


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), entries=st.sampled_from([4, 16]))
def test_not_worse_than_lloyd_from_the_same_start(seed, entries):
    """Far from zero on purpose: without moving the points, products would lose the digits of distances."""
    points, weights = example(seed)
    key = jax.random.key(seed)
    mean = np.average(points, axis=0, weights=weights).astype(np.float32)
    start = np.asarray(started(jnp.asarray(points - mean), normalised(jnp.asarray(weights)), entries, key=key)) + mean
    ours = fit(jnp.asarray(points), jnp.asarray(weights), entries, key=key, iterations=30, tolerance=0.0)
    theirs = lloyd(points, weights, start, 30)
    found, wanted = objective(points, weights, np.asarray(ours)), objective(points, weights, theirs)
    assert found <= wanted * 1.02, "equal but for points whose nearest centre rounding changes"
    assert found < objective(points, weights, start)


def test_more_than_one_piece_equals_lloyd():
    """Beyond 1024 points steps go by pieces, the last one padded."""
    points, weights = example(5, n=2500, channels=2)
    key = jax.random.key(1)
    mean = np.average(points, axis=0, weights=weights).astype(np.float32)
    start = np.asarray(started(jnp.asarray(points - mean), normalised(jnp.asarray(weights)), 5, key=key)) + mean
    ours = fit(jnp.asarray(points), jnp.asarray(weights), 5, key=key, iterations=4, tolerance=0.0)
    np.testing.assert_allclose(ours, lloyd(points, weights, start, 4), atol=2e-3)


def test_weights_of_channels_equal_lloyd():
    """Centres are means channel by channel; nearest is by plain distances."""
    points, weights = example(7, n=1500, channels=3)
    each = weights[:, None] * np.exp(np.random.default_rng(8).standard_normal(points.shape)).astype(np.float32)
    key, total = jax.random.key(1), each.mean(1)
    mean = np.average(points, axis=0, weights=total).astype(np.float32)
    start = np.asarray(started(jnp.asarray(points - mean), normalised(jnp.asarray(total)), 5, key=key)) + mean
    ours = fit(jnp.asarray(points), jnp.asarray(each), 5, key=key, iterations=4, tolerance=0.0)
    np.testing.assert_allclose(ours, lloyd(points, each, start, 4), atol=2e-3)


def test_start_draws_by_weight_times_distance():
    """Two tight clusters and a light point far away: the second draw comes from where weight and distance are."""
    points = np.array([[0, 0]] * 50 + [[10, 0]] * 50 + [[20, 0]], np.float32)
    weights = np.array([1.0] * 100 + [1e-9], np.float32)
    keys = jax.random.split(jax.random.key(0), 200)
    starts = np.asarray(jax.vmap(lambda k: plus_plus(jnp.asarray(points), jnp.asarray(weights), 2, key=k))(keys))
    assert sorted({tuple(sorted(start[:, 0].tolist())) for start in starts}) == [(0.0, 10.0)]
    first = starts[:, 0, 0]
    assert 0.35 < (first == 0).mean() < 0.65


def test_start_squares_distances():
    """From the first centre 0, points at 1 and 3 are drawn in the ratio 1 to 9."""
    points = jnp.array([[0.0], [1.0], [3.0]])
    keys = jax.random.split(jax.random.key(3), 3000)
    starts = np.asarray(jax.vmap(lambda k: plus_plus(points, jnp.ones(3), 2, key=k))(keys))[..., 0]
    second = starts[starts[:, 0] == 0, 1]
    assert 0.87 < (second == 3).mean() < 0.93


def test_fewer_distinct_points_than_centres():
    points = jnp.array([[1.0, 2.0], [1.0, 2.0], [5.0, 5.0]])
    centres = np.asarray(fit(points, jnp.ones(3), 4, key=jax.random.key(0)))
    assert np.isfinite(centres).all()
    np.testing.assert_allclose(np.unique(centres.round(4), axis=0), [[1, 2], [5, 5]])


def test_weights_count_by_their_ratios_alone():
    points, weights = example(2)

    def found(w):
        return fit(jnp.asarray(points), w, 8, key=jax.random.key(0))

    np.testing.assert_allclose(found(jnp.asarray(weights) * 2.0**-100), found(jnp.asarray(weights)), rtol=1e-5)
    np.testing.assert_array_equal(found(jnp.zeros(len(weights))), found(jnp.ones(len(weights))))
    assert np.isclose(float(normalised(jnp.asarray(weights)).mean()), 1)


def test_a_weightless_cluster_gets_no_centre():
    points = np.concatenate([np.random.default_rng(0).standard_normal((60, 2)), np.full((40, 2), 50.0)])
    weights = np.array([1.0] * 60 + [0.0] * 40)
    centres = fit(jnp.asarray(points, jnp.float32), jnp.asarray(weights), 4, key=jax.random.key(0))
    assert float(jnp.abs(centres).max()) < 5
