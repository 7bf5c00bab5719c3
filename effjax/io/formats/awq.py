"""AWQ checkpoints in the GEMM layout: qweight, qzeros and scales of one weight to a leaf and back.

Layout (4 bits): `qweight` int32 `[in, out / 8]`, packed along the outputs in an interleaved order: nibble `i` of word
`c` is column `8c + ORDER[i]`; `qzeros` int32 `[in / group, out / 8]` likewise, true zero points; `scales` float16
`[in / group, out]` in plain order.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from effjax.arrays.base import CompressedArray
from effjax.errors import CheckpointError, ConfigError, LeafError
from effjax.io.formats import words
from effjax.io.formats.checks import AGAIN, Tensors, exact_cast, only, take
from effjax.io.formats.uniform import Uniform, from_leaf, integer_zeros, to_leaf

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds column j of eight
FIELDS = ("qweight", "qzeros", "scales")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQScheme:
    """How one weight is stored.

    Attributes:
        group_size: inputs that share a scale, -1 for all of them.

    Raises:
        ConfigError: it is neither positive nor -1.
    """

    group_size: int = 128

    def __post_init__(self) -> None:
        if type(self.group_size) is not int or (self.group_size < 1 and self.group_size != -1):
            raise ConfigError(f"quantization_config: group_size {self.group_size!r} is neither positive nor -1")


def unpack_columns(packed: Int32[np.ndarray, "rows words"]) -> UInt8[np.ndarray, "rows 8*words"]:
    """Codes of interleaved words, columns in plain order.

    Example:
        >>> unpack_columns(np.array([[0x75316420]], np.int32)).tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    rows, count = packed.shape
    data = np.ascontiguousarray(packed.astype("<i4")).view(np.uint8).reshape(rows, count, 4)
    nibbles = np.stack([data & 15, data >> 4], axis=-1).reshape(rows, count, 8)
    return nibbles[..., PLACE].reshape(rows, 8 * count)


