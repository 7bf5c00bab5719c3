"""The next-token loss against numpy in float64, and what it reads of a window."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.evaluate import next_token_loss, next_token_nll


def oracle(logits, targets):
    shares = np.exp(np.asarray(logits, np.float64))
    shares /= shares.sum(-1, keepdims=True)
    return np.array([[-np.log(shares[i, j, t]) for j, t in enumerate(row)] for i, row in enumerate(targets)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nll_of_every_target(dtype):
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5)), dtype)
    targets = np.array([[0, 4, 2], [1, 1, 3]])
    found = next_token_nll(logits, jnp.asarray(targets))
    assert found.dtype == jnp.float32 and found.shape == (2, 3)
    np.testing.assert_allclose(found, oracle(logits.astype(jnp.float32), targets), rtol=1e-5)


def test_loss_is_the_mean_and_the_last_token_is_a_target_only():
    table = np.random.default_rng(1).standard_normal((7, 7)).astype(np.float32)
    tokens, seen = np.array([[0, 4, 2, 6], [1, 1, 3, 5]]), []

    def apply(variables, batch):
        seen.append(batch.shape)
        return variables["params"][batch]

    found = next_token_loss(apply)(jnp.asarray(table), jnp.asarray(tokens))
    assert float(found) == pytest.approx(oracle(table[tokens[:, :-1]], tokens[:, 1:]).mean(), rel=1e-5)
    assert seen == [(2, 3)]
