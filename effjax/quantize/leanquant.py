"""LeanQuant: grids whose points lie where rounding would hurt most, used in the sweep of GPTQ."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.base import CompressedArray
from effjax.arrays.codebook import Codebook
from effjax.lift.calibrate import InputStats
from effjax.quantize.affine_search import search_affine
from effjax.quantize.checks import check_bits, check_choice, check_floating, check_group_size, check_groups
from effjax.quantize.gptq import SecondOrder, SweepFactor
from effjax.quantize.group_scales import fit_scales, refit_scales, signed_peak
from effjax.quantize.kmeans import nearest, weighted_kmeans
from effjax.quantize.one_by_one import one_by_one
from effjax.quantize.rtn import as_quantized
from effjax.quantize.split import split_start
from effjax.quantize.sweep import sweep
from effjax.quantize.uniform import Grid, UniformGrid, grouped


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeanQuant(SecondOrder):
    """Loss-error-aware grids (Zhang and Shrivastava, LeanQuant, ICLR 2025) inside the GPTQ sweep.

    What rounding weight `i` costs after the best repair is `(w - q)**2 / [H^-1]_ii`. The grid of a column is learned
    with the weights `s_j = U[j, j]**-p` of its inputs, before the sweep and from the weights as they are. `U[j, j]**2`
    is the diagonal of the inverse Hessian of the inputs not yet swept, so `p = 2` weighs each error by its loss; the
    paper's `p = 4` leans further towards the precious inputs, and lost a little more wherever it was measured here.

    In groups, which the paper does not have, a column keeps one table of free points, learned from weights divided by
    the signed largest of their group: each group's largest is 1, and the table may reach further on one side. The scale
    of a group is fitted to the values that its weights have when the sweep reaches it, as GPTQ's is (with `act_order`,
    before the sweep), and may be negative. After the sweep all scales move to where they lose least with the codes that
    it chose (the codebook update of GPTVQ, van Baalen et al. 2024, for scales instead of codebooks).

    Attributes:
        bits: 1 to 8.
        group_size: inputs that share a scale; None is one grid a column, as in the paper.
        grid: "non_uniform" learns free points by weighted k-means, one table a column, and the leaf is a `Codebook`
            (in groups, with scales: see above); "affine" searches a scale and an integer zero point a group, and the
            leaf is a `Quantized` that any kernel for integers runs.
        p: see above.
        start: of the k-means. "even" is the paper's, from even distances; from there Lloyd's algorithm leaves points
            where hardly anything weighs. "split" cuts the column in two where that helps most, again and again.
        iterations, tolerance: of the k-means.
        candidates: T of the paper: the ends of an affine grid are moved inwards in steps of `range / T`.
        table_dtype: dtype the points or scales are stored in; weights are rounded to the stored ones.
        damping, act_order: see `SecondOrder`. The paper recommends 0.1 for the damping.

    Example:
        >>> import effjax as ej
        >>> x = jax.random.normal(jax.random.key(0), (256, 64)) @ jax.random.normal(jax.random.key(1), (64, 64))
        >>> params = {"kernel": jax.random.normal(jax.random.key(2), (64, 32))}
        >>> stats = ej.calibrate(lambda p, x: x @ p["kernel"], params, [x])
        >>> def error(method):
        ...     q = ej.quantize_params(params, method, stats=stats)
        ...     return float(jnp.linalg.norm(x @ (q["kernel"].materialize() - params["kernel"])))
        >>> error(LeanQuant(bits=2)) < 0.8 * error(ej.quantize.GPTQ(bits=2, group_size=None))
        True
    """

    bits: int = 4
    group_size: int | None = None
    grid: Literal["non_uniform", "affine"] = "non_uniform"
    p: float = 2.0
    damping: float = 0.1
    act_order: bool = False
    start: Literal["split", "even"] = "split"
    iterations: int = 100
    tolerance: float = 1e-6
    candidates: int = 2048
    table_dtype: str = "float16"

    def __post_init__(self) -> None:
        self.check_damping()
        check_group_size(self.group_size)
        check_bits(self.bits)
        check_choice(("non_uniform", "affine"), grid=self.grid)
        check_choice(("split", "even"), start=self.start)
        if self.iterations < 1 or self.candidates < 2 or not self.p >= 0:
            raise ValueError(
                f"iterations={self.iterations}, candidates={self.candidates}, p={self.p}: at least one iteration, two "
                "candidates and an exponent of 0"
            )
        check_floating(table_dtype=self.table_dtype)

    def check(self, shape: tuple[int, ...]) -> None:
        check_groups(shape, self.group_size)

    def compress(self, w: jax.Array, *, stats: InputStats, key: Any = None) -> CompressedArray:
        """Quantizes `w [*L, in, out]`; the result is a `Codebook`, or a `Quantized` for the affine grid."""
        return one_by_one(self._compress, w, self.factor_of(stats), stats.second_moment)

    def _compress(self, w: jax.Array, factor: SweepFactor, moment: jax.Array) -> CompressedArray:
        rows, size = factor.in_order(w), len(w) if self.group_size is None else self.group_size
        shares = jnp.where(factor.dead, 0, factor.back(importance(factor.upper, self.p))).reshape(-1, size)
        if self.grid == "affine":
            return self._affine(rows, factor, shares, w.dtype)
        if self.group_size is None:
            table = self._table(factor.back(rows)[None], shares, jnp.ones((1, 1, w.shape[-1])))
            swept = sweep(rows, factor.upper, lambda row, _: nearest(row, table))
            return self._leaf(factor.back(swept.codes), table, None, w.dtype)
        return self._scaled(rows, factor, shares, moment, w.dtype)

    def _affine(self, rows: jax.Array, factor: SweepFactor, shares: jax.Array, dtype: Any) -> CompressedArray:
        size = shares.shape[-1]
        kind = UniformGrid(bits=self.bits, scale_dtype=self.table_dtype)
        found = search_affine(grouped(factor.back(rows), size), shares, kind, candidates=self.candidates)
        group = group_of_row(factor, len(rows), size)

        def round_row(row: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
            codes = kind.round(row[None], grid)
            return codes[0], kind.values(codes, grid)[0]

        def grid_of_row(j: jax.Array) -> Grid:
            return jax.tree.map(lambda x: x[group[j]], found)

        swept = sweep(rows, factor.upper, round_row, grid_of_row=grid_of_row)
        return as_quantized(factor.back(swept.codes), found, kind, dtype)

    def _scaled(
        self, rows: jax.Array, factor: SweepFactor, shares: jax.Array, moment: jax.Array, dtype: Any
    ) -> CompressedArray:
        """A table a column and a scale a group: scales are fitted before rounding, and once more to all the codes."""
        n, size = len(rows), shares.shape[-1]
        groups = grouped(factor.back(rows), size)
        table = self._table(groups, shares, signed_peak(groups, self.table_dtype))

        def round_row(row: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
            codes, values = nearest(row / scale, table)
            return codes, values * scale

        def fitted(groups: jax.Array) -> jax.Array:
            return fit_scales(groups, table, self.table_dtype)[..., 0, :]

        if factor.order is None and size < n:  # a group is a run of the sweep: fitted to what it has become by then
            swept = sweep(rows, factor.upper, round_row, grid_of_block=fitted, block=size)
            scales = swept.grids
        else:
            scales, group = fitted(groups), group_of_row(factor, n, size)
            swept = sweep(rows, factor.upper, round_row, grid_of_row=lambda j: scales[group[j]])
        codes = factor.back(swept.codes)
        values = jnp.take_along_axis(table, codes.astype(jnp.int32), axis=0)
        damped = moment + self.damping * jnp.diagonal(moment).mean() * jnp.eye(n)
        scales = refit_scales(scales, values, factor.back(rows), damped, self.table_dtype)
        return self._leaf(codes, table, scales, dtype)

    def _table(self, groups: jax.Array, shares: jax.Array, scales: jax.Array) -> Float[Array, "entries out"]:
        """One table for every output, of the weights divided by the scale of their group, as it is stored."""
        count, size, out = groups.shape
        points = (groups / scales).reshape(count * size, out)
        weights = (shares[..., None] * jnp.square(scales)).reshape(count * size, out)
        return learned_tables(self, points, weights)

    def _leaf(self, codes: jax.Array, table: jax.Array, scales: jax.Array | None, dtype: Any) -> Codebook:
        kept = None if scales is None else scales.astype(self.table_dtype)
        return Codebook.from_codes(codes, table.T[None].astype(self.table_dtype), kept, dtype=dtype)


def learned_tables(
    method: Any, points: Float[Array, "n columns"], weights: Float[Array, "n columns"]
) -> Float[Array, "entries columns"]:
    """A sorted table a column by weighted k-means, as `method` says (`LeanQuant`'s fields), rounded as it is stored."""
    entries = 2**method.bits
    start = split_start(points, weights, entries) if method.start == "split" else None
    limits = {"iterations": method.iterations, "tolerance": method.tolerance}
    table = weighted_kmeans(points, weights, entries, start=start, **limits)
    return table.astype(method.table_dtype).astype(jnp.float32)


def importance(upper: Float[Array, "n n"], p: float) -> Float[Array, " n"]:
    """`U[j, j]**-p`, divided by the largest: in logarithms, since it spans many orders of magnitude."""
    logs = -p * jnp.log(jnp.diagonal(upper))
    return jnp.exp(logs - logs.max())


def group_of_row(factor: SweepFactor, n: int, size: int) -> jax.Array:
    """The group, in the order of the matrix, of every row of the sweep."""
    return (jnp.arange(n) if factor.order is None else factor.order) // size
