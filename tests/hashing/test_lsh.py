"""Locality-sensitive hashes: collisions as often as their formulas say, and formulas that can be differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from effjax.hashing.lsh import PStable, SignProjections, angle, angular_collision, distance, euclidean_collision

ROWS = 20_000


def pairs(dim=24, steps=8):
    """A vector and others further and further from it."""
    rng = np.random.default_rng(0)
    x, way = rng.normal(size=dim), rng.normal(size=dim)
    return jnp.asarray(np.stack([x + 0.6 * i * way / np.linalg.norm(way) for i in range(steps)]), jnp.float32)


def test_euclidean_formula_is_the_integral():
    """Of the density of |projection| times the share of offsets that keep both in one interval."""
    for c in (0.1, 1.0, 5.0):
        t = np.linspace(0, 2.0, 20_001)
        density = 2 * norm.pdf(t / c) / c * (1 - t / 2.0)
        want = ((density[1:] + density[:-1]) / 2 * np.diff(t)).sum()
        np.testing.assert_allclose(euclidean_collision(jnp.float32(c), 2.0, 3), want**3, rtol=2e-5)


@pytest.mark.parametrize("projections", ["gaussian", "sparse"])
@pytest.mark.parametrize("hashes", [1, 3])
@pytest.mark.parametrize("buckets", [16, 1000])
def test_p_stable_collides_as_often_as_it_should(projections, hashes, buckets):
    x = pairs()
    options = {"dim": 24, "rows": ROWS, "hashes": hashes, "width": 3.0, "buckets": buckets}
    lsh = PStable.make(jax.random.key(1), projections=projections, **options)
    cells, codes = (np.asarray(found) for found in jax.jit(lambda lsh: (lsh(x), lsh.codes(x)))(lsh))
    assert cells.min() >= 0 and cells.max() == buckets - 1 and codes.min() < 0
    want = np.asarray(lsh.kernel(x[0], x))
    same = (codes == codes[0]).all(-2).mean(-1)
    # Four standard errors, and what a sum of 24 terms of -1, 0, +1 differs from a Gaussian by.
    room = 4 * np.sqrt(want * (1 - want) / ROWS) + (0.012 if projections == "sparse" else 0)
    assert (np.abs(same - want) <= room + 1e-6).all()
    shared = (cells == cells[0]).mean(-1)
    rehashed = want + (1 - want) / buckets
    assert (np.abs(shared - rehashed) <= room + 4 * np.sqrt(rehashed * (1 - rehashed) / ROWS) + 1e-6).all()


@pytest.mark.parametrize("buckets", [None, 20])
def test_signs_collide_as_often_as_they_should(buckets):
    x = pairs()
    lsh = SignProjections.make(jax.random.key(1), dim=24, rows=ROWS, hashes=6, buckets=buckets)
    cells = np.asarray(jax.jit(lambda lsh: lsh(x))(lsh))
    assert cells.min() == 0 and cells.max() == (63 if buckets is None else 19)
    cosine = np.asarray(x @ x[0]) / np.linalg.norm(x, axis=-1) / np.linalg.norm(x[0])
    want = (1 - np.arccos(np.minimum(cosine, 1)) / np.pi) ** 6
    np.testing.assert_allclose(lsh.kernel(x[0], x), want, atol=1e-3)
    rehashed = want if buckets is None else want + (1 - want) / buckets
    room = 4 * np.sqrt(rehashed * (1 - rehashed) / ROWS) + 1e-3
    assert (np.abs((cells == cells[0]).mean(-1) - rehashed) <= room).all()


def test_sign_codes_are_their_bits():
    lsh = SignProjections.make(jax.random.key(1), dim=5, rows=9, hashes=4)
    x = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    bits = np.einsum("nd,dkr->nkr", x, np.asarray(lsh.directions)) >= 0
    np.testing.assert_array_equal(lsh(jnp.asarray(x)), (bits * (2 ** np.arange(4))[:, None]).sum(1))


def test_sparse_directions():
    lsh = PStable.make(jax.random.key(0), dim=30, rows=500, hashes=2, width=1.0, buckets=8, projections="sparse")
    values, counts = np.unique(np.asarray(lsh.directions), return_counts=True)
    np.testing.assert_allclose(values, np.sqrt(3) * np.array([-1, 0, 1]), rtol=1e-6)
    np.testing.assert_allclose(counts / counts.sum(), [1 / 6, 2 / 3, 1 / 6], atol=0.01)


def test_gradients_are_those_of_differences_and_finite_at_the_edges():
    x, y = jnp.array([1.0, 2.0, -1.0]), jnp.array([0.5, -1.0, 2.0])
    lsh = PStable.make(jax.random.key(0), dim=3, rows=1, hashes=3, width=2.0, buckets=8)
    signs = SignProjections.make(jax.random.key(0), dim=3, rows=1, hashes=3)
    for kernel in (jax.jit(lsh.kernel), jax.jit(signs.kernel)):
        gradient = jax.jit(jax.grad(kernel))
        got = gradient(x, y)
        for i in range(3):
            step = 1e-2 * jnp.eye(3)[i]
            np.testing.assert_allclose(got[i], (kernel(x + step, y) - kernel(x - step, y)) / 2e-2, atol=2e-3)
        for other in (x, 0 * x, -x, 1e6 * x):
            assert np.isfinite(gradient(x, other)).all()
    np.testing.assert_allclose(lsh.kernel(x, x), 1, atol=1e-4)
    np.testing.assert_allclose(signs.kernel(x, x), 1, atol=1e-4)
    np.testing.assert_allclose(angle(x, -x), np.pi, atol=1e-4)
    np.testing.assert_allclose(angular_collision(jnp.float32(np.pi / 2), 2), 0.25, rtol=1e-6)
    np.testing.assert_allclose(distance(x, y), np.linalg.norm(np.asarray(x - y)), rtol=1e-6)


def test_any_number_has_a_cell():
    """Huge and undefined coordinates: a cell in range, the same at every call."""
    lsh = PStable.make(jax.random.key(0), dim=2, rows=50, hashes=2, width=1.0, buckets=7)
    x = jnp.array([[1e30, 0], [-1e30, 1], [jnp.inf, 0], [jnp.nan, 1]])
    cells = np.asarray(lsh(x))
    assert cells.min() >= 0 and cells.max() < 7
    np.testing.assert_array_equal(jax.jit(lambda f, x: f(x))(lsh, x), cells)
    np.testing.assert_array_equal(jax.vmap(lsh)(x), cells)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"width": 0.0}, "width=0.0: a positive number"),
        ({"rows": 0}, "rows=0: a positive number"),
        ({"projections": "dense"}, "projections='dense': choose 'gaussian' or 'sparse'"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        PStable.make(jax.random.key(0), **({"dim": 2, "rows": 3, "hashes": 1, "width": 1.0, "buckets": 4} | options))


def test_too_many_signs_for_cells():
    with pytest.raises(ValueError, match="give buckets to rehash them"):
        SignProjections.make(jax.random.key(0), dim=2, rows=3, hashes=31)
