"""SparseGPT: the mask is chosen where a loss is least after the best repair, and the repair itself for any mask."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from effjax.arrays.base import PyTree
from effjax.arrays.view import fold
from effjax.paths import map_with_paths
from effjax.prune.api import masks_by_path, unfold_mask
from effjax.prune.pattern import Pattern
from effjax.prune.score import check_sparsity, kept_of
from effjax.quantize.gptq import SecondOrder, SweepFactor
from effjax.quantize.one_by_one import one_by_one
from effjax.quantize.sweep import BLOCK, sweep
from effjax.transform import How, select


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPT(SecondOrder):
    """Adaptive mask selection in the sweep of optimal brain surgeon (Frantar and Alistarh, ICML 2023, section 3.3).

    When the sweep reaches a block of inputs, the weights of least `w**2 / [H^-1]_jj` go, by their values of that
    moment; those behind repair what is lost. `prune_mask` gives the mask; `repair` gives the repaired weights, for this
    mask the very ones that the sweep chose it by.

    Attributes:
        sparsity: share of weights that become zero, exact in every block of inputs over all outputs together; for an
            n:m pattern it is `1 - n/m` and may be left out.
        pattern: None for single weights, or "n:m", chosen output by output.
        block: inputs that are chosen together without a pattern (the paper's `B_s`).
        damping: see `SecondOrder`.

    Example:
        >>> import effjax as ej
        >>> x = jax.random.normal(jax.random.key(0), (256, 64)) @ jax.random.normal(jax.random.key(1), (64, 64))
        >>> params = {"kernel": jax.random.normal(jax.random.key(2), (64, 32))}
        >>> stats = ej.calibrate(lambda p, x: x @ p["kernel"], params, [x])
        >>> def error(pruned):
        ...     return float(jnp.linalg.norm(x @ (pruned["kernel"] - params["kernel"])))
        >>> mask = ej.prune_mask(params, SparseGPT(sparsity=0.5), stats=stats)
        >>> error(ej.prune.repair(params, mask, stats=stats)) < 0.9 * error(ej.apply_mask(params, mask))
        True
    """

    scope = "leaf"
    act_order = False  # patterns are of neighbouring inputs

    sparsity: float | None = None
    pattern: str | None = None
    block: int = BLOCK
    damping: float = 0.01

    def __post_init__(self) -> None:
        self.check_damping()
        check_sparsity(self.sparsity, self.pattern)
        if Pattern.parse(self.pattern).block is not None:
            raise ValueError(f"pattern={self.pattern!r}: SparseGPT chooses single weights or n:m; write None or 'n:m'")
        if self.block < 1:
            raise ValueError(f"block={self.block}: at least 1 input")

    def check(self, shape: tuple[int, ...]) -> None:
        Pattern.parse(self.pattern).check(shape)

    def mask(self, w: jax.Array, *, stats: Any, key: Any = None) -> Bool[Array, "*L in out"]:
        """True where a weight `[*L, in, out]` is kept."""
        return one_by_one(self._mask, w, self.factor_of(stats))

    def _mask(self, w: Float[Array, "in out"], factor: SweepFactor) -> Bool[Array, "in out"]:
        pattern, (n, out) = Pattern.parse(self.pattern), w.shape
        run = pattern.m or min(self.block, n)
        inverse = jnp.pad(jnp.diagonal(factor.upper), (0, -n % run), constant_values=1.0)
        ends = np.minimum(np.arange(0, n + run, run), n) * out
        kept = jnp.asarray(np.diff([kept_of(int(end), self.sparsity) for end in ends]))

        def choose(rows: jax.Array, first: jax.Array) -> jax.Array:
            scores = jnp.square(rows / jax.lax.dynamic_slice_in_dim(inverse, first, run)[:, None])
            if pattern.m is not None:
                return pattern.keep_n_of_m(scores)
            there = first + jnp.arange(run) < n  # the rows that fill the last block
            flat = jnp.where(there[:, None], scores, -1.0).ravel()
            order = jnp.argsort(-flat, stable=True)
            return (
                jnp.zeros(flat.shape, bool)
                .at[order]
                .set(jnp.arange(flat.size) < kept[first // run])
                .reshape(rows.shape)
            )

        swept = sweep(
            factor.in_order(w), factor.upper, _keep_or_zero, grid_of_run=choose, run=run, block=max(run, BLOCK)
        )
        return swept.codes.astype(bool)

    def repaired(self, w: jax.Array, mask: Bool[Array, "*L in out"], *, stats: Any) -> jax.Array:
        """`w [*L, in, out]` with zeros outside of the mask and all else moved to make up for them."""
        return one_by_one(_repaired, w, mask, self.factor_of(stats)).astype(w.dtype)


def repair(params: PyTree, mask: PyTree, *, stats: PyTree, damping: float = 0.01) -> PyTree:
    """Zeroes the weights where the mask is False, and moves the others so that the outputs change least.

    The update of optimal brain surgeon, input by input, for any mask of single weights: `SparseGPT`'s, `Wanda`'s, or a
    drawn one. Where an input was always zero in the calibration data, its weights become zero.

    Args:
        params: dense weights.
        mask: as `effjax.prune_mask` gives it.
        stats: `calibrate(..., needs={"second_moment"})` of the dense weights.
        damping: share of the mean of the Hessian's diagonal that is added to it.

    Raises:
        LeafError: a mask of another shape than its weight, or on a compressed leaf.
        CalibrationError: statistics of a masked weight are missing.
    """
    masks = masks_by_path(params, mask)
    method = SparseGPT(sparsity=0.0, damping=damping)
    leaves = select(params, [(lambda path, _: path in masks, method)], where=None, stats=stats, key=None)
    done = {path: _compiled_repair(leaf.how, leaf.value, masks[path], leaf.stats) for path, leaf in leaves.items()}
    return map_with_paths(lambda path, w: done.get(path, w), params)


@partial(jax.jit, static_argnums=0)
def _compiled_repair(how: How, w: jax.Array, mask: jax.Array, stats: Any) -> jax.Array:
    method, *axes = how
    return unfold_mask(method.repaired(fold(w, *axes), fold(mask, *axes), stats=stats), w.shape, *axes)


def _repaired(w: Float[Array, "in out"], mask: Bool[Array, "in out"], factor: SweepFactor) -> Float[Array, "in out"]:
    rows = factor.in_order(w)
    swept = sweep(rows, factor.upper, _keep_or_zero, grid_of_row=lambda j: mask[j])
    return jnp.where(mask, rows - jnp.matmul(factor.upper.T, swept.errors, precision="highest"), 0)


def _keep_or_zero(row: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    return keep.astype(jnp.uint8), jnp.where(keep, row, 0)
