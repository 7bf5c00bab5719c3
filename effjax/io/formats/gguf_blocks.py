"""GGUF's block layouts to compressed leaves and back, with the codes and scales of the file.

What a matrix becomes (weights of a block are consecutive inputs of one output):

| type | value of a weight | leaf |
| --- | --- | --- |
| Q4_0, Q5_0, Q8_0 | `d (q - 2**(bits-1))` | `Quantized`, symmetric, groups of 32, float16 scales |
| Q6_K | `d sc (q - 32)` | `Quantized`, 6 bits, symmetric, groups of 16, float32 scales |
| Q4_1, Q5_1 | `d q + m` | `Sum` of two `Quantized`, float16 scales |
| Q4_K, Q5_K | `d sc q - dmin m` | `Sum` of two `Quantized`, groups of 32, float32 scales |
| F32, F16, BF16, F64 | itself | dense |

`d sc` is a float16 times a whole number of at most 7 bits, so float32 holds it exactly, and the leaf materialises to
what the reference dequantisation gives in float32, bit for bit. The price is the file's second level of scales: Q6_K
takes 8 bits a weight instead of 6.56, Q4_K 7.2 instead of 4.5. An offset that is no whole number of steps fits no zero
point: it is a second part of one bit whose codes are all 1 and whose scales are the offsets.

Layouts: ggml's `block_q4_0` and so on, as described in the documentation of GGUF and GGML.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from effjax.arrays.base import CompressedArray
from effjax.arrays.packing import unpack
from effjax.arrays.quantized import Quantized, centre
from effjax.arrays.sum import Sum
from effjax.errors import CheckpointError
from effjax.io.formats.gguf_types import BY_NAME, TensorType

_BLOCK = 32


class _Decoded(NamedTuple):
    """Blocks taken apart, still `[*L, out, ...]`.

    `codes` are uint8 `[..., blocks, elements]`; `scales` `[..., blocks, groups a block]`; `offsets` likewise, or None
    for a symmetric grid.
    """

    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None
    bits: int


def decode(kind: TensorType, raw: np.ndarray, *, name: str) -> CompressedArray | np.ndarray:
    """Rows of a tensor as a leaf (see the table above).

    Args:
        kind: the type of the tensor.
        raw: its bytes, `uint8[*L, out, row bytes]`, or `uint8[bytes]` of a vector.
        name: what errors call it.

    Returns:
        A compressed array `[*L, in, out]` that materialises to float32; a dense `[*L, in, out]` (or vector) of plain
        types.

    Raises:
        CheckpointError: a type that is not read, a vector in blocks, or numbers that are not finite.
    """
    if kind.dtype is not None:
        values = np.ascontiguousarray(raw).view(kind.dtype)
        if kind.dtype.kind not in "iu" and not np.isfinite(values).all():
            at = [int(index) for index in np.argwhere(~np.isfinite(values))[0]]
            raise CheckpointError(f"{name} has values that are NaN or infinite, the first at {at}; copy the file again")
        return values if raw.ndim == 1 else np.swapaxes(values, -1, -2)
    if kind.name not in _DECODERS:
        known = ", ".join((*_PLAIN, *_DECODERS))
        raise CheckpointError(f"{name} has type {kind.name}, which is not read; convert it to one of {known}")
    if raw.ndim == 1:
        raise CheckpointError(f"{name} is a vector of type {kind.name}; vectors are read as {', '.join(_PLAIN)}")
    blocks = np.ascontiguousarray(raw).reshape(*raw.shape[:-1], -1, kind.nbytes)
    found = _DECODERS[kind.name](blocks)
    for what, numbers in (("scales", found.scales), ("offsets", found.offsets)):
        if numbers is not None and not np.isfinite(numbers).all():
            *_, row, block, group = (int(index) for index in np.argwhere(~np.isfinite(numbers))[0])
            at = (block * found.scales.shape[-1] + group) * kind.elements // found.scales.shape[-1]
            raise CheckpointError(
                f"{name} has {what} that are NaN or infinite, the first in row {row} at weight {at}; copy the file "
                "again or ask its author"
            )
    return _leaf(found)


def _leaf(found: _Decoded) -> CompressedArray:
    def inputs_first(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.swapaxes(x.reshape(*x.shape[:-2], -1), -1, -2))

    codes, scales = inputs_first(found.codes), inputs_first(found.scales)
    if found.offsets is None:
        return _quantized(codes, scales, None, bits=found.bits)
    zeros = np.zeros(scales.shape, np.uint8)
    ones = np.ones(codes.shape, np.uint8)
    steps = _quantized(codes, scales, zeros, bits=found.bits)
    return Sum(parts=(steps, _quantized(ones, inputs_first(found.offsets), zeros, bits=1)))


@partial(jax.jit, static_argnames="bits")  # one program a shape: operation by operation, each would be compiled
def _quantized(codes: jax.Array, scales: jax.Array, zeros: jax.Array | None, *, bits: int) -> Quantized:
    return Quantized.from_codes(codes, scales, zeros, bits=bits, dtype=np.dtype(np.float32))


def _halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of every block, `[..., blocks, 1]`."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view(np.dtype("<f2"))


def _nibbles(data: np.ndarray, run: int) -> np.ndarray:
    """Codes of 4 bits: of every `run` bytes first the low nibbles, then the high ones."""
    runs = data.reshape(*data.shape[:-1], -1, run)
    return np.stack([runs & 15, runs >> 4], axis=-2).reshape(*data.shape[:-1], -1)


def _fifth_bits(data: np.ndarray) -> np.ndarray:
    """The fifth bit of 32 codes from 4 bytes, where codes want it."""
    return np.unpackbits(data, axis=-1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> _Decoded:
    return _Decoded(_nibbles(blocks[..., 2:], 16), _halves(blocks, 0), None, 4)


def _q4_1(blocks: np.ndarray) -> _Decoded:
    return _Decoded(_nibbles(blocks[..., 4:], 16), _halves(blocks, 0), _halves(blocks, 2), 4)


def _q5_0(blocks: np.ndarray) -> _Decoded:
    return _Decoded(_nibbles(blocks[..., 6:], 16) | _fifth_bits(blocks[..., 2:6]), _halves(blocks, 0), None, 5)


def _q5_1(blocks: np.ndarray) -> _Decoded:
    codes = _nibbles(blocks[..., 8:], 16) | _fifth_bits(blocks[..., 4:8])
    return _Decoded(codes, _halves(blocks, 0), _halves(blocks, 2), 5)


def _q8_0(blocks: np.ndarray) -> _Decoded:
    # int8 around 0 to codes around 128 is the flip of the sign bit.
    return _Decoded(blocks[..., 2:] ^ 128, _halves(blocks, 0), None, 8)


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales `d sc` and offsets `-dmin m` of the eight groups of a Q4_K or Q5_K block, float32 `[..., 8]`."""
    first, second, rest = (blocks[..., 4 + 4 * i : 8 + 4 * i] for i in range(3))
    steps = np.concatenate([first & 63, (rest & 15) | (first >> 6 << 4)], axis=-1)
    mins = np.concatenate([second & 63, (rest >> 4) | (second >> 6 << 4)], axis=-1)
    d, dmin = (_halves(blocks, start).astype(np.float32) for start in (0, 2))
    return _times(d, steps), _times(-dmin, mins)


