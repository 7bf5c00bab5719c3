"""Attention to a cache against plain numpy: one query, a few, and prompts long enough to go by runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models.attention import attend_to_slots

HEAD_DIM = 4


def softmax_attention(q, k, v, seen, asked):
    """Query by query in float64; a query that sees nothing gives nothing."""
    batch, length, kv_heads, group, _ = q.shape
    y, received = np.zeros(q.shape), np.zeros(k.shape[:3])
    for b, t, h, g in np.ndindex(batch, length, kv_heads, group):
        if seen[b, h, t].any():
            scores = k[b, h].astype(np.float64) @ q[b, t, h, g] / np.sqrt(HEAD_DIM)
            weights = np.where(seen[b, h, t], np.exp(scores - scores[seen[b, h, t]].max()), 0)
            weights /= weights.sum()
            y[b, t, h, g] = weights @ v[b, h]
            received[b, h] += weights * asked[b, t]
    return y, received


@pytest.mark.parametrize(
    ("length", "kv_heads", "group", "slots"),
    [(1, 2, 3, 11), (5, 2, 3, 11), (37, 1, 32, 2100)],
    ids=["one query", "a few", "by runs, the last one padded"],
)
def test_equals_softmax_of_what_is_seen(length, kv_heads, group, slots):
    rng = np.random.default_rng(length)
    q = rng.standard_normal((2, length, kv_heads, group, HEAD_DIM), np.float32)
    k, v = rng.standard_normal((2, 2, kv_heads, slots, HEAD_DIM), np.float32)
    slot_at = np.where(rng.random((2, kv_heads, slots)) < 0.8, rng.integers(0, 40, (2, kv_heads, slots)), -1)
    positions = np.broadcast_to(np.arange(3, 3 + length), (2, length)).astype(np.int32).copy()
    positions[1, -1] = -2  # sees nothing
    asked = np.ones((2, length), np.float32)
    asked[0, length // 2] = 0

    def seen(positions):
        return (slot_at >= 0)[:, :, None] & (slot_at[:, :, None] <= positions[:, None, :, None])

    y, received = jax.jit(lambda *x: attend_to_slots(*x[:3], seen, *x[3:]))(q, k, v, positions, asked)
    visible = seen(positions)
    expected_y, expected_received = softmax_attention(q, k, v, visible, asked)
    sees = visible.any(-1).transpose(0, 2, 1)
    np.testing.assert_allclose(np.asarray(y)[sees], expected_y[sees], atol=2e-5)
    np.testing.assert_allclose(received, expected_received, atol=2e-5, rtol=1e-4)
    assert np.isfinite(y).all()


def test_long_prompts_hold_no_scores_of_all_queries():
    """The program's temporaries are far below the scores of all heads, queries and slots."""
    length, kv_heads, group, slots = 1024, 4, 8, 1024
    shapes = [(1, length, kv_heads, group, 64), *[(1, kv_heads, slots, 64)] * 2, (1, length)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def prompt(q, k, v, asked):
        def seen(at):
            return (at[:, None, :, None] >= jnp.arange(slots)) & jnp.ones((1, kv_heads, 1, 1), jnp.bool_)

        return attend_to_slots(q, k, v, seen, jnp.arange(length)[None], asked)

    memory = jax.jit(prompt).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * kv_heads * group * length * slots / 4
