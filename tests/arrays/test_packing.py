"""The packing of codes against a bit stream of Python's big integers, and against words of published formats."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.arrays import pack, packed_size, unpack

BITS = range(1, 9)


packed_once = jax.jit(pack, static_argnums=1)
unpacked_once = jax.jit(unpack, static_argnums=(1, 2))


def stream(codes: list[int], bits: int) -> bytes:
    """Code i in bits [i * bits, (i + 1) * bits), least significant first."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes((len(codes) * bits + 7) // 8, "little")


@given(st.integers(1, 8), st.integers(1, 41), st.just(3), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_dense_bit_stream(bits, n, out, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (n, out))
    packed = np.asarray(packed_once(codes, bits))
    assert packed.dtype == np.uint8
    assert packed.shape == (packed_size(n, bits), out)
    for column in range(out):
        assert packed[:, column].tobytes() == stream(codes[:, column].tolist(), bits)
    np.testing.assert_array_equal(unpacked_once(packed, bits, n), codes)


@pytest.mark.parametrize("bits", BITS)
def test_stacked_is_layer_by_layer(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (2, 3, 13, 4))
    packed = pack(jnp.asarray(codes), bits)
    assert packed.shape == (2, 3, packed_size(13, bits), 4)
    np.testing.assert_array_equal(packed[1, 2], pack(jnp.asarray(codes[1, 2]), bits))
    np.testing.assert_array_equal(unpack(packed, bits, 13), codes)


@pytest.mark.parametrize("bits", BITS)
def test_extremes(bits):
    """All ones fill their bits and no others."""
    for n in (1, 7, 8, 9):
        packed = np.asarray(pack(jnp.full((n, 1), 2**bits - 1), bits))
        assert packed.tobytes() == ((1 << n * bits) - 1).to_bytes(packed_size(n, bits), "little")
        assert not np.asarray(pack(jnp.zeros((n, 1), jnp.int32), bits)).any()


def words(codes: list[int], bits: int) -> list[int]:
    return np.asarray(pack(jnp.asarray(codes)[:, None], bits)).ravel().view("<u4").tolist()


def test_words_of_published_formats():
    """GPTQ: codes 0 to 7 down the inputs; compressed-tensors: signed codes shifted to unsigned."""
    assert words(list(range(8)), 4) == [0x76543210]
    assert words(list(range(16)), 4) == [0x76543210, 0xFEDCBA98]
    assert words([(i % 8) - 4 + 4 for i in range(32)], 3) == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]
    assert words([0, 127, 128, 255], 8) == [0xFF807F00]
    # Zero points of symmetric GPTQ files, as `gptq` (minus one) and as `gptq_v2` store them.
    constants = {4: ([0x77777777], [0x88888888]), 8: ([0x7F7F7F7F], [0x80808080]), 2: ([0x55555555], [0xAAAAAAAA])}
    for bits, (first, second) in constants.items():
        count = 32 // bits
        assert words([2 ** (bits - 1) - 1] * count, bits) == first
        assert words([2 ** (bits - 1)] * count, bits) == second
    assert words([3] * 32, 3) == [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]
    assert words([4] * 32, 3) == [0x24924924, 0x49249249, 0x92492492]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [64, 61])
def test_bytes_in_memory_and_on_disk(bits, n, tmp_path):
    """Exactly ceil(n * bits / 8) bytes a column plus the scales, in memory and in the file's data section."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((n, 24)), jnp.float32)
    for symmetric in (True, False):
        q = ej.quantize.RTN(bits=bits, group_size=None, symmetric=symmetric).quantize(w)
        expected = 24 * (-(-n * bits // 8) + 2 + (0 if symmetric else -(-bits // 8)))
        assert q.nbytes == ej.nbytes({"w": q}) == expected
        directory = tmp_path / f"{symmetric}"
        ej.io.save_checkpoint(directory, {"w": q}, config={})
        raw = (directory / "model.safetensors").read_bytes()
        assert len(raw) - 8 - int.from_bytes(raw[:8], "little") == expected


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0), (2, 0, 3)])
def test_no_codes(bits, shape):
    packed = pack(jnp.zeros(shape, jnp.uint8), bits)
    assert packed.shape == (shape[0], packed_size(shape[1], bits), shape[2])
    assert unpack(packed, bits, shape[1]).shape == shape
