"""One table for the weights of a whole model: `share_params` makes it, `expand` reads it, leaf by leaf."""

import dataclasses
import math
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax import _compat
from effjax.arrays.base import PyTree
from effjax.arrays.shared import Shared, with_table
from effjax.arrays.view import fold, unfold
from effjax.errors import LeafError
from effjax.paths import Where, map_with_paths
from effjax.transform import Leaf, select


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharing:
    """Base of the methods that share one table among leaves; `sketch_params` makes a table a leaf instead.

    Attributes:
        ratio: weights a slot stands for; the table has `ceil(weights / ratio)` slots.
        table_std: spread of the table. A leaf reads it times its own spread (root mean square) over this, rounded to a
            power of two.
        start: "init" for freshly drawn weights: a slot is the sum of the weights that read it over the root of their
            number, which keeps the spread of every leaf (a mean would shrink it). "fit" for trained weights: the table
            of the smallest squared error.
    """

    ratio: float = 8.0
    table_std: float = 1.0
    start: Literal["init", "fit"] = "init"
    block: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if not 1 <= self.ratio < math.inf:
            raise ValueError(f"ratio={self.ratio}: at least 1 weight a slot")
        if not 2.0**-60 <= self.table_std <= 2.0**60:
            raise ValueError(f"table_std={self.table_std}: choose a positive spread, such as 1.0")
        if self.start not in ("init", "fit"):
            raise ValueError(f"start={self.start!r}: 'init' for freshly drawn weights, 'fit' for trained ones")

    def check(self, shape: tuple[int, ...]) -> None:
        """Every weight can be shared; that the table is large enough is seen when all leaves are known."""

    def slots(self, weights: int) -> int:
        """Size of the table for so many weights."""
        return math.ceil(weights / self.ratio)


