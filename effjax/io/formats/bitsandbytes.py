"""Four-bit weights of bitsandbytes (NF4 and FP4) to a leaf and back, with scales nested or not; written un-nested.

A weight `[out, in]` is flattened row by row into blocks that share a scale (`absmax`), a table of 16 values for all:
`weight` uint8 `[size / 2, 1]` with the first of two codes in the high nibble, `weight.absmax` float32, the table
`weight.quant_map` float32 `[16]`, and `weight.quant_state.bitsandbytes__nf4` (or `__fp4`), the bytes of a JSON object.
Nested scales are uint8 codes into `weight.nested_quant_map`, times `weight.nested_absmax`, plus an offset.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.codebook import Codebook
from effjax.errors import CheckpointError, ConfigError, LeafError
from effjax.io.formats import words
from effjax.io.formats.checks import AGAIN, Tensors, exact_cast, finite, only, take
from effjax.quantize.nf4 import LEVELS

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = "weight.quant_state.bitsandbytes__"
_DTYPES = ("float16", "bfloat16", "float32")
_PARTS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BNBScheme:
    """How one weight is stored.

    Attributes:
        block_size: consecutive weights of the flattened matrix that share a scale.
        dtype: of the dense weight, as the file says it.
        kind: "nf4" or "fp4"; the table itself is in the file.

    Raises:
        ConfigError: a value that is none of these.
    """

    block_size: int = 64
    dtype: str = "float16"
    kind: Literal["nf4", "fp4"] = "nf4"

    def __post_init__(self) -> None:
        if type(self.block_size) is not int or self.block_size < 2 or self.block_size % 2:
            raise ConfigError(f"quant_state: blocksize {self.block_size!r}; an even number such as 64")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"quant_state: dtype {self.dtype!r}; {', '.join(_DTYPES)} are read")
        if self.kind not in ("nf4", "fp4"):
            raise ConfigError(f"quant_state: quant_type {self.kind!r}; nf4 and fp4 are read")


def read(
    name: str, tensors: Tensors, scheme: "BNBConfig | None" = None, *, shape: tuple[int, int], dtype: Any
) -> Codebook:
    """One weight, as `Codebook` with one table and scales along the inputs.

    Blocks that reach over rows of the matrix (`in` is no multiple of them) are cut where rows end, so that a scale is
    kept several times.

    Args:
        name: the module, for messages.
        tensors: weight and what follows it, by the names behind the module's.
        scheme: not needed: the file says everything itself.
        shape: `(in, out)` of the weight.
        dtype: of the leaf's dense array.

    Raises:
        CheckpointError: a tensor that is missing, of a wrong dtype or shape, not finite, or contradicts another.
    """
    del scheme
    inputs, outputs = shape
    state_field, state = _read_state(name, tensors)
    only(tensors, name, (*_PARTS, state_field))
    if state["shape"] != [outputs, inputs]:
        raise CheckpointError(
            f"{name}.{state_field} says shape {state['shape']}, the model has [{outputs}, {inputs}]; {AGAIN}"
        )
    block, count = state["blocksize"], inputs * outputs
    if count % 2:
        raise CheckpointError(f"{name}: {outputs}x{inputs} weights of 4 bits fill no whole bytes; {AGAIN}")
    why = f"{outputs}x{inputs} weights in blocks of {block}"
    data = take(tensors, name, "weight", dtypes=["uint8"], shape=(count // 2, 1), why=why)
    table = take(tensors, name, "weight.quant_map", dtypes=["float32"], shape=(16,))
    absmax = _read_absmax(name, tensors, state, -(-count // block), why)
    codes = np.stack([data[:, 0] >> 4, data[:, 0] & 15], axis=-1).reshape(outputs, inputs).T
    step = math.gcd(block, inputs)
    rows = np.arange(0, count, step).reshape(outputs, inputs // step)
    return Codebook(
        codes=jnp.asarray(words.pack(codes, 4)),
        tables=jnp.asarray(table.reshape(1, 1, 16)),
        scales=jnp.asarray(np.ascontiguousarray(absmax[rows // block].T)),
        bits=4,
        pad=inputs % 2,
        dtype=jnp.dtype(dtype),
    )


def _read_state(name: str, tensors: Tensors) -> tuple[str, dict[str, Any]]:
    fields = sorted(field for field in tensors if field.startswith(_STATE))
    if len(fields) != 1:
        raise CheckpointError(f"{name}.{_STATE}nf4 (or fp4) is {'there twice' if fields else 'missing'}; {AGAIN}")
    [field] = fields
    x = tensors[field]
    if x.dtype != np.uint8 or x.ndim != 1:
        raise CheckpointError(f"{name}.{field} is {x.dtype.name}{list(x.shape)}, expected uint8 bytes of JSON; {AGAIN}")
    try:
        state = json.loads(x.tobytes().decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{name}.{field} is no JSON ({error}); {AGAIN}") from error
    kind = field.removeprefix(_STATE)
    try:
        BNBScheme(block_size=state["blocksize"], dtype=state["dtype"], kind=kind)  # type: ignore[arg-type]
        whole = [type(n) is int for n in state["shape"]]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{name}.{field} lacks blocksize, dtype or shape ({error}); {AGAIN}") from error
    except ConfigError as error:
        raise CheckpointError(f"{name}.{field}: {error}") from error
    if not whole or not all(whole):
        raise CheckpointError(f"{name}.{field} has shape {state['shape']!r}, expected sizes; {AGAIN}")
    if state.get("quant_type", kind) != kind:
        raise CheckpointError(f"{name}.{field} says quant_type {state['quant_type']!r}, its name {kind!r}; {AGAIN}")
    return field, state


def _read_absmax(name: str, tensors: Tensors, state: Mapping[str, Any], blocks: int, why: str) -> np.ndarray:
    """Scales of all blocks, float32, those of nested ones as bitsandbytes computes them."""
    nested = "weight.nested_absmax" in tensors or "weight.nested_quant_map" in tensors
    if not nested:
        return take(tensors, name, "weight.absmax", dtypes=["float32"], shape=(blocks,), why=why)
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(size) is not int or size < 1 or isinstance(offset, bool) or not isinstance(offset, int | float):
        raise CheckpointError(
            f"{name}: nested scales need nested_blocksize and nested_offset, found {size!r} and {offset!r}; {AGAIN}"
        )
    codes = take(tensors, name, "weight.absmax", dtypes=["uint8"], shape=(blocks,), why=why)
    table = take(tensors, name, "weight.nested_quant_map", dtypes=["float32"], shape=(256,))
    upper = take(tensors, name, "weight.nested_absmax", dtypes=["float32"], shape=(-(-blocks // size),), why=why)
    with np.errstate(over="ignore", invalid="ignore"):
        absmax = table[codes] * upper[np.arange(blocks) // size] + np.float32(offset)
    return finite(f"{name}.weight.absmax", absmax)


def scheme_for(leaf: Any, *, group_size: int | None = None) -> BNBScheme:
    """The scheme that stores an NF4 leaf exactly.

    Args:
        leaf: a matrix.
        group_size: of the blocks, where the leaf's own are pieces of them.

    Raises:
        LeafError: saying why there is none.
    """
    _check_nf4(leaf)
    step = leaf.shape[-2] // (1 if leaf.scales is None else leaf.scales.shape[-2])
    dtype = leaf.dtype.name if leaf.dtype.name in _DTYPES else "float32"
    problem = LeafError(f"its blocks of {step} inputs are none of bitsandbytes ({BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]})")
    candidates = [size for size in (group_size, step, *BLOCK_SIZES) if size in BLOCK_SIZES]
    for size in dict.fromkeys(candidates):
        try:
            write(leaf, scheme := BNBScheme(block_size=size, dtype=dtype))
            return scheme
        except LeafError as error:
            problem = error if size == step else problem
    raise problem


def _check_nf4(leaf: Any) -> None:
    table = np.asarray(leaf.tables, np.float32).ravel() if isinstance(leaf, Codebook) else np.zeros(0)
    if not np.array_equal(table, np.asarray(LEVELS, np.float32)) or leaf.codes.ndim != 2:
        raise LeafError(f"its values ({type(leaf).__name__}) are no NF4 levels of one matrix")
    if leaf.global_scale is not None:
        raise LeafError("it has two levels of scales")


def write(leaf: Any, scheme: BNBScheme) -> dict[str, np.ndarray]:
    """The tensors of one NF4 leaf, scales un-nested: the inverse of `read`.

    Raises:
        LeafError: saying what of the leaf the format cannot hold.

    Example:
        >>> import effjax as ej
        >>> leaf = ej.quantize.NF4(block_size=64).quantize(jnp.ones((64, 8)))
        >>> sorted(write(leaf, scheme_for(leaf)))[:2], scheme_for(leaf).block_size
        (['weight', 'weight.absmax'], 64)
    """
    _check_nf4(leaf)
    (inputs, outputs), block = leaf.shape, scheme.block_size
    count = inputs * outputs
    if count % 2:
        raise LeafError(f"its {outputs}x{inputs} weights of 4 bits fill no whole bytes")
    scales = np.ones((1, outputs), np.float32) if leaf.scales is None else np.asarray(jax.device_get(leaf.scales))
    absmax = exact_cast(scales, np.float32)
    if absmax is None:
        raise LeafError(f"its {scales.dtype.name} scales are not all float32 numbers")
    step = inputs // len(absmax)
    unit = math.gcd(block, step)
    pieces = np.repeat(absmax.T, step // unit, axis=1).ravel()  # one for every `unit` weights of the flat matrix
    first = np.arange(0, count, block)
    blocks = pieces[first // unit]
    if not np.array_equal(blocks[np.arange(0, count, unit) // block], pieces):
        raise LeafError(f"its blocks of {step} inputs differ within blocks of {block} weights")
    codes = words.unpack(np.asarray(jax.device_get(leaf.codes)), 4, inputs).T.ravel()
    state = {"quant_type": scheme.kind, "blocksize": block, "dtype": scheme.dtype, "shape": [outputs, inputs]}
    return {
        "weight": (codes[0::2] << 4 | codes[1::2])[:, None],
        "weight.absmax": np.ascontiguousarray(blocks),
        "weight.quant_map": np.asarray(LEVELS, np.float32),
        f"{_STATE}{scheme.kind}": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def nearest(w: np.ndarray, scheme: BNBScheme, *, dtype: Any) -> Codebook:
    """Rounds a dense weight `[in, out]` to NF4 as bitsandbytes does: blocks of the flattened `[out, in]` matrix.

    Raises:
        LeafError: an odd number of weights.
    """
    inputs, outputs = w.shape
    if w.size % 2:
        raise LeafError(f"its {outputs}x{inputs} weights of 4 bits fill no whole bytes")
    flat = np.asarray(w, np.float32).T.ravel()
    padded = np.pad(flat, (0, -flat.size % scheme.block_size)).reshape(-1, scheme.block_size)
    absmax = np.abs(padded).max(1)
    ratios = padded / np.where(absmax > 0, absmax, np.float32(1))[:, None]
    levels = np.asarray(LEVELS, np.float32)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, ratios).astype(np.uint8).ravel()[: flat.size]
    state = {"quant_type": "nf4", "blocksize": scheme.block_size, "dtype": scheme.dtype, "shape": [outputs, inputs]}
    tensors = {
        "weight": (codes[0::2] << 4 | codes[1::2])[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": levels,
        f"{_STATE}nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    return read("weight", tensors, shape=(inputs, outputs), dtype=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BNBConfig:
    """The `quantization_config` of a four-bit bitsandbytes model.

    Attributes:
        kind: "nf4" or "fp4".
        compute_dtype: the dtype that readers multiply in.
        dense: names, or parts of names, of modules that stay dense.
    """

    kind: str = "nf4"
    compute_dtype: str = "float32"
    dense: tuple[str, ...] = ()

    def scheme(self, module: str) -> "BNBConfig | None":
        """This configuration where `module` is quantized, None where it is dense."""
        return None if any(part in module for part in self.dense) else self

    def to_json(self) -> dict[str, Any]:
        """The entries that transformers and vLLM read."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": self.compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(self.dense) or None,
            "llm_int8_threshold": 6.0,
        }


