"""Rounds a matrix into the grid that a compressed leaf has already: same type, bits, groups, by default same scales."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.base import CompressedArray
from effjax.arrays.codebook import Codebook
from effjax.arrays.packing import pack, unpack
from effjax.arrays.permuted import Permuted
from effjax.arrays.quantized import Quantized
from effjax.arrays.row_scaled import RowScaled
from effjax.arrays.sum import Sum
from effjax.errors import LeafError
from effjax.quantize.hessian import activation_order, inverse_factor
from effjax.quantize.one_by_one import one_by_one
from effjax.quantize.rtn import RTN
from effjax.quantize.sweep import sweep

FITS = 10  # rounds of fitting tables or scales to a matrix


def regrid(
    w: Float[Array, "*L in out"],
    grid: CompressedArray,
    *,
    second_moment: Float[Array, "*L in in"] | None = None,
    refit: bool = False,
    damping: float = 0.01,
) -> CompressedArray:
    """Rounds `w` to the levels of `grid`; a weight of which the old level is as near as any keeps its code.

    Without statistics every weight goes to its nearest level. With the second moment of the inputs the rows are rounded
    one after the other, the most active first, and later rows repair the error (the sweep of GPTQ on a grid that is
    given, which leaves the rows where they are), and every output takes, of the swept codes, the nearest ones and those
    of `grid`, the ones whose output error `δᵀ H δ` is least.

    Args:
        w: what to round.
        grid: `Quantized` or `Codebook`, possibly within `RowScaled` and `Permuted`; of a `Sum` the first part is
            rounded and the others stay.
        second_moment: `E[x x^T]` of the inputs of `w`.
        refit: also tries new scales and zero points (tables, where there are no scales) for every group, and takes
            them where the squared error, weighted by the diagonal of `second_moment`, becomes smaller.
        damping: of the Hessian, see `inverse_factor`.

    Returns:
        An array of the structure, shapes and dtypes of `grid`.

    Raises:
        LeafError: an array without levels to round to.

    Example:
        >>> import effjax as ej, jax
        >>> w = jax.random.normal(jax.random.key(0), (32, 4))
        >>> q = ej.quantize.RTN(bits=4, group_size=16).quantize(w)
        >>> again = regrid(q.materialize(), q)
        >>> bool((again.codes == q.codes).all()), again.bits
        (True, 4)
    """
    if isinstance(grid, RowScaled):
        scales = grid.row_scales.astype(jnp.float32)
        inner = w / jnp.where(scales == 0, 1.0, scales)[..., None]
        if second_moment is not None:
            second_moment = second_moment * scales[..., :, None] * scales[..., None, :]
        return grid.replace(array=regrid(inner, grid.array, second_moment=second_moment, refit=refit, damping=damping))
    if isinstance(grid, Permuted):
        inner = jnp.take_along_axis(w, grid.order[..., None], axis=-2)
        if second_moment is not None:
            rows = jnp.take_along_axis(second_moment, grid.order[..., None], axis=-2)
            second_moment = jnp.take_along_axis(rows, grid.order[..., None, :], axis=-1)
        return grid.replace(array=regrid(inner, grid.array, second_moment=second_moment, refit=refit, damping=damping))
    if isinstance(grid, Sum):
        first, *others = grid.parts
        rest = sum(part.astype(jnp.float32).materialize() for part in others)
        part = regrid(w - rest, first, second_moment=second_moment, refit=refit, damping=damping)
        return grid.replace(parts=(part, *others))
    if not isinstance(grid, Quantized | Codebook):
        raise LeafError(f"{type(grid).__name__} has no levels to round to: keep the adapter, or merge with method=")

    def matrix(w: jax.Array, grid: Any, moment: jax.Array | None) -> Any:
        if refit:
            fit: Any = _refit_quantized if isinstance(grid, Quantized) else _refit_codebook
            grid = fit(w, grid, moment)
        return _rounded(w, grid, moment, damping)

    return one_by_one(matrix, w.astype(jnp.float32), grid, second_moment)


def _rounded(w: jax.Array, grid: Any, moment: jax.Array | None, damping: float) -> Any:
    """`grid` with the codes of one matrix `[in, out]`."""
    old = unpack(grid.codes, grid.bits, len(w))
    rows = _row_levels(grid, len(w))

    def round_row(row: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        level, values = rows(j)
        before, found = old[j], level(row)
        kept = jnp.abs(values(before) - row) <= jnp.abs(values(found) - row)
        code = jnp.where(kept, before, found)
        return code, values(code)

    index = jnp.arange(len(w))
    nearest = jax.lax.map(lambda both: round_row(*both)[0], (w, index))
    if moment is None:
        return grid.replace(codes=pack(nearest, grid.bits))
    order = activation_order(moment)
    factor = inverse_factor(moment, damping, order)
    swept = sweep(w[order], factor, round_row, grid_of_row=lambda j: order[jnp.minimum(j, len(w) - 1)]).codes
    swept = swept[jnp.argsort(order)]

    def loss(codes: jax.Array) -> jax.Array:
        delta = grid.replace(codes=pack(codes, grid.bits)).astype(jnp.float32).materialize() - w
        return jnp.sum(delta * jnp.matmul(moment, delta, precision="highest"), axis=0)

    best, least = old, loss(old)
    for codes in (nearest, swept):
        found = loss(codes)
        best, least = jnp.where(found < least, codes, best), jnp.minimum(found, least)
    return grid.replace(codes=pack(best, grid.bits))


def _row_levels(grid: Any, n: int) -> Any:
    """For row `j`: a function from values to codes of the nearest levels, and one from codes to values."""
    if isinstance(grid, Quantized):
        groups, top = grid.scales.shape[-2], 2**grid.bits - 1
        scales = grid.scales.astype(jnp.float32)
        zeros = jnp.broadcast_to(grid.zero_points(), scales.shape)

        def uniform(j: jax.Array) -> Any:
            scale, zero = scales[j // (n // groups)], zeros[j // (n // groups)]
            divisor = jnp.where(scale == 0, 1.0, scale)
            return (
                lambda row: jnp.clip(jnp.round(row / divisor + zero), 0, top).astype(jnp.uint8),
                lambda codes: scale * (codes.astype(jnp.float32) - zero),
            )

        return uniform
    out = grid.codes.shape[-1]
    in_groups, out_groups, _ = grid.tables.shape
    tables = jnp.repeat(grid.tables.astype(jnp.float32), out // out_groups, axis=1)
    scales = grid.float_scales()

    def table(j: jax.Array) -> Any:
        levels = tables[j // (n // in_groups)]
        if scales is not None:
            levels = levels * scales[j // (n // scales.shape[-2])][:, None]
        return (
            lambda row: jnp.argmin(jnp.abs(levels - row[:, None]), axis=-1).astype(jnp.uint8),
            lambda codes: jnp.take_along_axis(levels, codes.astype(jnp.int32)[:, None], axis=-1)[:, 0],
        )

    return table


def _group_error(w: jax.Array, grid: Any, groups: int, moment: jax.Array | None) -> jax.Array:
    """Squared error of every group of rows at the nearest levels, weighted by the inputs: `[groups, out]`."""
    new = _rounded(w, grid, None, 0.0).astype(jnp.float32).materialize()
    return jnp.sum((_row_weights(w, moment) * jnp.square(new - w)).reshape(groups, -1, w.shape[-1]), axis=1)


def _row_weights(w: jax.Array, moment: jax.Array | None) -> jax.Array:
    """What an error of each input counts, `[in, 1]`."""
    return (jnp.ones(len(w)) if moment is None else jnp.diagonal(moment))[:, None]


def _ratio(top: jax.Array, bottom: jax.Array, otherwise: jax.Array) -> jax.Array:
    return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1.0), otherwise)


def _refit_quantized(w: jax.Array, grid: Quantized, moment: jax.Array | None) -> Quantized:
    """New scales and zero points, by clipping of least squared error, for the groups that gain by them."""
    groups = grid.scales.shape[-2]
    method = RTN(
        bits=grid.bits,
        group_size=len(w) // groups,
        symmetric=grid.zeros is None,
        clip="mse",
        scale_dtype=grid.scales.dtype.name,
    )
    fitted = method.quantize(w).astype(grid.dtype)
    zeros = None
    if grid.zeros is not None and jnp.issubdtype(grid.zeros.dtype, jnp.floating):
        zeros = jnp.asarray(fitted.zero_points()).astype(grid.zeros.dtype)
        fitted = fitted.replace(zeros=zeros)
    better = _group_error(w, fitted, groups, moment) < _group_error(w, grid, groups, moment)
    scales = jnp.where(better, fitted.scales, grid.scales)
    if grid.zeros is None:
        return grid.replace(scales=scales)
    if zeros is not None:
        return grid.replace(scales=scales, zeros=jnp.where(better, zeros, grid.zeros))
    points = jnp.where(better, fitted.zero_points(), grid.zero_points())
    return grid.replace(scales=scales, zeros=pack(points.astype(jnp.uint8), grid.bits))


def _refit_codebook(w: jax.Array, grid: Codebook, moment: jax.Array | None) -> Codebook:
    """Scales (or tables, where there are no scales) of least squared error for the codes, and codes again, in turns."""
    fit = _fit_tables if grid.scales is None else _fit_scales
    return jax.lax.fori_loop(0, FITS, lambda _, grid: fit(w, _rounded(w, grid, None, 0.0), moment), grid)


def _fit_scales(w: jax.Array, grid: Codebook, moment: jax.Array | None) -> Codebook:
    """The tables are those of a format or shared by all groups, so only scales move, where their group gains."""
    old, scales = grid.float_scales(), grid.scales
    assert old is not None and scales is not None
    groups, out = scales.shape
    weight = _row_weights(w, moment)
    plain = grid.replace(scales=None, global_scale=None).astype(jnp.float32).materialize()
    top = jnp.sum((weight * w * plain).reshape(groups, -1, out), axis=1)
    bottom = jnp.sum((weight * plain * plain).reshape(groups, -1, out), axis=1)
    top_scale = 1.0 if grid.global_scale is None else grid.global_scale
    found = (_ratio(top, bottom, old) * top_scale).astype(scales.dtype)
    better = _group_error(w, grid.replace(scales=found), groups, moment) < _group_error(w, grid, groups, moment)
    return grid.replace(scales=jnp.where(better, found, scales))


def _fit_tables(w: jax.Array, grid: Codebook, moment: jax.Array | None) -> Codebook:
    """A level is the weighted mean of the weights that have its code (Lloyd), where its table gains."""
    in_groups, out_groups, entries = grid.tables.shape
    n, out = w.shape
    codes = unpack(grid.codes, grid.bits, n).astype(jnp.int32)
    table = (jnp.arange(n) // (n // in_groups))[:, None] * out_groups + jnp.arange(out) // (out // out_groups)
    place, size = (table * entries + codes).ravel(), in_groups * out_groups * entries
    weight = jnp.broadcast_to(_row_weights(w, moment), w.shape)
    total = jnp.zeros(size).at[place].add((weight * w).ravel())
    count = jnp.zeros(size).at[place].add(weight.ravel())
    means = _ratio(total, count, grid.tables.astype(jnp.float32).ravel())
    fitted = grid.replace(tables=means.reshape(grid.tables.shape).astype(grid.tables.dtype))

    def error(grid: Codebook) -> jax.Array:
        of_columns = _group_error(w, grid, in_groups, moment)
        return of_columns.reshape(in_groups, out_groups, -1).sum(-1)[..., None]

    return grid.replace(tables=jnp.where(error(fitted) < error(grid), fitted.tables, grid.tables))
