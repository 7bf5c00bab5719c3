"""Speculative decoding: the model's own tokens and distribution, fewer passes, and caches that take tokens back."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.errors import ConfigError
from effjax.kv.rollback import drop_last
from effjax.models.decoder import Decoder, DecoderApply, new_cache
from effjax.models.generate import generate
from effjax.models.speculative import Model, accept, generate_speculative, probabilities
from tests.models.small import SMALL

APPLY = DecoderApply(SMALL)
PROMPTS = np.random.Generator(np.random.PCG64(3)).integers(0, 40, (3, 6), np.int32)
LENGTHS = np.array([6, 2, 4], np.int32)
NEW = 12


def weights(seed):
    tree = jax.jit(Decoder(SMALL).init)(jax.random.key(seed), jnp.asarray(PROMPTS))["params"]
    return jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, tree)


@pytest.fixture(scope="module")
def params():
    return weights(0)


def of(params, *, slots=32, split=True, apply=APPLY):
    return Model(apply, params, new_cache(SMALL, batch=len(PROMPTS), slots=slots, split=split))


def run(model, draft, draft_tokens=3, new=NEW, **kwargs):
    prompts = jnp.asarray(PROMPTS), jnp.asarray(LENGTHS)
    found = generate_speculative(model, draft, *prompts, draft_tokens=draft_tokens, max_new_tokens=new, **kwargs)
    return [np.asarray(x) for x in found]


def alone(params, **kwargs):
    cache = of(params).cache
    found = generate(APPLY, params, cache, jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), max_new_tokens=NEW, **kwargs)
    return [np.asarray(x) for x in found]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_greedy_tokens_are_the_models_own(params, split, draft_tokens):
    want, _ = alone(params)
    half = jax.tree.map(lambda x, y: x + 0.3 * y, params, weights(1))  # right at times
    for draft in (params, half, weights(1)):
        tokens, counts, passes = run(of(params, split=split), of(draft, split=split), draft_tokens)
        np.testing.assert_array_equal(tokens, want)
        assert counts.tolist() == [NEW] * 3
        assert (passes >= 1 + math.ceil((NEW - 1) / (draft_tokens + 1))).all() and (passes <= NEW).all()
        if draft is params:
            assert passes.tolist() == [1 + math.ceil((NEW - 1) / (draft_tokens + 1))] * 3


def test_rows_end_with_their_stop_token(params):
    free, _ = alone(params)
    stops = (int(free[0, 4]), int(free[2, 7]))
    want = alone(params, stop_tokens=stops)
    tokens, counts, _ = run(of(params), of(weights(1)), stop_tokens=stops)
    np.testing.assert_array_equal(tokens, want[0])
    np.testing.assert_array_equal(counts, want[1])
    assert counts.min() < NEW


def test_a_draft_of_the_same_model_is_always_kept(params):
    settings = {"temperature": 1.5, "top_p": 0.8, "key": jax.random.key(1)}
    tokens, _, passes = run(of(params), of(params), **settings)
    # Passes over one token and over four round differently: a draw at the edge may be refused.
    assert passes.sum() <= 3 * (1 + math.ceil((NEW - 1) / 4)) + 1
    again, _, _ = run(of(params), of(params), **settings)
    np.testing.assert_array_equal(tokens, again)
    other, _, _ = run(of(params), of(params), **settings | {"key": jax.random.key(2)})
    assert (tokens != other).any()


def test_compressed_drafts(params):
    small = ej.quantize_params(params, ej.quantize.RTN(bits=8, group_size=None))
    want, _ = alone(params)
    tokens, _, passes = run(of(params), of(small, apply=ej.lift(APPLY)))
    np.testing.assert_array_equal(tokens, want)
    assert passes.max() < NEW


@settings(max_examples=5)
@given(st.integers(0, 10**6))
def test_accepted_tokens_follow_the_models_distribution(seed):
    rng = np.random.default_rng(seed)
    vocab, count, draws = 4, 2, 20000
    theirs, ours = rng.dirichlet(np.ones(vocab), count), rng.dirichlet(np.ones(vocab), count + 1)
    drafted = np.stack([rng.choice(vocab, draws, p=p) for p in theirs], axis=1)
    keys = jax.random.split(jax.random.key(seed), draws)
    spread = [jnp.broadcast_to(jnp.asarray(p, jnp.float32), (draws, *p.shape)) for p in (theirs, ours)]
    kept, behind = (np.asarray(x) for x in jax.jit(accept)(keys, jnp.asarray(drafted, jnp.int32), *spread))
    first = np.where(kept > 0, drafted[:, 0], behind)
    np.testing.assert_allclose(np.bincount(first, minlength=vocab) / draws, ours[0], atol=0.02)
    # A draft is kept as often as both distributions overlap.
    np.testing.assert_allclose((kept > 0).mean(), np.minimum(theirs[0], ours[0]).sum(), atol=0.02)
    second = np.where(kept > 1, drafted[:, 1], behind)[kept > 0]
    np.testing.assert_allclose(np.bincount(second, minlength=vocab) / len(second), ours[1], atol=0.05)


@pytest.mark.parametrize("top_p", [None, 0.5, 0.9])
def test_probabilities_are_those_of_the_mass(top_p):
    logits = np.random.default_rng(0).normal(size=(3, 9))
    for row, got in zip(logits, probabilities(jnp.asarray(logits, jnp.float32), 0.7, top_p), strict=True):
        p = np.exp(row / 0.7) / np.exp(row / 0.7).sum()
        order, mass, kept = np.argsort(-p), 0.0, np.zeros(9)
        for j in order:
            if mass < (1.0 if top_p is None else top_p):
                kept[j] = p[j]
            mass += p[j]
        np.testing.assert_allclose(got, kept / kept.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", [False, True])
def test_what_is_taken_back_was_never_there(params, split):
    def write(cache, tokens, lengths=None):
        return APPLY({"params": params}, jnp.asarray(tokens), cache=cache, lengths=lengths)

    empty = new_cache(SMALL, batch=3, slots=12, split=split)
    back = jnp.array([4, 0, 1])
    logits, cache = write(empty, PROMPTS)
    cache = drop_last(cache, back)
    assert cache.offset.tolist() == [2, 6, 5]
    want, _ = write(empty, PROMPTS, 6 - back)
    got, again = write(cache, PROMPTS[:, ::-1][:, :3])
    _, short = write(empty, PROMPTS, 6 - back)
    want, straight = write(short, PROMPTS[:, ::-1][:, :3])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(again.positions, straight.positions)
    np.testing.assert_array_equal(again.length, straight.length)


def test_bad_arguments_are_named(params):
    with pytest.raises(ConfigError, match="draft_tokens must be a whole number, at least 1: 0"):
        run(of(params), of(params), draft_tokens=0)
    with pytest.raises(ConfigError, match="cache of draft has 20 slots, but prompts, new tokens and drafts need 21"):
        run(of(params), of(params, slots=20), draft_tokens=3)
    config = dataclasses.replace(SMALL, vocab_size=50)
    other = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.asarray(PROMPTS))["params"]
    with pytest.raises(ConfigError, match="the draft has 50 tokens and the model 40; both must share a tokenizer"):
        run(of(params), of(other, apply=DecoderApply(config)))
