"""Streams of codes: the vectors of the formats, and agreement with the packing of the arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.arrays import packing
from effjax.io.formats import words
from tests.io.formats.bits import hexes, int32, stream_words


def test_golden_vectors():
    assert hexes(words.to_words(words.pack(np.arange(8)[:, None], 4))) == ["76543210"]
    signed = np.arange(-8, 8)[:, None] + 8
    assert hexes(words.to_words(words.pack(signed, 4))) == ["76543210", "FEDCBA98"]
    assert hexes(words.to_words(words.pack(np.array([-128, -1, 0, 127])[:, None] + 128, 8))) == ["FF807F00"]
    assert hexes(words.to_words(words.pack((np.arange(32) % 8)[:, None], 3))) == ["88FAC688", "C688FAC6", "FAC688FA"]


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_streams_are_those_of_the_definition(bits, n, m, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (n, m)).astype(np.uint8)
    stream = words.pack(codes, bits)
    expected = np.stack([int32(stream_words(codes[:, j], bits)) for j in range(m)], axis=1)
    np.testing.assert_array_equal(words.to_words(stream), expected)
    np.testing.assert_array_equal(words.to_bytes(expected)[: len(stream)], stream)
    np.testing.assert_array_equal(words.unpack(stream, bits, n), codes)
    assert words.padding_is_zero(words.to_bytes(expected), bits, n)
    if n * bits % 32:
        last = expected.copy()
        last[-1] |= np.int32(-(2**31))
        assert not words.padding_is_zero(words.to_bytes(last), bits, n)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bytes_are_those_of_the_arrays(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (61, 3)).astype(np.uint8)
    np.testing.assert_array_equal(words.pack(codes, bits), packing.pack(codes, bits))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_padded_words(bits):
    """The packing of compressed-tensors up to 0.12: `32 // bits` codes in a word, its upper bits free."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, 50)
    per_word = 32 // bits
    packed = [
        sum(int(c) << bits * i for i, c in enumerate(codes[k : k + per_word])) for k in range(0, len(codes), per_word)
    ]
    np.testing.assert_array_equal(words.unpack_padded(int32(packed)[:, None], bits, 50)[:, 0], codes)
