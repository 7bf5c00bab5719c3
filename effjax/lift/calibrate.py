"""`calibrate`: statistics of what every weight is multiplied with, by the walk that also runs compressed models."""

import dataclasses
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from effjax.arrays.base import PyTree, is_compressed
from effjax.errors import CalibrationError
from effjax.lift.control_flow import control_flow_rules
from effjax.lift.coverage import Policy
from effjax.lift.dot import Contraction, canonical_input
from effjax.lift.interpreter import Interpreter
from effjax.lift.layout import Layout
from effjax.lift.lifting import interpret
from effjax.lift.operand import Operand, Probe
from effjax.lift.rules import explicit_axes, structural_rules
from effjax.paths import Where, leaves_with_paths, map_with_paths, matches, path_str
from effjax.rules import is_dense_matrix

NEEDS = ("second_moment", "abs_mean", "norm")
SUMS = ("outer_sum", "abs_sum", "square_sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputStats:
    """Sums over all inputs that met one weight; they add over batches and hosts.

    Attributes:
        count: rows of input seen, `float32[*L]`.
        outer_sum: sum of `x x^T`, `float32[*L, in, in]`, or None when not asked for.
        abs_sum: sum of `|x|`, `float32[*L, in]`, or None.
        square_sum: sum of `x**2`, `float32[*L, in]`, or None.
        in_axes, out_axes: which (negative) axes of the weight were contracted, and which were not.
    """

    count: Float[Array, "*L"]
    outer_sum: Float[Array, "*L in in"] | None = None
    abs_sum: Float[Array, "*L in"] | None = None
    square_sum: Float[Array, "*L in"] | None = None
    in_axes: tuple[int, ...] = (-2,)
    out_axes: tuple[int, ...] = (-1,)

    def __add__(self, other: "InputStats") -> "InputStats":
        if any((getattr(self, need) is None) != (getattr(other, need) is None) for need in SUMS):
            raise CalibrationError("these statistics were gathered with other needs=: gather both with the same")
        if (self.in_axes, self.out_axes) != (other.in_axes, other.out_axes):
            raise CalibrationError(
                f"one weight is contracted over axes {self.in_axes} and over {other.in_axes}: its inputs have no "
                "common statistics; leave it out with where="
            )
        return jax.tree.map(jnp.add, self, other)

    @property
    def second_moment(self) -> jax.Array:
        """Mean of `x x^T`, `float32[*L, in, in]`."""
        return self._mean(self.outer_sum, "second_moment")

    @property
    def abs_mean(self) -> jax.Array:
        """Mean of `|x|`, `float32[*L, in]`."""
        return self._mean(self.abs_sum, "abs_mean")

    @property
    def norm(self) -> jax.Array:
        """Root mean square of each input, `float32[*L, in]`."""
        return jnp.sqrt(self._mean(self.square_sum, "norm"))

    def _mean(self, total: jax.Array | None, need: str) -> jax.Array:
        if total is None:
            raise CalibrationError(f"these statistics lack {need!r}: calibrate with needs={{{need!r}}}")
        return total / self.count.reshape(self.count.shape + (1,) * (total.ndim - self.count.ndim))


jax.tree_util.register_dataclass(
    InputStats,
    data_fields=["count", "outer_sum", "abs_sum", "square_sum"],
    meta_fields=["in_axes", "out_axes"],
)


def calibrate(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    needs: Collection[str] = ("second_moment",),
    where: Where | None = None,
    initial: PyTree | None = None,
) -> PyTree:
    """Runs `fn` over calibration batches and gathers statistics of the inputs of its weights.

    One pass, one compiled step; weights inside `nn.scan`, remat and other control flow included: a weight stacked over
    layers gets stacked statistics.

    Args:
        fn: `fn(params, batch)`, or `fn(params, *batch)` where batches are tuples, e.g. `model.apply`. Its result is not
            used.
        params: the first argument of `fn`; leaves may be compressed already.
        batches: an iterable of batches of equal shapes (each new shape compiles once more).
        needs: what to gather, of "second_moment", "abs_mean", "norm"; usually `method.needs`.
        where: pattern or predicate of the leaves to watch; dense-layer matrices by default.
        initial: statistics to go on from, as returned earlier.

    Returns:
        A tree like `params` with `InputStats` in place of watched leaves and None elsewhere.

    Raises:
        CalibrationError: no batches, an unknown need, or a watched leaf that nothing was multiplied with.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((3, 2))}
        >>> stats = ej.calibrate(lambda p, x: x @ p["kernel"], params, [jnp.ones((4, 3))])
        >>> stats["kernel"].second_moment.shape, float(stats["kernel"].count)
        ((3, 3), 4.0)
    """
    unknown = set(needs) - set(NEEDS)
    if unknown:
        raise CalibrationError(f"needs={sorted(unknown)} is unknown: choose of {NEEDS}")
    watched = {path for path, leaf in leaves_with_paths(params) if _is_watched(where, path, leaf)}
    if not watched:
        raise CalibrationError(f"where={where!r} selects no weight to watch")
    step = jax.jit(partial(_step, fn, frozenset(needs), frozenset(watched)))
    total: dict[str, InputStats] | None = None
    for batch in batches:
        statistics = step(params, batch if isinstance(batch, tuple) else (batch,))
        total = statistics if total is None else _add(total, statistics)
    if total is None:
        raise CalibrationError("the calibration set is empty: at least one batch is needed")
    unseen = sorted(watched - set(total))
    if unseen:
        raise CalibrationError(
            f"nothing was multiplied with {unseen[0]!r}"
            + (f" and {len(unseen) - 1} more" if unseen[1:] else "")
            + ": the function does not use it in a contraction; leave it out with where="
        )
    stats = map_with_paths(lambda path, leaf: total.get(path), params)
    return stats if initial is None else add_stats(initial, stats)


def add_stats(a: PyTree, b: PyTree) -> PyTree:
    """Adds two trees of statistics, of other batches or other hosts.

    Raises:
        CalibrationError: they are of other leaves, of other needs, or of other axes.
    """
    others = {path: leaf for path, leaf in _leaves(b) if leaf is not None}
    unequal = {path for path, leaf in _leaves(a) if leaf is not None} ^ set(others)
    if unequal:
        raise CalibrationError(f"only one of the two has statistics of {min(unequal)!r}: calibrate both alike")

    def add(path: Any, x: InputStats | None) -> InputStats | None:
        return None if x is None else x + others[path_str(path)]

    return jax.tree_util.tree_map_with_path(add, a, is_leaf=_is_stats)


def _leaves(stats: PyTree) -> list[tuple[str, Any]]:
    flat = jax.tree_util.tree_leaves_with_path(stats, is_leaf=_is_stats)
    return [(path_str(path), leaf) for path, leaf in flat]


def _is_stats(x: Any) -> bool:
    return x is None or isinstance(x, InputStats)


@jax.jit
def _add(a: dict[str, InputStats], b: dict[str, InputStats]) -> dict[str, InputStats]:
    return {path: a[path] + b[path] for path in a}


def _is_watched(where: Where | None, path: str, leaf: Any) -> bool:
    if not is_compressed(leaf) and not (hasattr(leaf, "ndim") and leaf.ndim >= 2):
        return False
    return is_dense_matrix(path, leaf) if where is None else matches(where, path, leaf)


def _step(
    fn: Callable[..., Any], needs: frozenset[str], watched: frozenset[str], params: PyTree, batch: tuple[Any, ...]
) -> dict[str, InputStats]:
    record = partial(_record, needs, watched)
    interp = Interpreter(
        rules={**structural_rules(), **control_flow_rules()}, policy=Policy(on_materialize="allow"), record=record
    )

    def wrap(path: str, leaf: Any) -> Any:
        return Operand(Probe(leaf), Layout.of_shape(leaf.shape), path) if path in watched else leaf

    def only_params_matter(params: PyTree, batch: tuple[Any, ...]) -> Any:
        return fn(params, *batch)

    interpret(only_params_matter, interp, (params, batch), {}, wrap)
    return interp.taps


def _record(
    needs: frozenset[str],
    watched: frozenset[str],
    interp: Interpreter,
    w: Operand,
    c: Contraction,
    x: jax.Array,
) -> None:
    if w.path not in watched:
        return
    ndim = len(w.layout.axes)
    if isinstance(w.array, Probe):
        stacked = [axis for axis in range(ndim) if axis in c.batch]
        in_axes = tuple(axis - ndim for axis in c.axes)
        out_axes = tuple(axis - ndim for axis in range(ndim) if axis not in (*c.axes, *c.batch))
    else:
        if c.axes != (ndim - 2,):
            return
        stacked = list(range(ndim - 2))
        in_axes, out_axes = (-2,), (-1,)
    shared = [axis for axis in stacked if axis not in c.batch]
    batch = len(stacked) - len(shared)

    def spread(total: jax.Array) -> jax.Array:
        """Experts that share one input have the same statistics each."""
        if not shared:
            return total
        sizes = [w.array.shape[axis] for axis in stacked]
        kept = [w.array.shape[axis] if axis in c.batch else 1 for axis in stacked]
        tail = total.shape[batch:]
        return jnp.broadcast_to(total.reshape(*kept, *tail), (*sizes, *tail))

    def sums(x: jax.Array) -> dict[str, jax.Array]:
        x = canonical_input(x, w.layout, c).astype(jnp.float32)
        lead = x.shape[:batch]
        rows = x.reshape(*lead, -1, x.shape[-1])
        found = {"count": jnp.full(lead, rows.shape[-2], jnp.float32)}
        if "second_moment" in needs:
            found["outer_sum"] = jnp.matmul(rows.mT, rows, precision="highest")
        if "abs_mean" in needs:
            found["abs_sum"] = jnp.abs(rows).sum(-2)
        if "norm" in needs:
            found["square_sum"] = jnp.square(rows).sum(-2)
        return jax.tree.map(spread, found)

    gather: Any = jax.sharding.auto_axes(sums, out_sharding=PartitionSpec()) if explicit_axes() else sums
    interp.tap(w.path, InputStats(**gather(x), in_axes=in_axes, out_axes=out_axes))
