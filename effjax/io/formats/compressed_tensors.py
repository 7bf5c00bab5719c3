"""Weights of compressed-tensors checkpoints to leaves and back: packed and plain integers, floats of 8 and 4 bits.

A weight is `[out, in]` here, codes are signed (`q = code - 2**(bits-1)`), and `W = (q - zero) * scale`. The format
`pack-quantized` keeps each row as one dense bit stream along the inputs in int32 words, zero points along the outputs.
Up to version 0.12 words held whole codes only; the two widths differ, and the shape of the tensor tells which it is.
"""

from typing import Any

import numpy as np

from effjax.arrays.base import CompressedArray
from effjax.errors import CheckpointError, LeafError
from effjax.io.formats import float8, fp4, words
from effjax.io.formats.checks import AGAIN, FLOATS, Tensors, only, take
from effjax.io.formats.compressed_tensors_config import CTConfig, CTScheme, config_for, parse_config
from effjax.io.formats.uniform import Uniform, from_leaf, integer_zeros, to_leaf

__all__ = ["CTConfig", "CTScheme", "config_for", "parse_config", "read", "scheme_for", "write"]

# What a layer holds for its inputs and outputs beside the weight: kept by no leaf, since leaves are weights only.
ACTIVATIONS = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "input_g_idx",
    "output_scale",
    "output_zero_point",
)


