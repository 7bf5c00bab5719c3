"""Tiles of the TPU's `quant_matmul`: how many inputs, outputs and rows a step takes, and the memory that they need."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp

from effjax.arrays.quantized import Quantized
from kernels_pallas.frame import best_span, live_weights
from kernels_pallas.words import LANES, Stream, round_up

MOST_PRODUCT_ROWS = 128  # rows of the matrix unit that a decode step may fill, all groups of a span together
TILE_WEIGHTS = 2**20  # weights a step: half a megabyte of 4-bit codes hides the latency of the memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What one step of the grid multiplies.

    Attributes:
        rows: of the activations.
        span: inputs that are unpacked together and go through the matrix unit as one product.
        spans: of a step, so that it takes `span * spans` inputs.
        out: outputs, a multiple of 128.
        scale_on: "products": codes are multiplied as they are and each group's partial products scaled (decode: few
            rows, little to scale); "weights": weights are made in the register (prefill, and every transposed product).
    """

    rows: int
    span: int
    spans: int
    out: int
    scale_on: Literal["products", "weights"]

    @property
    def inputs(self) -> int:
        return self.span * self.spans


def periods(w: Quantized) -> int:
    """Consecutive inputs that lie in one period of words, hence in one group."""
    return 1 if w.bits == 8 else Stream(w.bits).period_codes


def span_of(w: Quantized, preferred: int) -> int:
    """Inputs of a span: whole registers of every plane, whole groups (or a whole part of one), multiples of 128."""
    unit = math.lcm(Stream(w.bits).step, LANES)
    n, groups = w.shape[-2], w.scales.shape[-2]
    size = n // groups
    if groups == 1:
        return best_span(n, range(unit, max(unit, preferred) + 1, unit))
    whole = math.lcm(unit, size)  # multiples of it hold whole groups; what divides a group lies within one
    most = max(preferred, unit if size % unit == 0 else whole)
    fitting = [span for span in range(unit, most + 1, unit) if span % size == 0 or size % span == 0]
    return best_span(n, fitting)


def choose_tile(rows: int, x_dtype: Any, w: Quantized, *, transpose: bool = False) -> Tile:
    """The tile for `rows` rows of activations.

    Example:
        >>> import effjax as ej, jax
        >>> rtn = ej.quantize.RTN(bits=4, group_size=128)
        >>> w = jax.eval_shape(rtn.quantize, jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16))
        >>> choose_tile(1, jnp.bfloat16, w)
        Tile(rows=8, span=128, spans=8, out=1024, scale_on='products')
        >>> choose_tile(2048, jnp.bfloat16, w)
        Tile(rows=512, span=1024, spans=1, out=512, scale_on='weights')
    """
    n, out = w.shape
    single = jnp.dtype(x_dtype) == jnp.float32
    columns = min(1024 if out >= 2048 else 512, round_up(out, LANES))
    narrow = span_of(w, 128 if w.scales.shape[-2] > 1 else 512)
    stacked = round_up(3 * rows if single else rows, 8)
    groups = max(1, narrow // w.group_size) if w.scales.shape[-2] > 1 else 1
    if not transpose and stacked * groups <= MOST_PRODUCT_ROWS:
        return Tile(
            rows=stacked,
            span=narrow,
            spans=_spans(w, narrow, TILE_WEIGHTS // columns),
            out=columns,
            scale_on="products",
        )
    span, columns = span_of(w, 1024), min(512, columns)
    return Tile(
        rows=min(256 if single else 512, round_up(rows, 8)),
        span=span,
        spans=1,
        out=columns,
        scale_on="weights",
    )


def _spans(w: Quantized, span: int, inputs: int) -> int:
    """Spans of about `inputs` inputs: whole groups, or an equal part of one."""
    n, groups = w.shape[-2], w.scales.shape[-2]
    wanted = max(1, min(inputs, round_up(n, span)) // span)
    if groups == 1 or w.group_size <= span:
        return wanted
    in_group = w.group_size // span
    if wanted >= in_group:
        return wanted // in_group * in_group
    return max(k for k in range(1, wanted + 1) if in_group % k == 0)


def vmem_bytes(tile: Tile, x_dtype: Any, w: Quantized, *, transpose: bool = False) -> int:
    """Vector memory of a step: every block twice, since the next one is on its way, and what a span is unpacked to."""
    single = jnp.dtype(x_dtype) == jnp.float32 and tile.scale_on == "weights"
    item = 4 if single else 2
    codes = tile.inputs * w.bits // 8 * tile.out
    in_tile = max(1, tile.inputs // w.group_size) if w.scales.shape[-2] > 1 else 1
    table = round_up(in_tile, 32) * tile.out  # rows of scales, padded to the tiling of the smallest numbers
    scales = (0 if w.zeros is None else 1) * table * 4 + table * 4
    wide = tile.rows * max(tile.inputs if transpose else tile.out, LANES)
    activations = tile.rows * item * (tile.out if transpose else tile.inputs)
    blocks = 2 * (codes + scales + activations + 4 * wide)
    words = codes if Stream(w.bits).period_words > 1 else 0
    scratch = 4 * wide + scales + words
    unpacked = live_weights(tile) * (4 + 4 + item) + 4 * wide
    return blocks + scratch + 2 * unpacked
