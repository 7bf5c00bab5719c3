"""`calibrate`: statistics of what every weight is multiplied with, by the walk that also runs compressed models."""

import dataclasses
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from effjax._compat import is_tracer
from effjax.arrays.base import PyTree, is_compressed
from effjax.arrays.view import fold
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

NEEDS = ("second_moment", "abs_mean", "norm", "zeros", "fisher")
SUMS = ("outer_sum", "abs_sum", "square_sum", "zero_count", "fisher_sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputStats:
    """Sums over all inputs that met one weight; they add over batches and hosts.

    Attributes:
        count: rows of input seen, `float32[*L]`.
        outer_sum: sum of `x x^T`, `float32[*L, in, in]`, or None when not asked for.
        abs_sum: sum of `|x|`, `float32[*L, in]`, or None.
        square_sum: sum of `x**2`, `float32[*L, in]`, or None.
        zero_count: inputs that were exactly 0, `float32[*L, in]`, or None.
        fisher_sum: sum over examples of the squared gradient of their loss, `float32[*L, in, out]`, or None.
        examples: examples that `fisher_sum` is over, `float32[*L]`, or None.
        factor: what a method's `prepare` made of the sums, or None.
        in_axes, out_axes: which (negative) axes of the weight were contracted, and which were not.
        source: the path of the first weight that saw the very same inputs, such as that of the queries for queries,
            keys and values, whose sums are then one array; empty where unknown.
    """

    count: Float[Array, "*L"]
    outer_sum: Float[Array, "*L in in"] | None = None
    abs_sum: Float[Array, "*L in"] | None = None
    square_sum: Float[Array, "*L in"] | None = None
    zero_count: Float[Array, "*L in"] | None = None
    fisher_sum: Float[Array, "*L in out"] | None = None
    examples: Float[Array, "*L"] | None = None
    factor: PyTree = None
    in_axes: tuple[int, ...] = (-2,)
    out_axes: tuple[int, ...] = (-1,)
    source: str = ""

    def __add__(self, other: "InputStats") -> "InputStats":
        if any((getattr(self, need) is None) != (getattr(other, need) is None) for need in SUMS):
            raise CalibrationError("these statistics were gathered with other needs=: gather both with the same")
        if (self.in_axes, self.out_axes) != (other.in_axes, other.out_axes):
            raise CalibrationError(
                f"one weight is contracted over axes {self.in_axes} and over {other.in_axes}: its inputs have no "
                "common statistics; leave it out with where="
            )
        source = self.source if self.source == other.source else ""
        return jax.tree.map(jnp.add, self.of_source(source), other.of_source(source))

    def of_source(self, source: str) -> "InputStats":
        """The same sums, said to be of the inputs of `source`; what was prepared from them is left out."""
        return dataclasses.replace(self, source=source, factor=None)

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

    @property
    def zeros(self) -> jax.Array:
        """Share of the rows in which an input was exactly 0, `float32[*L, in]`."""
        return self._mean(self.zero_count, "zeros")

    @property
    def fisher(self) -> jax.Array:
        """Diagonal of the empirical Fisher information: mean over examples of squared gradients, `[*L, in, out]`."""
        return self._mean(self.fisher_sum, "fisher", self.examples)

    def _mean(self, total: jax.Array | None, need: str, count: jax.Array | None = None) -> jax.Array:
        if total is None:
            raise CalibrationError(f"these statistics lack {need!r}: calibrate with needs={{{need!r}}}")
        count = self.count if count is None else count
        return total / count.reshape(count.shape + (1,) * (total.ndim - count.ndim))


jax.tree_util.register_dataclass(
    InputStats,
    data_fields=["count", *SUMS, "examples", "factor"],
    meta_fields=["in_axes", "out_axes", "source"],
)


def calibrate(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    needs: Collection[str] = ("second_moment",),
    where: Where | None = None,
    initial: PyTree | None = None,
    loss: Callable[..., jax.Array] | None = None,
) -> PyTree:
    """Runs `fn` over calibration batches and gathers statistics of the inputs of its weights.

    One pass, one compiled step; weights inside `nn.scan`, remat and other control flow included: a weight stacked over
    layers gets stacked statistics. Weights that saw the same inputs share one array of sums.

    Args:
        fn: `fn(params, batch)`, or `fn(params, *batch)` where batches are tuples, e.g. `model.apply`. Its result is not
            used.
        params: the first argument of `fn`; leaves may be compressed already.
        batches: an iterable of batches of equal shapes (each new shape compiles once more).
        needs: what to gather, of "second_moment", "abs_mean", "norm", "zeros", "fisher"; usually `method.needs`.
        where: pattern or predicate of the leaves to watch; dense-layer matrices by default.
        initial: statistics to go on from, as returned earlier.
        loss: `loss(params, *batch) -> scalar`, for "fisher": its gradient is squared for one example (one entry of the
            batch's leading axis) after the other.

    Returns:
        A tree like `params` with `InputStats` in place of watched leaves and None elsewhere.

    Raises:
        CalibrationError: no batches, an unknown need, "fisher" without a loss or of a compressed leaf, or a watched
            leaf that nothing was multiplied with.

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
    if "fisher" in needs:
        _check_fisher(params, watched, loss)
    how = fn, loss, frozenset(needs), frozenset(watched)
    # A function that is known by its value, such as one for all layers of a model, is compiled once for all calls.
    step = partial(_compiled_step, *how) if _by_value(fn) and loss is None else jax.jit(partial(_step, *how))
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
    total = _share(total)
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

    sums = {path: leaf + others[path] for path, leaf in _leaves(a) if leaf is not None}
    shared = _share_sources(sums)
    return jax.tree_util.tree_map_with_path(lambda path, _: shared.get(path_str(path)), a, is_leaf=_is_stats)


def _share(total: dict[str, InputStats]) -> dict[str, InputStats]:
    """Names for every weight the first one with the very same sums, and lets both hold the same arrays."""
    if any(map(is_tracer, jax.tree.leaves(total))):
        return total
    named: dict[str, InputStats] = {}
    for path, stats in total.items():
        same = (other for other in named if named[other].source == other and _same_inputs(named[other], stats))
        named[path] = stats.of_source(next(same, path))
    return _share_sources(named)


def _share_sources(total: dict[str, InputStats]) -> dict[str, InputStats]:
    """Weights of one source hold its arrays."""
    fields = ("count", *(name for name in SUMS if name != "fisher_sum"))
    return {
        path: dataclasses.replace(stats, **{name: getattr(total[stats.source], name) for name in fields})
        if stats.source in total
        else stats
        for path, stats in total.items()
    }


def _same_inputs(a: InputStats, b: InputStats) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in SUMS if name != "fisher_sum"]
    pairs = [(x, y) for x, y in pairs if x is not None and y is not None]
    return bool(pairs) and all(x.shape == y.shape and bool(jnp.array_equal(x, y)) for x, y in pairs)


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
    fn: Callable[..., Any],
    loss: Callable[..., jax.Array] | None,
    needs: frozenset[str],
    watched: frozenset[str],
    params: PyTree,
    batch: tuple[Any, ...],
) -> dict[str, InputStats]:
    inputs = _input_sums(fn, needs, watched, params, batch)
    if "fisher" not in needs or loss is None:
        return inputs
    squares, examples = _squared_gradients(loss, watched, params, batch)

    def joined(path: str, stats: InputStats) -> InputStats:
        total = fold(squares[path], stats.in_axes, stats.out_axes)
        return dataclasses.replace(stats, fisher_sum=total, examples=jnp.full(total.shape[:-2], examples, jnp.float32))

    return {path: joined(path, stats) for path, stats in inputs.items()}


_compiled_step = jax.jit(_step, static_argnums=(0, 1, 2, 3))


def _by_value(fn: Callable[..., Any]) -> bool:
    """Whether a function is a frozen dataclass: equal ones do the same, and keeping one keeps no arrays alive."""
    return dataclasses.is_dataclass(fn) and fn.__dataclass_params__.frozen and fn.__dataclass_params__.eq  # type: ignore


def _check_fisher(params: PyTree, watched: set[str], loss: Any) -> None:
    if loss is None:
        raise CalibrationError('needs "fisher" are gradients of a loss: pass loss=lambda params, *batch: ..., a scalar')
    compressed = [path for path, leaf in leaves_with_paths(params) if path in watched and is_compressed(leaf)]
    if compressed:
        raise CalibrationError(f"{compressed[0]} is compressed: gather fisher before compressing, or leave it out")


def _squared_gradients(
    loss: Callable[..., jax.Array], watched: frozenset[str], params: PyTree, batch: tuple[Any, ...]
) -> tuple[dict[str, jax.Array], int]:
    """Sum over the examples of a batch of squared gradients of every watched weight, and the number of examples."""
    weights = {path: leaf for path, leaf in leaves_with_paths(params) if path in watched}

    def example_loss(weights: dict[str, jax.Array], example: tuple[Any, ...]) -> jax.Array:
        own = map_with_paths(lambda path, leaf: weights.get(path, leaf), params)
        return loss(own, *jax.tree.map(lambda x: x[None], example))

    def add(total: dict[str, jax.Array], example: tuple[Any, ...]) -> tuple[dict[str, jax.Array], None]:
        gradients = jax.grad(example_loss)(weights, example)
        return jax.tree.map(lambda t, g: t + jnp.square(g.astype(jnp.float32)), total, gradients), None

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    return jax.lax.scan(add, zeros, batch)[0], jax.tree.leaves(batch)[0].shape[0]


def _input_sums(
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
        if "zeros" in needs:
            found["zero_count"] = jnp.sum(rows == 0, axis=-2, dtype=jnp.float32)
        return jax.tree.map(spread, found)

    gather: Any = jax.sharding.auto_axes(sums, out_sharding=PartitionSpec()) if explicit_axes() else sums
    interp.tap(w.path, InputStats(**gather(x), in_axes=in_axes, out_axes=out_axes))
