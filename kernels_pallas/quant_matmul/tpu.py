"""`x @ W` and `x @ W.T` on a TPU for a quantized matrix, unpacked in the registers of the vector unit.

Codes cross the memory packed. Words are cut into planes of codes (`kernels_pallas.words`), so nothing is interleaved,
and two codes share a word's halves: as the first bits of a mantissa under the exponent of `2**bits`, a code of up to 7
bits is the bfloat16 number `2**bits + code` without any conversion. What is added so is taken off the products again.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from effjax.arrays.packing import unpack
from effjax.arrays.quantized import Quantized, centre
from kernels_pallas.frame import Operand, Weights, compiler_params, cost, multiply, simulator, unroll
from kernels_pallas.quant_matmul.tile import Tile, choose_tile, periods, span_of, vmem_bytes
from kernels_pallas.words import LANES, Stream, pad_to, spread, strided, three_parts, to_columns, to_planes

MOST_SPAN = 2048


def why_not(rows: int, x_dtype: Any, w: Quantized, *, transpose: bool = False) -> str:
    """Why this product is not one for this kernel; empty where it is.

    Example:
        >>> from effjax.quantize import RTN
        >>> w = RTN(bits=4, group_size=4).quantize(jnp.ones((64, 128)))
        >>> why_not(1, jnp.bfloat16, w)
        'groups of 4 inputs: codes of 4 bits are unpacked 8 inputs at a time, which must divide a group'
    """
    del transpose
    if len(w.shape) != 2:
        return f"a stack of matrices {list(w.shape)}: map over the leading axes"
    if jnp.dtype(x_dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"activations in {jnp.dtype(x_dtype).name}: only bfloat16 and float32"
    if rows < 1:
        return "no rows"
    if w.scales.shape[-2] > 1:
        if w.group_size % periods(w):
            return (
                f"groups of {w.group_size} inputs: codes of {w.bits} bits are unpacked {periods(w)} inputs at a time, "
                "which must divide a group"
            )
        if span_of(w, 128) > MOST_SPAN:
            return f"groups of {w.group_size} inputs: they meet whole registers only every {span_of(w, 128)} inputs"
    return ""


def quant_matmul(
    x: Float[Array, "rows in"],
    w: Quantized,
    *,
    transpose: bool = False,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """Multiplies by a quantized matrix whose packed codes are read once for every tile of rows.

    Args:
        x: `[rows, in]`, or `[rows, out]` when `transpose`; bfloat16 or float32.
        w: `[in, out]`.
        transpose: multiply by `W.T`: the gradient with respect to the inputs.
        tile: what a step takes; chosen by `choose_tile` where None.
        interpret: run on the CPU in the simulator of a TPU.

    Returns:
        float32 `[rows, out]`, or `[rows, in]` when `transpose`. With bfloat16 activations, weights are rounded to
        bfloat16 where the scales are put on them (`Tile.scale_on`), and nothing is where they are put on the products;
        with float32 activations nothing is rounded.

    Raises:
        ValueError: what `why_not` says.

    Example:
        >>> from effjax.quantize import RTN
        >>> w = RTN(bits=4, group_size=32).quantize(jnp.eye(64))
        >>> quant_matmul(jnp.ones((1, 64)), w, interpret=True).shape
        (1, 64)
    """
    reason = why_not(x.shape[0], x.dtype, w, transpose=transpose)
    if reason:
        raise ValueError(f"the TPU's quant_matmul does not take {w}: {reason}; use implementation='reference'")
    tile = choose_tile(x.shape[0], x.dtype, w, transpose=transpose) if tile is None else tile
    if transpose and tile.scale_on != "weights":
        raise ValueError("a transposed product contracts over the scales' axis: its tile needs scale_on='weights'")
    tables = _tables(w, tile)
    if tile.scale_on == "products":
        return _products(x, w, tables, tile, interpret)
    made = _made(w, tables, tile, x.dtype, transpose)
    return multiply(x, made, tile, transpose=transpose, interpret=interpret)


def _tables(w: Quantized, tile: Tile) -> list[jax.Array]:
    """Scales, and zero points where there are any, as `[input tiles, groups a tile, out]`; zeros fill up both ends."""
    groups = w.scales.shape[-2]
    in_tile = max(1, tile.inputs // w.group_size) if groups > 1 else 1
    tables = [w.scales if w.scales.dtype == jnp.bfloat16 else w.scales.astype(jnp.float32)]
    if w.zeros is not None:
        real = jnp.issubdtype(w.zeros.dtype, jnp.floating)
        tables.append(w.zeros.astype(jnp.float32) if real else unpack(w.zeros, w.bits, groups))
    padded = [pad_to(table, in_tile, tile.out) for table in tables]
    return [table.reshape(-1, in_tile, table.shape[-1]) for table in padded]


def _operands(w: Quantized, tables: list[jax.Array], tile: Tile) -> list[Operand]:
    part = max(1, w.group_size // tile.inputs)  # input tiles that share a group

    def table_at(k: Any, j: Any) -> tuple[Any, ...]:
        return (0 if w.scales.shape[-2] == 1 else lax.div(k, jnp.int32(part)) if part > 1 else k), 0, j

    codes = Operand(array=_codes_to_tile(w, tile), block=(tile.inputs * w.bits // 8, tile.out), at=lambda k, j: (k, j))
    return [codes, *(Operand(array=t, block=(1, t.shape[1], tile.out), at=table_at) for t in tables)]


def _scratch(w: Quantized, tables: list[jax.Array], tile: Tile) -> list[Any]:
    """Tables in float32, whose single rows can be read, and words in columns of 128, for reading with a stride."""
    stream = Stream(w.bits)
    rows = [pltpu.VMEM((table.shape[1], tile.out), jnp.float32) for table in tables]
    if w.bits == 8 or stream.period_words == 1:
        return rows
    return [*rows, pltpu.VMEM((tile.out // LANES, tile.inputs * w.bits // 32, LANES), jnp.int32)]


def _order(w: Quantized, tile: Tile) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The factors of a span and their order in the unpacked codes, for `to_planes`."""
    if w.bits == 8:
        return (tile.span,), (0,)
    codes = Stream(w.bits).period_codes
    if tile.scale_on == "products":
        return (tile.span // codes, 2, codes // 2), (2, 0, 1)
    return (tile.span // codes, codes), (1, 0)


def _codes_to_tile(w: Quantized, tile: Tile) -> jax.Array:
    """The packed codes; only a matrix smaller than one block is filled up."""
    size = tile.inputs * w.bits // 8
    return pad_to(w.codes, size if w.codes.shape[0] < size else 1, tile.out if w.codes.shape[1] < tile.out else 1)


def _products(x: jax.Array, w: Quantized, tables: list[jax.Array], tile: Tile, interpret: bool) -> jax.Array:
    rows, out = x.shape[0], w.shape[-1]
    parts = 3 if x.dtype == jnp.float32 else 1
    inner = pad_to(three_parts(x) if parts == 3 else x, tile.rows, tile.inputs)
    spans = to_planes(inner, tile.span, *_order(w, tile))
    operands = _operands(w, tables, tile)
    y = pl.pallas_call(
        functools.partial(_products_kernel, w=_facts(w), tile=tile, side_by_side=1 if interpret else unroll(tile)),
        grid=(inner.shape[0] // tile.rows, pl.cdiv(out, tile.out), spans.shape[0] // tile.spans),
        in_specs=[
            pl.BlockSpec((tile.spans, tile.rows, tile.span), lambda i, j, k: (k, i, 0)),
            *(operand.spec(lambda i, j, k: (k, j)) for operand in operands),
        ],
        out_specs=pl.BlockSpec((tile.rows, tile.out), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((inner.shape[0], max(out, tile.out)), jnp.float32),
        scratch_shapes=_scratch(w, tables, tile),
        compiler_params=compiler_params(vmem_bytes(tile, x.dtype, w)),
        cost_estimate=cost(rows, w.shape, w.nbytes, spans),
        interpret=simulator(interpret),
        name="quant_matmul",
    )(spans, *(operand.array for operand in operands))
    y = y[: parts * rows, :out]
    return y.reshape(parts, rows, out).sum(0) if parts > 1 else y


def _made(w: Quantized, tables: list[jax.Array], tile: Tile, x_dtype: Any, transpose: bool) -> Weights:
    facts = _facts(w)
    factors, order = _order(w, tile)

    def start(stored: Any, scratch: Any, k: Any, j: Any) -> None:
        _start(stored, scratch, 0.0)

    def dense(stored: Any, scratch: Any, s: Any, k: Any, j: Any, dtype: Any) -> jax.Array:
        return _weights(stored, scratch, s, facts, tile, dtype)

    return Weights(
        shape=w.shape,
        operands=_operands(w, tables, tile),
        factors=factors,
        order=order,
        start=start,
        dense=dense,
        scratch=_scratch(w, tables, tile),
        vmem=vmem_bytes(tile, x_dtype, w, transpose=transpose),
        nbytes=w.nbytes,
        name="quant_matmul",
    )


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What the kernels know of the matrix when they are traced; `group` is 0 where one scale serves all inputs."""

    bits: int
    group: int
    zeros: bool


def _facts(w: Quantized) -> _Facts:
    return _Facts(w.bits, 0 if w.scales.shape[-2] == 1 else w.group_size, w.zeros is not None)


def _products_kernel(x_ref: Any, *refs: Any, w: _Facts, tile: Tile, side_by_side: int) -> None:
    count = 3 if w.zeros else 2
    stored, out_ref, scratch = refs[:count], refs[count], refs[count + 1 :]
    base = -128.0 if w.bits == 8 else float(2**w.bits)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)

    _start(stored, scratch, base)
    groups = max(1, tile.span // w.group) if w.group else 1

    def step(s: Any, carry: None) -> None:
        x = x_ref[s]
        if groups > 1:  # a row for each group, with the inputs of the others at zero
            of = _group_of_lane(x.shape, w, tile)
            wide = x.astype(jnp.float32)
            x = jnp.concatenate([jnp.where(of == g, wide, 0.0) for g in range(groups)]).astype(jnp.bfloat16)
        total = jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)
        values = _bfloat16_codes(stored[0], scratch, s, w, tile)
        product = jnp.dot(x, values, preferred_element_type=jnp.float32)
        result = out_ref[...]
        for g in range(groups):
            rows = slice(g * tile.rows, (g + 1) * tile.rows)
            scale, shift = _rows(scratch, s, g, groups, w, tile)
            fixed = base + centre(w.bits) if shift is None else shift
            result = result + (product[rows] - total[rows] * fixed) * scale
        out_ref[...] = result
        return carry

    lax.fori_loop(0, tile.spans, step, None, unroll=side_by_side)


def _start(stored: Any, scratch: Any, base: float) -> None:
    """At every step the tables as float32, zero points with what the codes have too much, and words in columns."""
    codes_ref, *tables = stored
    for place, (table, rows) in enumerate(zip(tables, scratch, strict=False)):
        rows[...] = _float32(table[0]) + (base if place else 0.0)
    if len(scratch) > len(tables):
        to_columns(pltpu.bitcast(codes_ref[...], jnp.int32), scratch[-1])


def _float32(table: jax.Array) -> jax.Array:
    return table.astype(jnp.int32).astype(jnp.float32) if table.dtype == jnp.uint8 else table.astype(jnp.float32)


def _rows(scratch: Any, s: Any, g: int, groups: int, w: _Facts, tile: Tile) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point `[1, out]` of group `g` of span `s`."""
    if not w.group or w.group >= tile.inputs:
        row: Any = 0
    else:
        row = s * groups + g if w.group <= tile.span else lax.div(jnp.int32(s), jnp.int32(w.group // tile.span))
    scale = scratch[0][pl.ds(row, 1), :]
    return scale, scratch[1][pl.ds(row, 1), :] if w.zeros else None


def _codes(bits: int) -> int:
    return Stream(bits).period_codes


def _group_of_lane(shape: tuple[int, ...], w: _Facts, tile: Tile) -> jax.Array:
    """The group inside its span of every input, in the order of pairs."""
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    if w.bits == 8:
        return lax.div(lane, jnp.int32(w.group))
    pair = lax.rem(lane, jnp.int32(2 * tile.span // _codes(w.bits)))
    return lax.div(pair, jnp.int32(2 * w.group // _codes(w.bits)))


def _packed(codes_ref: Any, s: Any, count: int) -> jax.Array:
    """The `count` rows of words of span `s`; four rows of bytes are one of words in a register as they are."""
    return pltpu.bitcast(codes_ref[pl.ds(pl.multiple_of(s * (4 * count), 32), 4 * count), :], jnp.int32)


def _words(codes_ref: Any, scratch: Any, s: Any, bits: int, tile: Tile) -> list[jax.Array]:
    """`words[i]`: the i-th words of all periods of span `s`, `int32[periods, out]`."""
    stream = Stream(bits)
    count = tile.span // stream.period_codes
    if stream.period_words == 1:
        return [_packed(codes_ref, s, count)]
    start = s * (count * stream.period_words)
    return [strided(scratch[-1], start + word, count, stream.period_words) for word in range(stream.period_words)]


def _bfloat16_codes(codes_ref: Any, scratch: Any, s: Any, w: _Facts, tile: Tile) -> jax.Array:
    """`code + 2**bits` (`code - 128` for 8 bits) of a span, bfloat16 `[span, out]` in the order of `_order`."""
    if w.bits == 8:
        packed = _packed(codes_ref, s, tile.span // 4)
        signed = pltpu.bitcast(packed ^ jnp.int32(-0x7F7F7F80), jnp.int8)  # the sign bit of each byte flipped
        return signed.astype(jnp.bfloat16)
    stream = Stream(w.bits)
    read = _words(codes_ref, scratch, s, w.bits, tile)
    exponent = (127 + w.bits) << 7
    pairs = [stream.pair(read, code, 7 - w.bits) for code in range(stream.period_codes // 2)]
    pairs = [pair | jnp.int32(exponent | exponent << 16) for pair in pairs]
    return jnp.concatenate([pltpu.bitcast(pair, jnp.bfloat16) for pair in pairs])


def _weights(stored: Any, scratch: Any, s: Any, w: _Facts, tile: Tile, dtype: Any) -> jax.Array:
    """The weights of a span, `[span, out]` in the order of `_order`."""
    groups = max(1, tile.span // w.group) if w.group else 1
    tables = [_rows(scratch, s, g, groups, w, tile) for g in range(groups)]
    if w.bits == 8:
        codes = stored[0][pl.ds(pl.multiple_of(s * tile.span, 32), tile.span), :]
        planes = [codes.astype(jnp.int32)]
    else:
        read = _words(stored[0], scratch, s, w.bits, tile)
        planes = [Stream(w.bits).plane(read, code) for code in range(_codes(w.bits))]
    count = planes[0].shape[0]
    scale = spread([scale for scale, _ in tables], count)
    shift = spread([shift for _, shift in tables if shift is not None], count) if w.zeros else centre(w.bits)
    return jnp.concatenate([((plane.astype(jnp.float32) - shift) * scale).astype(dtype) for plane in planes])