def _times(d: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a damaged d: infinity times 0, which the caller reports by name
        return d * whole.astype(np.float32)


def _q4_k(blocks: np.ndarray) -> _Decoded:
    return _Decoded(_nibbles(blocks[..., 16:], 32), *_k_scales(blocks), 4)


def _q5_k(blocks: np.ndarray) -> _Decoded:
    high = (blocks[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = _nibbles(blocks[..., 48:], 32) | (high << 4).reshape(*blocks.shape[:-1], -1)
    return _Decoded(codes, *_k_scales(blocks), 5)


def _q6_k(blocks: np.ndarray) -> _Decoded:
    low = _nibbles(blocks[..., :128], 64).reshape(*blocks.shape[:-1], 2, 4, 32)
    high = blocks[..., 128:192].reshape(*blocks.shape[:-1], 2, 1, 32)
    high = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    scales = _times(_halves(blocks, 208).astype(np.float32), blocks[..., 192:208].view(np.int8))
    return _Decoded((low | high << 4).reshape(*blocks.shape[:-1], -1), scales, None, 6)


_DECODERS: Mapping[str, Callable[[np.ndarray], _Decoded]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
_PLAIN = ("F32", "F16", "BF16", "F64")


@partial(jax.jit, static_argnames=("bits", "n"))
def _unpacked(packed: jax.Array, *, bits: int, n: int) -> jax.Array:
    return unpack(packed, bits, n)


def steps_of(leaf: Quantized) -> tuple[np.ndarray, np.ndarray] | None:
    """Signed whole steps `int16[*L, in, out]` and float32 scales `[*L, groups, out]`: `W = scales * steps`.

    One bit around 1/2 has steps of -1 and 1 at half the scale. None where a zero point is no whole number.
    """
    codes = np.asarray(_unpacked(leaf.codes, bits=leaf.bits, n=leaf.shape[-2])).astype(np.int16)
    scales = np.asarray(leaf.scales).astype(np.float32)
    if leaf.zeros is None:
        return (codes - int(centre(leaf.bits)), scales) if leaf.bits > 1 else (2 * codes - 1, scales / 2)
    zeros = np.asarray(leaf.zeros)
    if zeros.dtype == np.uint8:
        zeros = np.asarray(_unpacked(leaf.zeros, bits=leaf.bits, n=scales.shape[-2]))
    if not (zeros == np.rint(zeros)).all() or np.abs(zeros).max() > 2**14:
        return None
    zeros = zeros.astype(np.int16)
    return codes - np.repeat(zeros, leaf.group_size, axis=-2), scales


def why_not(leaf: CompressedArray, kind: str) -> str | None:
    """Why `leaf` cannot be written as `kind` ("Q4_0" or "Q8_0") with the same values; None where it can.

    Example:
        >>> import jax.numpy as jnp
        >>> codes = jnp.zeros((32, 1), jnp.uint8)
        >>> leaf = Quantized.from_codes(codes, jnp.full((1, 1), 0.1), None, bits=4, dtype=np.float32)
        >>> why_not(leaf, "Q8_0")
        'its scales are no float16 numbers'
    """
    if not isinstance(leaf, Quantized):
        return f"a {type(leaf).__name__} is not one scale times whole numbers in each block"
    if leaf.shape[-2] % _BLOCK:
        return f"its {leaf.shape[-2]} inputs are no multiple of {_BLOCK}"
    if leaf.group_size % _BLOCK:
        return f"its groups of {leaf.group_size} inputs are no multiple of the blocks of {_BLOCK}"
    found = steps_of(leaf)
    if found is None:
        return "its zero points are no whole numbers"
    steps, scales = found
    lowest, highest = (-8, 7) if kind == "Q4_0" else (-128, 127)
    if steps.min() < lowest or steps.max() > highest:
        return f"its steps reach from {steps.min()} to {steps.max()}, {kind} holds {lowest} to {highest}"
    with np.errstate(over="ignore"):  # what overflows differs, and is reported so
        stored = scales.astype(np.float16)
    return None if (stored.astype(np.float32) == scales).all() else "its scales are no float16 numbers"


def encode(leaf: Quantized, kind: str) -> np.ndarray:
    """The rows of `leaf` in blocks of `kind`, `uint8[*L, out, row bytes]`; `why_not` is None for it.

    Example:
        >>> import jax.numpy as jnp
        >>> codes = jnp.full((32, 1), 9, jnp.uint8)
        >>> leaf = Quantized.from_codes(codes, jnp.ones((1, 1), jnp.float16), None, bits=4, dtype=np.float32)
        >>> encode(leaf, "Q4_0").tobytes().hex()
        '003c99999999999999999999999999999999'
    """
    found = steps_of(leaf)
    assert found is not None  # why_not says so
    steps, scales = found
    scales = np.repeat(scales.astype(np.float16), leaf.group_size // _BLOCK, axis=-2)
    return _blocks(np.swapaxes(steps, -1, -2), np.swapaxes(scales, -1, -2), kind)


def quantize(weight: np.ndarray, kind: str) -> np.ndarray:
    """Rounds a dense `[*L, out, in]` to blocks of `kind` as the reference quantizer does, byte for byte.

    Q8_0: `d = max|w| / 127`, halves away from zero. Q4_0: `d` is the weight of largest magnitude over -8, so that this
    one is met exactly.

    Raises:
        CheckpointError: rows that are no whole blocks, or weights too large for float16 scales.

    Example:
        >>> quantize(np.arange(-16, 16, dtype=np.float32)[None], "Q4_0").tobytes().hex(" ", 2)
        '0040 8091 91a2 a2b3 b3c4 c4d5 d5e6 e6f7 f7f8'
    """
    if weight.shape[-1] % _BLOCK:
        raise CheckpointError(f"rows of {weight.shape[-1]} weights are no whole blocks of {_BLOCK}; write F16 instead")
    blocks = weight.astype(np.float32).reshape(*weight.shape[:-1], -1, _BLOCK)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    d = peak / np.float32(-8) if kind == "Q4_0" else np.abs(peak) / np.float32(127)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=np.abs(d) > np.finfo(np.float32).tiny)
    if kind == "Q4_0":
        steps = np.clip(np.trunc(blocks * inverse + np.float32(8.5)), 0, 15) - 8
    else:
        scaled = blocks * inverse
        whole = np.floor(np.abs(scaled))
        steps = np.sign(scaled) * (whole + np.floor(2 * (np.abs(scaled) - whole)))
    with np.errstate(over="ignore"):  # refused right below
        scales = d[..., 0].astype(np.float16)
    if not np.isfinite(scales).all():
        raise CheckpointError(f"weights up to {np.abs(weight).max():g} need scales beyond float16; write F32 instead")
    return _blocks(steps.astype(np.int16).reshape(weight.shape), scales, kind)


def _blocks(steps: np.ndarray, scales: np.ndarray, kind: str) -> np.ndarray:
    """Steps `[*L, out, in]` and float16 scales `[*L, out, blocks]` as bytes of Q4_0 or Q8_0."""
    steps = steps.reshape(*scales.shape, _BLOCK)
    if kind == "Q4_0":
        codes = (steps + 8).astype(np.uint8)
        data = codes[..., : _BLOCK // 2] | codes[..., _BLOCK // 2 :] << 4
    else:
        data = steps.astype(np.int8).view(np.uint8)
    d = np.ascontiguousarray(scales[..., None]).astype("<f2").view(np.uint8)
    return np.concatenate([d, data], axis=-1).reshape(*scales.shape[:-1], scales.shape[-1] * BY_NAME[kind].nbytes)
