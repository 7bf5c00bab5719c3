"""GMF, MLP and NeuMF against a loop over pairs in NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models.ncf import apply_ncf, init_ncf, ncf_lower, ncf_upper

PAIRS = np.array([[0, 3], [4, 6], [0, 0], [2, 6]])
KINDS = {"GMF": (4, ()), "MLP": (0, (8, 6, 3)), "NeuMF": (4, (8, 6, 3)), "one layer": (2, (4, 3))}


def by_hand(params, user, item):
    parts = []
    if "gmf" in params:
        parts.append(params["gmf"]["user"][user] * params["gmf"]["item"][item])
    if "mlp" in params:
        x = np.concatenate([params["mlp"]["user"][user], params["mlp"]["item"][item]])
        for i in range(len(params["layers"])):
            layer = params["layers"][f"layer_{i}"]
            x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
        parts.append(x)
    features = np.concatenate(parts)
    return features, float(features @ params["head"]["kernel"][:, 0] + params["head"]["bias"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_features(kind):
    gmf, mlp = KINDS[kind]
    params = jax.jit(lambda key: init_ncf(key, 5, 7, gmf=gmf, mlp=mlp, scale=1.0))(jax.random.key(0))
    params = jax.tree.map(lambda x: np.asarray(x, np.float64) + 0.1, params)
    features, scores = ncf_upper(params, ncf_lower(params, PAIRS))
    for row, (user, item) in enumerate(PAIRS):
        wanted, score = by_hand(params, user, item)
        np.testing.assert_allclose(features[row], wanted, rtol=1e-5, atol=1e-6)
        assert float(scores[row]) == pytest.approx(score, rel=1e-4)
    np.testing.assert_array_equal(apply_ncf(params, PAIRS), scores)


def test_gradients_reach_the_vectors_that_are_read_and_no_others():
    params = init_ncf(jax.random.key(0), 5, 7)
    params["layers"] = jax.tree.map(jnp.abs, params["layers"])  # no ReLU that is off for all
    gradient = jax.grad(lambda p: apply_ncf(p, PAIRS[:1]).sum())(params)
    for kind in ("gmf", "mlp"):
        assert np.flatnonzero(np.asarray(gradient[kind]["user"]).any(1)).tolist() in ([0], [])
        assert np.flatnonzero(np.asarray(gradient[kind]["item"]).any(1)).tolist() in ([3], [])
    assert np.asarray(gradient["gmf"]["user"]).any()


@pytest.mark.parametrize(("gmf", "mlp"), [(0, ()), (4, (8,)), (0, (7, 3))])
def test_sizes_that_cannot_work(gmf, mlp):
    with pytest.raises(ValueError, match=re.escape(f"init_ncf: gmf={gmf}, mlp={mlp}: give one of them")):
        init_ncf(jax.random.key(0), 5, 7, gmf=gmf, mlp=mlp)
