"""Merges adapters back into the grid of the compressed leaf they were trained on, and says what that loses."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from effjax.adapters import has_adapter, map_matrix, split_adapter
from effjax.arrays.base import PyTree
from effjax.arrays.sum import Sum
from effjax.arrays.view import View
from effjax.errors import CalibrationError, LeafError
from effjax.lift.calibrate import InputStats
from effjax.paths import leaves_with_paths, map_with_paths, path_str
from effjax.quantize.api import quantize_params
from effjax.quantize.regrid import regrid
from effjax.transform import all_finite

ROUNDING = 1e-6  # relative differences below this are those of float32 arithmetic, not of codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafMerge:
    """What merging did to one leaf. `W` is the adapted weight, base plus adapter; norms are Frobenius norms.

    Attributes:
        path, shape, kind: the leaf, and the type that holds it now.
        nbytes_before, nbytes_after: container bytes with the adapter, and merged.
        adapter: `‖adapter‖ / ‖W‖`: what would be lost without the adapter.
        error: `‖merged - W‖ / ‖W‖`: what is lost by merging.
        output_adapter, output_error: the same two of the layer's outputs on the calibration inputs, the square root of
            `tr(Δᵀ H Δ) / tr(Wᵀ H W)`; None without statistics.
        output_error_nearest: `output_error` if every weight went to its nearest level, for comparison; None without
            statistics, or with a method.
        moved: share of the weights that changed against the base.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    nbytes_before: int
    nbytes_after: int
    adapter: float
    error: float
    output_adapter: float | None
    output_error: float | None
    output_error_nearest: float | None
    moved: float

    @property
    def kept(self) -> float:
        """How much of the adapter survives: 1 for all of it, 0 for what dropping it would leave, below 0 for harm.

        `1 - (error / adapter)²`, of outputs where they were measured; 1 for an adapter of zero that is merged exactly.
        """
        size, lost = (
            (self.adapter, self.error) if self.output_error is None else (self.output_adapter, self.output_error)
        )
        assert size is not None
        if size <= ROUNDING:
            return 1.0 if lost <= ROUNDING else -float("inf")
        return 1 - (lost / size) ** 2

    @property
    def flagged(self) -> bool:
        """Whether merging loses as much as the adapter changed, or more: dropping the adapter would be as good."""
        return self.kept < 1e-3


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """A row a merged leaf; prints as a table."""

    leaves: tuple[LeafMerge, ...]

    @property
    def flagged(self) -> tuple[str, ...]:
        """Paths of leaves in which merging loses as much as the adapter changed, or more."""
        return tuple(leaf.path for leaf in self.leaves if leaf.flagged)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"leaves": [dataclasses.asdict(leaf) | {"flagged": leaf.flagged} for leaf in self.leaves]}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("leaf", "held as", "bytes", "adapter", "error", "of outputs", "error", "moved", "kept", "")
        ]
        for leaf in self.leaves:
            outputs = [_number(leaf.output_adapter), _number(leaf.output_error)]
            kept = f"{leaf.kept:.1%}" if leaf.kept > -10 else "harm"
            row = (leaf.path, leaf.kind, f"{leaf.nbytes_after:,}", _number(leaf.adapter), _number(leaf.error), *outputs)
            rows.append((*row, f"{leaf.moved:.1%}", kept, "FLAGGED" if leaf.flagged else ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = []
        for row in rows:
            cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def merge_adapters(
    params: PyTree,
    *,
    stats: PyTree | None = None,
    method: Any = None,
    refit: bool = False,
    key: jax.Array | None = None,
) -> tuple[PyTree, MergeReport]:
    """Rounds `base + adapter` of every adapted leaf back into the base's own grid, and reports what is lost.

    The result has the type, bits, groups and bytes of the leaf before `add_lora`, so it runs and is written as that was
    (GPTQ, AWQ, ...). A step of the adapter that is small against the distance of two levels is lost to a large part;
    `kept` says how much survives, and keeping the adapter costs its bytes and loses nothing.

    Args:
        params: tree with adapters, from `add_lora`.
        stats: from `effjax.calibrate`, with second moments of the adapted leaves: rounding then is the sweep of GPTQ
            on the given grid, and the error is of outputs too.
        method: compress `base + adapter` anew by this method instead of into the grid.
        refit: tries new scales, zero points or tables for every group, and takes those that lower the squared error.
        key: for a method that draws.

    Returns:
        The tree without adapters, and a `MergeReport`. Leaves without adapters are untouched.

    Raises:
        ValueError: both `method` and `refit`.
        LeafError: no adapters, adapters that are not finite, or a base without levels.
        CalibrationError: statistics that lack an adapted leaf or its second moment.

    Example:
        >>> import effjax as ej, jax
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
        >>> base = ej.quantize_params(params, ej.quantize.RTN(bits=4, group_size=32))
        >>> merged, report = ej.quantize.merge_adapters(ej.add_lora(base, 4, key=jax.random.key(1)))
        >>> bool((merged["kernel"].codes == base["kernel"].codes).all()), report.leaves[0].error, report.flagged
        (True, 0.0, ())
    """
    if method is not None and refit:
        raise ValueError("method= makes new grids and refit= changes the old one: pass one of them")
    adapted = {path: leaf for path, leaf in leaves_with_paths(params) if has_adapter(leaf)}
    if not adapted:
        raise LeafError("no leaf carries an adapter: there is nothing to merge")
    moments = {path: _moment(path, stats) for path in adapted}
    weights = {}
    for path, leaf in adapted.items():
        weights[path] = _adapted(leaf)
        if not all_finite(weights[path][1]):
            raise LeafError(f"{path} {list(leaf.shape)}: its adapter has non-finite values; was the training stable?")
    merged, rows = {}, []
    anew = {} if method is None else _anew(params, adapted, method, stats, key)
    for path, leaf in adapted.items():
        base, target = weights[path]
        nearest = None
        if method is not None:
            merged[path] = anew[path]
        else:
            try:
                merged[path] = _into_grid(leaf, target, moments[path], refit=refit)
            except LeafError as error:
                raise LeafError(f"{path} {list(leaf.shape)}: {error}") from None
            if moments[path] is not None:
                nearest = _into_grid(leaf, target, None, refit=refit)
        rows.append(_row(path, leaf, merged[path], base, target, moments[path], nearest))
    return map_with_paths(lambda path, leaf: merged.get(path, leaf), params), MergeReport(tuple(rows))


def _moment(path: str, stats: PyTree | None) -> jax.Array | None:
    if stats is None:
        return None
    flat = jax.tree_util.tree_leaves_with_path(stats, is_leaf=lambda x: isinstance(x, InputStats))
    by_path = {path_str(p).removeprefix("params/"): s for p, s in flat if isinstance(s, InputStats)}
    found = by_path.get(path.removeprefix("params/"))
    if found is None or found.outer_sum is None:
        lack = "no statistics" if found is None else "statistics without second moments"
        raise CalibrationError(
            f"{path} has an adapter but {lack}: pass stats=effjax.calibrate(effjax.lift(fn), params, batches)"
        )
    return found.second_moment


@jax.jit
def _adapted(leaf: Any) -> tuple[jax.Array, jax.Array]:
    """The base and the adapted weight of a leaf, `float32[*L, in, out]`."""

    def both(matrix: Sum) -> tuple[jax.Array, jax.Array]:
        base, adapters = split_adapter(matrix)
        dense = base.astype(jnp.float32).materialize()
        return dense, dense + sum(part.astype(jnp.float32).materialize() for part in adapters)

    return map_matrix(both, leaf, unwrap=True)


@partial(jax.jit, static_argnames="refit")
def _into_grid(leaf: Any, target: jax.Array, moment: jax.Array | None, *, refit: bool) -> Any:
    return map_matrix(lambda m: regrid(target, split_adapter(m)[0], second_moment=moment, refit=refit), leaf)


def _anew(
    params: PyTree, adapted: Mapping[str, Any], method: Any, stats: PyTree | None, key: jax.Array | None
) -> dict[str, Any]:
    dense = map_with_paths(lambda path, leaf: leaf.materialize() if path in adapted else leaf, params)
    new = quantize_params(dense, [(lambda path, _: path in adapted, method)], stats=stats, key=key)
    return {path: leaf for path, leaf in leaves_with_paths(new) if path in adapted}


def _row(
    path: str, leaf: Any, merged: Any, base: jax.Array, target: jax.Array, moment: jax.Array | None, nearest: Any
) -> LeafMerge:
    outcome = {name: float(value) for name, value in _errors(merged, base, target, moment).items()}
    if nearest is not None:
        outcome["output_error_nearest"] = float(_errors(nearest, base, target, moment)["output_error"])
    inner = merged.array if isinstance(merged, View) else merged
    optional = {name: outcome.get(name) for name in ("output_adapter", "output_error", "output_error_nearest")}
    return LeafMerge(
        path=path,
        shape=tuple(leaf.shape),
        kind=type(inner).__name__,
        nbytes_before=leaf.nbytes,
        nbytes_after=merged.nbytes,
        adapter=outcome["adapter"],
        error=outcome["error"],
        moved=outcome["moved"],
        **optional,
    )


@jax.jit
def _errors(merged: Any, base: jax.Array, target: jax.Array, moment: jax.Array | None) -> dict[str, jax.Array]:
    new = map_matrix(lambda m: m.astype(jnp.float32).materialize(), merged, unwrap=True)
    tiny = jnp.finfo(jnp.float32).tiny

    def relative(delta: jax.Array) -> jax.Array:
        return jnp.linalg.norm(delta.ravel()) / jnp.maximum(jnp.linalg.norm(target.ravel()), tiny)

    moved = jnp.mean(jnp.abs(new - base) > ROUNDING * jnp.max(jnp.abs(base)))
    found = {"adapter": relative(target - base), "error": relative(new - target), "moved": moved}
    if moment is None:
        return found

    def output(delta: jax.Array) -> jax.Array:
        energy = jnp.sum(delta * jnp.matmul(moment, delta, precision="highest"))
        return jnp.sqrt(jnp.maximum(energy, 0))

    whole = jnp.maximum(output(target), tiny)
    return found | {"output_adapter": output(target - base) / whole, "output_error": output(new - target) / whole}
