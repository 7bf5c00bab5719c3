"""Representer Sketch: the kernel is its formula, the sketch estimates it without bias, and files keep it."""

import dataclasses
import functools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy.stats import norm

from effjax.errors import CheckpointError
from effjax.sketch import (
    RepresenterSketch,
    build_sketch,
    distillation_loss,
    init_representer,
    load_sketch,
    query_sketch,
    save_sketch,
)

X = jax.random.normal(jax.random.key(0), (40, 12))


@functools.cache
def kernel(kind="euclidean", outputs=3):
    made = init_representer(jax.random.key(1), X, outputs=outputs, dim=6, points=30, kind=kind, width=1.5, hashes=2)
    return dataclasses.replace(made, alpha=5 * made.alpha, bias=jnp.arange(float(outputs)))


def build(kind="euclidean", rows=60, buckets=8, seed=0, projections="gaussian"):
    return built(kernel(kind), jax.random.key(seed), rows=rows, buckets=buckets, projections=projections)


@functools.partial(jax.jit, static_argnames=("rows", "buckets", "projections"))
def built(k, key, *, rows, buckets, projections="gaussian"):
    return build_sketch(k, rows=rows, buckets=buckets, key=key, projections=projections)


@functools.partial(jax.jit, static_argnames=("rows", "buckets"))
def estimates(k, keys, *, rows, buckets):
    """What sketches with each of the keys say of all inputs."""

    def one(key):
        return query_sketch(build_sketch(k, rows=rows, buckets=buckets, key=key), X, implementation="reference")

    return jax.lax.map(one, keys)


@pytest.mark.parametrize("kind", ["euclidean", "angular"])
def test_kernel_is_its_formula(kind):
    k = kernel(kind)
    z, points = np.asarray(X @ k.projection, np.float64), np.asarray(k.points, np.float64)
    if kind == "angular":
        cosine = z @ points.T / np.linalg.norm(z, axis=1)[:, None] / np.linalg.norm(points, axis=1)
        once = 1 - np.arccos(np.clip(cosine, -1, 1)) / np.pi
    else:
        c = np.maximum(np.linalg.norm(z[:, None] - points, axis=-1), 1e-6)
        u = 1.5 / c
        once = 1 - 2 * norm.cdf(-u) - 2 / (np.sqrt(2 * np.pi) * u) * (1 - np.exp(-(u**2) / 2))
    np.testing.assert_allclose(k(X), once**2 @ np.asarray(k.alpha) + np.arange(3), atol=2e-3)


@pytest.mark.parametrize(("kind", "buckets"), [("euclidean", 5), ("angular", 4)])
def test_no_bias_over_hash_seeds(kind, buckets):
    """The mean over 200 seeds is the exact sum within three standard errors, with few cells that rehashing shares."""
    k = kernel(kind)
    found = np.asarray(estimates(k, jax.random.split(jax.random.key(7), 200), rows=20, buckets=buckets))
    error = found.mean(0) - np.asarray(k(X))
    standard = found.std(0, ddof=1) / np.sqrt(200)
    off = np.abs(error) / standard
    assert np.median(off) < 1.2 and (off < 3).mean() > 0.9  # queries share their seeds: not independent
    # Uncorrected, it would be off by (sum alpha - f) / buckets.
    shift = np.asarray(k.alpha.sum(0) - (k(X) - k.bias)) / buckets
    assert np.median(np.abs(error * (1 - 1 / buckets) + shift) / standard) > 3


def test_error_falls_with_the_root_of_the_rows():
    k, rmse = kernel(), {}
    for rows in (30, 480):
        found = estimates(k, jax.random.split(jax.random.key(3), 5), rows=rows, buckets=8)
        rmse[rows] = np.sqrt(np.square(np.asarray(found) - np.asarray(k(X))).mean())
    assert 0.7 * 4 < rmse[30] / rmse[480] < 1.3 * 4


def test_counts_are_sums_over_representers():
    sketch, k = build(), kernel()
    cells = np.asarray(sketch.hash_functions()(k.points))
    want = np.zeros((60, 8, 3))
    for j in range(30):
        for row in range(60):
            want[row, cells[j, row]] += np.asarray(k.alpha)[j]
    np.testing.assert_allclose(sketch.counts, want, atol=1e-5)
    np.testing.assert_allclose(sketch.total, np.asarray(k.alpha).sum(0), atol=1e-5)
    more = sketch.race.add(sketch.hash_functions()(k.points), -k.alpha)
    np.testing.assert_allclose(more.counts, 0, atol=1e-5)


