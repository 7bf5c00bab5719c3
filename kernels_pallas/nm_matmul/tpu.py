"""`x @ W` and `x @ W.T` on a TPU for an n:m sparse matrix, spread out in vector memory.

Only the kept values and their packed positions cross the memory. A period of both streams (`kernels_pallas.words`)
holds whole groups of m inputs; the values of one place in the period are read with a stride, so that they lie under the
words that hold their positions, and every input of the group is the sum of the values whose position it is.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from effjax.arrays.base import CompressedArray
from effjax.arrays.nm_sparse import NMSparse
from kernels_pallas.frame import Operand, Weights, best_span, live_weights, multiply
from kernels_pallas.words import LANES, SUBLANES, Stream, pad_to, round_up, strided, to_columns

MOST_GROUP = 32
MOST_SPAN = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What one step of the grid multiplies: `rows` of activations, `spans` spans of `span` inputs, `out` outputs."""

    rows: int
    span: int
    spans: int
    out: int

    @property
    def inputs(self) -> int:
        return self.span * self.spans


@dataclasses.dataclass(frozen=True)
class _Period:
    """The shortest run of groups whose positions fill whole words.

    Attributes:
        groups: of m inputs.
        words: of positions.
    """

    n: int
    m: int
    groups: int
    words: int

    @property
    def kept(self) -> int:
        return self.groups * self.n

    @property
    def inputs(self) -> int:
        return self.groups * self.m


