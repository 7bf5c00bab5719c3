"""Weighted one-dimensional k-means against a plain loop, and against scikit-free facts of Lloyd's algorithm."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from effjax.quantize import kmeans
from effjax.quantize.kmeans import nearest, weighted_kmeans

cluster = jax.jit(weighted_kmeans, static_argnums=2)


def lloyd(x, s, entries, iterations=100, tolerance=1e-6):
    """One column, in float64, point by point."""
    x, s = x.astype(np.float64), s.astype(np.float64)
    s = s if s.max() > 0 else np.ones_like(s)
    centres = np.linspace(x.min(), x.max(), entries)
    for _ in range(iterations):
        code = np.abs(x[:, None] - centres).argmin(1)
        new = centres.copy()
        for k in range(entries):
            if s[code == k].sum() > 0:
                new[k] = np.average(x[code == k], weights=s[code == k])
        moved = np.abs(new - centres).max()
        centres = new
        if moved <= tolerance * (x.max() - x.min()):
            break
    return centres


def cost(x, s, centres):
    return float((s * np.square(x[:, None] - centres).min(1)).sum() / s.sum())


@given(
    st.sampled_from([(3, 2), (40, 3), (61, 4), (700, 2)]),
    st.sampled_from([2, 5, 17]),
    st.integers(0, 50),
    st.floats(0, 6),
)
@settings(max_examples=12)
def test_lloyd(shape, entries, seed, spread):
    """Weights up to e^6 apart a standard deviation; both searches; odd sizes."""
    rng = np.random.default_rng(seed)
    points = rng.standard_normal(shape).astype(np.float32)
    weights = np.exp(spread * rng.standard_normal(shape)).astype(np.float32)
    found = np.asarray(cluster(points, weights, entries))
    assert np.all(np.diff(found, axis=0) >= 0)
    for column in range(shape[1]):
        x, s = points[:, column], weights[:, column]
        wanted = cost(x, s, lloyd(x, s, entries))
        # A point between two centres may fall to either at the last digit, so costs are compared, not paths.
        assert cost(x, s, found[:, column]) <= wanted * 1.05 + 1e-9 * np.ptp(x) ** 2


def test_same_centres_where_no_point_is_between():
    points = np.concatenate([np.linspace(-3, -2, 9), np.linspace(0, 0.5, 7), np.linspace(4, 5, 5)]).astype(np.float32)
    weights = np.linspace(1, 9, 21, dtype=np.float32)
    found = cluster(points[:, None], weights[:, None], 3)[:, 0]
    np.testing.assert_allclose(found, lloyd(points, weights, 3), rtol=1e-6)


def test_edges():
    """All equal; no weights; a centre without points stays; more centres than points."""
    flat = cluster(jnp.full((5, 1), 2.5), jnp.ones((5, 1)), 4)
    np.testing.assert_array_equal(flat, np.full((4, 1), 2.5))
    points = jnp.array([[0.0], [1.0], [2.0], [9.0]])
    np.testing.assert_array_equal(cluster(points, jnp.zeros((4, 1)), 2), cluster(points, jnp.ones((4, 1)), 2))
    assert cluster(points, jnp.ones((4, 1)), 4).ravel().tolist() == [0.5, 2.0, 6.0, 9.0]  # 6 has no points
    few = np.asarray(cluster(jnp.array([[0.0], [1.0]]), jnp.ones((2, 1)), 5)).ravel()
    assert few[0] == 0 and few[-1] == 1 and np.all(np.diff(few) >= 0)


def test_tiny_weights_are_not_lost_beside_huge_ones():
    """Running sums keep some forty bits: a cluster with a billionth of the weight still gets its own mean."""
    points = np.concatenate([np.linspace(0, 1, 400), [10.0, 10.5]]).astype(np.float32)[:, None]
    weights = np.concatenate([np.full(400, 1.0), [3e-7, 1e-7]]).astype(np.float32)[:, None]
    assert float(cluster(points, weights, 2)[1, 0]) == pytest.approx(10.125, abs=1e-3)


def test_a_column_does_not_depend_on_the_others():
    rng = np.random.default_rng(0)
    points, weights = rng.standard_normal((50, 6)).astype(np.float32), rng.random((50, 6)).astype(np.float32)
    together = np.asarray(cluster(points, weights, 5))
    for i in range(6):
        alone = np.asarray(cluster(points[:, i : i + 1], weights[:, i : i + 1], 5))
        assert alone.tobytes() == together[:, i : i + 1].copy().tobytes()


def test_both_searches_agree(monkeypatch):
    rng = np.random.default_rng(0)
    points, weights = rng.standard_normal((200, 4)).astype(np.float32), rng.random((200, 4)).astype(np.float32)
    compared = weighted_kmeans(points, weights, 6)
    monkeypatch.setattr(kmeans, "COMPARE_ALL", 10)
    np.testing.assert_array_equal(weighted_kmeans(points, weights, 6), compared)


@pytest.mark.parametrize("entries", [2, 16, 40])
def test_nearest(entries):
    rng = np.random.default_rng(0)
    table = np.sort(rng.standard_normal((entries, 7)), axis=0).astype(np.float32)
    w = rng.standard_normal((30, 7)).astype(np.float32)
    codes, values = nearest(w, table)
    wanted = np.abs(w[:, None, :] - table).argmin(1)
    np.testing.assert_array_equal(codes, wanted)
    np.testing.assert_array_equal(values, np.take_along_axis(table, wanted, axis=0))
    one, value = nearest(w[3], jnp.asarray(table))
    np.testing.assert_array_equal((one, value), (codes[3], values[3]))
