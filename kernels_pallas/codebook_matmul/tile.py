"""Tiles of the TPU's `codebook_matmul`, the way its tables are read, and the memory that a step needs."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp

from effjax.arrays.codebook import Codebook
from kernels_pallas.frame import best_span, live_weights
from kernels_pallas.words import LANES, SUBLANES, Stream, round_up

MOST_SUBLANE_ENTRIES = 32
MOST_SPAN = 4096
TILE_WEIGHTS = 2**19


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


def lookup(w: Codebook) -> Literal["lanes", "sublanes", "turned"]:
    """How a value is found.

    The hardware picks among the 128 lanes of a register row, or among its 8 sublanes, which takes less time (31.3
    against 55.6 microseconds for a 4096x4096 NF4 matrix in the compiler's schedule for a v5e). Small tables lie along
    sublanes, 8 entries a register, a large one of the whole matrix along lanes. Large tables a column lie along lanes
    too, a column a row, for which the words of the codes are turned first; a word holds several codes.
    """
    if w.tables.shape[-1] <= MOST_SUBLANE_ENTRIES:
        return "sublanes"
    return "lanes" if w.tables.shape[-2] == 1 else "turned"


def table_group(w: Codebook) -> int:
    """Consecutive inputs that share a table."""
    return w.shape[-2] // w.tables.shape[-3]


def scale_group(w: Codebook) -> int:
    """Consecutive inputs that share a scale; all of them where there is none."""
    return w.shape[-2] // (1 if w.scales is None else w.scales.shape[-2])


def span_of(w: Codebook, preferred: int) -> int:
    """Inputs that are unpacked together, or 0 where none do: whole planes, within a table's group, whole scales'."""
    stream = Stream(w.bits)
    rows = LANES if lookup(w) == "turned" else SUBLANES
    unit = math.lcm(rows * stream.period_codes, LANES)
    n, tables, scales = w.shape[-2], table_group(w), scale_group(w)
    whole_table, whole_scale = tables == n, scales == n

    def fits(span: int) -> bool:
        return (whole_table or tables % span == 0) and (whole_scale or scales % span == 0 or span % scales == 0)

    most = max(unit, preferred)
    found = [span for span in range(unit, most + 1, unit) if fits(span)]
    if not found and not whole_scale:  # a few groups of scales that meet the registers only together
        found = [span for span in (math.lcm(unit, scales),) if fits(span)]
    found = [span for span in found if span <= MOST_SPAN]
    return best_span(n, found) if found else 0


def choose_tile(rows: int, x_dtype: Any, w: Codebook, *, transpose: bool = False) -> Tile:
    """The tile for `rows` rows of activations.

    Example:
        >>> import effjax as ej, jax
        >>> w = jax.eval_shape(ej.quantize.NF4().quantize, jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16))
        >>> choose_tile(1, jnp.bfloat16, w)
        Tile(rows=8, span=1024, spans=2, out=256)
    """
    del transpose
    n, out = w.shape
    span = span_of(w, 1024)
    columns = min(128 if span > 1024 else 256 if span > 512 else 512, round_up(out, LANES))
    spans = max(1, min(TILE_WEIGHTS // columns, round_up(n, span)) // span)
    # A step holds whole groups of tables and scales, or an equal part of one.
    for group in (table_group(w), scale_group(w)):
        if group < n and group > span:
            parts = group // span
            spans = spans // parts * parts if spans >= parts else math.gcd(spans, parts)
    single = jnp.dtype(x_dtype) == jnp.float32
    return Tile(rows=min(256 if single else 512, round_up(rows, 8)), span=span, spans=spans, out=columns)


def vmem_bytes(tile: Tile, x_dtype: Any, w: Codebook, *, transpose: bool = False) -> int:
    """Vector memory of a step: every block twice, since the next one is on its way, and what a span is unpacked to."""
    item = jnp.dtype(x_dtype).itemsize
    codes = tile.inputs * w.bits // 8 * tile.out
    entries = w.tables.shape[-1]
    count = max(1, tile.inputs // table_group(w))
    width = tile.out if lookup(w) == "sublanes" else round_up(entries, LANES)
    height = {"lanes": 8, "sublanes": round_up(entries, 8), "turned": tile.out}[lookup(w)]
    tables = 4 * count * width * height
    scales = 0 if w.scales is None else 4 * round_up(max(1, tile.inputs // scale_group(w)), 32) * tile.out
    wide = tile.rows * max(tile.inputs if transpose else tile.out, LANES)
    activations = tile.rows * item * (tile.out if transpose else tile.inputs)
    unpacked = live_weights(tile) * (12 + item) + 4 * wide
    return 2 * (codes + tables + scales + activations + 4 * wide) + codes + scales + 4 * wide + 2 * unpacked
