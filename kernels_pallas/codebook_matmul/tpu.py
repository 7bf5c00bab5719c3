"""`x @ W` and `x @ W.T` on a TPU for weights that are indices into tables, looked up inside the vector registers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from effjax.arrays.codebook import Codebook
from kernels_pallas.codebook_matmul.tile import (
    MOST_SPAN,
    Tile,
    choose_tile,
    lookup,
    scale_group,
    span_of,
    table_group,
    vmem_bytes,
)
from kernels_pallas.frame import Operand, Weights, multiply
from kernels_pallas.words import LANES, SUBLANES, Stream, pad_to, round_up, spread, strided, to_columns


def why_not(rows: int, x_dtype: Any, w: Codebook, *, transpose: bool = False) -> str:
    """Why this product is not one for this kernel; empty where it is.

    Example:
        >>> tables = jnp.linspace(-1, 1, 16).reshape(1, 1, 16)
        >>> w = Codebook.from_codes(jnp.zeros((64, 8), jnp.uint8), tables, jnp.ones((16, 8)), dtype=jnp.float32)
        >>> why_not(1, jnp.bfloat16, w)
        'scales of 4 inputs: codes of 4 bits are unpacked 8 inputs at a time, which must divide a group'
    """
    del transpose
    if len(w.shape) != 2:
        return f"a stack of matrices {list(w.shape)}: map over the leading axes"
    if jnp.dtype(x_dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"activations in {jnp.dtype(x_dtype).name}: only bfloat16 and float32"
    if rows < 1:
        return "no rows"
    codes, scaled = Stream(w.bits).period_codes, scale_group(w)
    if lookup(w) == "turned" and w.scales is not None:
        return f"scales on top of tables of {w.tables.shape[-1]} entries a column"
    if scaled < w.shape[-2] and scaled % codes:
        return (
            f"scales of {scaled} inputs: codes of {w.bits} bits are unpacked {codes} inputs at a time, "
            "which must divide a group"
        )
    if not span_of(w, 256):
        return (
            f"tables of {table_group(w)} and scales of {scaled} inputs: no run of up to {MOST_SPAN} inputs that fills "
            f"whole registers with codes of {w.bits} bits lies within both"
        )
    return ""


def codebook_matmul(
    x: Float[Array, "rows in"],
    w: Codebook,
    *,
    transpose: bool = False,
    tile: Tile | None = None,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """Multiplies by a matrix of table indices that is read packed, once for every tile of rows.

    Args:
        x: `[rows, in]`, or `[rows, out]` when `transpose`; bfloat16 or float32.
        w: `[in, out]` with a table for the matrix, a column, or groups of either.
        transpose: multiply by `W.T`: the gradient with respect to the inputs.
        tile: what a step takes; chosen by `choose_tile` where None.
        interpret: run on the CPU in the simulator of a TPU.

    Returns:
        float32 `[rows, out]`, or `[rows, in]` when `transpose`. Scaled values are rounded to the dtype of `x`.

    Raises:
        ValueError: what `why_not` says.

    Example:
        >>> from effjax.quantize import NF4
        >>> w = NF4(block_size=64).quantize(jnp.eye(64))
        >>> codebook_matmul(jnp.ones((1, 64)), w, interpret=True).shape
        (1, 64)
    """
    reason = why_not(x.shape[0], x.dtype, w, transpose=transpose)
    if reason:
        raise ValueError(f"the TPU's codebook_matmul does not take {w}: {reason}; use implementation='reference'")
    tile = choose_tile(x.shape[0], x.dtype, w, transpose=transpose) if tile is None else tile
    made = _weights(x, w, tile, transpose)
    y = multiply(x, made, tile, transpose=transpose, interpret=interpret)
    return y if w.global_scale is None else y / w.global_scale.astype(jnp.float32)


def _weights(x: jax.Array, w: Codebook, tile: Tile, transpose: bool) -> Weights:
    stream, how = Stream(w.bits), lookup(w)
    periods = tile.span // stream.period_codes
    size = tile.inputs * w.bits // 8
    codes = pad_to(w.codes, size if w.codes.shape[0] < size else 1, tile.out if w.codes.shape[1] < tile.out else 1)
    operands = [Operand(array=codes, block=(size, tile.out), at=lambda k, j: (k, j)), _tables(w, tile)]
    scratch: list[Any] = []
    if w.scales is not None:
        operands.append(_scales(w, tile))
        scratch.append(pltpu.VMEM((operands[-1].block[1], tile.out), jnp.float32))
    if stream.period_words > 1:
        scratch.append(pltpu.VMEM((tile.out // LANES, size // 4, LANES), jnp.int32))
    find = _find(how, 2**w.bits)
    whole_table, whole_scale = table_group(w) == w.shape[-2], scale_group(w) == w.shape[-2]

    def start(stored: Any, scratch: Any, k: Any, j: Any) -> None:
        if w.scales is not None:
            scratch[0][...] = stored[2][0].astype(jnp.float32)
        if stream.period_words > 1:
            to_columns(pltpu.bitcast(stored[0][...], jnp.int32), scratch[-1])

    def dense(stored: Any, scratch: Any, s: Any, k: Any, j: Any, dtype: Any) -> jax.Array:
        if stream.period_words > 1:
            first = s * (periods * stream.period_words)
            words = [strided(scratch[-1], first + i, periods, stream.period_words) for i in range(stream.period_words)]
        else:
            first = pl.multiple_of(s * (4 * periods), 32)
            words = [pltpu.bitcast(stored[0][pl.ds(first, 4 * periods), :], jnp.int32)]
        table = stored[1][0 if whole_table else _part(s, table_group(w), tile)].astype(jnp.float32)
        if how == "turned":
            words = [word.T for word in words]
        planes = [find(table, stream.plane(words, code)) for code in range(stream.period_codes)]
        if w.scales is not None:
            group = scale_group(w)
            count = 1 if whole_scale or group >= tile.span else tile.span // group
            first = 0 if whole_scale else _part(s, group, tile) if count == 1 else s * count
            scale = spread([scratch[0][pl.ds(first + g, 1), :] for g in range(count)], periods)
            planes = [plane * scale for plane in planes]
        return jnp.concatenate([plane.astype(dtype) for plane in planes], axis=1 if how == "turned" else 0)

    return Weights(
        shape=w.shape,
        operands=operands,
        factors=(periods, stream.period_codes),
        order=(1, 0),
        start=start,
        dense=dense,
        scratch=scratch,
        vmem=vmem_bytes(tile, x.dtype, w, transpose=transpose),
        nbytes=w.nbytes,
        name="codebook_matmul",
        turned=how == "turned",
    )


def _tables(w: Codebook, tile: Tile) -> Operand:
    """Tables of 128 (or 256) lanes, or of 8 (or more) sublanes; zeros fill up, so that any code finds a number."""
    how, entries, out = lookup(w), 2**w.bits, w.shape[-1]
    count = max(1, tile.inputs // table_group(w)) if w.tables.shape[-3] > 1 else 1
    part = max(1, table_group(w) // tile.inputs)
    tables = w.tables if w.tables.dtype == jnp.bfloat16 else w.tables.astype(jnp.float32)
    if how == "lanes":
        tables = pad_to(tables, count, 1, round_up(entries, LANES))
        block = (count, 1, tables.shape[-1])
    else:
        if tables.shape[-2] == 1:
            tables = jnp.repeat(tables, tile.out, axis=-2)  # one block that serves all
        elif tables.shape[-2] != out:
            tables = jnp.repeat(tables, out // tables.shape[-2], axis=-2)
        if how == "turned":
            tables = pad_to(tables, count, tile.out, round_up(entries, LANES))
            block = (count, tile.out, tables.shape[-1])
        else:
            tables = pad_to(tables.mT, count, round_up(entries, SUBLANES), tile.out)
            block = (count, tables.shape[-2], tile.out)
    grouped = w.tables.shape[-3] > 1

    def at(k: Any, j: Any) -> tuple[Any, ...]:
        group = 0 if not grouped else k if part == 1 else lax.div(k, jnp.int32(part))
        column = 0 if w.tables.shape[-2] == 1 else j
        return (group, column, 0) if how == "turned" else (group, 0, column)

    return Operand(array=tables, block=block, at=at)


def _scales(w: Codebook, tile: Tile) -> Operand:
    assert w.scales is not None
    groups = w.scales.shape[-2]
    count = max(1, tile.inputs // scale_group(w)) if groups > 1 else 1
    part = max(1, scale_group(w) // tile.inputs)
    # Eight-bit floats are exact in bfloat16.
    narrow = w.scales.dtype.itemsize == 1 or w.scales.dtype == jnp.bfloat16
    scales = pad_to(w.scales.astype(jnp.bfloat16 if narrow else jnp.float32), count, tile.out)
    scales = scales.reshape(-1, count, scales.shape[-1])

    def at(k: Any, j: Any) -> tuple[Any, ...]:
        return 0 if groups == 1 else k if part == 1 else lax.div(k, jnp.int32(part)), 0, j

    return Operand(array=scales, block=(1, count, tile.out), at=at)


def _part(s: Any, group: int, tile: Tile) -> Any:
    """The group, of those that a step has, that span `s` lies in."""
    return 0 if group >= tile.inputs else lax.div(jnp.int32(s), jnp.int32(group // tile.span))


def _find(how: str, entries: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`find(table, codes)`: the value of every code."""

    def lanes(table: jax.Array, codes: jax.Array) -> jax.Array:
        found = _pick(table[:, :LANES], codes & jnp.int32(LANES - 1) if entries > LANES else codes, 1)
        if entries <= LANES:
            return found
        return jnp.where(codes < LANES, found, _pick(table[:, LANES:], codes & jnp.int32(LANES - 1), 1))

    def sublanes(table: jax.Array, codes: jax.Array) -> jax.Array:
        rows = []
        for top in range(0, codes.shape[0], SUBLANES):
            code = codes[top : top + SUBLANES]
            place = code & jnp.int32(SUBLANES - 1)
            found = _pick(table[:SUBLANES], place, 0)
            for low in range(SUBLANES, entries, SUBLANES):
                found = jnp.where(code < low, found, _pick(table[low : low + SUBLANES], place, 0))
            rows.append(found)
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows)

    return sublanes if how == "sublanes" else lanes


def _pick(table: jax.Array, places: jax.Array, axis: int) -> jax.Array:
    """One register's worth of entries, looked up by every row (axis 1) or column (axis 0) on its own."""
    shape = (places.shape[0], LANES) if axis else (SUBLANES, places.shape[1])
    return jnp.take_along_axis(jnp.broadcast_to(table, shape), places, axis=axis, mode="promise_in_bounds")
