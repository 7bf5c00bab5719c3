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
from effjax.quantize.gptq import SecondOrder, SweepFactor
from effjax.quantize.kmeans import nearest, weighted_kmeans
from effjax.quantize.one_by_one import one_by_one
from effjax.quantize.rtn import as_quantized
from effjax.quantize.sweep import sweep
from effjax.quantize.uniform import Grid, UniformGrid, check_group_size, check_groups, grouped


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeanQuant(SecondOrder):
    """Loss-error-aware grids (Zhang and Shrivastava, LeanQuant, ICLR 2025) inside the GPTQ sweep.

    What rounding weight `i` costs after the best repair is `(w - q)**2 / [H^-1]_ii`. The grid of a column is learned
    with the weights `s_j = U[j, j]**-p` of its inputs, before the sweep and from the weights as they are. `U[j, j]**2`
    is the diagonal of the inverse Hessian of the inputs not yet swept, so `p = 2` weighs each error by its loss; the
    paper's `p = 4` leans further towards the precious inputs.

    Attributes:
        bits: 1 to 8.
        group_size: inputs that share a grid; None is one grid a column, as in the paper.
        grid: "non_uniform" learns free points by weighted k-means, and the leaf is a `Codebook`; "affine" searches a
            scale and an integer zero point, and the leaf is a `Quantized` that any kernel for integers runs.
        p: see above.
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
    p: float = 4.0
    damping: float = 0.1
    act_order: bool = False
    iterations: int = 100
    tolerance: float = 1e-6
    candidates: int = 2048
    table_dtype: str = "float16"

    def __post_init__(self) -> None:
        self.check_damping()
        check_group_size(self.group_size)
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits}: choose 1 to 8")
        if self.grid not in ("non_uniform", "affine"):
            raise ValueError(f"grid={self.grid!r}: choose 'non_uniform' or 'affine'")
        if self.iterations < 1 or self.candidates < 2 or not self.p >= 0:
            raise ValueError(
                f"iterations={self.iterations}, candidates={self.candidates}, p={self.p}: at least one iteration, two "
                "candidates and an exponent of 0"
            )
        if not jnp.issubdtype(jnp.dtype(self.table_dtype), jnp.floating):
            raise ValueError(f"table_dtype={self.table_dtype!r} is no floating dtype")

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
        if self.grid == "affine":
            kind = UniformGrid(bits=self.bits, scale_dtype=self.table_dtype)
            grids = search_affine(groups, shares, kind, candidates=self.candidates)

            def round_uniform(row: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
                codes = kind.round(row[None], grid)
                return codes[0], kind.values(codes, grid)[0]

            swept = sweep(
                rows, factor.upper, round_uniform, grid_of_row=lambda j: jax.tree.map(lambda x: x[group[j]], grids)
            )
            return as_quantized(factor.back(swept.codes), grids, kind, w.dtype)
        tables = self._tables(groups, shares)
        by_entry = tables.astype(jnp.float32).mT
        swept = sweep(rows, factor.upper, nearest, grid_of_row=lambda j: by_entry[group[j]])
        return Codebook.from_codes(factor.back(swept.codes), tables, dtype=w.dtype)

    def _tables(self, groups: jax.Array, shares: jax.Array) -> Float[Array, "groups out entries"]:
        """The points of every group and output, sorted, as they are stored."""
        count, size, out = groups.shape
        points = jnp.swapaxes(groups, 0, 1).reshape(size, count * out)
        weights = jnp.broadcast_to(shares.T[:, :, None], (size, count, out)).reshape(size, count * out)
        tables = weighted_kmeans(points, weights, 2**self.bits, iterations=self.iterations, tolerance=self.tolerance)
        return tables.T.reshape(count, out, -1).astype(self.table_dtype)


def importance(upper: Float[Array, "n n"], p: float) -> Float[Array, " n"]:
    """`U[j, j]**-p`, divided by the largest: in logarithms, since it spans many orders of magnitude."""
    logs = -p * jnp.log(jnp.diagonal(upper))
    return jnp.exp(logs - logs.max())
