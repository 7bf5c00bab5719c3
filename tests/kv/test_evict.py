"""Eviction: the tokens that a plain-python oracle keeps, the bytes, the logits, and every transformation."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import ConfigError
from effjax.kv.cache import init_cache, resize
from effjax.kv.evict import kv_evict
from effjax.kv.method import EvictionMethod
from effjax.kv.sink_window import SinkWindow
from effjax.models.decoder import Decoder, DecoderApply, new_cache
from tests.kv.caches import filled
from tests.models.small import SMALL


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeaviestPerHead(EvictionMethod):
    """A method that keeps scattered tokens, different ones in each head: the highest scores."""

    budget: int

    def keep(self, cache):
        order = jnp.argsort(jnp.where(cache.positions >= 0, -cache.scores, jnp.inf), axis=-1)
        rank = jnp.argsort(order, axis=-1)
        return (rank < self.budget) & (cache.positions >= 0)


def oracle_sink_window(tokens, sinks, window):
    """`tokens` as StreamingLLM keeps them, with lists."""
    return tokens if len(tokens) <= sinks + window else tokens[:sinks] + tokens[len(tokens) - window :]


def oracle_heaviest(tokens, budget):
    best = sorted(tokens, key=lambda token: -token[1])[:budget]
    return [token for token in tokens if token in best]


def listed(cache, at):
    """The tokens of one layer, row and head: (position, score, key, value)."""
    count = int(cache.length[at])
    columns = (cache.positions[at], cache.scores[at], cache.k[at], cache.v[at])
    rows = zip(*(np.asarray(column)[:count].tolist() for column in columns), strict=True)
    return [(position, score, tuple(k), tuple(v)) for position, score, k, v in rows]


def check(before, after, oracle, slots):
    assert after.slots == slots
    np.testing.assert_array_equal(after.offset, before.offset)
    for at in np.ndindex(*before.length.shape):
        assert listed(after, at) == oracle(listed(before, at)), at
        count = int(after.length[at])
        assert (np.asarray(after.positions[at])[count:] == -1).all()
        for leaf in (after.scores, after.k, after.v):
            assert (np.asarray(leaf[at])[count:] == 0).all(), "empty slots hold nothing of evicted tokens"


lengths = st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=2, max_size=2)


@settings(max_examples=60)
@given(
    lengths=lengths, sinks=st.integers(0, 4), window=st.integers(1, 7), extra=st.integers(0, 5), seed=st.integers(0, 9)
)
def test_sink_window_equals_the_oracle(lengths, sinks, window, extra, seed):
    cache = filled(lengths, slots=9, seed=seed)
    method = SinkWindow(sinks=sinks, window=window)
    slots = method.budget + extra
    check(cache, kv_evict(cache, method, slots=slots), lambda t: oracle_sink_window(t, sinks, window), slots)


@settings(max_examples=40)
@given(lengths=lengths, budget=st.integers(1, 10), seed=st.integers(0, 9))
def test_scattered_choices_equal_the_oracle(lengths, budget, seed):
    cache = filled(lengths, slots=9, seed=seed)
    check(cache, kv_evict(cache, HeaviestPerHead(budget=budget)), lambda t: oracle_heaviest(t, budget), budget)


@settings(max_examples=20)
@given(lengths=lengths, seed=st.integers(0, 9))
def test_evicting_twice_is_evicting_once(lengths, seed):
    once = kv_evict(filled(lengths, slots=9, seed=seed), SinkWindow(sinks=2, window=3))
    chex.assert_trees_all_equal(kv_evict(once, SinkWindow(sinks=2, window=3)), once)


def test_bytes_are_gone():
    cache = init_cache(layers=2, batch=3, kv_heads=2, slots=64, head_dim=8)
    smaller = kv_evict(cache, SinkWindow(sinks=4, window=12))
    fixed = 4 * (2 * 3 * 2 + 3)  # length and offset
    assert smaller.slots == 16 and (smaller.nbytes - fixed) * 4 == cache.nbytes - fixed
    memory = (
        jax.jit(kv_evict, static_argnames="method")
        .lower(cache, SinkWindow(sinks=4, window=12))
        .compile()
        .memory_analysis()
    )
    assert memory.output_size_in_bytes < cache.nbytes / 3


def test_under_jit_vmap_and_eval_shape():
    method = SinkWindow(sinks=1, window=3)
    caches = [filled([[3, 8], [9, 0]], slots=9, seed=seed) for seed in (1, 2)]
    expected = [kv_evict(cache, method, slots=6) for cache in caches]
    jitted = jax.jit(kv_evict, static_argnames=("method", "slots"))
    chex.assert_trees_all_equal(jitted(caches[0], method, slots=6), expected[0])
    stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    mapped = jax.vmap(lambda cache: kv_evict(cache, method, slots=6))(jax.tree.map(stack, *caches))
    chex.assert_trees_all_equal(mapped, jax.tree.map(stack, *expected))
    shapes = jax.eval_shape(lambda cache: kv_evict(cache, method, slots=6), caches[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, expected[0])


def test_refused():
    cache = filled([[3]], slots=9)
    with pytest.raises(ConfigError, match=r"slots=4 cannot hold the budget of 5 tokens .*write slots=5 or more"):
        kv_evict(cache, SinkWindow(sinks=2, window=3), slots=4)
    for kwargs, message in (
        ({"sinks": -1}, "sinks must be a whole number of at least 0, found -1"),
        ({"window": 0}, "window must be a whole number of at least 1, found 0"),
        ({"window": 3.0}, "window must be a whole number of at least 1, found 3.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            SinkWindow(**kwargs)


CONFIG = dataclasses.replace(SMALL, scan_layers=True)
TOKENS = np.random.Generator(np.random.PCG64(3)).integers(0, 40, (2, 14), np.int32)
LENGTHS = np.array([12, 7], np.int32)
step = jax.jit(DecoderApply(CONFIG))


@pytest.fixture(scope="module")
def prefilled():
    params = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, params)
    _, cache = step({"params": params}, TOKENS[:, :12], cache=new_cache(CONFIG, batch=2, slots=16), lengths=LENGTHS)
    return params, cache


def next_logits(params, cache, steps=2):
    """Logits of the following tokens, the first of which is decoded on top of the second's cache."""
    logits = []
    for i in range(steps):
        one, cache = step({"params": params}, TOKENS[:, 12 + i : 13 + i], cache=cache)
        logits.append(np.asarray(one[:, 0]))
    return np.stack(logits)


