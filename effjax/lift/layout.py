"""How the axes of a stored matrix make up the dimensions the model sees: transposes and reshapes as bookkeeping."""

import dataclasses
import math

Atom = tuple[int, int]  # (axis of the stored array, position among that axis's parts, major first)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A permutation of parts of stored axes.

    Every stored axis is cut into parts ("atoms"); every dimension of the model's view is an ordered product of atoms.
    Transposing, splitting and merging dimensions change only this description, never the stored codes. Atoms of size 1
    are in no dimension.

    Attributes:
        axes: for each stored axis, the sizes of its atoms, major first.
        dims: for each dimension of the view, its atoms, major first.
    """

    axes: tuple[tuple[int, ...], ...]
    dims: tuple[tuple[Atom, ...], ...]

    @classmethod
    def of_shape(cls, shape: tuple[int, ...]) -> "Layout":
        """The stored array as it is."""
        dims = tuple(((axis, 0),) if size > 1 else () for axis, size in enumerate(shape))
        return cls(axes=tuple((size,) for size in shape), dims=dims)

    def size_of(self, atom: Atom) -> int:
        return self.axes[atom[0]][atom[1]]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(map(self.size_of, dim)) for dim in self.dims)

    @property
    def is_identity(self) -> bool:
        return self == Layout.of_shape(tuple(math.prod(sizes) for sizes in self.axes))

    def atoms_of(self, axis: int) -> tuple[Atom, ...]:
        """The atoms of a stored axis, major first, without those of size 1."""
        return tuple((axis, i) for i, size in enumerate(self.axes[axis]) if size > 1)

    def transpose(self, permutation: tuple[int, ...]) -> "Layout":
        return dataclasses.replace(self, dims=tuple(self.dims[i] for i in permutation))

    def expand(self, positions: tuple[int, ...]) -> "Layout":
        """New dimensions of size 1 so that they stand at `positions` of the result."""
        old = iter(self.dims)
        ndim = len(self.dims) + len(positions)
        return dataclasses.replace(self, dims=tuple(() if i in positions else next(old) for i in range(ndim)))

    def squeeze(self, dimensions: tuple[int, ...]) -> "Layout":
        return dataclasses.replace(self, dims=tuple(d for i, d in enumerate(self.dims) if i not in dimensions))

    def reshape(self, shape: tuple[int, ...]) -> "Layout | None":
        """The layout after a row-major reshape, or None when an atom would be cut at a fraction."""
        layout, queue, dims = self, [atom for dim in self.dims for atom in dim], []
        for size in shape:
            dim: list[Atom] = []
            while size > 1:
                if not queue:
                    return None
                atom = queue.pop(0)
                if size % layout.size_of(atom):
                    if layout.size_of(atom) % size:
                        return None
                    layout, rename = layout._split(atom, size)
                    queue = [(atom[0], atom[1] + 1), *map(rename, queue)]
                    dims = [[rename(a) for a in d] for d in dims]
                    dim = [rename(a) for a in dim]
                size //= layout.size_of(atom)
                dim.append(atom)
            dims.append(dim)
        return None if queue else dataclasses.replace(layout, dims=tuple(map(tuple, dims)))

    def _split(self, atom: Atom, major: int):
        """Cuts `atom` into `major` times the rest; atoms behind it on the same axis move up by one."""
        axis, position = atom
        sizes = self.axes[axis]
        sizes = (*sizes[:position], major, sizes[position] // major, *sizes[position + 1 :])

        def rename(other: Atom) -> Atom:
            return (axis, other[1] + 1) if other[0] == axis and other[1] > position else other

        return dataclasses.replace(self, axes=(*self.axes[:axis], sizes, *self.axes[axis + 1 :])), rename

    def whole_axis(self, dim: int) -> int | None:
        """The stored axis that dimension `dim` is exactly, or None."""
        atoms = self.dims[dim]
        if not atoms or atoms != self.atoms_of(atoms[0][0]):
            return None
        return atoms[0][0]

    def without_axis(self, axis: int) -> "Layout":
        """The layout after the stored array was indexed along `axis`; dimensions of that axis must be gone already."""
        dims = tuple(tuple((a - (a > axis), i) for a, i in dim) for dim in self.dims)
        return Layout(axes=self.axes[:axis] + self.axes[axis + 1 :], dims=dims)

    def with_axis_in_front(self, size: int) -> "Layout":
        """The layout after a new stored axis of `size` was put in front, seen as a new first dimension."""
        dims = tuple(tuple((a + 1, i) for a, i in dim) for dim in self.dims)
        return Layout(axes=((size,), *self.axes), dims=(((0, 0),) if size > 1 else (), *dims))

    def resized(self, shape: tuple[int, ...]) -> "Layout":
        """The same layout over stored axes of other sizes (a shard): only the major atom of an axis may shrink."""
        axes = tuple((size // math.prod(sizes[1:]), *sizes[1:]) for sizes, size in zip(self.axes, shape, strict=True))
        gone = {(axis, 0) for axis, sizes in enumerate(axes) if sizes[0] == 1}
        return Layout(axes=axes, dims=tuple(tuple(a for a in dim if a not in gone) for dim in self.dims))
