"""SNIP, GraSP and SynFlow against their definitions by finite differences and loops; schedules against theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.errors import ConfigError, LeafError
from effjax.prune import Highest, cubic_sparsity, erk_sparsities, geometric_sparsity, grasp, snip, synflow
from effjax.prune.at_init import synflow_scores


def network(seed=0, sizes=(5, 7, 3)):
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    return {
        f"layer_{i}": {"kernel": jax.random.normal(keys[i], (a, b)), "bias": jnp.zeros(b)}
        for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
    }


def apply(params, x):
    for i, layer in enumerate(params.values()):
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i + 1 < len(params) else x
    return x


def loss(params, x, y):
    return jnp.mean((apply(params, x) - y) ** 2)


X, Y = (np.random.default_rng(i).normal(size=(6, n)).astype(np.float32) for i, n in enumerate((5, 3)))


def test_snip_is_the_change_of_the_loss_with_each_weight():
    with jax.enable_x64():
        params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), network())
        scores = snip(loss, params, X, Y)["layer_0"]["kernel"]
        for i, j in [(0, 0), (4, 6), (2, 3)]:
            w, step = params["layer_0"]["kernel"], 1e-6

            def at(factor, w=w, i=i, j=j):
                scaled = w.at[i, j].multiply(factor)
                return loss(params | {"layer_0": params["layer_0"] | {"kernel": scaled}}, X, Y)

            np.testing.assert_allclose(scores[i, j], abs(at(1 + step) - at(1 - step)) / (2 * step), rtol=1e-5)


def test_grasp_is_the_change_of_the_squared_gradient_with_each_weight():
    with jax.enable_x64():
        params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), network(1))
        scores = grasp(loss, params, X, Y)["layer_1"]["kernel"]

        def half_of_squares(params):
            return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(params, X, Y))) / 2

        for i, j in [(0, 0), (6, 2), (3, 1)]:
            w, step = params["layer_1"]["kernel"], 1e-6

            def at(factor, w=w, i=i, j=j):
                scaled = w.at[i, j].multiply(factor)
                return half_of_squares(params | {"layer_1": params["layer_1"] | {"kernel": scaled}})

            np.testing.assert_allclose(scores[i, j], (at(1 + step) - at(1 - step)) / (2 * step), rtol=1e-4)


def test_flow_is_the_product_over_all_paths():
    params = network(2)
    scores = synflow_scores(apply, params, jnp.zeros((1, 5)))
    a, b = (np.abs(params[f"layer_{i}"]["kernel"]) for i in (0, 1))
    first, second = np.zeros_like(a), np.zeros_like(b)
    for i in range(5):
        for j in range(7):
            for k in range(3):
                first[i, j] += a[i, j] * b[j, k]
                second[j, k] += a[i, j] * b[j, k]
    np.testing.assert_allclose(scores["layer_0"]["kernel"], first, rtol=1e-5)
    np.testing.assert_allclose(scores["layer_1"]["kernel"], second, rtol=1e-5)


def test_synflow_leaves_a_path_where_one_cut_by_magnitude_leaves_none():
    params = network(3, (40, 40, 40, 40))
    params["layer_1"]["kernel"] *= 1e-3  # magnitude over all layers empties it
    mask = synflow(apply, params, jnp.ones((1, 40)), sparsity=0.95, rounds=20)
    kept = [int(layer["kernel"].sum()) for layer in mask.values()]
    assert sum(kept) == 3 * 1600 - round(0.95 * 4800)
    assert min(kept) > 0
    assert float(jnp.abs(apply(ej.apply_mask(params, mask), jnp.ones((1, 40)))).sum()) > 0
    by_magnitude = ej.prune_mask(params, ej.prune.Magnitude(sparsity=0.65, scope="global"))
    assert int(by_magnitude["layer_1"]["kernel"].sum()) == 0
    assert mask["layer_0"]["bias"] is None


def test_bad_input_is_said():
    with pytest.raises(ConfigError, match="rounds=0, sparsity=0.5: at least one round, and a share"):
        synflow(apply, network(), jnp.ones((1, 5)), sparsity=0.5, rounds=0)
    huge = jax.tree.map(lambda w: w * 1e30, network())
    with pytest.raises(LeafError, match="layer_0/kernel: scores are not finite; scale the weights down"):
        synflow(apply, huge, jnp.ones((1, 5)), sparsity=0.5, rounds=2)
    with pytest.raises(ConfigError, match="0 shapes, sparsity=0.5"):
        erk_sparsities({}, 0.5)


def test_highest_reads_the_leaves_as_scores():
    scores = {"kernel": jnp.array([[5.0, -9.0], [0.0, 2.0]])}
    np.testing.assert_array_equal(
        ej.prune_mask(scores, Highest(sparsity=0.5))["kernel"], [[True, False], [False, True]]
    )


def test_schedules():
    steps = np.arange(-3, 40)
    found = np.asarray(cubic_sparsity(steps, begin=4, end=30, final=0.9, initial=0.2))
    for step, share in zip(steps, found, strict=True):
        t = min(max((step - 4) / 26, 0), 1)
        assert share == pytest.approx(0.9 - 0.7 * (1 - t) ** 3, abs=1e-6)
    left = [1 - geometric_sparsity(k, 5, 0.9) for k in range(6)]
    ratios = np.divide(left[1:], left[:-1])
    np.testing.assert_allclose(ratios, ratios[0])
    assert left[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.98])
def test_densities_follow_the_axes_and_sum_up(sparsity):
    shapes = {"a": (784, 300), "b": (300, 100), "c": (100, 10), "conv": (3, 3, 16, 32)}
    found = erk_sparsities(shapes, sparsity)
    sizes = {path: np.prod(shape) for path, shape in shapes.items()}
    kept = sum((1 - found[path]) * sizes[path] for path in shapes)
    assert kept == pytest.approx((1 - sparsity) * sum(sizes.values()), rel=1e-6)
    assert all(0 <= share <= 1 for share in found.values())
    free = [path for path in shapes if found[path] > 0]
    scales = [(1 - found[path]) * sizes[path] / sum(shapes[path]) for path in free]
    np.testing.assert_allclose(scales, scales[:1] * len(free), rtol=1e-6)
