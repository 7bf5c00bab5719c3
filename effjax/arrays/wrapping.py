"""What leaves share that hold another compressed array of the same shape, and something for each of its inputs."""

from typing import Any, TypeVar

import jax
import numpy as np

from effjax.arrays.base import CompressedArray, Spec

W = TypeVar("W", bound="Wrapping")


class Wrapping(CompressedArray):
    """A weight whose logical shape, dtype and sharding are those of the array inside; subclasses declare the field.

    Attributes:
        array: compressed `[*L, in, out]`.
    """

    array: CompressedArray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.array.dtype

    def astype(self: W, dtype: Any) -> W:
        return self.replace(array=self.array.astype(dtype))

    def columns(self: W, ids: jax.Array) -> W | None:
        array = self.array.columns(ids)
        return None if array is None else self.replace(array=array)

    def logical_spec(self) -> Spec:
        return self.array.logical_spec()