@pytest.mark.parametrize("groups", [None, 5])
def test_query_under_transformations(groups):
    sketch = build()
    lsh = jax.jit(RepresenterSketch.hash_functions)(sketch)

    @jax.jit
    def query(sketch, x):
        return query_sketch(sketch, x, groups=groups)

    want = query(sketch, X)
    hit = np.asarray(sketch.counts)[np.arange(60), np.asarray(lsh(X @ sketch.projection))]
    means = np.median(hit.reshape(40, groups or 1, -1, 3).mean(2), axis=1)
    np.testing.assert_allclose(want, (means - np.asarray(sketch.total) / 8) / (7 / 8) + np.arange(3), atol=1e-4)
    np.testing.assert_allclose(query_sketch(sketch, X, groups=groups), want, atol=1e-5)  # not compiled as a whole
    np.testing.assert_allclose(jax.vmap(query, (None, 0))(sketch, X), want, atol=1e-5)
    np.testing.assert_allclose(query_sketch(sketch, X, hash_functions=lsh, groups=groups), want, atol=1e-5)
    two = jax.tree.map(lambda *leaves: jnp.stack(leaves), sketch, build(seed=1))
    both = jax.jit(jax.vmap(lambda s: query_sketch(s, X, groups=groups, implementation="reference")))(two)
    np.testing.assert_allclose(both[0], want, atol=1e-5)
    assert jax.eval_shape(query, sketch, X[None]).shape == (1, 40, 3)


def test_bytes_are_counted():
    sketch = build()
    assert sketch.nbytes == 4 * (12 * 6 + 60 * 8 * 3 + 3 + 3 + 2)
    assert sketch.nbytes == sum(x.nbytes for x in jax.tree.leaves(sketch))
    drawn = sum(x.nbytes for x in jax.tree.leaves(sketch.hash_functions()))
    assert sketch.working_bytes == sketch.nbytes + drawn
    abstract = jax.eval_shape(lambda k: build_sketch(k, rows=60, buckets=8, key=jax.random.key(0)), kernel())
    assert isinstance(abstract, RepresenterSketch) and abstract.nbytes == sketch.nbytes


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.integers(0, 2**31), st.sampled_from(["gaussian", "sparse"]))
def test_same_key_same_bytes(seed, projections):
    first, second = (build(rows=10, buckets=4, seed=seed, projections=projections) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    other = build(rows=10, buckets=4, seed=seed + 1, projections=projections)
    assert not np.array_equal(first.counts, other.counts)


def test_distillation_reduces_its_loss_and_has_its_gradient():
    start, targets = kernel(outputs=1), jnp.tanh(X[:, :1] * X[:, 1:2])
    options = {"spread": 0.02, "norm": 0.01}

    @jax.jit
    def loss(k):
        return distillation_loss(k, X, targets, **options)

    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(start)
    sums = {name: float(total / count) for name, (total, count) in metrics.items()}
    collisions, alpha = start.collisions(X @ start.projection), np.asarray(start.alpha)
    among = np.asarray(start.collisions(start.points))
    np.testing.assert_allclose(sums["squared_error"], np.square(start(X) - targets).mean(), rtol=1e-4)
    np.testing.assert_allclose(sums["spread"], np.square(np.sqrt(collisions) @ np.abs(alpha)).mean(), rtol=1e-3)
    np.testing.assert_allclose(sums["norm"], (alpha.T @ among @ alpha).item(), rtol=1e-3)
    np.testing.assert_allclose(value, sums["squared_error"] + 0.02 * sums["spread"] + 0.01 * sums["norm"], rtol=1e-5)
    way = jax.tree.map(lambda g: g / jnp.sqrt(sum(jnp.vdot(v, v) for v in jax.tree.leaves(gradient))), gradient)
    ahead, behind = (loss(jax.tree.map(lambda p, w, h=h: p + h * w, start, way))[0] for h in (1e-2, -1e-2))
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
    np.testing.assert_allclose((ahead - behind) / 2e-2, slope, rtol=0.05)
    step = jax.jit(lambda k: jax.tree.map(lambda p, g: p - 2e-3 * g, k, jax.grad(loss, has_aux=True)(k)[0]))
    trained = start
    for _ in range(60):
        trained = step(trained)
    assert loss(trained)[0] < 0.5 * value
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained))


