"""AWQ: inputs scaled against weights so that salient channels round finely, then clipping, both searched on a grid."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.quantized import Quantized
from effjax.arrays.row_scaled import RowScaled
from effjax.lift.calibrate import InputStats
from effjax.quantize.checks import check_group_size, check_groups
from effjax.quantize.one_by_one import one_by_one
from effjax.quantize.rtn import as_quantized
from effjax.quantize.uniform import UniformGrid, grouped
from effjax.transform import Method

_RATIOS = 20  # exponents 0, 1/20, ..., 19/20
_CLIP_GRID = 20  # clipping thresholds are multiples of 1/20 of the group's largest magnitude, above one half of it
_CLIP_STEPS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ(Method):
    """Activation-aware weight quantization (Lin et al. 2024, sections 3.2 and 4; duo scaling as in AutoAWQ).

    Every input `i` gets a factor `s_i = x_i^r / (w_i^(1-r) + 1e-4)` from its mean magnitude `x_i` and the mean `w_i` of
    its weights' magnitudes relative to their groups' largest. The exponent `r` is the one of 20 whose rounded weights
    `Q(W s) / s` have the least error on the inputs, `tr(D^T H D)` with the inputs' second moment `H`. Weights that saw
    the same input share `s`, and their errors are added. Then every group takes one of ten clipping thresholds: that of
    least error of the group's own output.

    The result is `RowScaled(Quantized)`: `effjax.quantize.fold_scales` moves the factors into the layer before.

    Attributes:
        bits: 1 to 8.
        group_size: consecutive inputs that share a scale; None is one group a column.
        symmetric: whether the grid is centred at zero; AWQ's file format has zero points.
        scale: whether to search factors. Without, the result is `Quantized`, as for a layer whose factors could not be
            folded (the output projection of grouped-query attention).
        clip: whether to search thresholds. The authors do not clip query and key projections, whose outputs are
            multiplied with each other: give `"*/[qkv]_proj/kernel"` a rule with `clip=False`. (One rule for all three:
            weights share factors only under one method.)
        duo_scaling: False leaves the weights' magnitudes out, as in the paper: `s_i = x_i^r`.
        scale_dtype: dtype of the stored scales of groups; the factors of inputs are float32.

    Example:
        >>> import effjax as ej
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (32, 8))}
        >>> method, x = AWQ(bits=4, group_size=16), jax.random.normal(jax.random.key(1), (64, 32))
        >>> stats = ej.calibrate(lambda p, x: x @ p["kernel"], params, [x], needs=method.needs)
        >>> q = ej.quantize_params(params, method, stats=stats)["kernel"]
        >>> type(q).__name__, q.array.bits, q.row_scales.shape
        ('RowScaled', 4, (32,))
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = False
    scale: bool = True
    clip: bool = True
    duo_scaling: bool = True
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if not self.scale and not self.clip:
            raise ValueError("scale=False, clip=False: without both searches this is RTN; use that")
        check_group_size(self.group_size)
        _ = self.grid

    joint = True
    sums = True

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"second_moment", "abs_mean"} if self.scale else {"second_moment"})

    @property
    def grid(self) -> UniformGrid:
        """The grid of a group, without its values."""
        return UniformGrid(bits=self.bits, symmetric=self.symmetric, scale_dtype=self.scale_dtype)

    def check(self, shape: tuple[int, ...]) -> None:
        check_groups(shape, self.group_size)

    def compress(self, w: jax.Array, *, stats: InputStats, key: Any = None) -> RowScaled | Quantized:
        return self.compress_jointly([w], stats=[stats], keys=[key])[0]

    def compress_jointly(
        self, weights: list[jax.Array], *, stats: list[InputStats], keys: list[Any]
    ) -> list[RowScaled | Quantized]:
        """One search of factors for weights `[*L, in, out]` of one `[*L, in]`; they may have other numbers of outputs.

        Raises:
            LeafError: the group size does not divide the inputs.
            CalibrationError: the statistics lack what `needs` says.
        """
        for w in weights:
            self.check(w.shape)
        if any(w.shape[:-1] != weights[0].shape[:-1] for w in weights):  # a stack beside a single matrix
            return [self.compress(w, stats=s) for w, s in zip(weights, stats, strict=True)]
        # Groups are runs of inputs of one column: side by side, the weights are one matrix.
        whole = jnp.concatenate([w.astype(jnp.float32) for w in weights], -1)
        abs_mean = stats[0].abs_mean if self.scale else jnp.zeros(whole.shape[:-1])
        factors, array = one_by_one(self._search, whole, stats[0].second_moment, abs_mean)
        results, start = [], 0
        for w in weights:
            columns = slice(start, start + w.shape[-1])
            mine = jax.tree.map(lambda field, columns=columns: field[..., columns], array).astype(w.dtype)
            results.append(RowScaled(array=mine, row_scales=1 / factors) if self.scale else mine)
            start = columns.stop
        return results

    def _search(
        self, w: Float[Array, "in out"], moment: Float[Array, "in in"], abs_mean: Float[Array, " in"]
    ) -> tuple[Float[Array, " in"], Quantized]:
        """The factors, and the scaled, clipped and rounded weights."""
        factors = self._factors(w, moment, abs_mean) if self.scale else jnp.ones(w.shape[0])
        groups = grouped(w * factors[:, None], self.group_size)
        if self.clip:
            groups = self._clipped(groups, moment / (factors[:, None] * factors))
        grid = self.grid.fit(groups)
        return factors, as_quantized(self.grid.round(groups, grid).reshape(w.shape), grid, self.grid, w.dtype)

    def _rounded(self, groups: Float[Array, "groups size out"]) -> Float[Array, "groups size out"]:
        grid = self.grid.fit(groups)
        return self.grid.values(self.grid.round(groups, grid), grid)

    def _factors(self, w: jax.Array, moment: jax.Array, abs_mean: jax.Array) -> jax.Array:
        groups = jnp.abs(grouped(w, self.group_size))
        largest = groups.max(-2, keepdims=True)
        weight_mean = (groups / jnp.where(largest > 0, largest, 1.0)).reshape(w.shape).mean(-1)

        def candidate(ratio: jax.Array) -> jax.Array:
            factors = abs_mean**ratio
            if self.duo_scaling:
                factors /= weight_mean ** (1 - ratio) + 1e-4
            factors = jnp.maximum(factors, 1e-4)
            return factors / jnp.sqrt(factors.max() * factors.min())

        def better(best: tuple[jax.Array, jax.Array], ratio: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            factors = candidate(ratio)
            groups = grouped(w * factors[:, None], self.group_size)
            error = self._rounded(groups).reshape(w.shape) / factors[:, None] - w
            loss = (error * jnp.matmul(moment, error, precision="highest")).sum()
            improved = loss < best[0]
            return (jnp.where(improved, loss, best[0]), jnp.where(improved, factors, best[1])), None

        ratios = jnp.arange(_RATIOS) / jnp.float32(_RATIOS)
        return jax.lax.scan(better, (jnp.float32(jnp.inf), jnp.ones(w.shape[0])), ratios)[0][1]

    def _clipped(self, groups: Float[Array, "groups size out"], moment: Float[Array, "in in"]) -> jax.Array:
        """Every group clipped where its own output, over the inputs of the group alone, is off least."""
        count, size, _ = groups.shape
        own = jnp.einsum("gigj->gij", moment.reshape(count, size, count, size))
        largest = jnp.abs(groups).max(-2, keepdims=True)

        def better(best: tuple[jax.Array, jax.Array], share: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            error = self._rounded(jnp.clip(groups, -largest * share, largest * share)) - groups
            loss = (error * jnp.matmul(own, error, precision="highest")).sum(-2, keepdims=True)
            improved = loss < best[0]
            return (jnp.where(improved, loss, best[0]), jnp.where(improved, share, best[1])), None

        shares = 1 - jnp.arange(_CLIP_STEPS) / jnp.float32(_CLIP_GRID)
        start = (jnp.full_like(largest, jnp.inf), jnp.ones_like(largest))
        limit = largest * jax.lax.scan(better, start, shares)[0][1]
        return jnp.clip(groups, -limit, limit)