def pack_columns(codes: UInt8[np.ndarray, "rows columns"]) -> Int32[np.ndarray, "rows columns/8"]:
    """The inverse of `unpack_columns`; the columns are a multiple of eight."""
    rows, columns = codes.shape
    nibbles = codes.reshape(rows, columns // 8, 8)[..., ORDER]
    data = np.ascontiguousarray(nibbles[..., 0::2] | nibbles[..., 1::2] << 4)
    return data.view("<i4")[..., 0].astype(np.int32)


def read(name: str, tensors: Tensors, scheme: AWQScheme, *, shape: tuple[int, int], dtype: Any) -> CompressedArray:
    """One weight, as `Quantized` with four bits and zero points.

    Args:
        name: the module, for messages.
        tensors: qweight, qzeros and scales.
        scheme: how they are stored.
        shape: `(in, out)` of the weight.
        dtype: of the leaf's dense array.

    Raises:
        CheckpointError: a tensor that is missing, of a wrong dtype or shape, or not finite.
    """
    inputs, outputs = shape
    size = inputs if scheme.group_size == -1 else scheme.group_size
    only(tensors, name, FIELDS)
    if outputs % 8 or inputs % size:
        raise CheckpointError(
            f"{name}: {inputs} inputs in groups of {size} and {outputs} outputs in words of 8 do not come out even; "
            f"{AGAIN}"
        )
    groups, why = inputs // size, f"{inputs} inputs in groups of {size}, {outputs} outputs"
    qweight = take(tensors, name, "qweight", dtypes=["int32"], shape=(inputs, outputs // 8), why=why)
    qzeros = take(tensors, name, "qzeros", dtypes=["int32"], shape=(groups, outputs // 8), why=why)
    scales = take(tensors, name, "scales", dtypes=["float16", "bfloat16"], shape=(groups, outputs), why=why)
    weight = Uniform(
        stream=words.pack(unpack_columns(qweight), 4),
        scales=scales,
        zeros=unpack_columns(qzeros),
        bits=4,
        inputs=inputs,
        group_size=size,
    )
    return to_leaf(name, weight, dtype)


def scheme_for(leaf: Any, *, group_size: int | None = None) -> AWQScheme:
    """The scheme that stores a leaf exactly.

    Raises:
        LeafError: saying why there is none.
    """
    weight = from_leaf(leaf, group_size)
    scheme = AWQScheme(group_size=-1 if weight.group_size == weight.inputs else weight.group_size)
    write(leaf, scheme)
    return scheme


def write(leaf: Any, scheme: AWQScheme) -> dict[str, np.ndarray]:
    """The tensors of one leaf: the inverse of `read`.

    Raises:
        LeafError: saying what of the leaf the layout cannot hold.

    Example:
        >>> import effjax as ej
        >>> leaf = ej.quantize.RTN(bits=4, group_size=32).quantize(np.ones((64, 8), np.float32))
        >>> tensors = write(leaf, scheme_for(leaf))
        >>> {name: x.shape for name, x in tensors.items()}
        {'qweight': (64, 1), 'qzeros': (2, 1), 'scales': (2, 8)}
        >>> again = read("up_proj", tensors, scheme_for(leaf), shape=(64, 8), dtype="float32")
        >>> bool((again.materialize() == leaf.materialize()).all())
        True
    """
    inputs, outputs = leaf.shape[-2:]
    weight = from_leaf(leaf, inputs if scheme.group_size == -1 else scheme.group_size)
    if weight.bits != 4:
        raise LeafError(f"its codes have {weight.bits} bits; AWQ holds 4")
    if weight.group_of_row is not None:
        raise LeafError("its groups are no runs of inputs, and AWQ has no g_idx")
    if outputs % 8 or inputs % weight.group_size:
        raise LeafError(
            f"{outputs} outputs are no multiple of 8, or groups of {weight.group_size} do not divide {inputs}"
        )
    scales = weight.scales
    if scales.dtype.name != "float16":
        cast = exact_cast(scales, np.float16)
        if cast is None:
            raise LeafError(f"its {scales.dtype.name} scales are not all float16 numbers")
        scales = cast
    return {
        "qweight": pack_columns(words.unpack(weight.stream, 4, inputs)),
        "qzeros": pack_columns(integer_zeros(weight)),
        "scales": np.ascontiguousarray(scales),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQConfig:
    """The `quantization_config` of an AWQ model: all linear layers but the head and `dense` (parts of their names)."""

    default: AWQScheme
    dense: tuple[str, ...] = ()

    def scheme(self, module: str) -> AWQScheme | None:
        """How `module` is stored, None where it is dense."""
        return None if module == "lm_head" or any(part in module for part in self.dense) else self.default

    def to_json(self) -> dict[str, Any]:
        """The entries that AutoAWQ, transformers and vLLM read."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.default.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(self.dense) or None,
        }


def parse_config(entries: Mapping[str, Any]) -> AWQConfig:
    """Reads a `quantization_config` as AutoAWQ, transformers, GPTQModel or llm-awq (`w_bit`, `q_group_size`) write it.

    `sym` is passed over: transformers writes `sym: true` beside `zero_point: true`, and the GEMM layout always has zero
    points.

    Raises:
        ConfigError: naming the entry that is missing or of a layout that is not read.

    Example:
        >>> parse_config({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}).default.group_size
        64
    """
    version = str(entries.get("version") or entries.get("format") or "gemm").lower()
    if version != "gemm":
        raise ConfigError(f"quantization_config: version {version!r} is not read; 'gemm' is, save the model as that")
    bits = entries.get("bits", entries.get("w_bit"))
    if bits != 4:
        raise ConfigError(f"quantization_config: bits {bits!r}; AWQ weights have 4")
    size = entries.get("group_size", entries.get("q_group_size", 128))
    dense = entries.get("modules_to_not_convert") or []
    if not isinstance(dense, list | tuple) or not all(isinstance(part, str) for part in dense):
        raise ConfigError(f"quantization_config: modules_to_not_convert must list names, found {dense!r}")
    return AWQConfig(default=AWQScheme(group_size=size), dense=tuple(dense))


def config_for(schemes: Mapping[str, AWQScheme | None]) -> AWQConfig:
    """The configuration of a model whose modules are stored so; None are dense.

    Raises:
        LeafError: no module is quantized, the head is, or groups differ: AWQ has one size for the whole model.
    """
    sizes = {module: scheme.group_size for module, scheme in schemes.items() if scheme is not None}
    if not sizes:
        raise LeafError("no weight of the model is quantized: AWQ needs at least one")
    if "lm_head" in sizes:
        raise LeafError("lm_head is quantized, which readers of AWQ do not expect: leave it dense")
    if len(set(sizes.values())) > 1:
        counts = list(sizes.values())
        odd = min(sizes, key=lambda module: counts.count(sizes[module]))
        raise LeafError(f"groups of {sorted(set(sizes.values()))} in one model (as {odd}): AWQ has one size for all")
    dense = tuple(module for module, scheme in schemes.items() if scheme is None and module != "lm_head")
    return AWQConfig(default=AWQScheme(group_size=next(iter(sizes.values()))), dense=dense)
