"""Caches whose keys are looked up: against whole texts, written in chunks or one by one, evicted, and bad input."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import ConfigError
from effjax.kv import H2O, NoMAD, SinkWindow, kv_evict, resize
from effjax.kv.capture import capture_kv
from effjax.kv.nomad_slots import NomadLayers
from effjax.kv.nomad_text import apply_nomad, learn_layers
from effjax.models.decoder import Decoder, DecoderApply, new_cache
from effjax.models.generate import generate
from effjax.models.generate_evicting import new_evicting_cache
from tests.models.small import SMALL

TOKENS = np.random.Generator(np.random.PCG64(7)).integers(0, 40, (2, 40), np.int32)
STEP = jax.jit(DecoderApply(SMALL))


@pytest.fixture(scope="module")
def params():
    tree = jax.jit(Decoder(SMALL).init)(jax.random.key(0), jnp.asarray(TOKENS))["params"]
    return jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, tree)


@pytest.fixture(scope="module")
def layers(params):
    windows = np.random.Generator(np.random.PCG64(8)).integers(0, 40, (8, 40), np.int32)
    captured = capture_kv(SMALL, params, windows)
    return learn_layers(NoMAD(d_sub=2, iterations=5), SMALL, captured, 40, key=jax.random.key(1))


def test_steps_give_the_logits_of_whole_texts(params, layers):
    """Over the end of a block of 32, behind which its keys are looked up."""
    cache, found = new_cache(SMALL, batch=2, slots=40, coders=layers), []
    for at in range(40):
        logits, cache = STEP({"params": params}, jnp.asarray(TOKENS[:, at : at + 1]), cache=cache)
        found.append(logits)
    expected = apply_nomad(SMALL, params, layers, jnp.asarray(TOKENS))
    chex.assert_trees_all_close(jnp.concatenate(found, axis=1), expected, atol=2e-3)
    plain, _ = STEP({"params": params}, jnp.asarray(TOKENS), cache=new_cache(SMALL, batch=2, slots=40, split=True))
    assert np.abs(np.asarray(plain - expected))[:, 33:].max() > 0.05, "the codes cost nothing: were they read?"


@pytest.mark.parametrize("chunks", [(70,), (33, 37), (5, 1, 64)])
def test_chunks_are_written_as_single_keys_are(layers, chunks):
    """Two rows, the second with fewer valid tokens in every chunk; the rest is dropped."""
    x = jax.random.normal(jax.random.key(3), (2, 2, 70, 8))
    empty = layers.empty_keys(0, (2, 2, 71, 8), jnp.float32, None)
    row, head = (jax.lax.broadcasted_iota(jnp.int32, (2, 2, 1), axis) for axis in (0, 1))
    short = [max(count - 3, 1) for count in chunks]
    ours, filled = empty, np.zeros(2, int)
    kept = [[], []]
    begin = 0
    for count, fewer in zip(chunks, short, strict=True):
        valid = np.array([count, fewer])
        slot = filled[:, None, None] + np.arange(count)[None, None]
        slot = np.where(np.arange(count)[None, None] < valid[:, None, None], slot, 71)
        slot = jnp.broadcast_to(jnp.asarray(slot), (2, 2, count))
        at = tuple(jnp.broadcast_to(i, slot.shape) for i in (row, head))
        ours = ours.write((*at, slot), x[:, :, begin : begin + count])
        for b in range(2):
            kept[b] += list(range(begin, begin + valid[b]))
        filled, begin = filled + valid, begin + count
    theirs = empty
    for step in range(max(filled)):
        token = jnp.stack([x[b][:, kept[b][min(step, len(kept[b]) - 1)]] for b in range(2)])[:, :, None]
        slot = jnp.asarray(np.where(step < filled, step, 71))[:, None, None]
        theirs = theirs.write((row, head, jnp.broadcast_to(slot, (2, 2, 1))), token)
    at = np.arange(71)[None, None]
    positions = jnp.asarray(np.broadcast_to(np.where(at < filled[:, None, None], at, -1), (2, 2, 71)))
    read, expected = (np.asarray(held.read(positions)) for held in (ours, theirs))
    for b in range(2):
        np.testing.assert_array_equal(read[b, :, : filled[b]], expected[b, :, : filled[b]])
    last = filled[0] // 32 * 32
    np.testing.assert_array_equal(read[0, :, last : filled[0]], x[0][:, np.array(kept[0][last:])])


def test_evicted_and_resized(params, layers):
    _, cache = STEP({"params": params}, jnp.asarray(TOKENS), cache=new_cache(SMALL, batch=2, slots=40, coders=layers))
    kept = kv_evict(cache, SinkWindow(sinks=2, window=34), slots=50)
    assert kept.k[0].shape == kept.v[0].shape == (2, 2, 50, 8) and kept.is_coded
    at = np.asarray(kept.positions[0])[..., :32, None]  # positions were slots; the last block's keys may change
    was, now = (np.asarray(x.k[0].read(x.positions[0])) for x in (cache, kept))
    was = np.take_along_axis(was, at, axis=2)
    coded = (at < 32)[..., 0]
    np.testing.assert_allclose(now[:, :, :32][coded], was[coded], atol=1e-6)
    small = resize(kept, 36)
    assert small.k[0].shape == (2, 2, 36, 8) and small.k[0].keys.codes.shape[2] == 2
    read = small.k[0].read(small.positions[0])
    chex.assert_trees_all_equal(read[:, :, :36], kept.k[0].read(kept.positions[0])[:, :, :36])


def test_rows_evict_alone_as_together(params, layers):
    prompts, lengths, kv = jnp.asarray(TOKENS[:, :38]), jnp.array([38, 29]), H2O(budget=34)

    def run(rows):
        made = new_evicting_cache(
            SMALL, kv, prompts=prompts[rows].shape, max_new_tokens=9, prefill_chunk=8, coders=layers
        )
        options = {"max_new_tokens": 9, "kv": kv, "prefill_chunk": 8, "donate_cache": True}
        return generate(DecoderApply(SMALL), params, made, prompts[rows], lengths[rows], **options)

    both, alone = run(slice(None)), run(slice(1, 2))
    np.testing.assert_array_equal(both[0][1:], alone[0])
    assert not any(book.is_deleted() for book in layers.books)


def test_bytes(layers):
    """A slot more costs half a byte for two channels of a key; a whole block of 32 at once."""

    def held(slots):
        return jax.eval_shape(lambda: new_cache(SMALL, batch=1, slots=slots, coders=layers)).k

    shapes = held(64), held(96)
    assert sum(k.keys.codes.size for k in shapes[1]) - sum(k.keys.codes.size for k in shapes[0]) == 2 * 2 * 32 * 8 // 4
    assert layers.bits_per_channel((1, 2, 64, 8), tables=False) == 2
    assert layers.nbytes == 2 * 2 * 4 * 16 * 2 * 4


def test_codebooks_of_another_model(layers):
    one = NomadLayers(books=tuple(book[:1] for book in layers.books))
    with pytest.raises(ConfigError, match="of layer 0 are of 1 key heads, the cache has 2; learn them"):
        new_cache(SMALL, batch=1, slots=8, coders=one)
    more = dataclasses.replace(SMALL, num_hidden_layers=3)
    with pytest.raises(ConfigError, match="coders for 2 layers, the model has 3"):
        new_cache(more, batch=1, slots=8, coders=layers)
    wide = dataclasses.replace(SMALL, head_dim=16)
    with pytest.raises(ConfigError, match="codebooks"):
        new_cache(wide, batch=1, slots=8, coders=layers)
