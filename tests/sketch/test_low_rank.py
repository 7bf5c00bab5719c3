"""Low rank against numpy's singular values, plain and weighted by the inputs that calibration saw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.lift.calibrate import InputStats
from effjax.sketch import LowRank
from tests.common.cases import statistics


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (13, 7)])
@pytest.mark.parametrize("rank", [1, 5, 7])
def test_error_is_that_of_the_truncated_spectrum(shape, rank):
    """Eckart and Young: no matrix of this rank is closer."""
    w = np.asarray(jax.random.normal(jax.random.key(0), shape))
    approximation = np.asarray(LowRank(rank=rank).compress(jnp.asarray(w)).materialize())
    spectrum = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    want = np.sqrt(np.square(spectrum[rank:]).sum())
    assert np.linalg.norm(approximation - w) == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert np.linalg.matrix_rank(approximation, tol=1e-3) == rank


def test_full_rank_is_exact_and_factors_share_the_spectrum():
    w = jax.random.normal(jax.random.key(0), (12, 8))
    factors = LowRank(rank=8).compress(w)
    np.testing.assert_allclose(factors.materialize(), w, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(factors.a, axis=0), np.linalg.norm(factors.b, axis=1), rtol=1e-4)


def output_error(w, approximation, stats):
    """Root of the mean squared error of `x W` over the calibrated inputs."""
    difference = np.asarray(w - approximation, np.float64)
    return np.sqrt(np.trace(difference.T @ np.asarray(stats.second_moment, np.float64) @ difference))


@pytest.mark.parametrize("rank", [2, 6])
def test_weighted_minimises_the_error_on_calibrated_inputs(rank):
    """Better than plain on the inputs, worse on the weight, and as good as the optimum of numpy."""
    w, stats = jax.random.normal(jax.random.key(0), (24, 16)), statistics(24)
    plain = LowRank(rank=rank).compress(w).materialize()
    weighted = LowRank(rank=rank, weighted=True, damping=1e-4).compress(w, stats=stats).materialize()
    assert output_error(w, weighted, stats) < 0.97 * output_error(w, plain, stats)
    assert np.linalg.norm(weighted - w) > np.linalg.norm(plain - w)
    factor = np.linalg.cholesky(np.asarray(stats.second_moment, np.float64)).T
    spectrum = np.linalg.svd(factor @ np.asarray(w, np.float64), compute_uv=False)
    assert output_error(w, weighted, stats) == pytest.approx(np.sqrt(np.square(spectrum[rank:]).sum()), rel=1e-2)


def test_weighted_through_calibration():
    """The same numbers, gathered by `calibrate` from a model."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (12, 8))}
    batches = [jax.random.normal(jax.random.key(i), (16, 12)) * jnp.linspace(0.1, 3, 12) for i in range(3)]
    method = LowRank(rank=3, weighted=True)
    stats = ej.calibrate(lambda p, x: x @ p["kernel"], params, batches, needs=method.needs)
    got = ej.sketch_params(params, method, stats=stats)["kernel"].materialize()
    x = jnp.concatenate(batches)
    want = method.compress(params["kernel"], stats=InputStats(count=jnp.float32(48), outer_sum=x.T @ x)).materialize()
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(("ratio", "rank"), [(1, 10), (2, 5), (4, 2), (1000, 1)])
def test_ratio(ratio, rank):
    """Dense bytes over factor bytes are at least the ratio, until the rank is one."""
    w = jnp.ones((32, 16))
    factors = LowRank(ratio=ratio).compress(w)
    assert factors.rank == rank
    assert w.nbytes / factors.nbytes >= ratio or rank == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "rank=None, ratio=None: give exactly one of them"),
        ({"rank": 1, "ratio": 2.0}, "rank=1, ratio=2.0: give exactly one of them"),
        ({"rank": 0}, "rank=0: at least 1"),
        ({"ratio": 0.0}, "ratio=0.0: a positive number"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        LowRank(**options)