@pytest.mark.parametrize("kind", ["euclidean", "angular"])
def test_gradients_are_finite_at_representers(kind):
    k = kernel(kind)
    k = dataclasses.replace(k, points=(X @ k.projection)[:30])
    gradient = jax.jit(jax.grad(lambda k: distillation_loss(k, X, 0 * k(X), spread=0.1, norm=0.1)[0]))(k)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_projection_is_begun_with_up_to_its_scale():
    given = jax.random.normal(jax.random.key(9), (12, 2))
    for factor in (1.0, 100.0):
        made = init_representer(jax.random.key(1), X, outputs=1, dim=2, points=10, width=3.0, projection=factor * given)
        scale = made.projection[0, 0] / given[0, 0]
        np.testing.assert_allclose(made.projection, scale * given, rtol=1e-5)
        pairs = np.square(np.asarray(X @ made.projection)[:, None] - np.asarray(X @ made.projection)[None]).sum(-1)
        assert np.sqrt(pairs.mean()) == pytest.approx(3.0, rel=1e-4)  # two inputs are a width apart
        rows = {tuple(row) for row in np.asarray(X @ made.projection).round(4).tolist()}
        assert {tuple(row) for row in np.asarray(made.points).round(4).tolist()} <= rows


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dim": 0}, "dim=0: a positive number"),
        ({"width": -1.0}, "width=-1.0: a positive number"),
        ({"kind": "cosine"}, "kind='cosine': choose 'euclidean' or 'angular'"),
        ({"projection": X[:5, :2]}, r"projection of shape \(5, 2\): must be \(12, 2\), inputs by dim"),
    ],
)
def test_wrong_kernel_options(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        init_representer(jax.random.key(0), X, **({"outputs": 1, "dim": 2, "points": 3} | options))


def test_wrong_sketch_options():
    with pytest.raises(ValueError, match="^rows=0, buckets=8: at least 1 row and 2 buckets$"):
        build_sketch(kernel(), rows=0, buckets=8, key=jax.random.key(0))
    with pytest.raises(ValueError, match="projections='dense': choose 'gaussian' or 'sparse'"):
        build_sketch(kernel(), rows=3, buckets=8, key=jax.random.key(0), projections="dense")
    with pytest.raises(ValueError, match="^groups=7 does not divide 60 rows"):
        query_sketch(build(), X, groups=7)
    with pytest.raises(ValueError, match=r"x \(40, 11\), projection \(12, 6\)"):
        query_sketch(build(), X[:, :11])


def test_file_keeps_everything(tmp_path):
    sketch = build(projections="sparse")
    save_sketch(tmp_path / "a.safetensors", sketch)
    again = load_sketch(tmp_path / "a.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(sketch)
    jax.tree.map(np.testing.assert_array_equal, again, sketch)
    np.testing.assert_array_equal(query_sketch(again, X), query_sketch(sketch, X))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(CheckpointError, match="a.safetensors exists already"):
        save_sketch(tmp_path / "a.safetensors", sketch)
    save_sketch(tmp_path / "a.safetensors", build(seed=1), overwrite=True)
    assert not np.array_equal(load_sketch(tmp_path / "a.safetensors").seed, sketch.seed)


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    save_sketch(file, build())
    whole = file.read_bytes()
    for spoil, message in (
        (whole[:-3], "truncated"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "do not have the hash in the header; copy the file again"),
    ):
        file.write_bytes(spoil)
        with pytest.raises(CheckpointError, match=message):
            load_sketch(file)
    save_file({"w": np.zeros(3, np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"holds no Representer Sketch \(format None, tensors \['w'\]\)"):
        load_sketch(file)


def test_other_hash_functions_are_refused(tmp_path):
    """As if another version of jax drew other numbers from the seed: the file says what they were."""
    file = tmp_path / "a.safetensors"
    save_sketch(file, build())
    with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
        with pytest.raises(CheckpointError, match="its hash functions are drawn differently here"):
            load_sketch(file)
    with safe_open(file, "np") as opened:
        assert json.loads(opened.metadata()["sketch"])["hashes"] == 2
    assert load_file(file)["counts"].shape == (60, 8, 3)