@partial(jax.tree_util.register_dataclass, data_fields=["table", "params"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class SharedParams:
    """The parameters of a model of which some leaves read one table.

    The table cannot be in the leaves: a pytree has no aliases, so that after a `jit` or an optimiser step every leaf
    would hold a table of its own. Hence it stands here, once, and `sketch_params`, which gives a tree with one
    compressed array a leaf, cannot make it. It is a pytree of plain arrays: `partition`, optimisers, `jit`, `nbytes`
    and shardings take it as any other. `effjax.io` stores trees of dicts: save `{"table": shared.table, "params":
    shared.params}`, and make it again with `SharedParams(**loaded)`.

    Attributes:
        table: `float[slots]`, trainable.
        params: tree of the model's structure, with `Shared` leaves without a table (inside a `View` where the weight is
            no matrix), and the other leaves as they were.
    """

    table: Float[Array, " slots"]
    params: PyTree

    def replace(self, **changes: Any) -> "SharedParams":
        return dataclasses.replace(self, **changes)


def share_params(params: PyTree, method: Sharing, *, key: jax.Array, where: Where | None = None) -> SharedParams:
    """Lets the matrices of a whole model read one table of `ceil(weights / ratio)` slots.

    Pure: the same inputs and key give the same bytes. Works under `jax.jit` and `jax.eval_shape`; leaves are read one
    after the other.

    Args:
        params: tree of dense parameters: an initialisation for `start="init"`, a checkpoint for `start="fit"`.
        method: `ROAST(...)` or `StableRPS(...)`.
        key: random key, of the hash function.
        where: pattern or predicate of leaves; matrices of dense layers and convolutions by default. Stacked leaves
            `[layers, in, out]` get a copy of the table a layer when expanded: unstack large ones.

    Raises:
        LeafError: a selected leaf that is compressed, not a floating matrix, not finite or all zeros; a table smaller
            than a block; more weights or slots than 32 bits count.
        RuleError: nothing is selected.
        TypeError: a method that makes a table a leaf.

    Example:
        >>> import effjax as ej, jax, jax.numpy as jnp
        >>> up, down = jnp.ones((16, 64)), jnp.ones((64, 16))
        >>> params = {"up": {"kernel": up}, "down": {"kernel": down, "bias": jnp.zeros(16)}}
        >>> shared = share_params(params, ej.sketch.StableRPS(ratio=8), key=jax.random.key(0))
        >>> shared.table.shape, expand(shared)["down"]["kernel"].shape
        ((256,), (64, 16))
    """
    if not isinstance(method, Sharing):
        raise TypeError(f"{method!r} does not share a table among leaves: use ROAST or StableRPS, or sketch_params")
    leaves = select(params, method, where=where, stats=None, key=None)
    weights = sum(leaf.value.size for leaf in leaves.values())
    slots = method.slots(weights)
    if slots < (method.block or 1):
        raise LeafError(
            f"{weights} weights at ratio={method.ratio:g} leave {slots} slots, fewer than a block of {method.block}: "
            "choose a smaller ratio or block"
        )
    if weights >= 2**32 or slots >= 2**31:
        raise LeafError(f"{weights} weights in {slots} slots: at most 2^32 and 2^31; share fewer leaves, with where=")
    seed = jax.random.bits(key, (), jnp.uint32)
    total, weight = jnp.zeros(slots), jnp.zeros(slots)
    shared: dict[str, Any] = {}
    place = 0
    for path, leaf in leaves.items():
        in_axes, out_axes = _axes(leaf)
        matrix = fold(leaf.value, in_axes, out_axes)
        if not _compat.is_tracer(matrix) and not bool(jnp.any(matrix)):
            raise LeafError(f"{path} {list(matrix.shape)} is all zeros, so it has no scale: leave it out with where=")
        fixed = {"block": method.block, "start": method.start}
        array, total, weight = _added(matrix, seed, jnp.uint32(place), total, weight, method.table_std, **fixed)
        shared[path] = unfold(array, leaf.value.shape, in_axes, out_axes)
        place += leaf.value.size
    table = _started(total, weight, start=method.start).astype(
        jnp.result_type(*(leaf.value.dtype for leaf in leaves.values()))
    )
    return SharedParams(table, map_with_paths(lambda path, x: shared.get(path, x), params))


def expand(shared: SharedParams) -> PyTree:
    """The parameters with the table in every leaf that reads it: for `lift(model.apply)`, or for `materialize`.

    Nothing is computed and nothing is copied (but for stacked leaves, which hold the table once a layer): call it
    inside the function that is differentiated. The gradient of the one table is then the sum over all leaves, and no
    more than one leaf is dense at a time where the model runs under `lift`.

    Example:
        >>> import effjax as ej, jax, jax.numpy as jnp
        >>> shared = share_params({"kernel": jnp.ones((8, 8))}, ej.sketch.ROAST(ratio=4), key=jax.random.key(0))
        >>> apply = ej.lift(lambda p, x: x @ p["kernel"])
        >>> loss = lambda table: apply(expand(shared.replace(table=table)), jnp.ones(8)).sum()
        >>> jax.grad(loss)(shared.table).shape
        (16,)
    """
    return map_with_paths(lambda _, leaf: with_table(leaf, shared.table), shared.params)


def _axes(leaf: Leaf) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The leaf's axes; two leading axes or more are those of a convolution's window, and inputs here.

    One leading axis stays, since it may be that of layers which a scan slices.
    """
    lead = tuple(range(-leaf.value.ndim, leaf.lead - leaf.value.ndim))
    return ((*lead, *leaf.in_axes), leaf.out_axes) if leaf.lead > 1 else (leaf.in_axes, leaf.out_axes)


def per_matrix(fn: Any, array: Shared, *args: jax.Array, out: PyTree) -> PyTree:
    """Folds `out = fn(array, *args, out)` over the stacked matrices of `array`, which `args` are stacked like."""
    lead = array.ndim - 2
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[lead:]), (array, *args))
    out, _ = jax.lax.scan(lambda out, parts: (fn(*parts, out), None), out, flat)
    return out


@partial(jax.jit, static_argnames=("block", "start"))
def _added(
    matrix: jax.Array,
    seed: jax.Array,
    place: jax.Array,
    total: jax.Array,
    weight: jax.Array,
    table_std: Any,
    *,
    block: int | None,
    start: str,
) -> tuple[Shared, jax.Array, jax.Array]:
    """The leaf without its table, and the sums of the table with those of the leaf."""
    *lead, n, out = matrix.shape
    spread = jnp.sqrt(jnp.mean(jnp.square(matrix.astype(jnp.float32)), axis=(-2, -1)))
    exponent = jnp.round(jnp.log2(spread / table_std)).clip(-60, 60)  # float32 holds the squares of scales
    index = jnp.arange(math.prod(lead), dtype=jnp.uint32).reshape(lead)
    array = Shared(
        seed=jnp.broadcast_to(seed, lead),
        start=place + index * jnp.uint32(n * out),
        exponent=exponent.astype(jnp.int32),
        in_features=n,
        out_features=out,
        block=block,
        dtype=np.dtype(matrix.dtype),
    )

    def add(array: Shared, w: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        slot, factor = array.slots_and_factors(jnp.arange(n), total.size)
        w = w.astype(jnp.float32)
        value, square = (factor * w, factor**2) if start == "fit" else (w / factor, jnp.ones_like(factor))
        return sums[0].at[slot].add(value), sums[1].at[slot].add(square)

    return array, *per_matrix(add, array, matrix, out=(total, weight))


@partial(jax.jit, static_argnames="start")
def _started(total: jax.Array, weight: jax.Array, *, start: str) -> jax.Array:
    weight = jnp.where(weight > 0, weight, 1)
    return total / (weight if start == "fit" else jnp.sqrt(weight))
