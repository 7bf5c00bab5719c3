"""GPTQ: rounding input by input, the error of each repaired by the weights of the inputs behind it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.arrays.base import CompressedArray
from effjax.arrays.permuted import Permuted
from effjax.lift.calibrate import InputStats
from effjax.quantize.checks import check_group_size, check_groups
from effjax.quantize.hessian import activation_order, dead_inputs, inverse_factor
from effjax.quantize.one_by_one import one_by_one
from effjax.quantize.rtn import as_quantized
from effjax.quantize.sweep import sweep
from effjax.quantize.uniform import Clip, Grid, UniformGrid, grouped
from effjax.transform import Method


class SweepFactor(NamedTuple):
    """What a sweep needs to know of the inputs of a weight; arrays lead with the weight's stacked axes.

    Attributes:
        upper: `U` of `effjax.quantize.hessian.inverse_factor`, in sweep order.
        order: the input at each step of the sweep, or None for the order of the matrix.
        dead: inputs (in the order of the matrix) that were always zero.
    """

    upper: Float[Array, "*L in in"]
    order: Int[Array, "*L in"] | None
    dead: Bool[Array, "*L in"]

    def in_order(self, w: jax.Array) -> jax.Array:
        """Rows of one matrix in sweep order, those of dead inputs zero."""
        w = jnp.where(self.dead[:, None], 0, w.astype(jnp.float32))
        return w if self.order is None else w[self.order]

    def back(self, rows: jax.Array) -> jax.Array:
        """Rows of one matrix from sweep order to that of the matrix."""
        return rows if self.order is None else rows[jnp.argsort(self.order)]


class SecondOrder(Method):
    """What methods that sweep with the inverse Hessian share; they declare its attributes as fields.

    Attributes:
        damping: fraction of the mean of the Hessian's diagonal that is added to it.
        act_order: sweep the most active inputs first.
    """

    damping: float
    act_order: bool
    needs = frozenset({"second_moment"})
    sums = True

    def check_damping(self) -> None:
        """Raises ValueError for a damping that no matrix could have."""
        if not self.damping >= 0:
            raise ValueError(f"damping={self.damping}: a fraction of the Hessian's mean diagonal, 0 or more")

    def prepare(self, stats: InputStats) -> InputStats:
        moment = stats.second_moment
        return dataclasses.replace(stats, factor=one_by_one(self._factor, moment))

    def _factor(self, moment: jax.Array) -> SweepFactor:
        order = activation_order(moment) if self.act_order else None
        return SweepFactor(inverse_factor(moment, self.damping, order), order, dead_inputs(moment))

    def factor_of(self, stats: InputStats) -> SweepFactor:
        """The factor in `stats`, made here where nobody has."""
        return (stats if stats.factor is not None else self.prepare(stats)).factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ(SecondOrder):
    """Second-order rounding to a uniform grid (Frantar et al., ICLR 2023, algorithm 1).

    The grid of a group of inputs is found from the values its weights have when the sweep reaches it. With `act_order`
    groups are either runs of the sweep, any inputs of the matrix, and the leaf is `Permuted`; or, with `static_groups`,
    runs of the matrix whose grids are found before the sweep, and the leaf is plain.

    Attributes:
        bits: 1 to 8.
        group_size: inputs that share a scale; None is one group a column (per channel).
        symmetric, clip, steps, smallest, scale_dtype: the grid, as in `UniformGrid`.
        static_groups: find all grids before the sweep.
        damping, act_order: see `SecondOrder`.

    Example:
        >>> import effjax as ej
        >>> x = jax.random.normal(jax.random.key(0), (256, 64)) @ jax.random.normal(jax.random.key(1), (64, 64))
        >>> params = {"kernel": jax.random.normal(jax.random.key(2), (64, 32))}
        >>> stats = ej.calibrate(lambda p, x: x @ p["kernel"], params, [x])
        >>> def error(method):
        ...     q = ej.quantize_params(params, method, stats=stats)
        ...     return float(jnp.linalg.norm(x @ (q["kernel"].materialize() - params["kernel"])))
        >>> error(GPTQ(bits=3, group_size=32)) < 0.7 * error(ej.quantize.RTN(bits=3, group_size=32))
        True
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    act_order: bool = False
    static_groups: bool = False
    damping: float = 0.01
    clip: Clip = "absmax"
    steps: int = 40
    smallest: float = 0.4
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        self.check_damping()
        check_group_size(self.group_size)
        _ = self.grid

    @property
    def grid(self) -> UniformGrid:
        """The grid of a group, without its values."""
        return UniformGrid(**{f.name: getattr(self, f.name) for f in dataclasses.fields(UniformGrid)})

    def check(self, shape: tuple[int, ...]) -> None:
        check_groups(shape, self.group_size)

    def compress(self, w: jax.Array, *, stats: InputStats, key: Any = None) -> CompressedArray:
        """Quantizes `w [*L, in, out]`; the result is a `Quantized`, or a `Permuted` one."""
        return one_by_one(self._compress, w, self.factor_of(stats))

    def _compress(self, w: jax.Array, factor: SweepFactor) -> CompressedArray:
        kind, n = self.grid, w.shape[0]
        rows = factor.in_order(w)
        size = n if self.group_size is None else self.group_size
        if size == n or self.static_groups:
            # Scales of the weights as they are: for a whole column the sweep has nothing to tell them.
            grids = kind.fit(grouped(factor.back(rows), size))
            group = jnp.arange(n) // size if factor.order is None else factor.order // size

            def grid_of_row(j: jax.Array) -> Grid:
                return jax.tree.map(lambda x: x[group[j]], grids)

            swept = sweep(rows, factor.upper, self._round_row, grid_of_row=grid_of_row)
            return as_quantized(factor.back(swept.codes), grids, kind, w.dtype)

        def grid_of_block(block: jax.Array) -> Grid:
            return kind.fit(block)

        swept = sweep(rows, factor.upper, self._round_row, grid_of_block=grid_of_block, block=size)
        stored = as_quantized(swept.codes, swept.grids, kind, w.dtype)
        return stored if factor.order is None else Permuted(array=stored, order=factor.order.astype(jnp.int32))

    def _round_row(self, row: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
        codes = self.grid.round(row[None], grid)
        return codes[0], self.grid.values(codes, grid)[0]