def _period(w: NMSparse) -> _Period:
    stream = Stream(w.index_bits)
    kept = math.lcm(stream.period_codes, w.n)
    return _Period(w.n, w.m, kept // w.n, kept * w.index_bits // 32)


def _span(w: NMSparse) -> int:
    return math.lcm(SUBLANES * _period(w).inputs, LANES)


def choose_tile(rows: int, x_dtype: Any, w: NMSparse, *, transpose: bool = False) -> Tile:
    """The tile for `rows` rows of activations.

    Example:
        >>> dense = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
        >>> w = jax.eval_shape(lambda w: NMSparse.from_dense(w, w != 0, n=2, m=4), dense)
        >>> choose_tile(1, jnp.bfloat16, w)
        Tile(rows=8, span=1024, spans=1, out=512)
    """
    del transpose
    n, out = w.shape
    unit = _span(w)
    span = best_span(n, range(unit, max(unit, 1024) + 1, unit))
    single = jnp.dtype(x_dtype) == jnp.float32
    most = 256 if single else 512
    return Tile(rows=min(most, round_up(rows, 8)), span=span, spans=1, out=min(512, round_up(out, LANES)))


def vmem_bytes(tile: Tile, x_dtype: Any, w: NMSparse, *, transpose: bool = False) -> int:
    """Vector memory of a step: every block twice, since the next one is on its way, and what a span is spread to."""
    item = jnp.dtype(x_dtype).itemsize
    kept = tile.inputs // w.m * w.n
    stored = kept * tile.out * w.values.dtype.itemsize + kept * w.index_bits // 8 * tile.out
    wide = tile.rows * max(tile.inputs if transpose else tile.out, LANES)
    activations = tile.rows * item * (tile.out if transpose else tile.inputs)
    spread = live_weights(tile) * (8 + item) + 4 * wide
    return 2 * (stored + activations + 4 * wide) + stored + 4 * wide + 2 * spread


def why_not(rows: int, x_dtype: Any, w: NMSparse, *, transpose: bool = False) -> str:
    """Why this product is not one for this kernel; empty where it is.

    Example:
        >>> w = NMSparse.from_dense(jnp.ones((64, 8)), jnp.ones((64, 8), bool), n=2, m=64)
        >>> why_not(1, jnp.bfloat16, w)
        'a 2:64 pattern: groups of up to 32 inputs are spread out by comparing positions, larger ones cost too much'
    """
    del transpose
    if len(w.shape) != 2:
        return f"a stack of matrices {list(w.shape)}: map over the leading axes"
    if jnp.dtype(x_dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"activations in {jnp.dtype(x_dtype).name}: only bfloat16 and float32"
    if isinstance(w.values, CompressedArray):
        return "values that are quantized themselves: only floating ones"
    if w.values.dtype not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"values in {w.values.dtype.name}: only bfloat16 and float32"
    if rows < 1:
        return "no rows"
    if w.m > MOST_GROUP:
        return (
            f"a {w.n}:{w.m} pattern: groups of up to {MOST_GROUP} inputs are spread out by comparing positions, "
            "larger ones cost too much"
        )
    if _span(w) > MOST_SPAN:
        return f"a {w.n}:{w.m} pattern: its positions fill whole registers only every {_span(w)} inputs"
    return ""


def nm_matmul(
    x: Float[Array, "rows in"],
    w: NMSparse,
    *,
    transpose: bool = False,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """Multiplies by an n:m sparse matrix whose values and positions are read once for every tile of rows.

    Args:
        x: `[rows, in]`, or `[rows, out]` when `transpose`; bfloat16 or float32.
        w: `[in, out]`, values in bfloat16 or float32.
        transpose: multiply by `W.T`: the gradient with respect to the inputs.
        tile: what a step takes; chosen by `choose_tile` where None.
        interpret: run on the CPU in the simulator of a TPU.

    Returns:
        float32 `[rows, out]`, or `[rows, in]` when `transpose`. Values are rounded to the dtype of `x`.

    Raises:
        ValueError: what `why_not` says.

    Example:
        >>> w = NMSparse.from_dense(jnp.eye(64), jnp.eye(64) > 0, n=2, m=4)
        >>> nm_matmul(jnp.ones((1, 64)), w, interpret=True).shape
        (1, 64)
    """
    reason = why_not(x.shape[0], x.dtype, w, transpose=transpose)
    if reason:
        raise ValueError(f"the TPU's nm_matmul does not take {w}: {reason}; use implementation='reference'")
    tile = choose_tile(x.shape[0], x.dtype, w, transpose=transpose) if tile is None else tile
    made = _weights(x, w, tile, transpose)
    return multiply(x, made, tile, transpose=transpose, interpret=interpret)


def _weights(x: jax.Array, w: NMSparse, tile: Tile, transpose: bool) -> Weights:
    period, halves = _period(w), w.values.dtype == jnp.bfloat16
    periods = tile.span // period.inputs
    assert not isinstance(w.values, CompressedArray)  # why_not has said so
    rows = tile.inputs // w.m * w.n
    index_rows = rows * w.index_bits // 8
    # Only a matrix smaller than a block is filled up, and one whose last pair of values is no pair.
    values = pad_to(
        w.values,
        rows if w.values.shape[0] < rows else 2,
        tile.out if w.values.shape[1] < tile.out else 1,
    )
    indices = pad_to(
        w.indices,
        index_rows if w.indices.shape[0] < index_rows else 1,
        tile.out if w.indices.shape[1] < tile.out else 1,
    )
    word_rows = rows // 2 if halves else rows
    stride = period.kept // 2 if halves else period.kept
    limits = values.shape[0] // 2 if halves else values.shape[0], values.shape[1]
    scratch = [pltpu.VMEM((tile.out // LANES, word_rows, LANES), jnp.int32)]
    if period.words > 1:
        scratch.append(pltpu.VMEM((tile.out // LANES, index_rows // 4, LANES), jnp.int32))

    def start(stored: Any, scratch: Any, k: Any, j: Any) -> None:
        read = stored[0][...]
        words = pltpu.bitcast(read, jnp.int32)
        # The end of the last block is whatever was in memory, which times zero need not be zero.
        if limits[0] % word_rows:
            place = lax.broadcasted_iota(jnp.int32, words.shape, 0) + k * word_rows
            words = jnp.where(place < limits[0], words, 0)
        if transpose and limits[1] % tile.out:
            place = lax.broadcasted_iota(jnp.int32, words.shape, 1) + j * tile.out
            words = jnp.where(place < limits[1], words, 0)
        to_columns(words, scratch[0])
        if period.words > 1:
            to_columns(pltpu.bitcast(stored[1][...], jnp.int32), scratch[1])

    def dense(stored: Any, scratch: Any, s: Any, k: Any, j: Any, dtype: Any) -> jax.Array:
        if period.words > 1:
            first = s * (periods * period.words)
            words = [strided(scratch[1], first + i, periods, period.words) for i in range(period.words)]
        else:
            start = pl.multiple_of(s * (4 * periods), 32)
            words = [pltpu.bitcast(stored[1][pl.ds(start, 4 * periods), :], jnp.int32)]
        first = s * (periods * stride)

        def value(place: int) -> jax.Array:
            if not halves:
                return lax.bitcast_convert_type(strided(scratch[0], first + place, periods, stride), jnp.float32)
            pair = strided(scratch[0], first + place // 2, periods, stride)
            high = pair & jnp.int32(-0x10000) if place % 2 else lax.shift_left(pair, jnp.int32(16))
            return lax.bitcast_convert_type(high, jnp.float32)

        planes = []
        for group in range(period.groups):
            places = range(group * w.n, (group + 1) * w.n)
            kept = [(_position(words, w.index_bits, place), value(place)) for place in places]
            for position in range(w.m):
                terms = [jnp.where(at == position, v, 0.0) for at, v in kept]
                planes.append(sum(terms[1:], terms[0]).astype(dtype))
        return jnp.concatenate(planes)

    return Weights(
        shape=w.shape,
        operands=[
            Operand(array=values, block=(rows, tile.out), at=lambda k, j: (k, j)),
            Operand(array=indices, block=(index_rows, tile.out), at=lambda k, j: (k, j)),
        ],
        factors=(periods, period.inputs),
        order=(1, 0),
        start=start,
        dense=dense,
        scratch=scratch,
        vmem=vmem_bytes(tile, x.dtype, w, transpose=transpose),
        nbytes=w.nbytes,
        name="nm_matmul",
    )


def _position(words: list[jax.Array], bits: int, place: int) -> jax.Array:
    """The position of kept value `place` of every period; the words of a period may hold several runs of codes."""
    stream = Stream(bits)
    run, code = divmod(place, stream.period_codes)
    return stream.plane(words[run * stream.period_words : (run + 1) * stream.period_words], code)
