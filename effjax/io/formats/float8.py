"""Weights of compressed-tensors' `float-quantized`: one float8 (e4m3) a weight, a scale a tensor, channel or block."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.codebook import Codebook
from effjax.arrays.float_values import float8_table
from effjax.errors import CheckpointError, LeafError
from effjax.io.formats.checks import AGAIN, FLOATS, Tensors, float_dtype, take
from effjax.io.formats.compressed_tensors_config import CTScheme

KIND = "float8_e4m3fn"


def read(
    name: str,
    tensors: Tensors,
    *,
    shape: tuple[int, int],
    dtype: Any,
    strategy: str,
    block: tuple[int, int] | None,
) -> Codebook:
    """One weight: the 256 float8 values as a table, the stored bytes as codes, scales per group of inputs and output.

    Args:
        name: the module, for messages.
        tensors: `weight` float8 `[out, in]` and `weight_scale`: `[1]`, `[out, 1]`, or one a block.
        shape: `(in, out)` of the weight.
        dtype: of the leaf's dense array.
        strategy: "tensor", "channel" or "block".
        block: outputs and inputs that share a scale.

    Raises:
        CheckpointError: a tensor that is missing, of a wrong dtype or shape, or not finite.
    """
    inputs, outputs = shape
    rows, columns = block or (outputs, inputs)
    if strategy == "block" and inputs > columns and inputs % columns:
        raise CheckpointError(f"{name}: blocks of {columns} do not divide its {inputs} inputs; {AGAIN}")
    weight = take(tensors, name, "weight", dtypes=[KIND], shape=(outputs, inputs))
    if strategy == "tensor":
        given = tensors.get("weight_scale", np.zeros(1))
        scale = take(tensors, name, "weight_scale", dtypes=FLOATS, shape=(1,) if np.ndim(given) else ())
        scales = np.broadcast_to(scale.reshape(1, 1), (1, outputs))
    elif strategy == "channel":
        scales = take(tensors, name, "weight_scale", dtypes=FLOATS, shape=(outputs, 1)).T
    else:
        grid, why = (-(-outputs // rows), -(-inputs // columns)), f"blocks of {rows} outputs and {columns} inputs"
        scale = take(tensors, name, "weight_scale", dtypes=FLOATS, shape=grid, why=why)
        scales = np.repeat(scale.T, rows, axis=1)[:, :outputs]
    return Codebook(
        codes=jnp.asarray(np.ascontiguousarray(weight.view(np.uint8).T)),
        tables=jnp.asarray(float8_table(KIND).reshape(1, 1, 256)),
        scales=jnp.asarray(np.ascontiguousarray(scales)),
        bits=8,
        dtype=jnp.dtype(dtype),
    )


def is_float8(leaf: Any) -> bool:
    """Whether a leaf holds e4m3 values: a `Codebook` with their table for the whole matrix."""
    return (
        isinstance(leaf, Codebook)
        and leaf.bits == 8
        and leaf.tables.shape == (1, 1, 256)
        and leaf.global_scale is None
        and np.array_equal(np.asarray(leaf.tables, np.float32).ravel(), float8_table(KIND))
    )


def scheme(leaf: Codebook) -> CTScheme:
    """The scheme of a leaf with a scale an output."""
    return CTScheme(format="float-quantized", num_bits=8, strategy="channel", group_size=None)


def write(leaf: Any, strategy: str, block: tuple[int, int] | None) -> dict[str, np.ndarray]:
    """The tensors of one leaf: the inverse of `read`.

    Raises:
        LeafError: saying what of the leaf the scheme cannot hold.
    """
    if not is_float8(leaf) or leaf.codes.ndim != 2:
        raise LeafError(f"its values ({type(leaf).__name__}) are no float8 (e4m3) numbers of one matrix")
    codes = np.asarray(jax.device_get(leaf.codes))
    outputs, inputs = codes.shape[::-1]
    scales = np.ones((1, outputs), np.float32) if leaf.scales is None else np.asarray(jax.device_get(leaf.scales))
    if ((codes & 127) == 127).any():
        raise LeafError("it uses codes that are NaN in float8")
    if scales.dtype.name not in FLOATS:
        raise LeafError(f"its scales are {scales.dtype.name}, readers take {', '.join(FLOATS)}")
    if strategy == "block":
        rows, columns = block or (outputs, inputs)
        if inputs % len(scales) or (inputs > columns and inputs // len(scales) != columns):
            raise LeafError(f"its groups of {inputs // len(scales)} inputs are no blocks of {columns}")
        scale = scales[:, ::rows].T
        if not np.array_equal(np.repeat(scale.T, rows, axis=1)[:, :outputs], scales):
            raise LeafError(f"its scales differ within blocks of {rows} outputs")
    else:
        if len(scales) > 1:
            raise LeafError(f"it has {len(scales)} groups of inputs, float-quantized has one scale an output")
        scale = scales.T
        if strategy == "tensor":
            if not (scale == scale[0, 0]).all():
                raise LeafError("its columns differ in scale")
            scale = scale[0]
    weight = np.ascontiguousarray(codes.T).view(float_dtype(KIND))
    return {"weight": weight, "weight_scale": np.ascontiguousarray(scale)}
