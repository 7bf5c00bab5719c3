"""TEAL and WINA: thresholds that leave the wanted share, masks against sorting, and the greedy allocation."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.sparsity.teal import allocate_sparsity, teal_sparsify, teal_threshold
from effjax.sparsity.wina import row_norms, wina_mask, wina_threshold


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.9])
def test_thresholds_leave_the_wanted_share(sparsity):
    rng = np.random.default_rng(0)
    x, norms = jnp.asarray(rng.normal(size=(50, 40)), jnp.float32), jnp.asarray(rng.random(40), jnp.float32)
    kept = teal_sparsify(x, teal_threshold(x, sparsity))
    assert abs(float((kept == 0).mean()) - sparsity) < 2e-3
    np.testing.assert_array_equal(kept[kept != 0], x[kept != 0])
    assert float(jnp.abs(x[kept == 0]).max(initial=0)) <= float(jnp.abs(kept)[kept != 0].min())
    bound = wina_threshold(x, norms, sparsity)
    assert abs(float((jnp.abs(x) * norms <= bound).mean()) - sparsity) < 2e-3


def test_wina_keeps_what_moves_the_output_most():
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(6, 9)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    norms = np.array([np.sqrt(sum(float(w) ** 2 for w in row)) for row in kernel])
    np.testing.assert_allclose(row_norms(jnp.asarray(kernel)), norms, rtol=1e-5)
    mask = np.asarray(wina_mask(jnp.asarray(x), jnp.asarray(norms, jnp.float32), 3))
    for row, chosen in zip(x, mask, strict=True):
        assert set(np.nonzero(chosen)[0]) == set(np.argsort(-np.abs(row) * norms)[:3])


def test_allocation_is_greedy_and_reaches_the_target():
    sizes = {"q": 10, "up": 30, "down": 60}
    costs = {"q": 9.0, "up": 1.0, "down": 2.0}
    asked = []

    def error(s):
        asked.append(dict(s))
        return sum(costs[name] * s[name] ** 2 for name in s)

    found = allocate_sparsity(error, sizes, 0.5, step=0.1)
    reached = sum(found[name] * sizes[name] for name in sizes) / 100
    assert 0.5 - 1e-6 <= reached < 0.6 and all(0 <= s <= 1 for s in found.values())
    assert found["up"] > found["down"] > found["q"]
    assert all(s <= 1 for s in itertools.chain.from_iterable(a.values() for a in asked))
    uneven = allocate_sparsity(lambda s: s["a"], {"a": 1, "b": 1}, 0.75, step=0.25)
    assert uneven == {"a": 0.5, "b": 1.0}
    with pytest.raises(ValueError, match="target=1.0 must lie in"):
        allocate_sparsity(error, sizes, 1.0)
