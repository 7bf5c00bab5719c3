"""A compressed matrix made ready for products: in the order that kernels read, with a wish for the activations."""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.arrays.base import CompressedArray, Spec, register, static
from effjax.arrays.wrapping import Wrapping


@register
class Prepared(Wrapping):
    """The same weight as `array` was, made by `effjax.prepare` and undone by `effjax.restore`.

    Attributes:
        array: compressed `[*L, in, out]`; its fields are in the order of tiles where `tile` is not 0, so only
            `restore` and the kernels can read them.
        stored: dtypes that floating fields of `array` had before, in their order.
        tile: columns that lie together: fields are `[*L, out / tile, rows, tile]` under the shape they had; 0 leaves
            them as they are.
        activation_bits: what products do to their activations, see `effjax.ops.matmul`.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> w = ej.quantize.RTN(bits=8, group_size=None).quantize(jnp.eye(64))
        >>> ready = ej.prepare({"kernel": w}, activation_bits=8)["kernel"]
        >>> ready.activation_bits, ready.tile, bool(jnp.array_equal(ready.materialize(), w.materialize()))
        (8, 64, True)
    """

    array: CompressedArray
    stored: tuple[str, ...] = static(default=())
    tile: int = static(default=0)
    activation_bits: int | None = static(default=None)

    def materialize(self) -> jax.Array:
        return self.untiled().materialize()

    def columns(self, ids: jax.Array) -> CompressedArray | None:  # type: ignore[override]
        return self.untiled().columns(ids)

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        if self.tile:  # a cut of the columns would be one of whole tiles, which lie along the rows
            spec = (*spec[:-2], None, None)
        return {"array": self.array.replace(**self.array.field_specs(spec))}

    def logical_spec(self) -> Spec:
        return (*self.array.logical_spec()[:-2], None, None) if self.tile else self.array.logical_spec()

    def untiled(self) -> CompressedArray:
        """The array in the order that everything but the kernels reads."""
        if not self.tile:
            return self.array
        return jax.tree.map(
            lambda field: from_tiles(field, self.tile) if is_matrix(field, self.array) else field, self.array
        )

    def restore(self) -> CompressedArray:
        """The array as it was before `prepare`, to the byte."""
        dtypes = iter(self.stored)
        return jax.tree.map(
            lambda field: field.astype(next(dtypes)) if jnp.issubdtype(field.dtype, jnp.inexact) else field,
            self.untiled(),
        )


def is_matrix(field: Any, array: CompressedArray) -> bool:
    """Whether a field of `array` has its columns last, as codes and scales have and tables have not."""
    return field.ndim == array.ndim and field.shape[-1] == array.shape[-1]


def to_tiles(field: jax.Array, tile: int) -> jax.Array:
    """`[*L, rows, out]` in the order of `[*L, out / tile, rows, tile]`, under its own shape."""
    *lead, rows, out = field.shape
    return jnp.moveaxis(field.reshape(*lead, rows, out // tile, tile), -2, -3).reshape(field.shape)


def from_tiles(field: jax.Array, tile: int) -> jax.Array:
    """What `to_tiles` was given."""
    *lead, rows, out = field.shape
    return jnp.moveaxis(field.reshape(*lead, out // tile, rows, tile), -3, -2).reshape(field.shape)