def parse_config(entries: Mapping[str, Any]) -> BNBConfig:
    """Reads a `quantization_config` as transformers writes it.

    Raises:
        ConfigError: eight-bit models, another storage than uint8, or an unknown type of values.

    Example:
        >>> parse_config({"quant_method": "bitsandbytes", "load_in_4bit": True}).kind
        'fp4'
    """
    at = "quantization_config"
    if not (entries.get("load_in_4bit") or entries.get("_load_in_4bit")):
        raise ConfigError(f"{at}: load_in_4bit is not true; the four-bit weights of bitsandbytes are read, no others")
    kind = entries.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise ConfigError(f"{at}: bnb_4bit_quant_type {kind!r}; nf4 and fp4 are read")
    if entries.get("bnb_4bit_quant_storage", "uint8") not in ("uint8", None):
        raise ConfigError(f"{at}: bnb_4bit_quant_storage {entries['bnb_4bit_quant_storage']!r} is not read; uint8 is")
    dense = entries.get("llm_int8_skip_modules") or []
    if not isinstance(dense, list | tuple) or not all(isinstance(part, str) for part in dense):
        raise ConfigError(f"{at}: llm_int8_skip_modules must list names, found {dense!r}")
    compute = entries.get("bnb_4bit_compute_dtype") or "float32"
    return BNBConfig(kind=kind, compute_dtype=str(compute), dense=tuple(dense))


def config_for(schemes: Mapping[str, BNBScheme | None]) -> BNBConfig:
    """The configuration of a model whose modules are stored so; None are dense.

    Raises:
        LeafError: no module is quantized.
    """
    stored = [scheme for scheme in schemes.values() if scheme is not None]
    if not stored:
        raise LeafError("no weight of the model is quantized: bitsandbytes needs at least one")
    dense = tuple(module for module, scheme in schemes.items() if scheme is None)
    return BNBConfig(kind="nf4", compute_dtype=stored[0].dtype, dense=dense)
