"""Which tokens each method keeps, against lists; budgets, layers, slots moved about, and bad settings."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.errors import ConfigError
from effjax.kv import H2O, TOVA, PyramidKV, Scissorhands, SinkWindow, SnapKV, StreamingLLM, kv_evict
from effjax.kv.cache import join_layers, split_layers
from effjax.kv.importance import Importance
from tests.kv.caches import filled

SLOTS = 11


def cache_for(method, lengths, *, seed=0, ties=False, layers=2):
    cache = filled(lengths, slots=SLOTS, seed=seed, layers=layers, importance=method.importance)
    return cache.replace(scores=jnp.round(cache.scores * 3)) if ties else cache


def best(scores, budget, newest):
    """Indices that stay, with lists: the newest, then by score and, among equals, the later."""
    count = len(scores)
    recent = [i for i in range(count) if i >= count - newest][-budget:]
    others = sorted((i for i in range(count) if i not in recent), key=lambda i: (-scores[i], -i))
    return sorted(recent + others[: budget - len(recent)])


def pooled(scores, window, kernel):
    """Means over `kernel` neighbours of what lies before the window, zeros beyond the ends."""
    before = np.array([s if i < len(scores) - window else 0 for i, s in enumerate(scores)] + [0] * SLOTS, np.float32)
    padded = np.concatenate([np.zeros(kernel // 2, np.float32), before, np.zeros(kernel, np.float32)])
    return [float(np.float32(sum(padded[i : i + kernel]))) for i in range(len(scores))]


def kept(cache, method):
    """Per layer, row and head: indices of the slots that stay."""
    mask = np.asarray(method.keep(cache))
    return {at: np.flatnonzero(mask[at]).tolist() for at in np.ndindex(*mask.shape[:-1])}


def scores_of(cache):
    return {
        at: np.asarray(cache.scores[at])[: int(cache.length[at])].tolist() for at in np.ndindex(*cache.length.shape)
    }


lengths = st.lists(st.lists(st.integers(0, SLOTS), min_size=2, max_size=2), min_size=2, max_size=2)


@settings(max_examples=25)
@given(
    lengths=lengths, budget=st.integers(3, 12), recent=st.integers(1, 2), seed=st.integers(0, 99), ties=st.booleans()
)
def test_ranked_methods_equal_lists(lengths, budget, recent, seed, ties):
    for method, newest in (
        (H2O(budget=budget, recent=recent), recent),
        (H2O(budget=budget), budget // 2),
        (Scissorhands(budget=budget, recent=recent), recent),
    ):
        cache = cache_for(method, lengths, seed=seed, ties=ties)
        found = kept(cache, method)
        for at, scores in scores_of(cache).items():
            assert found[at] == best(scores, budget, newest), (method, at, scores)


@settings(max_examples=20)
@given(
    lengths=lengths, budget=st.integers(4, 12), window=st.integers(1, 3), kernel=st.sampled_from([1, 3, 5]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_snapkv_pools_what_is_before_the_window(lengths, budget, window, kernel, seed):
    method = SnapKV(budget=budget, window=window, kernel=kernel)
    cache = cache_for(method, lengths, seed=seed)
    cache = cache.replace(scores=jnp.round(cache.scores * 64))  # whole numbers: sums are exact in any order
    found = kept(cache, method)
    for at, scores in scores_of(cache).items():
        assert found[at] == best(pooled(scores, window, kernel), budget, window), at


@settings(max_examples=20)
@given(rows=st.lists(st.integers(0, SLOTS), min_size=2, max_size=2), budget=st.integers(1, 12), seed=st.integers(0, 99))
def test_tova_keeps_one_set_a_layer(rows, budget, seed):
    method = TOVA(budget=budget)
    cache = cache_for(method, [[n, n] for n in rows], seed=seed)
    cache = cache.replace(scores=jnp.round(cache.scores * 64))
    found, scores = kept(cache, method), scores_of(cache)
    for layer, row in np.ndindex(2, 2):
        total = np.sum([scores[layer, row, head] for head in range(2)], axis=0).tolist()
        assert found[layer, row, 0] == found[layer, row, 1] == best(total, budget, 1)


def test_ties_go_to_the_newer():
    cache = cache_for(H2O(budget=4), [[SLOTS]], layers=1)
    cache = cache.replace(scores=jnp.zeros_like(cache.scores))
    assert kept(cache, H2O(budget=4, recent=1))[0, 0, 0] == [7, 8, 9, 10]


METHODS = [
    H2O(budget=5),
    Scissorhands(budget=5, recent=2),
    SnapKV(budget=5, window=2, kernel=3),
    TOVA(budget=5),
    SinkWindow(sinks=2, window=3),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_split_caches_jit_and_vmap(method):
    caches = [cache_for(method, [[9, 9], [4, 4]], seed=seed) for seed in (1, 2)]
    expected = [kv_evict(cache, method) for cache in caches]
    split = jax.jit(kv_evict, static_argnames="method")(split_layers(caches[0]), method)
    assert split.is_split and split.importance == caches[0].importance
    chex.assert_trees_all_equal(join_layers(split), expected[0])
    stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    mapped = jax.vmap(lambda cache: kv_evict(cache, method))(jax.tree.map(stack, *caches))
    chex.assert_trees_all_equal(mapped, jax.tree.map(stack, *expected))
    chex.assert_trees_all_equal(kv_evict(expected[0], method), expected[0])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_rows_and_heads_do_not_see_each_other(method):
    """Rows in another order, and heads, keep the same tokens: what stays is a matter of the row (and head) alone."""
    cache = cache_for(method, [[9, 9], [7, 7]], seed=5)
    turned = jax.tree.map(lambda x: x[:, ::-1, ::-1] if x.ndim > 2 else x[::-1], cache)
    after = jax.tree.map(lambda x: x[:, ::-1, ::-1] if x.ndim > 2 else x[::-1], kv_evict(cache, method))
    chex.assert_trees_all_equal(kv_evict(turned, method), after)


def test_layers_of_different_budgets():
    """Each layer has the slots of its own budget and no more, and holds what that budget alone would keep."""
    method = Scissorhands(budget=(7, 3, 5), recent=2)
    cache = cache_for(method, [[9, 9], [4, 4]], layers=3)
    after = jax.jit(kv_evict, static_argnames="method")(cache, method)
    assert after.layer_slots == (7, 3, 5) and after.slots == 3 and not after.is_even and after.is_split
    rows = 3 * 2 * 2
    assert after.nbytes == (7 + 3 + 5) * 2 * 2 * (2 * 3 * 4 + 4 + 4) + rows * 4 + 2 * 4
    for layer, budget in enumerate(method.layer_budgets(3)):
        alone = kv_evict(cache, method.within(budget))
        for name in ("k", "v", "positions", "scores", "length"):
            np.testing.assert_array_equal(getattr(after, name)[layer], getattr(alone, name)[layer])
    chex.assert_trees_all_equal(kv_evict(after, method), after)
    even = kv_evict(split_layers(cache), method, slots=8)
    assert even.layer_slots == (8, 8, 8) and even.is_even
    np.testing.assert_array_equal(np.asarray(even.length)[:, 0, 0], [7, 3, 5])


def test_pyramid_gives_low_layers_more():
    method = PyramidKV(budget=64, window=16, beta=8)
    budgets = method.layer_budgets(5)
    assert sum(budgets) == 5 * 64 and budgets[-1] == 16 + 48 // 8
    assert np.ptp(np.diff(budgets)) <= 1 and budgets[0] > budgets[-1]
    assert method.layer_budgets(1) == (64,)
    small = PyramidKV(budget=7, window=1, kernel=3, beta=3)
    cache = cache_for(small, [[SLOTS, 9]])
    after = kv_evict(cache, small)
    assert after.layer_slots == small.layer_budgets(2) == (11, 3)
    one = SnapKV(budget=3, window=1, kernel=3)
    np.testing.assert_array_equal(after.positions[1], kv_evict(cache, one).positions[1])
    np.testing.assert_array_equal(small.keep(cache)[1], one.keep(cache)[1])


def test_a_pyramid_without_a_top_is_flat():
    """The last layer must have two tokens besides the window, or all keep what SnapKV does."""
    method = PyramidKV(budget=9, window=3, kernel=3, beta=3)
    assert method.layer_budgets(3) == (13, 9, 5)
    flat = method.within(8)
    assert flat.layer_budgets(3) == (8, 8, 8)
    cache = cache_for(flat, [[SLOTS, 9]])
    chex.assert_trees_all_equal(kv_evict(cache, flat), kv_evict(cache, SnapKV(budget=8, window=3, kernel=3)))


def test_shares_become_whole_tokens():
    for method in (H2O(budget=0.2), Scissorhands(budget=0.2), PyramidKV(budget=0.2), SinkWindow(window=0.2)):
        assert method.resolve(500).budget == 100
        assert method.resolve(500).importance == method.importance
    assert SinkWindow(sinks=4, window=0.2).resolve(500) == SinkWindow(sinks=4, window=96)
    assert H2O(budget=7).resolve(500) == H2O(budget=7)
    with pytest.raises(ConfigError, match=r"H2O: a budget of 0.2 is a share .*write method.resolve\(length\)"):
        kv_evict(cache_for(H2O(budget=4), [[3]]), H2O(budget=0.2))


def test_room_is_made_within_the_budget():
    assert H2O(budget=64).make_room(64).budget == 60
    assert Scissorhands(budget=64, drop=32).make_room(64).budget == 32
    assert SnapKV(budget=66, window=64).make_room(66).budget == 65, "not below what always stays"
    with pytest.raises(ConfigError, match="of 12 slots that loses 4 at once keeps 8, but 11 must stay"):
        Scissorhands(budget=12, drop=4).make_room(12)


def test_streaming_llm_is_sink_window():
    assert StreamingLLM is SinkWindow is ej.kv.SinkWindow


def test_methods_are_hashable_data():
    for method in METHODS:
        assert hash(method) == hash(dataclasses.replace(method)) and method == dataclasses.replace(method)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: H2O(budget=0), "H2O: budget must be a whole number of tokens of at least 1, .* found 0"),
        (lambda: H2O(budget=1.5), "a share between 0 and 1, found 1.5"),
        (lambda: H2O(budget=(4, 0)), r"one a layer, or a share between 0 and 1, found \(4, 0\)"),
        (lambda: H2O(budget=4, recent=0), "H2O: recent must be a whole number of at least 1, found 0"),
        (lambda: H2O(budget=4, recent=4), "a budget of 4 tokens leaves nothing besides the newest 4 .* at least 5"),
        (lambda: TOVA(budget=4, drop=0), "TOVA: drop must be a whole number of at least 1, found 0"),
        (lambda: SnapKV(budget=40), "SnapKV: a budget of 40 tokens leaves nothing besides the newest 64"),
        (lambda: SnapKV(budget=80, kernel=4), "SnapKV: kernel must be odd, found 4"),
        (lambda: PyramidKV(budget=(80, 80)), r"PyramidKV: budget is the mean of the layers, .* found \(80, 80\)"),
        (lambda: PyramidKV(budget=80, beta=0), "PyramidKV: beta must be a whole number of at least 1, found 0"),
        (lambda: Scissorhands(budget=40, quantile=None), "give one of quantile and multiple .* quantile=None"),
        (lambda: Scissorhands(budget=40, multiple=2.0), "give one of quantile and multiple .* multiple=2.0"),
        (lambda: Scissorhands(budget=40, history=0), "Importance: history must be .* at least 2, found 0"),
        (lambda: Importance(quantile=1.0), "quantile must be between 0 and 1, found 1.0"),
        (lambda: Importance(multiple=-1.0), "multiple must be a positive number, found -1.0"),
        (lambda: Importance(history=4, peaked=True), "peaked is of pivotal slots; give quantile or multiple"),
        (lambda: Importance(window=3, history=4), "history and window exclude each other"),
        (lambda: SinkWindow(window=4).within((3, 4)), "all layers keep the same tokens, so the budget is one number"),
    ],
)
def test_refused_settings(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_refused_caches():
    cache = filled([[5, 5]], slots=SLOTS)
    with pytest.raises(ConfigError, match=r"TOVA ranks tokens by .*window=1, .*\), but the scores .*importance="):
        kv_evict(cache, TOVA(budget=4))
    kv_evict(cache, SinkWindow(sinks=1, window=2))
    with pytest.raises(ConfigError, match=r"the budget \(4, 4, 4\) has 3 numbers but the cache 2 layers"):
        kv_evict(cache, H2O(budget=(4, 4, 4)))
    with pytest.raises(ConfigError, match="slots=4 of layer 1 cannot hold the budget of 5 tokens"):
        kv_evict(cache, H2O(budget=(4, 5)), slots=4)
    with pytest.raises(ConfigError, match=r"one number or one a layer \(2\), found 3"):
        kv_evict(cache, H2O(budget=4), slots=(4, 4, 4))
