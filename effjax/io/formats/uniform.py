"""Uniform grids between a file and a leaf: a packed stream, scales and integer zero points per group, on the host."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from effjax.arrays.base import CompressedArray
from effjax.arrays.permuted import Permuted
from effjax.arrays.quantized import Quantized
from effjax.errors import CheckpointError, LeafError
from effjax.io.formats import words


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Uniform:
    """`W[k, n] = scales[g(k), n] * (code[k, n] - zeros[g(k), n])`, rows in the order of the model.

    Attributes:
        stream: the codes, packed down the inputs.
        scales: one a group and output.
        zeros: integer zero points in `[0, 2**bits)`, or None for the centre `2**(bits-1)`.
        bits: of a code.
        inputs: rows of the weight.
        group_size: rows of a group, of which the last may have fewer.
        group_of_row: the group of each row, or None where groups are runs of `group_size` rows.
    """

    stream: UInt8[np.ndarray, "bytes out"]
    scales: Float[np.ndarray, "groups out"]
    zeros: UInt8[np.ndarray, "groups out"] | None
    bits: int
    inputs: int
    group_size: int
    group_of_row: Int[np.ndarray, "in"] | None = None


def to_leaf(name: str, weight: Uniform, dtype: Any) -> CompressedArray:
    """The leaf of the same values: `Quantized`, inside `Permuted` where the groups are not runs of rows.

    Groups of unequal sizes (the last one of inputs that `group_size` does not divide) are cut into pieces of their
    greatest common divisor, each with its own copy of scale and zero point.

    Raises:
        CheckpointError: a group that no row belongs to.

    Example:
        >>> stream = words.pack(np.zeros((12, 2), np.uint8), 4)
        >>> scales = np.ones((2, 2), np.float16)  # groups of 8 and of 4 rows
        >>> weight = Uniform(stream=stream, scales=scales, zeros=None, bits=4, inputs=12, group_size=8)
        >>> leaf = to_leaf("m", weight, "float32")
        >>> leaf.shape, leaf.group_size
        ((12, 2), 4)
    """
    groups = weight.scales.shape[0]
    stream, order = weight.stream, None
    if weight.group_of_row is None:
        sizes = np.minimum(weight.group_size, weight.inputs - weight.group_size * np.arange(groups))
    else:
        order = np.argsort(weight.group_of_row, kind="stable").astype(np.int32)
        sizes = np.bincount(weight.group_of_row, minlength=groups)
        if not sizes.all():
            raise CheckpointError(
                f"{name}.g_idx gives group {int(np.argmin(sizes))} of {groups} no input; copy the checkpoint again, or "
                "leave g_idx out if its writer left it blank"
            )
        if np.array_equal(order, np.arange(weight.inputs)):
            order = None
        else:
            stream = words.pack(words.unpack(stream, weight.bits, weight.inputs)[order], weight.bits)
    step = math.gcd(*(int(size) for size in sizes))
    repeats = sizes // step
    scales = np.repeat(weight.scales, repeats, axis=0)
    zeros = None if weight.zeros is None else words.pack(np.repeat(weight.zeros, repeats, axis=0), weight.bits)
    array = Quantized(
        codes=jnp.asarray(stream),
        scales=jnp.asarray(scales),
        zeros=None if zeros is None else jnp.asarray(zeros),
        bits=weight.bits,
        pad=len(stream) * 8 // weight.bits - weight.inputs,
        dtype=jnp.dtype(dtype),
    )
    return array if order is None else Permuted(array=array, order=jnp.asarray(order))


def from_leaf(leaf: Any, group_size: int | None = None) -> Uniform:
    """The uniform grid of a leaf.

    Args:
        leaf: a matrix, concrete.
        group_size: rows of a group (the last may have fewer); None is that of the leaf itself.

    Raises:
        LeafError: saying why the leaf is no uniform grid with integer zero points, or not one of such groups.
    """
    order = None
    if isinstance(leaf, Permuted):
        order, leaf = np.asarray(leaf.order), leaf.array
    if not isinstance(leaf, Quantized):
        raise LeafError(f"its values ({type(leaf).__name__}) lie on no uniform grid")
    codes, scales, packed_zeros = (
        None if x is None else np.asarray(jax.device_get(x)) for x in (leaf.codes, leaf.scales, leaf.zeros)
    )
    assert codes is not None and scales is not None
    if codes.ndim != 2:
        raise LeafError(f"it has shape {list(leaf.shape)}: one matrix at a time, unstack the layers first")
    if packed_zeros is not None and packed_zeros.dtype != np.uint8:
        raise LeafError("its zero points are real numbers, not integers")
    inputs, step = leaf.shape[-2], leaf.group_size
    zeros = None if packed_zeros is None else words.unpack(packed_zeros, leaf.bits, len(scales))
    size = step if group_size is None else min(group_size, inputs)
    if size != step:
        first = np.arange(0, inputs, size)  # first rows of the wanted groups
        rows = np.arange(0, inputs, math.gcd(size, step))  # within these pieces neither grouping changes
        for x in [scales] if zeros is None else [scales, zeros]:
            if not np.array_equal(x[rows // step], x[first // step][rows // size]):
                raise LeafError(f"its groups of {step} inputs differ within groups of {size}")
        scales, zeros = scales[first // step], None if zeros is None else zeros[first // step]
    stream, group_of_row = codes, None
    if order is not None:
        group_of_row = np.empty(inputs, np.int32)
        group_of_row[order] = np.arange(inputs) // size
        natural = np.empty((inputs, codes.shape[1]), np.uint8)
        natural[order] = words.unpack(codes, leaf.bits, inputs)
        stream = words.pack(natural, leaf.bits)
        if np.array_equal(group_of_row, np.arange(inputs) // size):
            group_of_row = None
    return Uniform(
        stream=stream,
        scales=scales,
        zeros=zeros,
        bits=leaf.bits,
        inputs=inputs,
        group_size=size,
        group_of_row=group_of_row,
    )


def all_at_centre(weight: Uniform) -> bool:
    """Whether every zero point is `2**(bits-1)`."""
    if weight.zeros is None:
        return weight.bits > 1  # one bit is centred between its two levels
    return bool((weight.zeros == 2 ** (weight.bits - 1)).all())


def integer_zeros(weight: Uniform) -> UInt8[np.ndarray, "groups out"]:
    """Zero points, those of a symmetric grid spelled out.

    Raises:
        LeafError: one bit centred between its two levels.
    """
    if weight.zeros is not None:
        return weight.zeros
    if weight.bits == 1:
        raise LeafError("its one-bit grid is centred between its two levels, at no integer")
    return np.full(weight.scales.shape, 2 ** (weight.bits - 1), np.uint8)
