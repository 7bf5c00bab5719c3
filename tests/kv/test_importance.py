"""What scores add up to: attention, pivotal counts, histories and windows, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.kv.importance import ATTENTION_RECEIVED, Importance
from effjax.models.attention import attend_to_slots

BATCH, HEADS, GROUP, WIDTH = 2, 2, 2, 4
KINDS = {
    "attention": ATTENTION_RECEIVED,
    "last query": Importance(window=1),
    "window": Importance(window=5),
    "quantile": Importance(quantile=0.9, history=7),
    "quantile, window": Importance(quantile=0.6, window=3),
    "multiple": Importance(multiple=2.0, history=400),
    "peaked": Importance(quantile=0.5, history=9, peaked=True),
}


def given(importance, weights):
    """What a query of these weights gives to the slots that it sees, one head."""
    if importance.quantile is not None:
        return (weights > np.quantile(weights, importance.quantile)) * (weights.max() if importance.peaked else 1.0)
    if importance.multiple is not None:
        return (weights > importance.multiple / len(weights)).astype(float)
    return weights


def oracle(importance, scores, q, k, positions, slot_at, lengths):
    """Query by query in float64, the history faded one query at a time."""
    scores = np.array(scores, np.float64)
    for b in range(BATCH):
        count = int(lengths[b])
        if importance.window is not None:
            scores[b] *= max(1 - count / importance.window, 0)
        for t in range(count):
            if importance.history is not None:
                scores[b] *= 1 - 1 / importance.history
            if importance.window is not None and t < count - importance.window:
                continue
            for h, g in np.ndindex(HEADS, GROUP):
                seen = (slot_at[b, h] >= 0) & (slot_at[b, h] <= positions[b, t])
                logits = k[b, h].astype(np.float64)[seen] @ q[b, t, h, g] / np.sqrt(WIDTH)
                weights = np.exp(logits - logits.max())
                scores[b, h, seen] += given(importance, weights / weights.sum())
    return scores


@pytest.mark.parametrize("importance", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("queries", [1, 9])
def test_scores_equal_numpy(importance, queries):
    """Random slots, ragged rows: of one query (as in decoding) and of many (as in a prompt)."""
    slots = 23
    rng = np.random.default_rng(queries)
    q = rng.standard_normal((BATCH, queries, HEADS, GROUP, WIDTH)).astype(np.float32) * 2
    k, v = rng.standard_normal((2, BATCH, HEADS, slots, WIDTH)).astype(np.float32)
    slot_at = np.where(rng.random((BATCH, HEADS, slots)) < 0.8, rng.integers(0, 60, (BATCH, HEADS, slots)), -1)
    slot_at[..., 0] = 0
    positions = np.broadcast_to(np.arange(40, 40 + queries), (BATCH, queries)).astype(np.int32)
    lengths = np.array([queries, queries // 2], np.int32)
    old = rng.random((BATCH, HEADS, slots)).astype(np.float32)

    @jax.jit
    def run(q, k, v, lengths, old):
        def seen(at):
            return (slot_at >= 0)[:, :, None] & (slot_at[:, :, None] <= at[:, None, :, None])

        asked = importance.query_weights(lengths, queries)
        _, received = attend_to_slots(q, k, v, seen, jnp.asarray(positions), asked, importance)
        return importance.add(old, received, lengths)

    found = run(q, k, v, lengths, old)
    expected = oracle(importance, old, q, k, positions, slot_at, lengths)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)
    assert np.abs(expected[0] - old[0]).max() > 1e-3
    if queries == 1:  # a row without queries stays as it is
        np.testing.assert_array_equal(found[1], old[1])


def test_histories_do_not_depend_on_the_cut():
    """Two calls give what one call gives: the fading is by queries, not by calls."""
    importance = Importance(multiple=1.0, history=5)
    given = np.random.default_rng(0).random((1, 7)).astype(np.float32)

    def call(scores, given):
        lengths = jnp.array([given.shape[1]], jnp.int32)
        received = jnp.sum(importance.query_weights(lengths, given.shape[1]) * given)
        return importance.add(scores, received.reshape(1, 1, 1), lengths)

    zero = jnp.zeros((1, 1, 1))
    once = call(zero, given)
    for cut in range(1, 7):
        np.testing.assert_allclose(call(call(zero, given[:, :cut]), given[:, cut:]), once, rtol=1e-5)


def test_the_quantile_is_exact_among_tiny_weights():
    """Weights that differ in their last bit, and by many orders of magnitude, are still told apart."""
    powers = np.float32([1.0, 1e-3, 1e-20, 2e-38, 1e-20, 0.5, np.nextafter(np.float32(1e-20), np.float32(1)), 0.0])
    seen = np.array([1, 1, 1, 1, 1, 0, 1, 1], bool)
    for quantile in (0.1, 0.3, 0.5, 0.7, 0.9):
        found = Importance(quantile=quantile).pivotal(jnp.asarray(powers), jnp.float32(1.0), jnp.asarray(seen))
        ranked = np.sort(powers[seen])
        expected = seen & (powers > ranked[int(np.floor(np.float32(quantile) * (seen.sum() - 1)))])
        np.testing.assert_array_equal(found, expected)
