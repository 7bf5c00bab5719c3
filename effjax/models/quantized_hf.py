"""Quantized Hugging Face directories (GPTQ, AWQ, compressed-tensors, bitsandbytes), read with compressed leaves."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from effjax.arrays.base import PyTree
from effjax.errors import CheckpointError, ConfigError
from effjax.io.formats import awq, bitsandbytes, compressed_tensors, gptq
from effjax.io.safetensors_file import TensorEntry
from effjax.models.decoder import stack_layers
from effjax.models.hf import (
    LoadedModel,
    StoredTensor,
    all_entries,
    embedding_name,
    expected_tensors,
    read_config,
    read_dense,
    read_json,
    read_tokenizer,
)

_READERS: Mapping[str, ModuleType] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": bitsandbytes,
}
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_SIDE_FILES = ("quantize_config.json", "quant_config.json")
_CACHE_SCALES = re.compile(r"model\.layers\.\d+\.self_attn\.[kvq]_(scale|zero_point)")  # of the KV cache, not weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """What `load_quantized` read.

    Attributes:
        model: with compressed leaves.
        schemes: how each of them was stored, by path; `effjax.models.quantized_save` stores them so again.
    """

    model: LoadedModel
    schemes: dict[str, Any]


def quantization_config(directory: Path) -> dict[str, Any] | None:
    """How the weights of a directory are quantized: the entry of config.json, or one of the files beside it.

    Raises:
        CheckpointError: a file that is damaged.
        ConfigError: an entry that is no object.
    """
    if (directory / "config.json").is_file():
        entries = read_json(directory / "config.json").get("quantization_config")
        if entries:
            if not isinstance(entries, dict):
                raise ConfigError(f"config.json: quantization_config must be an object, found {entries!r}")
            return entries
    for name in _SIDE_FILES:
        if (directory / name).is_file():
            return read_json(directory / name)
    return None


def is_quantized(directory: Path) -> bool:
    """Whether the configuration of a directory says that its weights are quantized."""
    return quantization_config(directory) is not None


def load_quantized(
    directory: Path, source: str | None = None, *, dtype: Any = None, scan_layers: bool = False
) -> QuantizedModel:
    """Reads a quantized decoder; `effjax.models.hf.load_model` calls this where a directory says so.

    Codes, zero points and scales are kept as stored. How activations are quantized is not: leaves are weights only.

    Args:
        directory: with config.json, safetensors and, if texts shall go in and out, tokenizer.json.
        source: how to call the model; the name of the directory by default.
        dtype: of dense parameters, and what compressed leaves materialize to; None is the embedding's.
        scan_layers: stacks the layers for `nn.scan`; they must all be stored alike.

    Raises:
        CheckpointError: a tensor that is missing, unexpected, of a wrong shape, out of range or not finite.
        ConfigError: a configuration that is not read, naming the entry and what is.

    Example:
        >>> found = load_quantized(Path("model-gptq"))  # doctest: +SKIP
        >>> found.model.params["layers_0"]["mlp"]["up_proj"]["kernel"]  # doctest: +SKIP
        Quantized(float16[256, 640], 4.25 bits a weight, bits=4, pad=0)
    """
    source = source or directory.resolve().name
    entries = quantization_config(directory)
    if entries is None:
        raise ConfigError(f"{source}: no quantization_config says how weights are stored; read it as a dense model")
    reader = _reader(entries)
    stored = reader.parse_config(entries)
    config = read_config(directory, quantized=True)
    tensors, expected = all_entries(directory), expected_tensors(config)
    embedding = tensors.get(embedding_name(config))
    leaf_dtype = dtype or (embedding.dtype if embedding and embedding.dtype.name in _FLOATS else "float32")
    leaves: dict[str, Any] = {}
    schemes: dict[str, Any] = {}
    for name in [name for name, tensor in expected.items() if tensor.transposed]:
        module, tensor = name.removesuffix(".weight"), expected[name]
        fields = _fields(module, tensors)
        if not fields or (set(fields) == {"weight"} and fields["weight"].dtype.name in _FLOATS):
            continue
        scheme = stored.scheme(module)
        if scheme is None:
            raise CheckpointError(
                f"{module} is stored as {', '.join(sorted(fields))}, but quantization_config leaves it dense; take the "
                "configuration that belongs to the weights"
            )
        arrays = {field: entry.read() for field, entry in fields.items()}
        leaves[tensor.path] = reader.read(module, arrays, scheme, shape=tensor.shape[::-1], dtype=leaf_dtype)
        schemes[tensor.path] = scheme
        del expected[name]
        tensors = {key: entry for key, entry in tensors.items() if key.removeprefix(f"{module}.") not in fields}
        tensors = _without_blank_bias(module, tensors, expected)
    if not leaves:
        raise CheckpointError(
            f"{source}: quantization_config says {entries.get('quant_method', 'gptq')}, but no weight is stored so; "
            "remove the entry to read a dense model"
        )
    tensors = {name: entry for name, entry in tensors.items() if not _CACHE_SCALES.fullmatch(name)}
    params = read_dense(config, tensors, expected, source, dtype=dtype, leaves=leaves)
    if scan_layers:
        params, config = _stacked(params, source), dataclasses.replace(config, scan_layers=True)
    model = LoadedModel(config=config, params=params, tokenizer=read_tokenizer(directory), source=source)
    return QuantizedModel(model=model, schemes=schemes)


def _reader(entries: Mapping[str, Any]) -> ModuleType:
    method = entries.get("quant_method", entries.get("method"))
    if method is None:  # files beside config.json may leave it out
        method = "awq" if "w_bit" in entries or "q_group_size" in entries else "gptq"
    if method not in _READERS:
        raise ConfigError(f"quantization_config: quant_method {method!r} is not read; {', '.join(_READERS)} are")
    return _READERS[method]


def _fields(module: str, tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of a linear layer but its bias, by their names behind the layer's."""
    found = {name.removeprefix(f"{module}."): entry for name, entry in tensors.items() if name.startswith(f"{module}.")}
    found.pop("bias", None)
    return found


def _without_blank_bias(
    module: str, tensors: dict[str, TensorEntry], expected: Mapping[str, StoredTensor]
) -> dict[str, TensorEntry]:
    """AutoGPTQ writes a bias of zeros for layers that have none."""
    name = f"{module}.bias"
    if name in tensors and name not in expected and not tensors[name].read().astype(np.float32).any():
        return {key: entry for key, entry in tensors.items() if key != name}
    return tensors


def _stacked(params: PyTree, source: str) -> PyTree:
    try:
        return stack_layers(params)
    except ValueError as error:
        raise CheckpointError(
            f"{source}: its layers are stored in different ways and cannot be stacked; read it with scan_layers=False"
        ) from error
