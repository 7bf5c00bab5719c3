"""Which entries of which axes go together: labels of axes, how they meet, and what follows for all of them.

Every entry of every axis of every parameter has a label, a number above 0. A traced array has *factors*: label arrays
of as many dimensions, of size 1 where they say nothing; an entry of the array exists as long as the labels of all
factors at its place are kept. The label 0 is kept always. A dimension in no factor may have any size, as that of a
broadcast. Where arrays meet, labels at the same place become equal: that is an edge; the connected components of all
edges are the sets that are cut together.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Factor = np.ndarray
FIXED = 0  # the label that is kept always


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """What is known of a traced array.

    Attributes:
        shape: of the array.
        factors: label arrays; no two of them say something about the same dimension.
        from_data: whether it depends on an input of the function that is no parameter.
        vanishes: whether entries of masked labels are 0 in the masked model.
    """

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()
    from_data: bool = False
    vanishes: bool = False

    def with_factors(self, factors: Iterable[Factor], shape: Sequence[int] | None = None) -> "Value":
        return dataclasses.replace(self, shape=self.shape if shape is None else tuple(shape), factors=tuple(factors))


def dims_of(factor: Factor) -> tuple[int, ...]:
    """The dimensions that a factor says something about."""
    return tuple(d for d, size in enumerate(factor.shape) if size > 1)


def along(labels: np.ndarray, dim: int, ndim: int) -> Factor:
    """A factor over one dimension."""
    return labels.reshape(tuple(-1 if d == dim else 1 for d in range(ndim)))


def fixed(shape: Sequence[int], dims: Iterable[int] | None = None) -> tuple[Factor, ...]:
    """Factors that keep these dimensions (all by default) as they are."""
    dims = range(len(shape)) if dims is None else dims
    return tuple(along(np.zeros(shape[d], np.int64), d, len(shape)) for d in dims if shape[d] > 1)


def is_fixed(factor: Factor) -> bool:
    return not factor.any()


@dataclasses.dataclass
class Coupling:
    """What one walk over a function finds out.

    Attributes:
        edges: pairs of label arrays that are equal, entry by entry.
        pins: labels that must stay, and why.
        splits: factors over several dimensions; of those, only one may be cut.
        pieces: factors of which a piece was taken along a dimension: `(factor, dim, start, stop, why)`.
        work: `(floating-point operations, factors)` of every product.
    """

    edges: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    pins: list[tuple[np.ndarray, str]] = dataclasses.field(default_factory=list)
    splits: list[Factor] = dataclasses.field(default_factory=list)
    pieces: list[tuple[Factor, int, int, int, str]] = dataclasses.field(default_factory=list)
    work: list[tuple[int, tuple[Factor, ...]]] = dataclasses.field(default_factory=list)

    def pin(self, labels: np.ndarray, why: str) -> None:
        labels = np.unique(labels)
        if labels.any():
            self.pins.append((labels[labels != FIXED], why))

    def couple(self, a: np.ndarray, b: np.ndarray, why: str) -> None:
        """The labels of `a` and `b` are kept or cut together; `why` is told where one of them must stay."""
        a, b = (x.ravel() for x in np.broadcast_arrays(a, b))
        differ = (a != FIXED) & (b != FIXED) & (a != b)
        if differ.any():
            self.edges.append((a[differ], b[differ]))
        self.pin(a[b == FIXED], why)
        self.pin(b[a == FIXED], why)

    def whole(self, factor: Factor, dims: Iterable[int], why: str) -> Factor:
        """The factor without `dims`: what it labels along them is kept or cut together."""
        for dim in dims:
            first = factor.take([0], dim)
            self.couple(first, factor, why)
            factor = first
        return factor

    def meet(self, factors: Iterable[Factor], why: str) -> tuple[Factor, ...]:
        """Factors of arrays that are combined entry by entry, as factors of the result."""
        todo, done = list(factors), []
        while todo:
            one = todo.pop(0)
            other = next((f for f in done if set(dims_of(f)) & set(dims_of(one))), None)
            if other is None:
                done.append(one)
            else:
                done = [f for f in done if f is not other]
                todo += self._join(one, other, why)
        return tuple(done)

    def _join(self, a: Factor, b: Factor, why: str) -> list[Factor]:
        mine, theirs = set(dims_of(a)), set(dims_of(b))
        shared, ndim = mine & theirs, a.ndim
        sizes = [max(pair) for pair in zip(a.shape, b.shape, strict=True)]
        for one, other in ((a, b), (b, a)):
            if is_fixed(one) and set(dims_of(other)) > shared:
                # The dimension stays; the other factor may still be cut along its others.
                return [one, self.whole(other, shared, why)]
        self.couple(a, b, why)
        if is_fixed(b):
            a = b
        for dim in sorted((mine | theirs) - shared):
            a = a.take([0], dim)
        return [a, *(along(np.zeros(sizes[d], np.int64), d, ndim) for d in sorted((mine | theirs) - shared))]

    def fix(self, value: Value, dims: Iterable[int], why: str) -> Value:
        """The value with `dims` kept as they are; what would be cut along one of them alone is pinned."""
        return value.with_factors(self.meet([*fixed(value.shape, dims), *value.factors], why))

    def contract(self, factors: Iterable[Factor], dims: Iterable[int], why: str | None) -> tuple[Factor, ...]:
        """Factors after `dims` (kept with size 1) were summed over.

        Args:
            why: pins what is cut along these dimensions alone; with None it may be cut, for it adds nothing.
        """
        gone, left = set(dims), []
        for factor in factors:
            over = set(dims_of(factor))
            if over <= gone and over:
                if why is not None:
                    self.pin(factor, why)
                continue
            left.append(self.whole(factor, over & gone, why or "summed over"))
        return tuple(left)

    def reshape(self, value: Value, shape: Sequence[int], why: str) -> Value:
        """Row-major reshape."""
        shape = tuple(shape)
        if 0 in shape:
            return Value(shape, fixed(shape), value.from_data, value.vanishes)
        factors, sizes = list(value.factors), list(value.shape)
        for (i, i_end), (j, j_end) in reversed(_segments(value.shape, shape)):
            source, target = sizes[i:i_end], list(shape[j:j_end])
            factors = self._reshape_segment(factors, sizes, i, source, target, why)
            sizes[i:i_end] = target
        return value.with_factors(factors, shape)

    def _reshape_segment(
        self, factors: list[Factor], sizes: list[int], at: int, source: list[int], target: list[int], why: str
    ) -> list[Factor]:
        """Factors after the dimensions of sizes `source` from `at` on became those of sizes `target`."""
        end = at + len(source)
        touching = [f for f in factors if any(at <= d < end for d in dims_of(f))]
        rest = [f.reshape(*f.shape[:at], *(1,) * len(target), *f.shape[end:]) for f in factors if not _has(touching, f)]
        if not touching:
            return rest
        labelled = sorted((f for f in touching if not is_fixed(f)), key=dims_of)
        shift, ndim = len(target) - len(source), len(sizes) - len(source) + len(target)
        for minor in labelled[1:]:  # the product of two axes could not be cut as a rectangle
            self.pin(minor, f"{why} merges them with another axis")
            outside = [d for d in dims_of(minor) if not at <= d < end]
            rest += [along(np.zeros(sizes[d], np.int64), d if d < at else d + shift, ndim) for d in outside]
        first = labelled[0] if labelled else np.zeros((1,) * len(sizes), np.int64)
        full = np.broadcast_to(first, (*first.shape[:at], *source, *first.shape[end:]))
        full = full.reshape(*first.shape[:at], *target, *first.shape[end:])
        seen: list[Factor] = []
        for dim in range(at, at + len(target)):
            one = full.take([0], dim)
            if full.shape[dim] > 1 and (full == one).all():  # all of it or nothing: the dimension stays
                seen.append(along(np.zeros(full.shape[dim], np.int64), dim, full.ndim))
                full = one
        if len(dims_of(full)) > 1:  # blocks, such as heads: they go as a whole, since code names the size of one
            last = dims_of(full)[-1]
            seen.append(along(np.zeros(full.shape[last], np.int64), last, full.ndim))
            full = self.whole(full, [last], f"{why}: a part of its block stays")
        if dims_of(full):
            seen.append(full)
        else:
            self.pin(full, f"{why}: all would go at once")
        if len(dims_of(full)) > 1:
            self.splits.append(full)
        return [*rest, *seen]

    def resolve(self, labels: int) -> tuple[np.ndarray, dict[int, str]]:
        """The component of every label up to `labels`, and why components that must stay do so."""
        while True:
            component = self._components(labels)
            pinned: dict[int, str] = {}
            for nodes, why in self.pins:
                for c in np.unique(component[nodes]).tolist():
                    pinned.setdefault(c, why)
            stays = np.isin(component, list(pinned))
            stays[FIXED] = True
            found = np.where(stays, -1, component)
            if not (self._resolve_splits(found) | self._resolve_pieces(found)):
                return component, pinned

    def _components(self, labels: int) -> np.ndarray:
        ends = [np.concatenate([e[i] for e in self.edges] or [np.zeros(0, np.int64)]) for i in (0, 1)]
        graph = coo_array((np.ones(len(ends[0]), bool), tuple(ends)), shape=(labels, labels))
        return connected_components(graph, directed=False)[1]

    def _resolve_splits(self, component: np.ndarray) -> bool:
        """Where several dimensions of a split axis could be cut, only the first of them is."""
        changed = False
        for factor in self.splits:
            seen = component[factor]
            varied = [d for d in dims_of(factor) if (seen != seen.take([0], d)).any()]
            if len(varied) > 1:
                self.whole(factor, varied[1:], "part of a block that is fixed elsewhere")
                changed = True
        return changed

    def _resolve_pieces(self, component: np.ndarray) -> bool:
        """A piece is found again at its place when all pieces of its length lose the same; else nothing may go."""
        changed = False
        for factor, dim, start, stop, why in self.pieces:
            seen, size = component[factor], stop - start
            if (seen == seen.take([0], dim)).all():
                continue
            if factor.shape[dim] % size == 0 and start % size == 0:
                blocks = seen.reshape(*seen.shape[:dim], -1, size, *seen.shape[dim + 1 :])
                if (blocks == blocks.take([0], dim)).all():
                    continue
            self.pin(factor, why)
            changed |= bool((seen >= 0).any())
        return changed


def _has(factors: list[Factor], factor: Factor) -> bool:
    return any(f is factor for f in factors)


def _segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Runs of dimensions of equal products, `((old from, to), (new from, to))`, as short as they can be."""
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (left := math.prod(old[a:i])) != (right := math.prod(new[b:j])):
            if left < right:
                i += 1
            else:
                j += 1
        found.append(((a, i), (b, j)))
    return found
