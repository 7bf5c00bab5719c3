"""Hit rate and NDCG against sorting in NumPy."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.evaluate import hit_rate_and_ndcg


@settings(max_examples=20)
@given(st.integers(0, 999), st.integers(1, 30), st.integers(1, 12))
def test_places_are_those_of_sorting(seed, items, top):
    scores = np.random.default_rng(seed).permuted(np.tile(np.arange(items, dtype=np.float32), (6, 1)), axis=1)
    hits, gains = hit_rate_and_ndcg(scores, top=top)
    for row, hit, gain in zip(scores, hits, gains, strict=True):
        place = 1 + np.argsort(-row).tolist().index(0)
        assert float(hit) == (place <= top)
        np.testing.assert_allclose(gain, (place <= top) / np.log2(place + 1), rtol=1e-6)


def test_a_model_that_tells_nothing_apart_has_no_hits():
    hits, gains = hit_rate_and_ndcg(np.zeros((4, 100), np.float32))
    assert not np.asarray(hits).any() and not np.asarray(gains).any()
