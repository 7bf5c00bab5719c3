"""The neuron cache against sets: what is resident, what is read, and what happens when there is no room."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import ConfigError
from effjax.flash import apply_update, empty_cache, plan_update


def stride_of(neuron):
    return neuron * 3 + 1


class Rows:
    """A file whose row `i` is filled with a byte that tells it; remembers what was read."""

    def __init__(self):
        self.read_now: list[int] = []

    def __call__(self, neurons, matrix, rows):
        self.read_now = neurons.tolist()
        matrix[rows] = stride_of(neurons)[:, None]


@settings(max_examples=12, deadline=None)
@given(
    neurons=st.integers(1, 60),
    window=st.integers(1, 8),
    share=st.floats(0.0, 0.6),
    room=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_a_thousand_updates_keep_every_promise(neurons, window, share, room, seed):
    rng = np.random.default_rng(seed)
    capacity, rows = int(room * neurons), Rows()
    cache = empty_cache(neurons, capacity, 4)
    past: list[set[int]] = []
    kept: set[int] = set()
    for token in range(1000 if neurons > 30 else 100):
        active = rng.random(neurons) < share * rng.random()
        plan = plan_update(cache, active, token, window)
        before = {*cache.pointer[: cache.count].tolist()}
        cache = apply_update(cache, plan, rows)
        used = {*np.flatnonzero(active).tolist()}
        past = [*past, used][-window:]
        stays = kept & set().union(*past)
        missing = used - stays
        resident = cache.pointer[: cache.count].tolist()
        assert before == kept and {*plan.evicted.tolist()} == kept - stays
        assert {*plan.loaded.tolist(), *plan.passing.tolist()} == missing and plan.needed == len(missing)
        assert len(plan.loaded) == min(len(missing), capacity - len(stays)) and rows.read_now == plan.loaded.tolist()
        kept = stays | {*plan.loaded.tolist()}
        assert len(resident) == len({*resident}) == cache.count <= cache.capacity and {*resident} == kept
        assert cache.resident.sum() == cache.count and (cache.pointer[cache.count :] == -1).all()
        np.testing.assert_array_equal(cache.matrix[: cache.count, 0], stride_of(cache.pointer[: cache.count]))
        if capacity == neurons:
            assert kept == set().union(*past)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_reads_are_what_the_last_tokens_did_not_use(window):
    rng = np.random.default_rng(window)
    masks = rng.random((50, 40)) < 0.2
    cache = empty_cache(40, 40, 1)
    for token, active in enumerate(masks):
        plan = plan_update(cache, active, token, window)
        union = masks[max(0, token - window) : token].any(0)
        assert plan.needed == (active & ~union).sum()
        cache = apply_update(cache, plan, Rows())
        np.testing.assert_array_equal(cache.resident, masks[max(0, token - window + 1) : token + 1].any(0))


def test_an_endless_window_keeps_all_and_reads_nothing_in_the_end():
    masks = np.random.default_rng(0).random((60, 30)) < 0.2
    cache = empty_cache(30, 30, 1)
    for token, active in enumerate([*masks, *masks]):
        plan = plan_update(cache, active, token, 10**6)
        assert token < 60 or plan.needed == 0
        cache = apply_update(cache, plan, Rows())
    np.testing.assert_array_equal(cache.resident, masks.any(0))


def test_a_plan_changes_nothing_and_moves_few_rows():
    cache = empty_cache(10, 10, 2)
    for token, ids in enumerate(([0, 1, 2, 3], [1, 2, 3, 7])):
        active = np.isin(np.arange(10), ids)
        cache = apply_update(cache, plan_update(cache, active, token, 1), Rows())
    old = cache.pointer.copy(), cache.last_used.copy(), cache.matrix.copy()
    plan = plan_update(cache, np.isin(np.arange(10), [1, 7, 9]), 2, 1)
    for before, after in zip(old, (cache.pointer, cache.last_used, cache.matrix), strict=True):
        np.testing.assert_array_equal(before, after)
    # Of 7, 1, 2, 3 in order of rows only what lies behind two survivors moves.
    assert len(plan.moved_to) == len(plan.moved_from) <= len(plan.evicted) == 2 and plan.loaded.tolist() == [9]


def test_sizes_that_cannot_be():
    with pytest.raises(ConfigError, match="capacity=5 for 4 neurons"):
        empty_cache(4, 5, 1)
    with pytest.raises(ConfigError, match="window=0; must be at least 1"):
        plan_update(empty_cache(4, 4, 1), np.zeros(4, bool), 0, 0)