def read(name: str, tensors: Tensors, scheme: CTScheme, *, shape: tuple[int, int], dtype: Any) -> CompressedArray:
    """One weight: `Quantized` of integers, `Codebook` of floats.

    Args:
        name: the module, for messages.
        tensors: weight_packed or weight, weight_scale, and what else the format has.
        scheme: how they are stored.
        shape: `(in, out)` of the weight.
        dtype: of the leaf's dense array.

    Raises:
        CheckpointError: a tensor that is missing, of a wrong dtype, width or shape, not finite, or out of range.
    """
    tensors = {field: x for field, x in tensors.items() if field not in ACTIVATIONS}
    if scheme.format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        only(tensors, name, ("weight_packed", "weight_scale", "weight_global_scale", "weight_shape"))
        return fp4.read(name, tensors, shape=shape, dtype=dtype, kind=scheme.format.partition("-")[0])
    if scheme.format == "float-quantized":
        only(tensors, name, ("weight", "weight_scale"))
        return float8.read(name, tensors, shape=shape, dtype=dtype, strategy=scheme.strategy, block=scheme.block)
    inputs, outputs = shape
    size = _group_size(name, scheme, inputs)
    if scheme.format == "pack-quantized":
        fields = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
        stream = _packed(name, tensors, scheme, shape)
    else:
        fields = ("weight", "weight_scale", "weight_zero_point")
        stream = words.pack(_plain(name, tensors, scheme, shape), scheme.num_bits)
    only(tensors, name, fields)
    weight = Uniform(
        stream=stream,
        scales=_scales(name, tensors, scheme, shape, size),
        zeros=_zeros(name, tensors, scheme, shape, inputs // size),
        bits=scheme.num_bits,
        inputs=inputs,
        group_size=size,
        group_of_row=_group_of_row(name, tensors, inputs, size),
    )
    return to_leaf(name, weight, dtype)


def _group_size(name: str, scheme: CTScheme, inputs: int) -> int:
    if scheme.strategy != "group":
        return inputs
    size = scheme.group_size or inputs
    if inputs % size:
        raise CheckpointError(f"{name}: groups of {size} do not divide its {inputs} inputs; {AGAIN}")
    return size


def _packed(name: str, tensors: Tensors, scheme: CTScheme, shape: tuple[int, int]) -> np.ndarray:
    """The stream of codes; whether words are dense or padded is told by their number."""
    (inputs, outputs), bits = shape, scheme.num_bits
    logical = take(tensors, name, "weight_shape", dtypes=["int64", "int32"], shape=(2,))
    if logical.tolist() != [outputs, inputs]:
        raise CheckpointError(
            f"{name}.weight_shape says {logical.tolist()}, the model has [{outputs}, {inputs}]; {AGAIN}"
        )
    dense, padded = -(-inputs * bits // 32), -(-inputs // (32 // bits))
    found = tensors.get("weight_packed")
    width = padded if found is not None and found.ndim == 2 and found.shape[1] == padded != dense else dense
    why = f"{bits} bits, {inputs} inputs" + (f"; {padded} words in versions up to 0.12" if padded != dense else "")
    packed = take(tensors, name, "weight_packed", dtypes=["int32"], shape=(outputs, width), why=why)
    down = np.ascontiguousarray(packed.T)
    stream = words.to_bytes(down)
    if _is_padded(name, down, scheme, inputs, dense, padded, width):
        return words.pack(words.unpack_padded(down, bits, inputs), bits)
    if not words.padding_is_zero(stream, bits, inputs):
        raise CheckpointError(f"{name}.weight_packed has bits set behind its {inputs} codes; {AGAIN}")
    return stream[: -(-inputs * bits // 8)]


def _is_padded(name: str, down: np.ndarray, scheme: CTScheme, inputs: int, dense: int, padded: int, width: int) -> bool:
    if dense != padded:
        return width == padded
    bits, in_word = scheme.num_bits, 32 // scheme.num_bits
    if 32 % bits == 0 or inputs <= in_word or (down.view(np.uint32) >> np.uint32(bits * in_word)).any():
        return False
    # A small matrix for which both packings need as many words, and the bits that padding leaves free are free.
    if scheme.padded_words is None and not np.array_equal(
        words.unpack_padded(down, bits, inputs), words.unpack(words.to_bytes(down), bits, inputs)
    ):
        raise CheckpointError(
            f"{name}.weight_packed: {width} words for {inputs} codes of {bits} bits may be packed densely or with "
            "padding; write the version of compressed-tensors that packed it into quantization_config"
        )
    return bool(scheme.padded_words)


def _plain(name: str, tensors: Tensors, scheme: CTScheme, shape: tuple[int, int]) -> np.ndarray:
    """Unsigned codes of weights that are stored as int8, one each."""
    inputs, outputs = shape
    half = 2 ** (scheme.num_bits - 1)
    weight = take(tensors, name, "weight", dtypes=["int8"], shape=(outputs, inputs)).T.astype(np.int16) + half
    return _in_range(name, "weight", weight, scheme)


def _in_range(name: str, field: str, codes: np.ndarray, scheme: CTScheme) -> np.ndarray:
    if codes.size and not (0 <= codes.min() and codes.max() < 2**scheme.num_bits):
        half = 2 ** (scheme.num_bits - 1)
        raise CheckpointError(
            f"{name}.{field} has values from {codes.min() - half} to {codes.max() - half}, {scheme.num_bits} bits hold "
            f"{-half} to {half - 1}; {AGAIN}"
        )
    return codes.astype(np.uint8)


def _scales(name: str, tensors: Tensors, scheme: CTScheme, shape: tuple[int, int], size: int) -> np.ndarray:
    inputs, outputs = shape
    if scheme.strategy == "tensor":
        scale = np.asarray(tensors["weight_scale"]) if "weight_scale" in tensors else np.zeros(0)
        scale = take(tensors, name, "weight_scale", dtypes=FLOATS, shape=(1,) if scale.ndim else ())
        return np.broadcast_to(scale.reshape(1, 1), (1, outputs))
    why = f"{inputs} inputs in groups of {size}"
    return take(tensors, name, "weight_scale", dtypes=FLOATS, shape=(outputs, inputs // size), why=why).T


def _zeros(name: str, tensors: Tensors, scheme: CTScheme, shape: tuple[int, int], groups: int) -> np.ndarray | None:
    outputs, bits, half = shape[1], scheme.num_bits, 2 ** (scheme.num_bits - 1)
    if scheme.symmetric:
        if "weight_zero_point" in tensors and tensors["weight_zero_point"].any():
            raise CheckpointError(f"{name}.weight_zero_point is not 0, but the weights are symmetric; {AGAIN}")
        return np.ones((groups, outputs), np.uint8) if bits == 1 else None
    if scheme.strategy == "tensor":
        zero = take(tensors, name, "weight_zero_point", dtypes=["int8"], shape=tensors["weight_scale"].shape)
        codes = np.broadcast_to(zero.reshape(1, 1).astype(np.int16) + half, (1, outputs))
        return _in_range(name, "weight_zero_point", codes, scheme)
    if scheme.format == "int-quantized":
        zero = take(tensors, name, "weight_zero_point", dtypes=["int8"], shape=(outputs, groups))
        return _in_range(name, "weight_zero_point", zero.T.astype(np.int16) + half, scheme)
    shape_packed, why = (-(-outputs * bits // 32), groups), f"{bits} bits, {outputs} outputs, {groups} groups"
    padded = -(-outputs // (32 // bits))
    found = tensors.get("weight_zero_point")
    if scheme.padded_words and padded != shape_packed[0] and found is not None and found.shape == (padded, groups):
        found = take(tensors, name, "weight_zero_point", dtypes=["int32"], shape=(padded, groups), why=why)
        return words.unpack_padded(np.ascontiguousarray(found), bits, outputs).T
    packed = take(tensors, name, "weight_zero_point", dtypes=["int32"], shape=shape_packed, why=why)
    stream = words.to_bytes(packed)
    if not words.padding_is_zero(stream, bits, outputs):
        raise CheckpointError(f"{name}.weight_zero_point has bits set behind its {outputs} zero points; {AGAIN}")
    return words.unpack(stream, bits, outputs).T


def _group_of_row(name: str, tensors: Tensors, inputs: int, size: int) -> np.ndarray | None:
    """The legacy `weight_g_idx`; it counts for nothing where it holds -1 (groups are runs then)."""
    if "weight_g_idx" not in tensors:
        return None
    g_idx = take(tensors, name, "weight_g_idx", dtypes=["int32"], shape=(inputs,), why=f"{inputs} inputs")
    if (g_idx == -1).any():
        return None
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= inputs // size:
        raise CheckpointError(
            f"{name}.weight_g_idx has groups {int(g_idx.min())} to {int(g_idx.max())}, there are {inputs // size}; "
            f"{AGAIN}"
        )
    return None if np.array_equal(g_idx, np.arange(inputs) // size) else g_idx


def scheme_for(leaf: Any, *, group_size: int | None = None) -> CTScheme:
    """The scheme that stores a leaf exactly: packed integers, or floats of eight or four bits.

    Raises:
        LeafError: saying why there is none.
    """
    if (kind := fp4.kind_of(leaf)) is not None:
        scheme = fp4.scheme(kind)
    elif float8.is_float8(leaf):
        scheme = float8.scheme(leaf)
    else:
        weight = from_leaf(leaf)
        if group_size is not None and weight.inputs % min(group_size, weight.inputs) == 0:
            weight = from_leaf(leaf, group_size)
        channel = weight.group_size == weight.inputs
        scheme = CTScheme(
            format="pack-quantized",
            num_bits=weight.bits,
            symmetric=weight.zeros is None or (weight.bits == 1 and bool(weight.zeros.all())),
            strategy="channel" if channel else "group",
            group_size=None if channel else weight.group_size,
        )
    write(leaf, scheme)
    return scheme


def write(leaf: Any, scheme: CTScheme) -> dict[str, np.ndarray]:
    """The tensors of one leaf: the inverse of `read`.

    Raises:
        LeafError: saying what of the leaf the scheme cannot hold.

    Example:
        >>> import effjax as ej
        >>> leaf = ej.quantize.RTN(bits=3, group_size=32).quantize(np.ones((64, 8), np.float32))
        >>> scheme = scheme_for(leaf)
        >>> {name: x.shape for name, x in write(leaf, scheme).items()}
        {'weight_scale': (8, 2), 'weight_packed': (8, 6), 'weight_shape': (2,), 'weight_zero_point': (1, 2)}
    """
    if scheme.format in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        return fp4.write(leaf, scheme.format.partition("-")[0])
    if scheme.format == "float-quantized":
        return float8.write(leaf, scheme.strategy, scheme.block)
    inputs, outputs = leaf.shape[-2:]
    bits, size = scheme.num_bits, inputs if scheme.strategy != "group" else scheme.group_size or inputs
    weight = from_leaf(leaf, size)
    if weight.bits != bits:
        raise LeafError(f"its codes have {weight.bits} bits, the scheme {bits}")
    if weight.group_of_row is not None:
        raise LeafError("its groups are no runs of inputs, and compressed-tensors gave up weight_g_idx")
    if inputs % size:
        raise LeafError(f"groups of {size} do not divide its {inputs} inputs")
    if weight.scales.dtype.name not in FLOATS:
        raise LeafError(f"its scales are {weight.scales.dtype.name}, readers take {', '.join(FLOATS)}")
    zeros, half = integer_zeros(weight), 2 ** (bits - 1)
    if scheme.symmetric and not (zeros == half).all():
        raise LeafError(f"its zero points are not all {half}, as in a symmetric grid")
    scales = weight.scales.T
    if scheme.strategy == "tensor":
        if not ((scales == scales[0, 0]).all() and (zeros == zeros[0, 0]).all()):
            raise LeafError("its columns differ in scale or zero point, as one scale for the whole tensor cannot")
        scales, zeros = scales[0], zeros[:1, :1]
    tensors = {"weight_scale": np.ascontiguousarray(scales)}
    if scheme.format == "int-quantized":
        codes = words.unpack(weight.stream, bits, inputs).T.astype(np.int16) - half
        tensors["weight"] = np.ascontiguousarray(codes.astype(np.int8))
    else:
        tensors["weight_packed"] = np.ascontiguousarray(words.to_words(weight.stream).T)
        tensors["weight_shape"] = np.array([outputs, inputs], np.int64)
    if not scheme.symmetric:
        plain = np.ascontiguousarray((zeros.T.astype(np.int16) - half).astype(np.int8))
        if scheme.strategy == "tensor":
            tensors["weight_zero_point"] = plain.reshape(1)
        elif scheme.format == "int-quantized":
            tensors["weight_zero_point"] = plain
        else:
            tensors["weight_zero_point"] = words.to_words(words.pack(zeros.T, bits))
    return tensors
