"""What every compressed array is: a dataclass pytree with a logical shape and dtype, true bytes and `materialize()`."""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

PyTree = Any
Spec = tuple[Any, ...]  # one PartitionSpec entry a logical dimension, always of full length


def static(**kwargs: Any) -> Any:
    """A dataclass field that is metadata, not data: hashable, and part of the pytree's structure."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


T = TypeVar("T", bound="CompressedArray")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(static,))
def register(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen keyword-only dataclass and a pytree whose `static()` fields are metadata."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    return jax.tree_util.register_dataclass(
        cls,
        data_fields=[f.name for f in fields if not f.metadata.get("static")],
        meta_fields=[f.name for f in fields if f.metadata.get("static")],
    )


class CompressedArray:
    """A weight `[*L, in, out]` held in fewer bytes.

    `L` are stacked layers or experts. Every data field leads with `*L`, so slicing all fields with `scan`, `vmap` or an
    index gives the compressed slice; static fields never depend on `L`. Floating fields are trainable, integer fields
    are frozen. Fields may hold anything jax maps over (arrays, tracers, `ShapeDtypeStruct`, specs), hence nothing is
    checked at construction: the functions that make compressed arrays check their input instead.
    """

    dtype: np.dtype  # what materialize() returns

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Logical shape `[*L, in, out]`."""

    @abstractmethod
    def materialize(self) -> jax.Array:
        """The dense array, of `shape` and `dtype`."""

    @abstractmethod
    def field_specs(self, spec: Spec) -> dict[str, Any]:
        """For each data field, the `PartitionSpec` that follows the dense one (`spec`, an entry a dimension)."""

    def tiles(self, size: int) -> tuple[PyTree, Callable[[PyTree], jax.Array]] | None:
        """Cuts a `[in, out]` array into tiles of `size` consecutive rows, each dequantised on its own.

        Args:
            size: a multiple of `row_multiple` that divides `in`.

        Returns:
            The stored parts of all tiles, every array with a leading axis of `in / size`, and a function that makes the
            dense `[size, out]` of one slice of them; None where rows cannot be cut apart.
        """
        return None

    @property
    def row_multiple(self) -> int:
        """The smallest number of rows that a tile can have."""
        return self.shape[-2]

    def columns(self, ids: jax.Array) -> "CompressedArray | None":
        """The compressed array of outputs `ids` (`int[n]`), or None where columns cannot be picked."""
        return None

    def logical_spec(self) -> Spec:
        """The sharding of `shape` that the fields' own shardings (as jax types under explicit axes) amount to."""
        return full_spec(jax.typeof(getattr(self, self.data_fields[0])).sharding.spec, self.ndim)

    def logical_sharding(self) -> NamedSharding | None:
        """`logical_spec` on its mesh, where the fields carry shardings in their types; None otherwise."""
        fields = jax.tree.leaves(self)
        if any(isinstance(field, jax.ShapeDtypeStruct) and field.sharding is None for field in fields):
            return None
        mesh = jax.typeof(fields[0]).sharding.mesh
        if mesh.empty or AxisType.Explicit not in mesh.axis_types:
            return None
        return NamedSharding(mesh, PartitionSpec(*self.logical_spec()))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Container bytes of all data fields: what memory and disk really hold."""
        return nbytes(jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.size

    @property
    def data_fields(self) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(self) if not f.metadata.get("static"))  # type: ignore[arg-type]

    @property
    def static_fields(self) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(self) if f.metadata.get("static"))  # type: ignore[arg-type]

    def replace(self: T, **changes: Any) -> T:
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def astype(self: T, dtype: Any) -> T:
        """The same codes, materialised in another floating dtype."""
        return self.replace(dtype=np.dtype(dtype))

    def __getitem__(self: T, index: int) -> T:
        """Slice `index` of the leading stacked dimension, still compressed."""
        if self.ndim < 3:
            raise IndexError(f"{self} has no leading stacked dimension to index; call .materialize() first")
        return jax.tree.map(lambda field: field[index], self)

    def __repr__(self) -> str:
        try:
            what = f"{self.dtype.name}{list(self.shape)}, {self.bits_per_weight:.3g} bits a weight"
        except (AttributeError, TypeError, IndexError):  # fields that are not arrays, as in a tree of specs
            what = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.data_fields)
        meta = "".join(f", {name}={getattr(self, name)}" for name in self.static_fields if name != "dtype")
        return f"{type(self).__name__}({what}{meta})"


def is_compressed(x: Any) -> bool:
    """Whether `x` is a compressed leaf; the `is_leaf` to walk a parameter tree with."""
    return isinstance(x, CompressedArray)


def materialize(tree: PyTree) -> PyTree:
    """Replaces every compressed leaf by its dense array.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((8, 4))}
        >>> qparams = ej.quantize_params(params, ej.quantize.RTN(bits=8, group_size=None))
        >>> ej.materialize(qparams)["kernel"].shape
        (8, 4)
    """
    return jax.tree.map(lambda x: x.materialize() if is_compressed(x) else x, tree, is_leaf=is_compressed)


def nbytes(tree: PyTree) -> int:
    """Bytes that the arrays of `tree` occupy in memory and on disk (works on `ShapeDtypeStruct` too)."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def cut_rows(x: jax.Array, tiles: int) -> jax.Array:
    """`[rows, out]` as `[tiles, rows / tiles, out]`."""
    return jax.lax.reshape(x, (tiles, x.shape[0] // tiles, *x.shape[1:]))


def dense_struct(x: Any) -> Any:
    """The `ShapeDtypeStruct` that a model sees in place of a compressed leaf; anything else as it is."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_compressed(x) else x


def full_spec(spec: PartitionSpec | None, ndim: int) -> Spec:
    """`spec` padded with None to one entry a dimension."""
    entries = tuple(spec) if spec is not None else ()
    return entries + (None,) * (ndim - len(entries))
