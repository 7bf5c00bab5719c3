"""Wanda and SparseGPT against plain numpy, and the repair against the least-squares solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.errors import CalibrationError, LeafError
from effjax.prune import Magnitude, SparseGPT, Wanda, repair
from effjax.recipe import Recipe, apply_recipe


def inputs(rows=256, n=24, seed=0):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, n)) @ rng.standard_normal((n, n))
    return (mixed * np.geomspace(4, 0.25, n)).astype(np.float32)  # some inputs are louder than others


def calibrated(n=24, out=6, seed=1):
    x = inputs(n=n)
    params = {"kernel": jax.random.normal(jax.random.key(seed), (n, out))}
    needs = {"second_moment", "norm"}
    return x, params, ej.calibrate(lambda p, x: x @ p["kernel"], params, [jnp.asarray(x)], needs=needs)


def swept(w, h, damping, choose, run):
    """Right-looking, in float64, as the paper's algorithm 1 reads: the weights left, and the mask."""
    w, n = w.astype(np.float64).copy(), len(w)
    u = np.linalg.cholesky(np.linalg.inv(h + damping * np.diag(h).mean() * np.eye(n))).T
    mask = np.ones(w.shape, bool)
    for i in range(n):
        if i % run == 0:
            rows = slice(i, min(i + run, n))
            mask[rows] = choose((w[rows] / np.diag(u)[rows, None]) ** 2, i)
        error = np.where(mask[i], 0, w[i]) / u[i, i]
        w[i] = np.where(mask[i], w[i], 0)
        w[i + 1 :] -= np.outer(u[i, i + 1 :], error)
    return w, mask


def two_of_four(scores, first):
    return np.argsort(np.argsort(-scores, axis=0, kind="stable"), axis=0) < 2


