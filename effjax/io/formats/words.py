"""Bit streams of codes in bytes and in 32-bit words, on the host: the packing that GPTQ and compressed-tensors share.

Code `i` of `b` bits occupies bits `[i * b, (i + 1) * b)` of its column's stream, least significant bit first. Read as
little-endian 32-bit words the stream is GPTQ's `qweight`; transposed it is the `weight_packed` of compressed-tensors;
as bytes it is `codes` of `effjax.arrays.Quantized`. So a weight passes from one to the other without being unpacked.
"""

import numpy as np
from jaxtyping import Int32, Integer, UInt8


def pack(codes: Integer[np.ndarray, "n m"], bits: int) -> UInt8[np.ndarray, "bytes m"]:
    """Packs codes in `[0, 2**bits)` down axis 0; the last byte is filled with zero bits.

    Example:
        >>> pack(np.array([[1], [2], [3]]), bits=4).ravel().tolist()
        [33, 3]
    """
    codes = codes.astype(np.uint8)
    if bits == 8:
        return codes
    n, m = codes.shape
    if 8 % bits == 0:  # no code straddles two bytes: several times as fast as bit by bit
        in_byte = 8 // bits
        octets = np.pad(codes, ((0, -n % in_byte), (0, 0))).reshape(-1, in_byte, m)
        return np.bitwise_or.reduce([octets[:, j] << np.uint8(bits * j) for j in range(in_byte)])
    spread = np.unpackbits(codes[:, None, :], axis=1, count=bits, bitorder="little")
    return np.packbits(spread.reshape(n * bits, m), axis=0, bitorder="little")


def unpack(stream: UInt8[np.ndarray, "bytes m"], bits: int, n: int) -> UInt8[np.ndarray, "n m"]:
    """The first `n` codes of each column: the inverse of `pack`."""
    if bits == 8:
        return stream[:n]
    if 8 % bits == 0:
        mask = np.uint8(2**bits - 1)
        codes = np.stack([stream >> np.uint8(bits * j) & mask for j in range(8 // bits)], axis=1)
        return codes.reshape(-1, stream.shape[1])[:n]
    spread = np.unpackbits(stream, axis=0, count=n * bits, bitorder="little")
    return np.packbits(spread.reshape(n, bits, -1), axis=1, bitorder="little")[:, 0]


def to_words(stream: UInt8[np.ndarray, "bytes m"]) -> Int32[np.ndarray, "words m"]:
    """Four bytes of a column as one little-endian word, the last one filled with zero bytes.

    Example:
        >>> to_words(np.array([[0x10], [0x32], [0x54], [0x76]], np.uint8)).tolist() == [[0x76543210]]
        True
    """
    size, m = stream.shape
    whole = np.pad(stream, ((0, -size % 4), (0, 0)))
    quads = np.ascontiguousarray(whole.reshape(-1, 4, m).transpose(0, 2, 1))
    return quads.view("<i4")[..., 0].astype(np.int32)


def to_bytes(words: Int32[np.ndarray, "words m"]) -> UInt8[np.ndarray, "4*words m"]:
    """The bytes of each column of words: the inverse of `to_words`."""
    count, m = words.shape
    quads = np.ascontiguousarray(words.astype("<i4")).view(np.uint8).reshape(count, m, 4)
    return quads.transpose(0, 2, 1).reshape(4 * count, m)


def padding_is_zero(stream: UInt8[np.ndarray, "bytes m"], bits: int, n: int) -> bool:
    """Whether everything behind the `n`-th code of each column is zero."""
    whole, rest = divmod(n * bits, 8)
    if rest and (stream[whole] >> rest).any():
        return False
    return not stream[whole + bool(rest) :].any()


def unpack_padded(words: Int32[np.ndarray, "words m"], bits: int, n: int) -> UInt8[np.ndarray, "n m"]:
    """Codes of the older packing of compressed-tensors (up to 0.12), which lets no code straddle two words."""
    in_word = 32 // bits
    shifts = (bits * np.arange(in_word, dtype=np.uint32))[None, :, None]
    codes = (words.view(np.uint32)[:, None, :] >> shifts) & np.uint32(2**bits - 1)
    return codes.reshape(-1, words.shape[1])[:n].astype(np.uint8)
