"""Low-rank adapters (LoRA) on compressed leaves: added as a part of a sum, trained alone, taken off again."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from effjax.arrays.adapter import Adapter
from effjax.arrays.base import CompressedArray, PyTree, is_compressed
from effjax.arrays.sum import Sum
from effjax.arrays.view import View
from effjax.errors import LeafError, RuleError
from effjax.paths import Where, leaves_with_paths, map_with_paths, matches


def add_lora(
    params: PyTree,
    rank: int,
    *,
    key: jax.Array,
    alpha: float | None = None,
    where: Where | None = None,
    dtype: Any = jnp.float32,
) -> PyTree:
    """Puts a low-rank adapter beside compressed weights: `W` becomes `W + a @ b`.

    `a` is drawn from a normal distribution of deviation `alpha / (rank * sqrt(in))`, `b` is zero: the function is
    unchanged until `b` is trained. LoRA's factor `alpha / rank` (Hu et al. 2021, section 4.1) is held in `a`: a step of
    `b` moves the weight as in LoRA, a step of `a` as with `alpha = rank`.

    The base stays compressed: its codes are frozen, products with it keep no dense copy for the gradient, and
    `partition_specs`, `effjax.io`, `lift` take the result as any other leaf. Works under `jax.eval_shape`.

    Args:
        params: tree with compressed leaves `[*L, in, out]`; stacked leaves get stacked adapters.
        rank: columns of `a` and rows of `b`.
        key: random key; every leaf draws by its own name.
        alpha: scale of the update, `rank` by default.
        where: pattern or predicate of leaves; all compressed leaves by default.
        dtype: of `a` and `b`.

    Returns:
        The same tree with `Sum(parts=(base, Adapter))` (inside a `View` where the leaf is one).

    Raises:
        ValueError: a rank below 1, or a dtype that is not floating.
        LeafError: a selected leaf is dense, has an adapter already, or is smaller than the rank.
        RuleError: nothing is selected.

    Example:
        >>> import effjax as ej, jax, jax.numpy as jnp
        >>> params = ej.quantize_params({"kernel": jnp.ones((64, 32))}, ej.quantize.RTN(bits=4, group_size=32))
        >>> adapted = ej.add_lora(params, 4, key=jax.random.key(0))
        >>> ej.nbytes(adapted) - ej.nbytes(params) == 4 * 4 * (64 + 32)
        True
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: choose at least 1")
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"dtype={dtype!r} of an adapter: choose a floating one")
    scale = 1.0 if alpha is None else alpha / rank
    chosen = [
        (path, leaf)
        for path, leaf in leaves_with_paths(params)
        if (is_compressed(leaf) if where is None else matches(where, path, leaf))
    ]
    if not chosen:
        selected = "no leaf is compressed" if where is None else f"where={where!r} matches no leaf"
        raise RuleError(f"{selected}: quantize first, e.g. ej.quantize_params(params, ej.quantize.RTN(bits=4))")
    for path, leaf in chosen:
        _check(path, leaf, rank)
    paths = {path for path, _ in chosen}

    def adapted(path: str, leaf: Any) -> Any:
        if path not in paths:
            return leaf
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return map_matrix(lambda base: _with_adapter(base, rank, scale, own, dtype), leaf)

    return map_with_paths(adapted, params)


def _check(path: str, leaf: Any, rank: int) -> None:
    if not is_compressed(leaf):
        shape = f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(getattr(leaf, 'shape', ()))}"
        raise LeafError(
            f"{path} is dense ({shape}): an adapter is a part of a sum of compressed parts; quantize the leaf "
            "(RTN(bits=8, group_size=None) is nearly exact), or leave it out with where="
        )
    if has_adapter(leaf):
        raise LeafError(f"{path} has an adapter already: merge it (merge_adapters) or drop it (drop_adapters) first")
    smallest = min(map_matrix(lambda base: base, leaf, unwrap=True).shape[-2:])
    if rank > smallest:
        raise LeafError(f"{path} {list(leaf.shape)}: rank={rank} is more than its {smallest} inputs or outputs")


def _with_adapter(base: CompressedArray, rank: int, scale: float, key: jax.Array, dtype: Any) -> Sum:
    *lead, n, out = base.shape
    a = jax.random.normal(key, (*lead, n, rank), jnp.float32) * (scale / math.sqrt(n))
    adapter = Adapter(a=a.astype(dtype), b=jnp.zeros((*lead, rank, out), dtype), dtype=base.dtype)
    return Sum(parts=(*(base.parts if isinstance(base, Sum) else (base,)), adapter))


def map_matrix(fn: Any, leaf: CompressedArray, *, unwrap: bool = False) -> Any:
    """`fn` on the matrix `[*L, in, out]` of a leaf: on the array inside a `View`, which is put around the result.

    Args:
        unwrap: give the result without the view.
    """
    if isinstance(leaf, View):
        inner = fn(leaf.array)
        return inner if unwrap else leaf.replace(array=inner)
    return fn(leaf)


def has_adapter(leaf: Any) -> bool:
    """Whether a leaf carries an adapter."""
    if isinstance(leaf, View):
        return has_adapter(leaf.array)
    return isinstance(leaf, Sum) and any(isinstance(part, Adapter) for part in leaf.parts)


def split_adapter(matrix: Sum) -> tuple[CompressedArray, tuple[Adapter, ...]]:
    """The base of a sum without its adapters, and the adapters."""
    rest = tuple(part for part in matrix.parts if not isinstance(part, Adapter))
    adapters = tuple(part for part in matrix.parts if isinstance(part, Adapter))
    return (rest[0] if len(rest) == 1 else Sum(parts=rest)), adapters


def partition_adapters(params: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree into the factors of its adapters (to train) and everything else, scales and norms included.

    Each has None in the other's places; `effjax.combine` joins them.

    Raises:
        LeafError: no leaf carries an adapter.

    Example:
        >>> import effjax as ej, jax, jax.numpy as jnp
        >>> params = ej.quantize_params({"kernel": jnp.ones((64, 32))}, ej.quantize.RTN(bits=4, group_size=32))
        >>> adapters, frozen = ej.partition_adapters(ej.add_lora(params, 4, key=jax.random.key(0)))
        >>> [x.shape for x in jax.tree.leaves(adapters)], len(jax.tree.leaves(frozen))
        ([(64, 4), (4, 32)], 3)
    """
    if not any(has_adapter(leaf) for _, leaf in leaves_with_paths(params)):
        raise LeafError("no leaf carries an adapter: add them with add_lora(params, rank, key=key)")

    def keep(adapters: bool) -> PyTree:
        def part(x: Any) -> Any:
            return x if isinstance(x, Adapter) == adapters else jax.tree.map(lambda _: None, x)

        return jax.tree.map(part, params, is_leaf=lambda x: isinstance(x, Adapter))

    return keep(True), keep(False)


def drop_adapters(params: PyTree) -> PyTree:
    """The tree before `add_lora`: the same bytes, without the adapters.

    Example:
        >>> import effjax as ej, jax, jax.numpy as jnp
        >>> params = ej.quantize_params({"kernel": jnp.ones((64, 32))}, ej.quantize.RTN(bits=4, group_size=32))
        >>> type(ej.drop_adapters(ej.add_lora(params, 4, key=jax.random.key(0)))["kernel"]).__name__
        'Quantized'
    """
    return map_with_paths(
        lambda _, leaf: map_matrix(lambda m: split_adapter(m)[0], leaf) if has_adapter(leaf) else leaf, params
    )