def half_of_all(scores, first):
    order = np.argsort(-scores.ravel(), kind="stable")
    mask = np.zeros(scores.size, bool)
    mask[order[: scores.size - scores.size // 2]] = True
    return mask.reshape(scores.shape)


@pytest.mark.parametrize(
    ("method", "choose", "run"),
    [
        (SparseGPT(pattern="2:4"), two_of_four, 4),
        (SparseGPT(sparsity=0.5, block=8, damping=0.1), half_of_all, 8),
        (SparseGPT(sparsity=0.5), half_of_all, 24),
        (SparseGPT(sparsity=0.5, block=10), half_of_all, 10),  # the last block has four inputs
    ],
)
def test_sparsegpt(method, choose, run):
    x, params, stats = calibrated()
    h = x.T.astype(np.float64) @ x / len(x)
    want, mask = swept(np.asarray(params["kernel"]), h, method.damping, choose, run)
    found = ej.prune_mask(params, method, stats=stats)
    np.testing.assert_array_equal(found["kernel"], mask)
    assert int((~mask).sum()) == mask.size // 2
    repaired = repair(params, found, stats=stats, damping=method.damping)["kernel"]
    np.testing.assert_allclose(repaired, want, atol=2e-4)
    assert ((np.asarray(repaired) == 0) == ~mask).all()


@pytest.mark.parametrize("scope", ["output", "leaf"])
def test_wanda(scope):
    x, params, stats = calibrated()
    scores = np.abs(params["kernel"]) * np.sqrt((x.astype(np.float64) ** 2).mean(0))[:, None]
    mask = np.asarray(ej.prune_mask(params, Wanda(sparsity=0.25, scope=scope), stats=stats)["kernel"])
    want = scores > (np.sort(scores, axis=0)[5] if scope == "output" else np.sort(scores.ravel())[35])
    np.testing.assert_array_equal(mask, want)


def test_what_follows_from_the_inputs_beats_what_does_not():
    x, params, stats = calibrated(n=64, out=32)

    def error(pruned):
        return float(np.linalg.norm(x @ (pruned["kernel"] - params["kernel"])))

    masks = [
        ej.prune_mask(params, m, stats=stats)
        for m in (Magnitude(sparsity=0.5), Wanda(sparsity=0.5), SparseGPT(sparsity=0.5))
    ]
    plain = [error(ej.apply_mask(params, mask)) for mask in masks]
    repaired = [error(repair(params, mask, stats=stats)) for mask in masks]
    assert max(plain[1:]) < 0.6 * plain[0] and max(repaired[1:]) < 0.6 * repaired[0]
    assert all(after < before for after, before in zip(repaired, plain, strict=True))


def test_repair_is_least_squares_where_only_the_first_input_goes():
    """Then every weight behind it may make up for it: the exact solution on the remaining inputs."""
    x, params, stats = calibrated()
    mask = {"kernel": jnp.ones((24, 6), bool).at[0].set(False)}
    found = repair(params, mask, stats=stats, damping=0.0)["kernel"]
    w = np.asarray(params["kernel"], np.float64)
    exact = np.linalg.lstsq(x[:, 1:].astype(np.float64), x.astype(np.float64) @ w, rcond=None)[0]
    np.testing.assert_allclose(found[1:], exact, rtol=2e-3, atol=2e-3)
    assert (found[0] == 0).all()


def test_stacked_and_single_matrices_agree_and_sizes_are_known_ahead():
    x, params, _ = calibrated()
    both = {"kernel": jnp.stack([params["kernel"], -2 * params["kernel"]])}
    stats = ej.calibrate(
        lambda p, x: jax.lax.scan(lambda h, w: (h, h @ w), x, p["kernel"])[1], both, [x], needs={"second_moment"}
    )
    method = SparseGPT(pattern="2:4")
    masks = ej.prune_mask(both, method, stats=stats)
    one = {"kernel": both["kernel"][1]}
    alone = ej.calibrate(lambda p, x: x @ p["kernel"], one, [x])
    np.testing.assert_array_equal(masks["kernel"][1], ej.prune_mask(one, method, stats=alone)["kernel"])
    found = repair(both, masks, stats=stats)["kernel"]
    np.testing.assert_array_equal(found[1], repair(one, {"kernel": masks["kernel"][1]}, stats=alone)["kernel"])
    shapes = jax.eval_shape(lambda p, s: ej.prune_mask(p, method, stats=s), both, stats)
    assert shapes["kernel"].shape == (2, 24, 6)


def test_dead_inputs_stay_zero_and_all_is_finite():
    x = inputs()
    x[:, 3] = 0
    params = {"kernel": jax.random.normal(jax.random.key(0), (24, 6))}
    stats = ej.calibrate(lambda p, x: x @ p["kernel"], params, [x])
    mask = ej.prune_mask(params, SparseGPT(sparsity=0.3), stats=stats)
    found = repair(params, mask, stats=stats)["kernel"]
    assert (found[3] == 0).all() and np.isfinite(found).all()


def test_a_recipe_repairs_and_packs():
    _, params, stats = calibrated()
    method = SparseGPT(pattern="2:4")
    packed = apply_recipe(params, Recipe(rules=[(None, method)]), stats=stats)["kernel"]
    want = repair(params, ej.prune_mask(params, method, stats=stats), stats=stats)["kernel"]
    np.testing.assert_array_equal(packed.materialize(), want)
    assert packed.nbytes < 0.6 * want.nbytes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseGPT(), r"sparsity=None: a share in \[0, 1\)"),
        (lambda: SparseGPT(sparsity=0.3, pattern="2:4"), "contradicts pattern='2:4': leave it out"),
        (lambda: SparseGPT(sparsity=0.5, pattern="4x4"), "SparseGPT chooses single weights or n:m"),
        (lambda: SparseGPT(sparsity=0.5, block=0), "block=0: at least 1 input"),
        (lambda: SparseGPT(sparsity=0.5, damping=-1), "damping=-1"),
        (lambda: Wanda(sparsity=0.5, scope="row"), "choose 'output', 'leaf' or 'global'"),
    ],
)
def test_bad_methods(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_missing_statistics_and_other_shapes():
    _, params, stats = calibrated()
    with pytest.raises(CalibrationError, match=r"kernel: Wanda needs \['norm'\]"):
        ej.prune_mask(params, Wanda(sparsity=0.5))
    with pytest.raises(CalibrationError, match=r"kernel: SparseGPT needs \['second_moment'\]"):
        repair(params, {"kernel": jnp.ones((24, 6), bool)}, stats={"kernel": None})
    with pytest.raises(LeafError, match=r"the mask is \[6, 24\], the weight \[24, 6\]"):
        repair(params, {"kernel": jnp.ones((6, 24), bool)}, stats=stats)
