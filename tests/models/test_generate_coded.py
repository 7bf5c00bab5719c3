"""Caches that hold codes: against a decoder whose keys and values are coded and decoded, bytes, eviction, bad input."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.kv import CQ, H2O, KIVI, IntKV, KVQuant, SinkWindow, kv_evict, resize
from effjax.kv.cache import init_cache, join_layers, one_layer, split_layers
from effjax.kv.capture import capture_kv
from effjax.kv.coded_apply import apply_coded
from effjax.kv.coders import fit_layers
from effjax.models.compiled_generate import compile_generate, whole_cache_bytes
from effjax.models.config import RopeScaling
from effjax.models.decoder import Decoder, DecoderApply, new_cache
from effjax.models.generate import generate
from effjax.models.generate_evicting import new_evicting_cache
from tests.models.small import SMALL

CODINGS = {
    "cq": CQ(channels=4, bits=6, iterations=8),
    "cq of more than a byte": CQ(channels=2, bits=9, iterations=2),
    "integers": IntKV(bits=4, head_dim=8),
    "kvquant": KVQuant(bits=3, head_dim=8, outliers=1, iterations=8),
}
PROMPTS = np.random.Generator(np.random.PCG64(7)).integers(0, 40, (2, 14), np.int32)
LENGTHS = np.array([14, 9], np.int32)
APPLY = DecoderApply(SMALL)
STEP = jax.jit(APPLY)


@pytest.fixture(scope="module")
def params():
    tree = jax.jit(Decoder(SMALL).init)(jax.random.key(0), jnp.asarray(PROMPTS))["params"]
    return jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, tree)


@pytest.fixture(scope="module")
def captured(params):
    windows = np.random.Generator(np.random.PCG64(8)).integers(0, 40, (16, 40), np.int32)
    return capture_kv(SMALL, params, windows, batch_size=16)


@pytest.fixture(scope="module", params=("cq", "kvquant"))
def coders(request, captured):
    return fit_layers(CODINGS[request.param], captured, key=jax.random.key(1))


def cached_logits(params, tokens, cache, parts):
    found, begin = [], 0
    for count in parts:
        logits, cache = STEP({"params": params}, tokens[:, begin : begin + count], cache=cache)
        found.append(logits)
        begin += count
    return jnp.concatenate(found, axis=1), cache


@pytest.mark.parametrize("name", CODINGS)
def test_logits_are_those_of_a_decoder_whose_keys_and_values_are_decoded(params, captured, name):
    coders = fit_layers(CODINGS[name], captured, key=jax.random.key(1))
    cache = new_cache(SMALL, batch=2, slots=14, coders=coders)
    found, cache = cached_logits(params, jnp.asarray(PROMPTS), cache, (9, 5))
    chex.assert_trees_all_close(found, apply_coded(SMALL, params, coders, jnp.asarray(PROMPTS)), atol=2e-3)
    assert cache.is_coded and cache.length.min() == cache.length.max() == 14


def test_layers_that_are_left_hold_what_they_always_held(params, captured):
    coders = fit_layers(CODINGS["integers"], captured, key=jax.random.key(1), leave=(0,))
    _, cache = STEP({"params": params}, jnp.asarray(PROMPTS), cache=new_cache(SMALL, batch=2, slots=14, coders=coders))
    _, plain = STEP({"params": params}, jnp.asarray(PROMPTS), cache=new_cache(SMALL, batch=2, slots=14, split=True))
    chex.assert_trees_all_equal(cache.k[0], plain.k[0])
    chex.assert_trees_all_equal(cache.v[0], plain.v[0])
    assert cache.k[1].shape == plain.k[1].shape and cache.k[1].dtype == plain.k[1].dtype


def test_bytes_are_those_of_codes_and_tables(coders):
    def held(slots):
        return jax.eval_shape(lambda: new_cache(SMALL, batch=2, slots=slots, coders=coders)).nbytes

    layers, batch, heads, head_dim = 2, 2, 2, 8
    per_slot = layers * batch * heads * (2 * head_dim * coders.bits_per_channel((2, 64, 8), tables=False) / 8 + 8)
    frequencies = layers * 4 * head_dim // 2
    lengths = 4 * (layers * batch * heads + batch)
    assert held(64) == 64 * per_slot + coders.nbytes + frequencies + lengths
    assert held(128) - held(64) == 64 * per_slot


def test_evicted_codes_are_those_of_the_kept_tokens(params, coders):
    cache = new_cache(SMALL, batch=2, slots=15, coders=coders)
    plain = new_cache(SMALL, batch=2, slots=15, split=True)
    tokens, method = jnp.asarray(PROMPTS), SinkWindow(sinks=2, window=5)
    _, cache = STEP({"params": params}, tokens, cache=cache)
    _, plain = STEP({"params": params}, tokens, cache=plain)
    kept, left = kv_evict(cache, method, slots=9), kv_evict(plain, method, slots=9)
    chex.assert_trees_all_equal(kept.positions, left.positions)
    was, now = (x.k[1].read(x.positions[1]) for x in (cache, kept))
    at = np.asarray(kept.positions[1])[..., :7, None]  # positions were slots
    np.testing.assert_allclose(now[..., :7, :], np.take_along_axis(np.asarray(was), at, axis=-2), atol=1e-6)
    assert all(not np.asarray(x)[..., 7:, :].any() for x in kept.k[1].tokens.values())
    chex.assert_trees_all_equal(kept.k[1].coder, cache.k[1].coder)


def test_generation_evicts_from_codes(params, coders):
    """A budget that drops nothing gives the tokens of a coded cache; a small one gives a row the same in any batch."""
    prompts, lengths = jnp.asarray(PROMPTS), jnp.asarray(LENGTHS)
    cache = new_cache(SMALL, batch=2, slots=22, coders=coders)
    whole = generate(APPLY, params, cache, prompts, lengths, max_new_tokens=9)

    def evicting(kv, rows=slice(None), chunk=4):
        made = new_evicting_cache(
            SMALL, kv, prompts=prompts[rows].shape, max_new_tokens=9, prefill_chunk=chunk, coders=coders
        )
        options = {"max_new_tokens": 9, "kv": kv, "prefill_chunk": chunk, "donate_cache": True}
        return generate(APPLY, params, made, prompts[rows], lengths[rows], **options)

    chex.assert_trees_all_equal(evicting(H2O(budget=23)), whole)
    kv = H2O(budget=8)
    both, alone = evicting(kv), evicting(kv, slice(1, 2))
    np.testing.assert_array_equal(both[0][1:], alone[0])
    assert not np.array_equal(both[0], whole[0])
    assert not any(x.is_deleted() for x in jax.tree.leaves(coders))  # the cache that was given away had copies


def test_a_step_never_holds_a_layer_as_it_was(params, captured):
    """Beside the cache, a step needs less than the keys and values of one layer; decoded pieces are small."""
    coders = fit_layers(CODINGS["integers"], captured, key=jax.random.key(1))
    slots, token = 8192, jax.ShapeDtypeStruct((1, 1), jnp.int32)
    cache = jax.eval_shape(lambda: new_cache(SMALL, batch=1, slots=slots, coders=coders))
    step = jax.jit(lambda params, cache, token: APPLY({"params": params}, token, cache=cache), donate_argnums=1)
    memory = step.lower(params, cache, token).compile().memory_analysis()
    layer = 2 * SMALL.num_key_value_heads * slots * SMALL.head_dim * 4
    scores = SMALL.num_attention_heads * slots * 4
    assert memory.temp_size_in_bytes < 0.5 * layer + 4 * scores


def test_stats_count_codes_against_a_plain_cache(params, captured):
    coders = fit_layers(CODINGS["integers"], captured, key=jax.random.key(1))
    prompts, lengths = jnp.asarray(PROMPTS), jnp.asarray(LENGTHS)
    cache = new_cache(SMALL, batch=2, slots=17, coders=coders)
    compiled = compile_generate(APPLY, params, cache, prompts, lengths, max_new_tokens=4)
    _, _, stats = compiled.run(params, cache, prompts, lengths)
    assert stats.cache_bytes == jax.eval_shape(lambda: new_cache(SMALL, batch=2, slots=17, coders=coders)).nbytes
    assert stats.full_cache_bytes == new_cache(SMALL, batch=2, slots=17).nbytes
    assert (
        whole_cache_bytes(new_cache(SMALL, batch=1, slots=3, coders=coders), 5)
        == new_cache(SMALL, batch=1, slots=5).nbytes
    )


def test_sizes_change(params, coders):
    cache = new_cache(SMALL, batch=1, slots=6, coders=coders)
    _, cache = STEP({"params": params}, jnp.asarray(PROMPTS[:1, :5]), cache=cache)
    larger = resize(cache, (8, 10))
    assert larger.layer_slots == (8, 10) and larger.v[1].shape == (1, 2, 10, 8)
    chex.assert_trees_all_equal(resize(larger, 6), cache)
    assert one_layer(larger, 1).slots == 10
    with pytest.raises(ConfigError, match="codes have tables of their own in each layer"):
        join_layers(cache)
    assert split_layers(cache) is cache


def test_caches_that_cannot_be(captured):
    def of(method, **options):
        return fit_layers(method, captured, key=jax.random.key(1), **options)

    runs = dataclasses.replace(KIVI(bits=2, head_dim=8, group_size=8, residual=8).coders(2), rotated=False)
    with pytest.raises(ConfigError, match="make the coders with rotated=True"):
        new_cache(SMALL, batch=1, slots=64, coders=runs)
    integers = of(CODINGS["integers"])
    with pytest.raises(ConfigError, match="the first 1 tokens uncoded"):
        new_cache(SMALL, batch=1, slots=8, coders=dataclasses.replace(integers, exact=1))
    more = dataclasses.replace(SMALL, num_hidden_layers=3)
    with pytest.raises(ConfigError, match="coders for 2 layers, the model has 3"):
        new_cache(more, batch=1, slots=8, coders=integers)
    with pytest.raises(ConfigError, match="give its frequencies"):
        init_cache(layers=2, batch=1, kv_heads=2, slots=8, head_dim=8, coders=integers)
    growing = dataclasses.replace(SMALL, rope_scaling=RopeScaling(rope_type="dynamic", factor=2.0))
    with pytest.raises(ConfigError, match="cannot be coded before it"):
        new_cache(growing, batch=1, slots=8, coders=integers)
    scanned = dataclasses.replace(SMALL, scan_layers=True)
    with pytest.raises(ConfigError, match=r"scans over them \(scan_layers=True\)"):
        jax.eval_shape(
            lambda: Decoder(scanned).init(
                jax.random.key(0),
                jnp.zeros((1, 2), jnp.int32),
                cache=new_cache(scanned, batch=1, slots=8, coders=integers),
            )
        )
