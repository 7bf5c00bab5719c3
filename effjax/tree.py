"""Functions over parameter trees with compressed leaves: what is trainable, how large, how far from the original."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from effjax.arrays.base import PyTree, is_compressed, nbytes
from effjax.paths import leaves_with_paths


def partition(params: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree into floating arrays (trainable) and the rest (frozen), each with None in the other's places.

    The inner arrays of compressed leaves are split too: scales, tables and factors train, codes stay.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> params = ej.quantize_params({"kernel": jnp.ones((32, 8))}, ej.quantize.RTN(bits=4, group_size=32))
        >>> trainable, frozen = ej.partition(params)
        >>> trainable["kernel"].codes is None, frozen["kernel"].scales is None
        (True, True)
        >>> restored = ej.combine(trainable, frozen)
    """

    def keep(floating: bool) -> PyTree:
        return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) == floating else None, params)

    return keep(True), keep(False)


def combine(*trees: PyTree) -> PyTree:
    """Joins trees that `partition` split: at every place the first that is not None."""
    return jax.tree.map(
        lambda *leaves: next((leaf for leaf in leaves if leaf is not None), None), *trees, is_leaf=lambda x: x is None
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafReport:
    """One leaf before and after.

    Attributes:
        path, shape, kind: its name, logical shape, and type after.
        bytes_before, bytes_after: container bytes.
        relative_error: Frobenius norm of the difference over that of the original; None for abstract leaves.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    bytes_before: int
    bytes_after: int
    relative_error: float | None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_after / max(1, math.prod(self.shape))


@dataclasses.dataclass(frozen=True)
class Report:
    """All leaves before and after; prints as a table."""

    leaves: tuple[LeafReport, ...]

    @property
    def bytes_before(self) -> int:
        return sum(leaf.bytes_before for leaf in self.leaves)

    @property
    def bytes_after(self) -> int:
        return sum(leaf.bytes_after for leaf in self.leaves)

    @property
    def ratio(self) -> float:
        return self.bytes_before / max(1, self.bytes_after)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        total = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "ratio": self.ratio}
        return {**total, "leaves": [dataclasses.asdict(leaf) for leaf in self.leaves]}

    def __str__(self) -> str:
        width = max([len(leaf.path) for leaf in self.leaves] + [5])
        lines = [f"{'leaf':<{width}}  {'kind':<12} {'bytes':>12} {'before':>12} {'bits/weight':>11} {'rel. error':>10}"]
        for leaf in self.leaves:
            error = "" if leaf.relative_error is None else f"{leaf.relative_error:.2e}"
            lines.append(
                f"{leaf.path:<{width}}  {leaf.kind:<12} {leaf.bytes_after:>12,} {leaf.bytes_before:>12,} "
                f"{leaf.bits_per_weight:>11.3f} {error:>10}"
            )
        lines.append(
            f"{'total':<{width}}  {'':<12} {self.bytes_after:>12,} {self.bytes_before:>12,} {self.ratio:>10.2f}x"
        )
        return "\n".join(lines)


def report(before: PyTree, after: PyTree) -> Report:
    """Compares two trees leaf by leaf: bytes, bits a weight, relative error.

    Raises:
        KeyError: the trees do not have the same leaves.
    """
    old, new = dict(leaves_with_paths(before)), dict(leaves_with_paths(after))
    if old.keys() != new.keys():
        raise KeyError(f"the trees differ in {sorted(old.keys() ^ new.keys())[:3]}")
    return Report(tuple(_compare(path, old[path], new[path]) for path in old))


def _compare(path: str, old: Any, new: Any) -> LeafReport:
    concrete = not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((old, new)))
    return LeafReport(
        path=path,
        shape=tuple(new.shape),
        kind=kind_of(new),
        bytes_before=nbytes(old),
        bytes_after=nbytes(new),
        relative_error=float(_relative_error(old, new)) if concrete else None,
    )


def kind_of(leaf: Any) -> str:
    """What a leaf is, in a word: the compressed type, or the dtype."""
    if not is_compressed(leaf):
        return jnp.dtype(leaf.dtype).name
    return kind_of(leaf.array) if hasattr(leaf, "array") else type(leaf).__name__


@jax.jit
def _relative_error(old: Any, new: Any) -> jax.Array:
    a, b = (jnp.asarray(x.materialize() if is_compressed(x) else x).astype(jnp.float32) for x in (old, new))
    return jnp.linalg.norm((b - a).ravel()) / jnp.maximum(jnp.linalg.norm(a.ravel()), 1e-30)


def summary(params: PyTree) -> str:
    """A table of the leaves of one tree: kind, shape, bytes, bits a weight."""
    rows = [
        (path, kind_of(x), str(list(x.shape)), nbytes(x), 8 * nbytes(x) / max(1, math.prod(x.shape)))
        for path, x in leaves_with_paths(params)
    ]
    width = max([len(row[0]) for row in rows] + [5])
    lines = [
        f"{path:<{width}}  {kind:<12} {shape:<20} {size:>12,} {bits:>8.3f}" for path, kind, shape, size, bits in rows
    ]
    return "\n".join([*lines, f"{'total':<{width}}  {'':<12} {'':<20} {nbytes(params):>12,}"])