def test_budget_above_the_live_length_changes_no_logit(prefilled):
    params, cache = prefilled
    whole = next_logits(params, cache)
    for sinks, window in ((4, 8), (0, 12), (4, 20)):
        evicted = kv_evict(cache, SinkWindow(sinks=sinks, window=window), slots=max(sinks + window, 14))
        np.testing.assert_allclose(next_logits(params, evicted), whole, atol=1e-5)
    np.testing.assert_allclose(next_logits(params, resize(cache, 14)), whole, atol=1e-5)


@pytest.mark.parametrize(
    "method", [SinkWindow(sinks=2, window=4), HeaviestPerHead(budget=5)], ids=["sinks", "heaviest"]
)
def test_evicted_equals_dense_with_those_tokens_masked(prefilled, method):
    params, cache = prefilled
    masked = cache.replace(positions=jnp.where(method.keep(cache), cache.positions, -1))
    expected = next_logits(params, masked)
    evicted = resize(kv_evict(cache, method), method.budget + 2)
    np.testing.assert_allclose(next_logits(params, evicted), expected, atol=1e-5)
    assert np.abs(next_logits(params, cache) - expected).max() > 1e-2, "the evicted tokens did matter"


def test_scores_of_the_model_are_the_attention_that_tokens_received(prefilled):
    """First layer, one more token: its weights, recomputed with numpy from the cache, are what the scores gained."""
    params, cache = prefilled
    _, after = step({"params": params}, TOKENS[:, 12:13], cache=cache)
    block = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["layers"])
    for row in range(2):
        x = np.asarray(params["embed"]["embedding"], np.float64)[TOKENS[row, 12]]
        x = x / np.sqrt(np.mean(x * x) + CONFIG.rms_norm_eps) * block["attention_norm"]["scale"]
        q = (x @ block["attention"]["q_proj"]["kernel"]).reshape(4, 8)
        angle = LENGTHS[row] * CONFIG.rope_theta ** (-np.arange(4) / 4)
        one, two = q[:, :4], q[:, 4:]
        q = np.concatenate([one * np.cos(angle) - two * np.sin(angle), two * np.cos(angle) + one * np.sin(angle)], 1)
        for head in range(2):
            count = LENGTHS[row] + 1
            logits = q[2 * head : 2 * head + 2] @ np.asarray(after.k[0, row, head, :count], np.float64).T / np.sqrt(8)
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            gained = np.asarray(after.scores - cache.scores)[0, row, head, :count]
            np.testing.assert_allclose(gained, weights.sum(0), atol=1e-5)
