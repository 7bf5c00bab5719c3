"""Packed matrices as the Hopper kernels read them: 16-bit words of two outputs, a plane for each byte of a run.

Codes are packed along the inputs and lie next to each other along the outputs, so neither unpacking nor an interleave
is needed along either:

* The smallest number of codes that fills whole bytes is a *run* (2 codes of 4 bits, 8 of 3). Code `j` of all runs is
  multiplied by `x[:, j::run]`, a product of its own, and the sum over `j` is the whole.
* Two neighbouring bytes, of outputs `2i` and `2i + 1`, are read as one 16-bit word. Even and odd outputs have an
  accumulator each, and are put in order by whoever sums the partial products.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

BLOCK = 64  # pairs of outputs, or runs of inputs, that a tensor core instruction has as rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """A matrix as the kernels read it; `runs` and `pairs` are padded to whole tiles.

    Attributes:
        planes: arrays of codes, `[runs, planes * pairs]` words of 16 or 32 bits, and the plane of each that is meant.
        sides: rows of scales and zero points, one a group: `[groups, pairs]` words of 16 or 32 bits.
        constants: arrays that a block reads once, `[k, pairs]` words, or `[k]` scalars.
        run: inputs of a run.
        runs, pairs: what is left after padding.
        group: runs that share a row of the sides; `runs` where there is one group.
        values: `values(j, parity, planes, sides, constants, spread)` gives input `j` of every run, of the even (0) or
            odd (1) outputs, as bf16 parts to be added; `spread` repeats a row of the sides over the tile.
        scale: `scale(parity, sides)` gives what multiplies the values of a group, float32, or None.
        parts: how many parts there are.
        step: runs a step of the forward contraction takes, all of one group: 16, 32 or 64.
    """

    planes: tuple[tuple[jax.Array, int], ...]
    sides: tuple[jax.Array, ...]
    constants: tuple[jax.Array, ...]
    run: int
    runs: int
    pairs: int
    group: int
    values: Callable[..., list[jax.Array]]
    scale: Callable[[int, list[jax.Array]], jax.Array] | None
    parts: int
    step: int


def step_runs(group: int) -> int:
    """The most runs, of 64, 32 and 16, that divide a group of `group`; 0 where none does."""
    return next((size for size in (64, 32, 16) if group % size == 0), 0)


def word16(x: Any) -> np.uint16:
    """A constant of 16 bits: a numpy scalar is an immediate operand, a jax one would be an argument of the kernel."""
    return np.uint16(x)


def column_pairs(x: jax.Array) -> jax.Array:
    """`[n, out]` of 8 or 16 bits as `[n, out / 2]` words of twice the width, the even column in the lower half."""
    wide = jnp.uint16 if x.dtype.itemsize == 1 else jnp.uint32
    return lax.bitcast_convert_type(x.reshape(x.shape[0], -1, 2), wide)


def pad_to(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Zeros below and to the right; no operation where the shape is that already."""
    if x.shape == (rows, columns):
        return x
    return jnp.pad(x, [(0, rows - x.shape[0]), (0, columns - x.shape[1])])


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def packed_runs(bits: int) -> tuple[int, int]:
    """`(inputs of a run, bytes of a run)` for codes of `bits` bits in a stream.

    Example:
        >>> [packed_runs(bits) for bits in (1, 2, 3, 4, 6, 8)]
        [(8, 1), (4, 1), (8, 3), (2, 1), (4, 3), (1, 1)]
    """
    size = math.lcm(8, bits) // 8
    return 8 * size // bits, size


def packed_planes(codes: jax.Array, bits: int, runs: int, pairs: int) -> tuple[tuple[jax.Array, int], ...]:
    """The bytes of every run, `[runs, bytes * pairs]` words, as one plane a byte of the run."""
    _, size = packed_runs(bits)
    words = column_pairs(pad_to(codes, runs * size, 2 * pairs)).reshape(runs, size * pairs)
    return tuple((words, byte) for byte in range(size))


