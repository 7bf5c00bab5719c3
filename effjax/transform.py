"""What the transforms over parameter trees share: checking first, one compiled call a kind of leaf, keys by name."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from effjax import _compat
from effjax.arrays.base import CompressedArray, PyTree, full_spec, is_compressed
from effjax.arrays.sharding import partition_specs
from effjax.arrays.view import fold, folded_shape, unfold
from effjax.errors import CalibrationError, LeafError
from effjax.lift.calibrate import InputStats
from effjax.paths import Where, leaves_with_paths, map_with_paths, path_str
from effjax.rules import assign, default_axes

How = tuple[Any, tuple[int, ...], tuple[int, ...]]  # method, input axes, output axes
Inputs = tuple[Any, InputStats | None, jax.Array | None]  # weight, statistics, key


class Method:
    """Base of the methods: frozen keyword-only dataclasses of hyper-parameters.

    Attributes:
        needs: statistics the method asks `calibrate` for.
        needs_key: whether it draws random numbers.
        sums: whether the result depends on the order of sums over a matrix. Then the two matrix axes of a sharded
            weight are gathered first, one weight at a time, so that the bytes are those of a single device.
        joint: whether weights that saw the same inputs are compressed together, by `compress_jointly`.
        by_column: whether a run of outputs gets the bytes it has in the whole weight, so that a large one may be cut.
    """

    needs: frozenset[str] = frozenset()
    needs_key: bool = False
    sums: bool = False
    joint: bool = False
    by_column: bool = False

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises LeafError when a weight `[*L, in, out]` of this shape cannot be taken."""

    def prepare(self, stats: InputStats) -> InputStats:
        """What depends on the inputs alone, as `stats.factor`: made once for all weights that saw the same inputs."""
        return stats

    def compress_jointly(
        self, weights: list[jax.Array], *, stats: list[InputStats | None], keys: list[jax.Array | None]
    ) -> list[Any]:
        """The compressed arrays of weights that saw the same inputs."""
        compress = self.compress  # type: ignore[attr-defined]
        return [compress(w, stats=s, key=k) for w, s, k in zip(weights, stats, keys, strict=True)]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter about to be transformed.

    Attributes:
        path: its name.
        value: the dense array.
        method: what is to be done.
        in_axes, out_axes: its input and output axes, negative.
        stats: statistics of its inputs, or None.
        key: its own random key, or None.
    """

    path: str
    value: Any
    method: Any
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    stats: InputStats | None
    key: jax.Array | None

    @property
    def how(self) -> How:
        """The method and the axes: what a program is compiled for."""
        return self.method, self.in_axes, self.out_axes

    @property
    def lead(self) -> int:
        """Number of stacked dimensions."""
        return self.value.ndim - len(self.in_axes) - len(self.out_axes)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """`[*L, in, out]`."""
        return folded_shape(self.value.shape, self.in_axes, self.out_axes)


def select(
    params: PyTree, method: Any, *, where: Where | None, stats: PyTree | None, key: jax.Array | None
) -> dict[str, Leaf]:
    """The leaves to transform, every one checked, before anything is computed.

    Raises:
        RuleError: see `effjax.rules.assign`.
        LeafError: a leaf whose rank, dtype, shape or values the method cannot take.
        CalibrationError: a method needs statistics that are missing or of another shape.
    """
    methods = assign(params, method, where)
    statistics = _stats_by_path(stats)
    leaves = {}
    for path, value in leaves_with_paths(params):
        if path in methods:
            leaves[path] = _leaf(path, value, methods[path], statistics.get(path), key)
    return leaves


def _leaf(path: str, value: Any, method: Any, stats: InputStats | None, key: jax.Array | None) -> Leaf:
    if is_compressed(value):
        raise LeafError(f"{path} is compressed already ({value}): materialize it first, or leave it out with a rule")
    if not hasattr(value, "ndim") or value.ndim < 2 or not jnp.issubdtype(value.dtype, jnp.floating):
        shape = f"{getattr(value, 'dtype', type(value).__name__)}{list(getattr(value, 'shape', ()))}"
        raise LeafError(f"{path} is {shape}: {type(method).__name__} takes floating weights [*L, in, out]")
    needs_key = getattr(method, "needs_key", False)
    if needs_key and key is None:
        raise LeafError(f"{path}: {type(method).__name__} draws random numbers: pass key=jax.random.key(seed)")
    if getattr(method, "needs", frozenset()) and stats is None:
        raise CalibrationError(
            f"{path}: {type(method).__name__} needs {sorted(method.needs)} of its inputs: pass "
            "stats=effjax.calibrate(fn, params, batches, needs=method.needs)"
        )
    in_axes, out_axes = default_axes(path, value.ndim) if stats is None else (stats.in_axes, stats.out_axes)
    # A key by name, so that a leaf's result does not depend on which other leaves are transformed.
    own = jax.random.fold_in(key, zlib.crc32(path.encode())) if needs_key and key is not None else None
    leaf = Leaf(path, value, method, in_axes, out_axes, stats, own)
    try:
        method.check(leaf.matrix_shape)
    except LeafError as error:
        raise LeafError(f"{path} {list(value.shape)}: {error}") from None
    if not _compat.is_tracer(value) and not isinstance(value, jax.ShapeDtypeStruct) and not all_finite(value):
        bad = np.argwhere(~np.isfinite(np.asarray(value, np.float32)))
        raise LeafError(
            f"{path} has {len(bad)} non-finite values, the first at {bad[0].tolist()}: repair the checkpoint"
        )
    return leaf


def all_finite(value: Any) -> bool:
    """Whether a concrete array holds neither NaN nor infinity."""
    return bool(_all_finite(value))


@jax.jit
def _all_finite(value: jax.Array) -> jax.Array:
    return jnp.isfinite(value).all()


def _stats_by_path(stats: PyTree | None) -> dict[str, InputStats]:
    """Statistics by path; a tree of Flax variables may wrap them in `params`, which a parameter tree does not have."""
    if stats is None:
        return {}
    flat = jax.tree_util.tree_leaves_with_path(stats, is_leaf=lambda x: isinstance(x, InputStats))
    by_path = {path_str(path): leaf for path, leaf in flat if isinstance(leaf, InputStats)}
    short = {path.removeprefix("params/"): leaf for path, leaf in by_path.items()}
    return {**short, **by_path}


def compress_leaves(
    leaves: dict[str, Leaf], params: PyTree, progress: Callable[[int, int], None] | None = None
) -> PyTree:
    """`params` with every selected leaf replaced by `method.compress(matrix, stats, key)`.

    Leaves whose statistics are the same arrays are done one after the other, so that what a method prepares from them
    is made once; those of a `joint` method are done together. `progress` is called with the leaves done, and all.

    Raises:
        LeafError: a field of the result overflows its dtype (seen on concrete arrays).
    """
    done: dict[str, CompressedArray] = {}
    for group in _groups(leaves):
        prepared = _prepared(group)
        together = [prepared] if prepared[0].method.joint else [[leaf] for leaf in prepared]
        for part in together:
            arrays = on_shards(part, partial(_compressed, tuple(leaf.how for leaf in part)))
            done |= {leaf.path: _checked(leaf, array) for leaf, array in zip(part, arrays, strict=True)}
            if progress is not None:
                progress(len(done), len(leaves))
    return map_with_paths(lambda path, x: done.get(path, x), params)


def _groups(leaves: dict[str, Leaf]) -> list[list[Leaf]]:
    """The leaves by method and inputs, in the order of their first members."""
    groups: dict[Any, list[Leaf]] = {}
    for leaf in leaves.values():
        source = leaf.stats.source if leaf.stats is not None and leaf.stats.source else leaf.path
        groups.setdefault((leaf.method, source), []).append(leaf)
    return list(groups.values())


def _prepared(group: list[Leaf]) -> list[Leaf]:
    """The leaves with their statistics prepared, and without the name of the source: programs are shared by layers."""
    first = group[0]
    if first.stats is None:
        return group
    plain = [dataclasses.replace(leaf.stats, source="") for leaf in group if leaf.stats is not None]
    mesh = jax.sharding.get_abstract_mesh()
    here = not any(map(_compat.is_tracer, jax.tree.leaves(plain[0]))) and AxisType.Explicit not in mesh.axis_types
    if here and type(first.method).prepare is not Method.prepare:
        factor = _prepare(first.method, dataclasses.replace(plain[0], fisher_sum=None, examples=None)).factor
        plain = [dataclasses.replace(stats, factor=factor) for stats in plain]
    return [dataclasses.replace(leaf, stats=stats) for leaf, stats in zip(group, plain, strict=True)]


@partial(jax.jit, static_argnums=0)
def _prepare(method: Any, stats: InputStats) -> InputStats:
    return method.prepare(stats)


def _checked(leaf: Leaf, array: CompressedArray) -> CompressedArray:
    """The result, after a look at its values where they can be seen."""
    fields = [x for x in jax.tree.leaves(array) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not any(map(_compat.is_tracer, fields)) and not all(map(all_finite, fields)):
        stored = getattr(leaf.method, "scale_dtype", None)
        remedy = "write scale_dtype='float32'" if stored not in (None, "float32") else "scale the weight down first"
        raise LeafError(
            f"{leaf.path} {list(leaf.value.shape)}: {type(leaf.method).__name__} gives values that overflow "
            f"{stored or fields[0].dtype}: {remedy} for this leaf with a rule"
        )
    return array


@partial(jax.jit, static_argnums=0)
def _compressed(how: tuple[How, ...], inputs: list[Inputs]) -> list[CompressedArray]:
    """One compiled program a method and shape."""
    folded = [fold(w, in_axes, out_axes) for (_, in_axes, out_axes), (w, _, _) in zip(how, inputs, strict=True)]
    _, stats, keys = zip(*inputs, strict=True)
    arrays = how[0][0].compress_jointly(folded, stats=list(stats), keys=list(keys))
    return [
        unfold(array, w.shape, in_axes, out_axes)
        for array, (_, in_axes, out_axes), (w, _, _) in zip(arrays, how, inputs, strict=True)
    ]


def on_shards(leaves: Sequence[Leaf], fn: Callable[[list[Inputs]], list[Any]]) -> list[Any]:
    """`fn` on the weight, statistics and key of every leaf; results are sharded as their weights are.

    Under `jit` with automatic axes the sharding of a weight cannot be seen: there the compiler chooses that of the
    result, and methods of `sums` give the bytes of a single device only inside `jax.set_mesh`.

    Args:
        leaves: what `fn` takes together.
        fn: gives, for every leaf, an array or a compressed array of the leaf's shape.
    """
    shardings = [_sharding(leaf.value) for leaf in leaves]
    mesh = next((s.mesh for s in shardings if s is not None), None)
    if mesh is None:
        return fn([(_gathered_under_trace(leaf), leaf.stats, leaf.key) for leaf in leaves])
    inputs = [(_gathered(leaf, s, mesh), leaf.stats, leaf.key) for leaf, s in zip(leaves, shardings, strict=True)]
    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs))

    def placed(dense: list[PartitionSpec]) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(shapes, dense, mesh))

    final = placed([PartitionSpec() if s is None else s.spec for s in shardings])
    if AxisType.Explicit not in mesh.axis_types:
        return jax.device_put(fn(inputs), final)
    # The compiler cuts a computation as its result is cut: where sums must not be, the result is cut afterwards.
    inside = placed([_spec_inside(leaf, s) for leaf, s in zip(leaves, shardings, strict=True)])
    return jax.sharding.reshard(jax.sharding.auto_axes(fn, out_sharding=inside)(inputs), final)


def _spec_inside(leaf: Leaf, sharding: NamedSharding | None) -> PartitionSpec:
    """How a weight is cut while its method works on it: its matrix axes are whole where the order of sums matters."""
    spec = full_spec(None if sharding is None else sharding.spec, leaf.value.ndim)
    return PartitionSpec(*(e if d < leaf.lead or not leaf.method.sums else None for d, e in enumerate(spec)))


def _gathered(leaf: Leaf, sharding: NamedSharding | None, mesh: Any) -> Any:
    """The weight on the mesh, its matrix axes whole where the method needs that."""
    target = NamedSharding(mesh, _spec_inside(leaf, sharding))
    return (jax.sharding.reshard if _compat.is_tracer(leaf.value) else jax.device_put)(leaf.value, target)


def _gathered_under_trace(leaf: Leaf) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    if not leaf.method.sums or not _compat.is_tracer(leaf.value) or AxisType.Auto not in mesh.axis_types:
        return leaf.value
    matrix = [None] * (leaf.value.ndim - leaf.lead)
    spec = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * leaf.lead, *matrix)
    return jax.lax.with_sharding_constraint(leaf.value, spec)


def _sharding(value: Any) -> NamedSharding | None:
    """The sharding of a concrete array on a mesh, or of a tracer with explicit axes."""
    if _compat.is_tracer(value):
        sharding = jax.typeof(value).sharding
        return sharding if not sharding.mesh.empty and AxisType.Explicit in sharding.mesh.axis_types else None
    sharding = getattr(value, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None


def per_leaf(fn: Callable[[Leaf], Any], leaves: dict[str, Leaf], params: PyTree) -> PyTree:
    """A tree like `params` with `fn(leaf)` at selected leaves and None elsewhere."""
    return map_with_paths(lambda path, _: fn(leaves[path]) if path in leaves else None, params)
