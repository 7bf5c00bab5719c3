"""What the transforms over parameter trees share: checking first, one compiled call a kind of leaf, keys by name."""

import dataclasses
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax import _compat
from effjax.arrays.base import CompressedArray, PyTree, is_compressed
from effjax.arrays.view import fold, unfold
from effjax.errors import CalibrationError, LeafError
from effjax.lift.calibrate import InputStats
from effjax.paths import Where, leaves_with_paths, map_with_paths
from effjax.rules import assign, default_axes


class Method:
    """Base of the methods: frozen keyword-only dataclasses of hyper-parameters.

    Attributes:
        needs: statistics the method asks `calibrate` for.
        needs_key: whether it draws random numbers.
    """

    needs: frozenset[str] = frozenset()
    needs_key: bool = False

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises LeafError when a weight `[*L, in, out]` of this shape cannot be taken."""


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
    def matrix_shape(self) -> tuple[int, ...]:
        """`[*L, in, out]`."""
        return jax.eval_shape(self.fold, self.value).shape

    def fold(self, w: Any) -> jax.Array:
        return fold(w, self.in_axes, self.out_axes)

    def unfold(self, array: CompressedArray) -> CompressedArray:
        return unfold(array, self.value.shape, self.in_axes, self.out_axes)


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
    own = jax.random.fold_in(key, zlib.crc32(path.encode())) if needs_key else None
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
    from effjax.paths import path_str

    by_path = {path_str(path): leaf for path, leaf in flat if isinstance(leaf, InputStats)}
    short = {path.removeprefix("params/"): leaf for path, leaf in by_path.items()}
    return {**short, **by_path}


def compress_leaves(leaves: dict[str, Leaf], params: PyTree) -> PyTree:
    """`params` with every selected leaf replaced by `method.compress(matrix, stats, key)`."""
    return map_with_paths(lambda path, x: leaves[path].unfold(_compress(leaves[path])) if path in leaves else x, params)


def _compress(leaf: Leaf) -> CompressedArray:
    return compressed(leaf.method, leaf.fold(leaf.value), leaf.stats, leaf.key)


@partial(jax.jit, static_argnums=0)
def compressed(method: Any, w: jax.Array, stats: InputStats | None, key: jax.Array | None) -> CompressedArray:
    """One compiled program a method and shape."""
    return method.compress(w, stats=stats, key=key)


def per_leaf(fn: Callable[[Leaf], Any], leaves: dict[str, Leaf], params: PyTree) -> PyTree:
    """A tree like `params` with `fn(leaf)` at selected leaves and None elsewhere."""
    return map_with_paths(lambda path, _: fn(leaves[path]) if path in leaves else None, params)
