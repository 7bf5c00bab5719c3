"""LeanQuant: grids whose points lie where rounding would hurt most, used in the sweep of GPTQ."""

import dataclasses
from collections.abc import Callable
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
from effjax.quantize.kmeans import nearest, weighted_kmeans
from effjax.quantize.one_by_one import one_by_one
from effjax.quantize.rtn import as_quantized
from effjax.quantize.split import split_start
from effjax.quantize.sweep import Rounder, sweep
from effjax.quantize.uniform import Grid, UniformGrid, grouped

# The grid of a group by its number, how a row is rounded on it, and the leaf of codes and dtype.
_Learned = tuple[Callable[[jax.Array], Any], Rounder, Callable[[jax.Array, Any], CompressedArray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeanQuant(SecondOrder):
    """Loss-error-aware grids (Zhang and Shrivastava, LeanQuant, ICLR 2025) inside the GPTQ sweep.

    What rounding weight `i` costs after the best repair is `(w - q)**2 / [H^-1]_ii`. The grid of a column is learned
    with the weights `s_j = U[j, j]**-p` of its inputs, before the sweep and from the weights as they are. `U[j, j]**2`
    is the diagonal of the inverse Hessian of the inputs not yet swept, so `p = 2` weighs each error by its loss; the
    paper's `p = 4` leans further towards the precious inputs, and lost a little more wherever it was measured here.

    Attributes:
        bits: 1 to 8.
        group_size: inputs that share a scale; None is one grid a column, as in the paper.
        grid: "non_uniform" learns free points by weighted k-means, one table a column, and the leaf is a `Codebook`
            (in groups, the table is of weights divided by their group's largest); "affine" searches a scale and an
            integer zero point a group, and the leaf is a `Quantized` that any kernel for integers runs.
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
        return one_by_one(self._compress, w, self.factor_of(stats))

    def _compress(self, w: jax.Array, factor: SweepFactor) -> CompressedArray:
        n = len(w)
        rows = factor.in_order(w)
        size = n if self.group_size is None else self.group_size
        weights = jnp.where(factor.dead, 0, factor.back(importance(factor.upper, self.p)))
        groups, shares = grouped(factor.back(rows), size), weights.reshape(-1, size)
        group = (jnp.arange(n) if factor.order is None else factor.order) // size
        learn = self._affine if self.grid == "affine" else self._free
        grids, round_row, leaf = learn(groups, shares)
        swept = sweep(rows, factor.upper, round_row, grid_of_row=lambda j: grids(group[j]))
        return leaf(factor.back(swept.codes), w.dtype)

    def _affine(self, groups: jax.Array, shares: jax.Array) -> _Learned:
        kind = UniformGrid(bits=self.bits, scale_dtype=self.table_dtype)
        found = search_affine(groups, shares, kind, candidates=self.candidates)

        def round_row(row: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
            codes = kind.round(row[None], grid)
            return codes[0], kind.values(codes, grid)[0]

        return lambda g: jax.tree.map(lambda x: x[g], found), round_row, lambda c, d: as_quantized(c, found, kind, d)

    def _free(self, groups: jax.Array, shares: jax.Array) -> _Learned:
        """One table for every output, over weights divided by the scale of their group where there are groups."""
        count, size, out = groups.shape
        scales = jnp.ones((count, 1, out))
        if self.group_size is not None:
            scales = jnp.abs(groups).max(-2, keepdims=True).astype(self.table_dtype).astype(jnp.float32)
            scales = jnp.where(scales > 0, scales, 1.0)
        points = (groups / scales).reshape(count * size, out)
        weights = (shares[..., None] * jnp.square(scales)).reshape(count * size, out)
        entries = 2**self.bits
        start = split_start(points, weights, entries) if self.start == "split" else None
        limits = {"iterations": self.iterations, "tolerance": self.tolerance}
        table = weighted_kmeans(points, weights, entries, start=start, **limits)
        table = table.astype(self.table_dtype)
        stored = table.astype(jnp.float32)

        def round_row(row: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
            codes, values = nearest(row / scale, stored)
            return codes, values * scale

        def leaf(codes: jax.Array, dtype: Any) -> Codebook:
            kept = None if self.group_size is None else scales[:, 0].astype(self.table_dtype)
            return Codebook.from_codes(codes, table.T[None], kept, dtype=dtype)

        return lambda g: scales[g, 0], round_row, leaf


def importance(upper: Float[Array, "n n"], p: float) -> Float[Array, " n"]:
    """`U[j, j]**-p`, divided by the largest: in logarithms, since it spans many orders of magnitude."""
    logs = -p * jnp.log(jnp.diagonal(upper))
    return jnp.exp(logs - logs.max())
