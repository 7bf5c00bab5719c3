"""Bit streams as words: planes and pairs of every width, the order of inputs, and float32 in three bfloat16 parts."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.arrays.packing import pack
from kernels_pallas.shapes import MODELS, shape, unique_shapes
from kernels_pallas.words import Stream, from_planes, pad_to, spread, three_parts, to_planes


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_and_pairs_are_the_codes_of_the_stream(bits):
    stream = Stream(bits)
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3 * stream.period_codes, 5)).astype(np.uint8)
    words = np.ascontiguousarray(np.asarray(pack(jnp.asarray(codes), bits)).T).view("<i4").T
    assert words.shape == (3 * stream.period_words, 5)
    read = [jnp.asarray(words[i :: stream.period_words]) for i in range(stream.period_words)]
    for code in range(stream.period_codes):
        np.testing.assert_array_equal(stream.plane(read, code), codes[code :: stream.period_codes])
    for code in range(stream.period_codes // 2):
        for at in {0, 8 - bits}:
            pair = np.asarray(stream.pair(read, code, at)).view(np.uint32)
            first, second = (
                codes[code :: stream.period_codes],
                codes[code + stream.period_codes // 2 :: stream.period_codes],
            )
            np.testing.assert_array_equal(pair & 0xFFFF, first.astype(np.uint32) << at)
            np.testing.assert_array_equal(pair >> 16, second.astype(np.uint32) << at)


@settings(max_examples=5)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_from_planes_undoes_to_planes(factors, data):
    order = tuple(data.draw(st.permutations(range(len(factors)))))
    span = int(np.prod(factors))
    x = jnp.arange(2.0 * 3 * span).reshape(2, 3 * span)
    planes = to_planes(x, span, tuple(factors), order)
    assert planes.shape == (3, 2, span)
    np.testing.assert_array_equal(from_planes(planes, tuple(factors), order), x)


@settings(max_examples=20)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=4))
def test_three_parts_add_up_to_the_number(values):
    x = np.array([values], np.float32)
    x[np.abs(x) < 1e-20] = 0  # parts of smaller numbers leave the normal range
    parts = np.asarray(three_parts(jnp.asarray(x))).astype(np.float64)
    np.testing.assert_array_equal(parts.sum(0), x[0])


def test_spread_and_pad():
    rows = [jnp.full((1, 2), float(g)) for g in range(4)]
    for share in (2, 8):
        np.testing.assert_array_equal(spread(rows, 4 * share)[:, 0], np.repeat(np.arange(4.0), share))
    assert pad_to(jnp.ones((2, 3)), 1, 4).tolist() == [[1, 1, 1, 0]] * 2


def test_named_shapes():
    assert shape("Llama-3.1-70B", "down_proj") == (28672, 8192)
    assert shape("TinyLlama-1.1B", "k_proj") == (2048, 256)
    for model, decoder in MODELS.items():
        assert sum(map(len, unique_shapes(model).values())) == len(decoder.projections) == 7
    with pytest.raises(KeyError, match="no model 'GPT-2'; there are Llama-3.1-8B"):
        shape("GPT-2", "q_proj")
    with pytest.raises(KeyError, match="no projection 'head'; there are q_proj"):
        shape("Qwen3-0.6B", "head")