def code_of(words: list[jax.Array], j: int, parity: int, bits: int, mask: Any = None) -> jax.Array:
    """Code `j` of every run, `uint16`, from the words of its bytes; `parity` chooses the even or the odd outputs."""
    byte, shift = divmod(j * bits, 8)
    code = words[byte] >> word16(8 * parity + shift) if 8 * parity + shift else words[byte]
    if shift + bits <= 8:
        return code & (word16(2**bits - 1) if mask is None else mask) if 8 * parity + shift + bits < 16 else code
    first = 8 - shift  # bits that this byte holds
    rest = words[byte + 1] >> word16(8) if parity else words[byte + 1]
    return (code & word16(2**first - 1)) | ((rest & word16(2 ** (bits - first) - 1)) << word16(first))


def bf16_bits(words: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(words, jnp.bfloat16)


def half_bits(words: jax.Array, parity: int) -> jax.Array:
    """The even or the odd one of the two 16-bit values in a word of 32 bits."""
    return (words >> np.uint32(16) if parity else words).astype(jnp.uint16)


def row_sides(x: Float[Array, "groups out"], pairs: int) -> tuple[jax.Array, ...]:
    """Rows of floats as sides: 16-bit ones two a word as they lie, others as float32, even and odd apart."""
    x = pad_to(x, x.shape[0], 2 * pairs)
    if x.dtype in (jnp.float16, jnp.bfloat16):
        return (column_pairs(x),)
    x = x.astype(jnp.float32)
    return x[:, 0::2], x[:, 1::2]


def side_value(sides: list[jax.Array], parity: int, dtype: Any) -> jax.Array:
    """float32 values of the even or the odd outputs from what `row_sides` made of `dtype`."""
    if jnp.dtype(dtype) in (jnp.float16, jnp.bfloat16):
        return lax.bitcast_convert_type(half_bits(sides[0], parity), dtype).astype(jnp.float32)
    return sides[parity]


def padded(n: int, out: int, groups: int, run: int) -> tuple[int, int, int]:
    """`(runs, pairs, runs of a group)` of a padded matrix; only one whole group can be padded along the inputs."""
    pairs = round_up(out, 2 * BLOCK) // 2
    if groups == 1:
        runs = round_up(-(-n // run), BLOCK)
        return runs, pairs, runs
    return n // run, pairs, n // groups // run


def exact_terms(x: Float[Array, "rows n"], count: int = 3) -> list[jax.Array]:
    """bf16 arrays whose sum is `x`: itself, or the three that hold the 24 bits of a float32; or the first `count`.

    Example:
        >>> terms = exact_terms(jnp.array([[1 / 3]]))
        >>> len(terms), float(sum(t.astype(jnp.float32) for t in terms)[0, 0] - jnp.float32(1 / 3))
        (3, 0.0)
    """
    if x.dtype == jnp.bfloat16:
        return [x]
    terms, rest = [], x.astype(jnp.float32)
    for _ in range(count):
        # reduce_precision instead of two casts, which the compiler may take for none.
        rounded = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        terms.append(rounded.astype(jnp.bfloat16))
        rest = jnp.where(jnp.isfinite(rounded), rest - rounded, 0)
    return terms


def two_parts(x: jax.Array, parts: int) -> list[jax.Array]:
    """A float32 tile as one rounded bf16 array, or two that hold 16 bits of it."""
    high = x.astype(jnp.bfloat16)
    return [high] if parts == 1 else [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def weight_parts(x_dtype: Any, w_dtype: Any) -> int:
    """bf16 parts of a rounded weight: one where activations and weight are bf16, as a dense product would have it."""
    return 1 if jnp.dtype(x_dtype) == jnp.dtype(w_dtype) == jnp.bfloat16 else 2


def refusal(rows: int, dtype: Any) -> str:
    """Why no kernel here takes `rows` activations of `dtype`, or an empty string."""
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"activations of {jnp.dtype(dtype).name}: the GPU kernels take bfloat16 and float32"
    return "a product of no rows" if rows < 1 else ""


def group_refusal(n: int, groups: int, run: int, transpose: bool) -> str:
    """Why inputs in `groups` groups cannot be cut into steps of the tensor core, or an empty string."""
    size = n // groups
    if groups == 1:
        return ""
    if size % run or not step_runs(size // run):
        return f"groups of {size} inputs: a step takes a multiple of {16 * run} inputs of one group at this width"
    if transpose and size // run % BLOCK:
        return f"groups of {size} inputs: a transposed product takes a multiple of {BLOCK * run} at this width"
    return ""
