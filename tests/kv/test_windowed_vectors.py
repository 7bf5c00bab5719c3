"""Caches whose last tokens stay as they came: after every write what the coding gives for the whole text so far."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import ConfigError
from effjax.kv import H2O, KIVI, kv_evict
from effjax.kv.cache import KVCache, init_cache, resize
from effjax.kv.layer_cache import close_layers, open_layers
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder, new_cache
from effjax.models.generate import generate
from effjax.ops import decode_attention

HEADS, WIDTH = 2, 8


def empty(method: KIVI, batch: int, slots: int) -> KVCache:
    return init_cache(
        layers=1, batch=batch, kv_heads=HEADS, slots=slots, head_dim=WIDTH, split=True, coders=method.coders(1)
    )


@jax.jit
def written(cache: KVCache, k, v, lengths) -> tuple[KVCache, jax.Array, jax.Array]:
    """After new tokens in the first `lengths` places of each row: the cache, and what it holds."""
    positions = cache.offset[:, None] + jnp.arange(k.shape[2])
    cache, [layer] = open_layers(cache, positions, lengths)
    layer = layer.write(k, v, k)
    read = layer.read()
    layer = dataclasses.replace(layer, received=jnp.zeros(layer.positions.shape, jnp.float32))
    cache = close_layers(cache, [layer], lengths)
    return cache.replace(offset=cache.offset + lengths), *read


def texts(seed: int, batch: int, slots: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).normal(size=(2, batch, HEADS, slots, WIDTH)).astype(np.float32)


@settings(max_examples=6, deadline=None)
@given(
    sizes=st.sampled_from([(4, 0), (4, 8), (1, 3)]),
    parts=st.lists(st.sampled_from([1, 3, 9]), min_size=1, max_size=5),
    short=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_what_is_held_is_what_the_coding_gives_for_the_text_so_far(sizes, parts, short, seed):
    """Rows of different lengths; chunks longer and shorter than runs and windows; tokens beyond the last slot."""
    group, residual = sizes
    method = KIVI(bits=3, head_dim=WIDTH, group_size=group, residual=residual)
    slots = 21
    cache, given_so_far = empty(method, 2, slots), np.zeros(2, int)
    text = texts(seed, 2, 60)
    for i, part in enumerate(parts):
        lengths = np.array([part, max(part - short, 0) if i % 2 else part])
        new = np.zeros((2, 2, HEADS, 1 if part == 1 else 9, WIDTH), np.float32)  # few shapes, few programs
        for row in range(2):
            upto = given_so_far[row] + lengths[row]
            new[:, row, :, : lengths[row]] = text[:, row, :, given_so_far[row] : upto]
        cache, k, v = written(cache, new[0], new[1], jnp.asarray(lengths, jnp.int32))
        given_so_far = np.minimum(given_so_far + lengths, slots)
        for row, count in enumerate(given_so_far):
            for coding, held, whole in ((method.keys, k, text[0]), (method.values, v, text[1])):
                wanted = coding.decode(coding.encode(jnp.asarray(whole[row, :, :count])))
                np.testing.assert_allclose(held[row, :, :count], wanted, atol=1e-6)


def test_a_step_attends_to_what_is_held():
    method = KIVI(bits=2, head_dim=WIDTH, group_size=4, residual=8)
    text = texts(3, 2, 19)
    cache, k, v = written(empty(method, 2, 24), text[0], text[1], jnp.array([19, 14]))
    q = jnp.asarray(np.random.Generator(np.random.PCG64(4)).normal(size=(2, HEADS, 3, WIDTH)), jnp.float32)
    operands = (cache.k[0].operand(cache.positions[0]), cache.v[0].operand(cache.positions[0]))
    for implementation in ("reference", "blocked"):
        found = decode_attention(q, *operands, cache.length[0], implementation=implementation)
        wanted = decode_attention(q, k, v, cache.length[0], implementation="reference")
        chex.assert_trees_all_close(found, wanted, atol=1e-5)


def test_bytes_are_those_of_codes_scales_and_windows():
    method = KIVI(bits=2, head_dim=64, group_size=32, residual=128)
    cache = init_cache(layers=1, batch=1, kv_heads=2, slots=4096, head_dim=64, split=True, coders=method.coders(1))
    codes = 2 * 4096 * 64 * 2 // 8
    window = 2 * 128 * 64 * 4
    assert cache.k[0].shape == cache.v[0].shape == (1, 2, 4096, 64)
    assert sum(x.nbytes for x in jax.tree.leaves(cache.k)) == codes + 2 * (4096 // 32) * 64 * 2 * 2 + window
    assert sum(x.nbytes for x in jax.tree.leaves(cache.v)) == codes + 2 * 4096 * 2 * 2 * 2 + window


def test_a_decoder_whose_window_holds_the_whole_text_writes_what_it_always_wrote():
    config = DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    prompts = jnp.arange(12).reshape(2, 6)
    params = Decoder(config).init(jax.random.key(0), prompts)["params"]
    model, lengths = Decoder(config), jnp.array([6, 4])

    def tokens(coders, slots=16):
        cache = new_cache(config, batch=2, slots=slots, split=True, coders=coders)
        return generate(model.apply, params, cache, prompts, lengths, max_new_tokens=8)[0]

    plain = tokens(None)
    chex.assert_trees_all_equal(tokens(KIVI(bits=1, head_dim=8, group_size=8, residual=16).coders(2)), plain)
    chex.assert_trees_all_equal(tokens(KIVI(bits=8, head_dim=8, group_size=2, residual=2).coders(2)), plain)


def test_sizes_change_and_nothing_is_evicted():
    method = KIVI(bits=2, head_dim=WIDTH, group_size=4, residual=4)
    text = texts(5, 1, 11)
    cache, k, _ = written(empty(method, 1, 12), text[0], text[1], jnp.array([11]))
    larger = resize(cache, 30)
    assert larger.is_coded and larger.k[0].shape == (1, HEADS, 30, WIDTH)
    chex.assert_trees_all_equal(larger.k[0].read(larger.positions[0])[:, :, :11], k[:, :, :11])
    chex.assert_trees_all_equal(resize(larger, 12), cache)
    with pytest.raises(ConfigError, match=r"ChannelRuns\(bits=2.*nothing can be evicted.*choose CQ, KVQuant or IntKV"):
        kv_evict(cache, H2O(budget=4))
