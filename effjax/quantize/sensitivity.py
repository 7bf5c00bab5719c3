"""What every candidate method costs every leaf: container bytes, and the loss that its error is expected to bring."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from glob import escape
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.base import PyTree, is_compressed, nbytes
from effjax.arrays.view import fold
from effjax.errors import CalibrationError, LeafError
from effjax.lift.calibrate import InputStats
from effjax.lift.lifting import lift
from effjax.paths import Where, leaves_with_paths, map_with_paths
from effjax.quantize.api import quantize_params
from effjax.rules import assign
from effjax.transform import Leaf, select

MEASURES = {
    "loss": "measured change of the loss",
    "fisher layer": "layer error weighted by output gradients",
    "fisher": "squared error weighted by Fisher information",
    "layer": "squared error of the layer's outputs",
    "weights": "squared error of the weights",
    "sizes": "sizes alone",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One candidate for one leaf.

    Attributes:
        method: what would be done; None leaves the leaf as it is.
        nbytes: container bytes of the result, scales, zero points and tables included.
        loss: what it is expected to cost, in the unit of the table's measure; NaN where only sizes are known.
    """

    method: Any
    nbytes: int
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafChoices:
    """The candidates that fit one leaf; one method for the whole leaf, stacked layers included."""

    path: str
    shape: tuple[int, ...]
    choices: tuple[Choice, ...]

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    def choice(self, method: Any) -> Choice | None:
        return next((c for c in self.choices if c.method == method), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Bytes and expected loss of every candidate on every leaf; what `allocate` chooses from.

    Losses of different leaves are added up, as if the errors of leaves did not act on each other.

    Attributes:
        measure: a key of `MEASURES`: what the losses are.
        leaves: the leaves and the candidates that fit them.
    """

    measure: str
    leaves: tuple[LeafChoices, ...]

    @property
    def weights(self) -> int:
        """Weights in all taken leaves."""
        return sum(leaf.weights for leaf in self.leaves)

    @property
    def least_bytes(self) -> int:
        return sum(min(c.nbytes for c in leaf.choices) for leaf in self.leaves)

    @property
    def most_bytes(self) -> int:
        return sum(max(c.nbytes for c in leaf.choices) for leaf in self.leaves)

    def uniform(self, method: Any) -> list[tuple[str, Any]]:
        """Rules that give all leaves the same method.

        Raises:
            LeafError: a leaf that it does not fit.
        """
        for leaf in self.leaves:
            if leaf.choice(method) is None:
                raise LeafError(f"{method} is no candidate that fits {leaf.path} {list(leaf.shape)}")
        return [(escape(leaf.path), method) for leaf in self.leaves]

    def chosen(self, rules: Sequence[tuple[str, Any]]) -> list[Choice]:
        """The choice that `rules` (from `allocate` or `uniform`) make for every leaf, in the order of `leaves`.

        Raises:
            LeafError: a leaf without a rule, or a rule with a method that is no candidate.
        """
        methods = dict(rules)
        found = []
        for leaf in self.leaves:
            choice = leaf.choice(methods.get(escape(leaf.path), "no rule"))
            if choice is None:
                raise LeafError(f"{leaf.path} {list(leaf.shape)}: the rules give it no candidate of this table")
            found.append(choice)
        return found

    def nbytes(self, rules: Sequence[tuple[str, Any]]) -> int:
        """Container bytes of the taken leaves under `rules`."""
        return sum(choice.nbytes for choice in self.chosen(rules))

    def loss(self, rules: Sequence[tuple[str, Any]]) -> float:
        """Expected loss under `rules`, summed exactly rounded."""
        return math.fsum(choice.loss for choice in self.chosen(rules))

    def bits(self, rules: Sequence[tuple[str, Any]]) -> float:
        """Container bits a weight, on average over the taken leaves."""
        return 8 * self.nbytes(rules) / self.weights

    def table(self, rules: Sequence[tuple[str, Any]]) -> str:
        """What `rules` do to every leaf, as text."""
        rows = [
            (leaf.path, method_label(c.method), f"{8 * c.nbytes / leaf.weights:.3f}", f"{c.nbytes:,}", f"{c.loss:.3e}")
            for leaf, c in zip(self.leaves, self.chosen(rules), strict=True)
        ]
        total = ("total", "", f"{self.bits(rules):.3f}", f"{self.nbytes(rules):,}", f"{self.loss(rules):.3e}")
        rows = [("leaf", "method", "bits/weight", "bytes", "loss"), *rows, total]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def sensitivity(
    params: PyTree,
    candidates: Sequence[Any],
    *,
    stats: PyTree | None = None,
    key: jax.Array | None = None,
    where: Where | None = None,
    loss: Callable[..., Any] | None = None,
    batches: Iterable[Any] | None = None,
) -> Sensitivity:
    """Tries every candidate on every leaf: container bytes, and the loss that the error is expected to bring.

    What is measured follows from what is given, from the nearest to the model's loss to the farthest; `Δ` is the error
    of a weight `[in, out]`, `H` the second moment of its inputs, `F` its Fisher information:

    - `loss` and `batches`: the mean of `loss(params, batch)` with this leaf alone compressed, less that of `params`.
      It runs the model once a leaf, candidate and batch.
    - `stats` with `fisher` and second moments: `½ Σ_o g_o Δ_oᵀ H Δ_o` with `g_o = Σ_i F_io / Σ_i H_ii`, the mean
      squared gradient of output `o` if gradients and inputs are independent (as in K-FAC, Martens and Grosse 2015).
    - `stats` with `fisher`: `½ Σ F Δ²`, the second-order estimate with a diagonal Hessian.
    - `stats` with second moments: `tr(Δᵀ H Δ)`, the mean squared error of the layer's outputs, summed over outputs.
    - neither: `‖Δ‖²`.

    The last two do not know how much the model cares for a layer, and leaves compare by their size: a choice by them
    can be worse than one width for all. Give Fisher information or a loss where there is one.

    Args:
        params: dense parameters; `ShapeDtypeStruct`s give sizes alone.
        candidates: methods; None stands for leaving a leaf as it is. One that cannot take a leaf (a group that does not
            divide) is left out there.
        stats: from `effjax.calibrate`, for the methods that need them and for the measure.
        key: random key, for methods that draw.
        where: pattern or predicate of the leaves; dense-layer matrices by default.
        loss: `loss(params, batch)`, or `loss(params, *batch)` where batches are tuples: a scalar.
        batches: for `loss`; equal weights.

    Raises:
        ValueError: no candidates, one named twice, or only one of `loss` and `batches`.
        LeafError: a leaf that no candidate fits, with the reason of the last.
        CalibrationError: statistics that a candidate needs are missing, or statistics of some leaves only.

    Example:
        >>> import effjax as ej, jax
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
        >>> table = ej.quantize.sensitivity(params, [ej.quantize.RTN(bits=b, group_size=32) for b in (2, 4)])
        >>> [(c.method.bits, c.nbytes) for c in table.leaves[0].choices], table.measure
        ([(2, 168), (4, 296)], 'weights')
    """
    candidates = list(candidates)
    if not candidates or any(c in candidates[:i] for i, c in enumerate(candidates)):
        raise ValueError(f"candidates={candidates}: name at least one, and each once")
    if (loss is None) != (batches is None):
        raise ValueError("loss= and batches= go together: pass both to measure the loss, or neither")
    paths = list(assign(params, "any", where))
    dense = {path: leaf for path, leaf in leaves_with_paths(params) if path in paths}
    taken = {path: _fitting(path, params, candidates, stats, key) for path in paths}
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    measure = "sizes" if abstract else "loss" if loss is not None else _measure(taken)
    evaluate = _loss_change(params, loss, list(batches)) if loss is not None and batches is not None else None
    found: dict[str, list[Choice]] = {path: [] for path in paths}
    for candidate in candidates:
        members = [path for path in paths if candidate in taken[path]]
        for path, new in _compressed(params, candidate, members, stats, key, abstract).items():
            if measure == "sizes":
                cost = math.nan
            elif candidate is None:
                cost = 0.0
            elif evaluate is not None:
                cost = evaluate(path, new)
            else:
                leaf = taken[path][candidate]
                assert leaf is not None  # only the candidate None has none
                cost = float(_weight_loss(measure, leaf.in_axes, leaf.out_axes, dense[path], new, leaf.stats))
            if measure != "sizes" and not math.isfinite(cost):
                raise LeafError(f"{path} {list(new.shape)}: {method_label(candidate)} gives a loss of {cost}")
            found[path].append(Choice(method=candidate, nbytes=nbytes(new), loss=cost))
    leaves = tuple(LeafChoices(path=p, shape=tuple(dense[p].shape), choices=tuple(found[p])) for p in paths)
    return Sensitivity(measure=measure, leaves=leaves)


def _fitting(
    path: str, params: PyTree, candidates: list[Any], stats: PyTree | None, key: jax.Array | None
) -> dict[Any, Leaf | None]:
    """The candidates that can take a leaf, checked before anything is computed, with what they would be given."""
    found: dict[Any, Leaf | None] = {}
    refusal = None
    for candidate in candidates:
        if candidate is None:
            found[None] = None
            continue
        try:
            rule = [(lambda p, _: p == path, candidate)]
            found[candidate] = select(params, rule, where=None, stats=stats, key=key)[path]
        except LeafError as error:
            refusal = error
    if not found:
        raise LeafError(f"no candidate fits a leaf; the last refusal: {refusal}")
    return found


def _measure(taken: dict[str, dict[Any, Leaf | None]]) -> str:
    """The best measure that the statistics of all leaves allow; they must allow the same, or losses do not compare."""
    kinds: dict[str, str] = {}  # a path of every kind
    for path, fitting in taken.items():
        leaf = next((leaf for leaf in fitting.values() if leaf is not None), None)
        if leaf is not None:
            fisher = leaf.stats is not None and _has_fisher(leaf.stats)
            layer = leaf.stats is not None and leaf.stats.outer_sum is not None
            kinds.setdefault(
                "fisher layer" if fisher and layer else "fisher" if fisher else "layer" if layer else "weights", path
            )
    if len(kinds) > 1:
        each = ", ".join(f"{path} for the {MEASURES[kind]}" for kind, path in kinds.items())
        raise CalibrationError(
            f"the leaves have statistics of different kinds ({each}), so their losses do not compare: calibrate all of "
            "them with the same needs="
        )
    return next(iter(kinds), "weights")


def _has_fisher(stats: InputStats) -> bool:
    return stats.fisher_sum is not None


def _compressed(
    params: PyTree, candidate: Any, paths: list[str], stats: PyTree | None, key: jax.Array | None, abstract: bool
) -> dict[str, Any]:
    """The leaves `paths` under a candidate, by path."""
    if not paths:
        return {}
    members = set(paths)

    def transform(params: PyTree) -> PyTree:
        if candidate is None:
            return params
        return quantize_params(params, [(lambda path, _: path in members, candidate)], stats=stats, key=key)

    new = jax.eval_shape(transform, params) if abstract else transform(params)
    return {path: leaf for path, leaf in leaves_with_paths(new) if path in members}


@partial(jax.jit, static_argnums=(0, 1, 2))
def _weight_loss(
    measure: str, in_axes: tuple[int, ...], out_axes: tuple[int, ...], w: Any, new: Any, stats: InputStats | None
) -> jax.Array:
    """One leaf's loss from its weights alone, summed over stacked matrices."""
    difference = new.astype(jnp.float32).materialize() - w.astype(jnp.float32)
    delta = fold(difference, in_axes, out_axes)
    if measure == "weights" or stats is None:
        return jnp.sum(jnp.square(delta))
    if measure == "fisher":
        return jnp.sum(stats.fisher * jnp.square(delta)) / 2
    moment = stats.second_moment
    columns = jnp.sum(delta * jnp.matmul(moment, delta, precision="highest"), axis=-2)  # [*L, out]
    if measure == "layer":
        return jnp.sum(columns)
    energy = jnp.trace(moment, axis1=-2, axis2=-1)[..., None]
    gradients = jnp.sum(stats.fisher, axis=-2) / jnp.maximum(energy, jnp.finfo(jnp.float32).tiny)
    return jnp.sum(gradients * columns) / 2


def _loss_change(params: PyTree, loss: Callable[..., Any], batches: list[Any]) -> Callable[[str, Any], float]:
    """Gives the change of the mean loss when one leaf is replaced; one compiled program for all leaves."""
    if not batches:
        raise CalibrationError("no batches to measure the loss on: at least one is needed")
    step = jax.jit(lift(loss))

    def mean(params: PyTree) -> float:
        arguments = (batch if isinstance(batch, tuple) else (batch,) for batch in batches)
        return float(np.mean([np.float64(step(params, *batch)) for batch in arguments]))

    base = mean(params)

    def change(path: str, new: Any) -> float:
        dense = new.materialize() if is_compressed(new) else new
        return mean(map_with_paths(lambda p, leaf: dense if p == path else leaf, params)) - base

    return change


def method_label(method: Any) -> str:
    """A method in a word: its name and its bits.

    Example:
        >>> import effjax as ej
        >>> method_label(ej.quantize.RTN(bits=3)), method_label(None)
        ('RTN 3', 'dense')
    """
    if method is None:
        return "dense"
    bits = getattr(method, "bits", None)
    return type(method).__name__ + ("" if bits is None else f" {bits}")
