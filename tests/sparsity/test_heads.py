"""Attention of some heads: against loops of numpy, in every implementation that runs here, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.sparsity.heads import chosen_heads, head_sparse_attention


def oracle(q, k, v, length, heads):
    batch, kv_heads, group, head_dim = q.shape
    y = np.zeros(q.shape)
    for b, h, g in np.ndindex(batch, kv_heads, group):
        n = length[b, h]
        if heads[b, h, g] and n:
            logits = k[b, h, :n] @ q[b, h, g] / np.sqrt(head_dim)
            weights = np.exp(logits - logits.max())
            y[b, h, g] = weights / weights.sum() @ v[b, h, :n]
    return y


@pytest.mark.parametrize("implementation", [None, "reference", "blocked", "cpu"])
@pytest.mark.parametrize(("kv_heads", "group", "slots"), [(3, 1, 17), (2, 3, 130)])
def test_heads_that_are_not_asked_give_zeros(implementation, kv_heads, group, slots):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(3, kv_heads, group, 16)).astype(np.float32)
    k, v = (rng.normal(size=(3, kv_heads, slots, 16)).astype(np.float32) for _ in range(2))
    length = rng.integers(0, slots + 1, (3, kv_heads)).astype(np.int32)
    heads = rng.random((3, kv_heads, group)) < 0.5
    heads[0] = False
    got = jax.jit(head_sparse_attention, static_argnames="implementation")(
        q, k, v, length, heads, implementation=implementation
    )
    np.testing.assert_allclose(got, oracle(q, k, v, length, heads), rtol=1e-4, atol=1e-5)


def test_the_cache_of_other_heads_is_not_read():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 2, n, 16)), jnp.float32) for n in (2, 40, 40))
    heads = jnp.array([[[True, True], [False, False]]])
    broken = [x.at[:, 1].set(jnp.nan) for x in (k, v)]
    length = jnp.array([[40, 40]])
    want = head_sparse_attention(q, k, v, length, heads, implementation="cpu")
    got = head_sparse_attention(q, *broken, length, heads, implementation="cpu")
    np.testing.assert_array_equal(got, want)


def test_the_best_heads_by_key_head():
    scores = np.random.default_rng(2).normal(size=(5, 6)).astype(np.float32)
    got = np.asarray(chosen_heads(jnp.asarray(scores), 2, kv_heads=3))
    for row, mask in zip(scores, got, strict=True):
        assert set(np.flatnonzero(mask.ravel())) == set(np.argsort(-row)[:2])


def test_bad_arguments_are_named():
    q, k = jnp.ones((1, 2, 2, 16)), jnp.ones((1, 2, 8, 16))
    with pytest.raises(ConfigError, match=r"heads must be \[1, 2, 2\], found \[1, 4\]"):
        head_sparse_attention(q, k, k, jnp.array([[8, 8]]), jnp.ones((1, 4), bool))
    with pytest.raises(ConfigError, match="6 heads do not share 4 key heads evenly"):
        chosen_heads(jnp.ones((1, 6)), 2, kv_heads=4)
