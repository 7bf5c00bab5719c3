"""GPTQ checkpoints: qweight, qzeros, scales and g_idx of one weight to a leaf and back, and their configuration.

Layout (2, 3, 4 and 8 bits): `qweight` int32 `[in * bits / 32, out]` holds each column's codes as one bit stream down
the inputs, which is the packing of `effjax.arrays.Quantized`; `qzeros` int32 `[groups, out * bits / 32]` holds zero
points as a stream along the outputs; `scales` `[groups, out]`; `g_idx` int32 `[in]` the group of each input. Version 1
of the format stores zero points less one.
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from effjax.arrays.base import CompressedArray
from effjax.errors import CheckpointError, ConfigError, LeafError
from effjax.io.formats import words
from effjax.io.formats.checks import AGAIN, FLOATS, Tensors, exact_cast, only, take
from effjax.io.formats.uniform import Uniform, all_at_centre, from_leaf, integer_zeros, to_leaf

BITS = (2, 3, 4, 8)
FIELDS = ("qweight", "qzeros", "scales", "g_idx")


class ZeroPointWarning(UserWarning):
    """A zero point that version 1 of GPTQ cannot tell: 0 and `2**bits` are stored alike."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQScheme:
    """How one weight is stored.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale, -1 for all of them.
        sym: whether all zero points are `2**(bits-1)`.
        desc_act: whether groups are any inputs (`g_idx`) instead of runs of them.
        version: 1 stores zero points less one, 2 stores them as they are.

    Raises:
        ConfigError: a value that is none of these.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    version: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ConfigError(f"quantization_config: bits {self.bits!r}; GPTQ weights of 2, 3, 4 and 8 bits are read")
        if type(self.group_size) is not int or (self.group_size < 1 and self.group_size != -1):
            raise ConfigError(f"quantization_config: group_size {self.group_size!r} is neither positive nor -1")
        for key in ("sym", "desc_act"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"quantization_config: {key} must be true or false, found {getattr(self, key)!r}")


def read(name: str, tensors: Tensors, scheme: GPTQScheme, *, shape: tuple[int, int], dtype: Any) -> CompressedArray:
    """One weight.

    Zero points are decoded field by field: `(stored + 1) mod 2**bits` in version 1. A converter that adds one constant
    to whole words instead lets a carry out of any field of ones, which spoils its neighbour.

    Args:
        name: the module, for messages.
        tensors: qweight, qzeros, scales and (needed with `desc_act`) g_idx.
        scheme: how they are stored.
        shape: `(in, out)` of the weight.
        dtype: of the leaf's dense array.

    Returns:
        `Quantized`, or `Permuted` around it when groups are no runs of inputs.

    Raises:
        CheckpointError: a tensor that is missing, of a wrong dtype or shape, not finite, or out of range.

    Warns:
        ZeroPointWarning: version 1 with a zero point stored as all ones.

    Example:
        >>> tensors = {
        ...     "qweight": np.full((4, 8), 0x76543210, np.int32),
        ...     "qzeros": np.full((1, 1), 0x77777777, np.int32),
        ...     "scales": np.ones((1, 8), np.float16),
        ... }
        >>> leaf = read("up_proj", tensors, GPTQScheme(group_size=-1), shape=(32, 8), dtype="float32")
        >>> leaf.materialize()[:4, 0].tolist()
        [-8.0, -7.0, -6.0, -5.0]
    """
    inputs, outputs = shape
    bits, size = scheme.bits, inputs if scheme.group_size == -1 else min(scheme.group_size, inputs)
    only(tensors, name, FIELDS)
    if inputs * bits % 32 or outputs * bits % 32:
        raise CheckpointError(
            f"{name}: a weight of {inputs} inputs and {outputs} outputs at {bits} bits fills no whole 32-bit words; "
            f"{AGAIN}"
        )
    groups, why = -(-inputs // size), f"{bits} bits, {inputs} inputs, {outputs} outputs, groups of {size}"
    qweight = take(tensors, name, "qweight", dtypes=["int32"], shape=(inputs * bits // 32, outputs), why=why)
    qzeros = take(tensors, name, "qzeros", dtypes=["int32"], shape=(groups, outputs * bits // 32), why=why)
    scales = take(tensors, name, "scales", dtypes=FLOATS, shape=(groups, outputs), why=why)
    stored = words.unpack(words.to_bytes(qzeros.T), bits, outputs).T
    zeros = stored
    if scheme.version == 1:
        zeros = (stored + np.uint8(1)) & np.uint8(2**bits - 1)
        ambiguous = int((stored == 2**bits - 1).sum())
        if ambiguous:
            warnings.warn(
                f"{name}.qzeros: {ambiguous} zero points are stored as {2**bits - 1}, which in this version of GPTQ "
                f"means 0 or {2**bits}; read as 0, compare the model's outputs with its author's",
                ZeroPointWarning,
                stacklevel=2,
            )
    weight = Uniform(
        stream=words.to_bytes(qweight),
        scales=scales,
        zeros=zeros,
        bits=bits,
        inputs=inputs,
        group_size=size,
        group_of_row=_read_g_idx(name, tensors, scheme, inputs, size, groups),
    )
    if scheme.sym and all_at_centre(weight):
        weight = dataclasses.replace(weight, zeros=None)
    return to_leaf(name, weight, dtype)


def _read_g_idx(
    name: str, tensors: Tensors, scheme: GPTQScheme, inputs: int, size: int, groups: int
) -> np.ndarray | None:
    if "g_idx" not in tensors and not scheme.desc_act:
        return None
    g_idx = take(tensors, name, "g_idx", dtypes=["int32"], shape=(inputs,), why=f"{inputs} inputs")
    if inputs and not (-groups <= int(g_idx.min()) and int(g_idx.max()) < groups):
        raise CheckpointError(
            f"{name}.g_idx has groups {int(g_idx.min())} to {int(g_idx.max())}, there are {groups}; {AGAIN}"
        )
    g_idx = np.where(g_idx < 0, g_idx + groups, g_idx).astype(np.int32)
    return None if np.array_equal(g_idx, np.arange(inputs) // size) else g_idx


def scheme_for(leaf: Any, *, version: Literal[1, 2], group_size: int | None = None) -> GPTQScheme:
    """The scheme that stores a leaf exactly.

    Args:
        leaf: a matrix.
        version: of the format.
        group_size: of the groups, where the leaf's own are pieces of them.

    Raises:
        LeafError: saying why there is none.
    """
    weight = from_leaf(leaf, group_size)
    scheme = GPTQScheme(
        bits=weight.bits if weight.bits in BITS else 4,
        group_size=-1 if weight.group_size == weight.inputs else weight.group_size,
        sym=all_at_centre(weight),
        desc_act=weight.group_of_row is not None,
        version=version,
    )
    write(leaf, scheme)
    return scheme


def write(leaf: Any, scheme: GPTQScheme) -> dict[str, np.ndarray]:
    """The tensors of one leaf: the inverse of `read`.

    Raises:
        LeafError: saying what of the leaf the scheme cannot hold.

    Example:
        >>> import effjax as ej
        >>> leaf = ej.quantize.RTN(bits=4, group_size=32, symmetric=True).quantize(np.ones((64, 8), np.float32))
        >>> {name: x.shape for name, x in write(leaf, scheme_for(leaf, version=2)).items()}
        {'qweight': (8, 8), 'qzeros': (2, 1), 'scales': (2, 8), 'g_idx': (64,)}
    """
    inputs, outputs = leaf.shape[-2:]
    weight = from_leaf(leaf, inputs if scheme.group_size == -1 else scheme.group_size)
    if weight.bits != scheme.bits:
        raise LeafError(f"its codes have {weight.bits} bits; GPTQ holds 2, 3, 4 and 8")
    if inputs * weight.bits % 32 or outputs * weight.bits % 32:
        raise LeafError(f"{inputs} inputs and {outputs} outputs at {weight.bits} bits fill no whole 32-bit words")
    if weight.group_of_row is not None and not scheme.desc_act:
        raise LeafError("its groups are no runs of inputs: desc_act is needed")
    zeros = integer_zeros(weight)
    if scheme.version == 1:
        if (zeros == 0).any():
            count = int((zeros == 0).sum())
            raise LeafError(f"{count} of its zero points are 0, which version 1 of GPTQ stores like {2**weight.bits}")
        zeros = zeros - np.uint8(1)
    scales = weight.scales
    if scales.dtype.name not in ("float16", "bfloat16"):
        cast = exact_cast(scales, np.float16)
        if cast is None:
            raise LeafError(f"its {scales.dtype.name} scales are not all float16 numbers")
        scales = cast
    groups = np.arange(inputs, dtype=np.int32) // weight.group_size
    return {
        "qweight": words.to_words(weight.stream),
        "qzeros": np.ascontiguousarray(words.to_words(words.pack(zeros.T, weight.bits)).T),
        "scales": np.ascontiguousarray(scales),
        "g_idx": (groups if weight.group_of_row is None else weight.group_of_row).astype(np.int32),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQConfig:
    """The `quantization_config` of a GPTQ model.

    Attributes:
        default: of all linear layers but the head.
        lm_head: whether the head is quantized too.
        dynamic: `(pattern, changes)` in order: the first pattern that matches the start of a module's name decides;
            changes of None leave the module dense.
    """

    default: GPTQScheme
    lm_head: bool = False
    dynamic: tuple[tuple[str, tuple[tuple[str, Any], ...] | None], ...] = ()

    def scheme(self, module: str) -> GPTQScheme | None:
        """How `module` is stored, None where it is dense."""
        for pattern, changes in self.dynamic:
            if re.match(pattern, module):
                return None if changes is None else dataclasses.replace(self.default, **dict(changes))
        return self.default if self.lm_head or module != "lm_head" else None

    def to_json(self) -> dict[str, Any]:
        """The entries that transformers, vLLM and GPTQModel read; no field of it names a place on this machine."""
        entries: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": self.default.bits,
            "group_size": self.default.group_size,
            "desc_act": self.default.desc_act,
            "sym": self.default.sym,
            "lm_head": self.lm_head,
            "checkpoint_format": "gptq" if self.default.version == 1 else "gptq_v2",
        }
        if self.dynamic:
            entries["dynamic"] = {
                f"{'-' if changes is None else '+'}:{pattern}": dict(changes or ()) for pattern, changes in self.dynamic
            }
        return entries


def parse_config(entries: Mapping[str, Any]) -> GPTQConfig:
    """Reads a `quantization_config` (also `quantize_config.json`) as AutoGPTQ, GPTQModel or transformers write it.

    Entries that only say how a model was quantized (damp_percent, dataset, meta, …) are passed over.

    Raises:
        ConfigError: naming the entry that is missing, unknown or of a layout that is not read.

    Example:
        >>> parse_config({"quant_method": "gptq", "bits": 4, "group_size": 128}).default.version
        1
    """
    kind = entries.get("checkpoint_format") or entries.get("format") or "gptq"
    if entries.get("is_marlin_format"):
        kind = "marlin"
    if kind not in ("gptq", "gptq_v2"):
        raise ConfigError(
            f"quantization_config: checkpoint_format {kind!r} is not read; 'gptq' and 'gptq_v2' are, save the model as "
            "one of these"
        )
    if entries.get("pack_dtype", "int32") not in ("int32", None):
        raise ConfigError(f"quantization_config: pack_dtype {entries['pack_dtype']!r} is not read; int32 is")
    if entries.get("rotation"):
        raise ConfigError("quantization_config: rotation: weights of rotated models are not read")
    if "bits" not in entries:
        raise ConfigError("quantization_config: bits is missing; write how many bits a weight has")
    given = {key: entries[key] for key in ("bits", "group_size", "sym", "desc_act") if entries.get(key) is not None}
    default = GPTQScheme(version=1 if kind == "gptq" else 2, **given)
    dynamic = entries.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise ConfigError(f"quantization_config: dynamic must map patterns to changes, found {dynamic!r}")
    rules = tuple(_parse_rule(key, changes, default) for key, changes in dynamic.items())
    return GPTQConfig(default=default, lm_head=bool(entries.get("lm_head")), dynamic=rules)


def _parse_rule(key: str, changes: Any, default: GPTQScheme) -> tuple[str, tuple[tuple[str, Any], ...] | None]:
    sign, pattern = (key[0], key[2:]) if key[:2] in ("+:", "-:") else ("+", key)
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"quantization_config: dynamic: {key!r} is no regular expression ({error})") from error
    if sign == "-":
        return pattern, None
    if not isinstance(changes, Mapping):
        raise ConfigError(f"quantization_config: dynamic: {key!r} must hold an object, found {changes!r}")
    known = {name: value for name, value in changes.items() if name in ("bits", "group_size", "sym", "desc_act")}
    dataclasses.replace(default, **known)  # refuses values that are none
    return pattern, tuple(sorted(known.items()))


def config_for(schemes: Mapping[str, GPTQScheme | None]) -> GPTQConfig:
    """The configuration of a model whose modules are stored so; None are dense.

    The scheme that most modules have is the default, the others are exceptions by name (`dynamic`, as GPTQModel and
    vLLM read it).
    """
    stored = [scheme for scheme in schemes.values() if scheme is not None]
    if not stored:
        raise LeafError("no weight of the model is quantized: GPTQ needs at least one")
    if any(scheme.desc_act for scheme in stored):
        stored = [dataclasses.replace(scheme, desc_act=True) for scheme in stored]
    if not all(scheme.sym for scheme in stored):
        stored = [dataclasses.replace(scheme, sym=False) for scheme in stored]
    default = max(stored, key=stored.count)
    rules: list[tuple[str, tuple[tuple[str, Any], ...] | None]] = []
    for module, scheme in schemes.items():
        pattern = f"^{re.escape(module)}$"
        if scheme is None:
            if module != "lm_head":
                rules.append((pattern, None))
            continue
        changes = {key: getattr(scheme, key) for key in ("bits", "group_size")}
        changes = {key: value for key, value in changes.items() if value != getattr(default, key)}
        if changes:
            rules.append((pattern, tuple(sorted(changes.items()))))
    head = schemes.get("lm_head") is not None
    return GPTQConfig(default=default, lm_head=head, dynamic=tuple(rules))
