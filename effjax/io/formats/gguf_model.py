"""Whole decoders in GGUF files: llama (and Mistral), qwen2 and qwen3, in and out.

Llama files hold the rows of the query and key projections in another order, because their readers turn neighbouring
pairs where this decoder turns the halves of a head. Reading and writing move whole rows, so codes and scales stay what
they are.
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.base import CompressedArray, is_compressed
from effjax.arrays.quantized import Quantized
from effjax.arrays.view import View
from effjax.errors import CheckpointError
from effjax.io.formats.gguf import GGUFFile, read_gguf
from effjax.io.formats.gguf_blocks import decode, encode, quantize, why_not
from effjax.io.formats.gguf_config import (
    ROPE_FACTORS,
    architecture_of,
    read_config,
    rope_factors,
    to_metadata,
)
from effjax.io.formats.gguf_tokenizer import read_tokenizer, tokenizer_metadata
from effjax.io.formats.gguf_types import BY_NAME
from effjax.io.formats.gguf_writer import NewTensor, write_gguf
from effjax.models.config import DecoderConfig
from effjax.models.decoder import unstack_layers
from effjax.models.hf import LoadedModel, StoredTensor, expected_tensors
from effjax.models.hf import read_tokenizer as read_tokenizer_beside
from effjax.paths import leaves_with_paths, nest

PyTree = Any
FileType = Literal["keep", "q4_0", "q8_0", "f16", "bf16", "f32"]
_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # general.file_type: the type of most weights
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorVerdict:
    """What became of one parameter.

    Attributes:
        name: in the file.
        path: of the parameter.
        kind: the type it was written as.
        exact: whether a reader gets the same numbers.
        reason: why not; empty where exact.
        error: the largest absolute difference, 0 where exact.
    """

    name: str
    path: str
    kind: str
    exact: bool
    reason: str = ""
    error: float = 0.0


def read_model(path: str | os.PathLike[str], *, dtype: Any = None) -> LoadedModel:
    """Reads a decoder from one GGUF file; quantized weights stay compressed, with the codes and scales of the file.

    The tokenizer is the tokenizer.json that the file holds, or the one beside it; else None. GGUF's own vocabulary
    entries stay available from `read_gguf(path).metadata`.

    Args:
        path: the file.
        dtype: that dense parameters get and compressed ones materialise to; None keeps the file's, float32 for blocks.

    Raises:
        CheckpointError: a damaged file, missing, unexpected or wrongly shaped tensors (all are named), a type that is
            not read, or a number that is not finite.
        ConfigError: an architecture or option that the decoder does not run.

    Example:
        >>> model = read_model("model-q8_0.gguf")  # doctest: +SKIP
        >>> model.params["layers_0"]["mlp"]["up_proj"]["kernel"]  # doctest: +SKIP
        Quantized(float32[256, 640], 8.5 bits a weight, bits=8, pad=0)
    """
    file = Path(path)
    found = read_gguf(file)
    config = _config(file, found)
    expected = {_gguf_name(name): stored for name, stored in expected_tensors(config).items()}
    _compare(file, found, expected)
    flat: dict[str, Any] = {}
    for name, stored in expected.items():
        leaf = found.tensors[name].read(rows=_rows(config, name, reading=True))
        flat[stored.path] = _parameter(leaf, stored, dtype)
    tokenizer = read_tokenizer(found.metadata, file.name) or read_tokenizer_beside(file.parent)
    return LoadedModel(config=config, params=nest(flat), tokenizer=tokenizer, source=file.name)


def write_model(
    path: str | os.PathLike[str],
    config: DecoderConfig,
    params: PyTree,
    *,
    tokenizer_json: str | None = None,
    type: FileType = "keep",
    approximate: bool = False,
    overwrite: bool = False,
) -> tuple[TensorVerdict, ...]:
    """Writes a decoder as one GGUF file that llama.cpp reads: under a temporary name first, renamed when whole.

    Args:
        path: to make; its directory must exist.
        config: what `params` belong to.
        params: dense or compressed, scanned or unrolled.
        tokenizer_json: the text of tokenizer.json (`tokenizer.to_str()`); None writes a file that takes token ids only.
        type: "keep" writes dense weights in their dtype and compressed ones as the smaller of Q4_0 and Q8_0 that holds
            their codes and scales; the other values are the type of all matrices. With "q4_0" the embedding and the
            head are Q8_0 unless their own codes fit. Vectors are always F32, as readers expect.
        approximate: round what does not fit exactly, with the reference quantizer; "keep" rounds to Q8_0. A matrix
            whose rows are no multiple of 32 becomes F16.
        overwrite: replaces a file that exists already.

    Returns:
        For every parameter what it was written as, and whether exactly.

    Raises:
        CheckpointError: parameters that do not fit the configuration, or not exactly into the type while `approximate`
            is False (all are named with the reason, nothing is written); a file that exists already; a full disk.
        ConfigError: a configuration that GGUF cannot hold.
    """
    target = Path(path)
    if type not in ("keep", "q4_0", "q8_0", "f16", "bf16", "f32"):
        raise CheckpointError(f"type={type!r}: choose keep, q4_0, q8_0, f16, bf16 or f32")
    entries = to_metadata(config)
    tokens = tokenizer_metadata(tokenizer_json, config)
    leaves = _leaves(config, params)
    plans = {name: _plan(name, stored, leaf, config, type) for name, (stored, leaf) in leaves.items()}
    rounded = [verdict for _, verdict in plans.values() if not verdict.exact]
    if rounded and not approximate:
        listed = "; ".join(f"{verdict.name}: {verdict.reason}" for verdict in rounded[:4])
        more = f"; and {len(rounded) - 4} more" if len(rounded) > 4 else ""
        raise CheckpointError(
            f"{target.name}: {len(rounded)} tensors cannot be written exactly as type {type!r} ({listed}{more}); pass "
            "approximate=True to round them, or choose another type"
        )
    tensors = {name: tensor for name, (tensor, _) in plans.items()}
    if (factors := rope_factors(config)) is not None:
        tensors[ROPE_FACTORS] = NewTensor(kind=BY_NAME["F32"], shape=factors.shape, data=lambda: factors)
    weights: Counter[str] = Counter()
    for tensor in tensors.values():
        weights[tensor.kind.name] += int(np.prod(tensor.shape)) if len(tensor.shape) > 1 else 0
    metadata = {
        "general.architecture": architecture_of(config),
        "general.type": "model",
        "general.name": target.stem,
        "general.file_type": _FILE_TYPES[weights.most_common(1)[0][0]],
        "general.quantization_version": 2,
    }
    write_gguf(target, metadata | entries | tokens, tensors, overwrite=overwrite)
    return tuple(verdict for _, verdict in plans.values())


def _config(file: Path, found: GGUFFile) -> DecoderConfig:
    factors = None
    if ROPE_FACTORS in found.tensors:
        factors = found.tensors[ROPE_FACTORS].read()
        if not isinstance(factors, np.ndarray) or factors.dtype != np.float32:
            raise CheckpointError(f"{file.name}: {ROPE_FACTORS} is no vector of F32; convert the model anew")
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    return read_config(found.metadata, shapes, factors, file.name)


def _gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` to `blk.3.ffn_up.weight`."""
    module, _, last = name.rpartition(".")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return f"blk.{match[1]}.{_PARTS[match[2]]}.{last}" if match else f"{_PARTS[module]}.{last}"


def _rows(config: DecoderConfig, name: str, *, reading: bool) -> np.ndarray | None:
    """The order to take the rows of a tensor in: from neighbouring pairs to halves when reading, else back."""
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
    if match is None or architecture_of(config) != "llama":
        return None
    heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
    pairs = (config.head_dim // 2, 2) if reading else (2, config.head_dim // 2)
    return np.arange(heads * config.head_dim).reshape(heads, *pairs).swapaxes(1, 2).reshape(-1)


def _compare(file: Path, found: GGUFFile, expected: dict[str, StoredTensor]) -> None:
    problems = [f"missing {name} {list(x.shape)}" for name, x in expected.items() if name not in found.tensors]
    for name, tensor in found.tensors.items():
        if name not in expected:
            if name != ROPE_FACTORS:
                problems.append(f"unexpected {name} {list(tensor.shape)}")
        elif tensor.shape != expected[name].shape:
            wanted = list(expected[name].shape)
            problems.append(f"{name} has shape {list(tensor.shape)}, the metadata says {wanted}")
        elif tensor.kind.dtype is not None and tensor.kind.name not in _FILE_TYPES:
            problems.append(f"{name} is {tensor.kind.name}, expected F32, F16, BF16 or blocks")
    if problems:
        raise CheckpointError(f"{file.name}: the tensors do not fit the metadata: " + "; ".join(problems))


def _parameter(leaf: CompressedArray | np.ndarray, stored: StoredTensor, dtype: Any) -> Any:
    """A leaf `[in, out]` as the parameter that the decoder takes."""
    if isinstance(leaf, np.ndarray):
        leaf = leaf if stored.transposed or leaf.ndim == 1 else leaf.T
        return jnp.asarray(leaf, dtype or leaf.dtype)
    leaf = leaf if dtype is None else leaf.astype(dtype)
    return leaf if stored.transposed else View(array=leaf, order=(1, 0))  # an embedding: blocks along its second axis


def _leaves(config: DecoderConfig, params: PyTree) -> dict[str, tuple[StoredTensor, Any]]:
    """Every tensor of the file with its parameter, all of them present, of the right shape and finite."""
    flat = dict(leaves_with_paths(unstack_layers(params) if "layers" in params else params))
    expected = {_gguf_name(name): stored for name, stored in expected_tensors(config).items()}
    wanted = {stored.path for stored in expected.values()}
    problems = [f"missing {path}" for path in sorted(wanted - set(flat))]
    problems += [f"unexpected {path}" for path in flat if path not in wanted]
    for stored in expected.values():
        leaf = flat.get(stored.path)
        shape = stored.shape[:: -1 if stored.transposed else 1]
        if leaf is not None and tuple(leaf.shape) != shape:
            problems.append(f"{stored.path} has shape {list(leaf.shape)}, expected {list(shape)}")
        elif leaf is not None and not all(map(_is_finite, jax.tree.leaves(leaf))):
            problems.append(f"{stored.path} has values that are not finite")
    if problems:
        raise CheckpointError("these parameters do not fit the configuration: " + "; ".join(problems))
    return {name: (stored, flat[stored.path]) for name, stored in expected.items()}


def _is_finite(x: Any) -> bool:
    values = np.asarray(x)
    return not jnp.issubdtype(values.dtype, jnp.floating) or bool(np.isfinite(values.astype(np.float32)).all())


def _plan(
    name: str, stored: StoredTensor, leaf: Any, config: DecoderConfig, type: FileType
) -> tuple[NewTensor, TensorVerdict]:
    """What to write for one parameter, and the verdict on it; its bytes are made when their turn comes."""
    rows = _rows(config, name, reading=False)

    def ordered(data: np.ndarray) -> np.ndarray:
        return data if rows is None else data[rows]

    def dense() -> np.ndarray:
        values = np.asarray(_materialize(leaf) if is_compressed(leaf) else leaf)
        return ordered(values.T if stored.transposed else values)

    def new(kind: str, data: Callable[[], np.ndarray], reason: str = "", error: float = 0.0) -> Any:
        verdict = TensorVerdict(
            name=name, path=stored.path, kind=kind, exact=not reason, reason=reason, error=float(error)
        )
        return NewTensor(kind=BY_NAME[kind], shape=stored.shape, data=data), verdict

    def plain(kind: str, reason: str = "") -> Any:
        dtype = BY_NAME[kind].dtype
        with np.errstate(over="ignore"):  # an overflow is refused below
            stored_values = dense().astype(dtype)
        error = np.abs(stored_values.astype(np.float64) - dense().astype(np.float64)).max()
        if not np.isfinite(error):
            raise CheckpointError(f"{name}: has values beyond {kind}; choose another type")
        if error:
            reason = reason or f"its {dense().dtype.name} values are no {kind} numbers"
        return new(kind, lambda: dense().astype(dtype), reason if error else "", error)

    if len(stored.shape) == 1:
        return plain("F32")
    if type in ("f16", "bf16", "f32"):
        return plain(type.upper())
    if type == "keep" and not is_compressed(leaf):
        return plain(_DTYPES.get(np.asarray(leaf).dtype.name, "F32"))
    codes = _along_rows(leaf, stored)
    wide = "Q8_0" if type != "q4_0" or name in ("token_embd.weight", "output.weight") else "Q4_0"
    narrow = type == "q4_0" or (type == "keep" and isinstance(codes, Quantized) and codes.bits <= 4)
    reason = "its groups do not run along the rows of the file" if is_compressed(leaf) else "it is dense"
    if codes is not None:
        for kind in ("Q4_0", wide) if narrow else (wide,):
            reason = why_not(codes, kind)
            if reason is None:
                return new(kind, partial(_encoded, codes, kind, ordered))
    if stored.shape[-1] % BY_NAME[wide].elements:
        return plain("F16", f"rows of {stored.shape[-1]} weights are no whole blocks, so it is F16")
    data = quantize(dense(), wide)
    back = decode(BY_NAME[wide], data, name=name)
    assert isinstance(back, CompressedArray)  # a type of blocks
    error = np.abs(np.asarray(_materialize(back)).T - dense().astype(np.float32)).max()
    return new(wide, lambda: quantize(dense(), wide), reason or "", error)


@jax.jit
def _materialize(leaf: CompressedArray) -> jax.Array:
    return leaf.materialize()


def _encoded(leaf: CompressedArray, kind: str, ordered: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    assert isinstance(leaf, Quantized)  # why_not found it so
    return ordered(encode(leaf, kind))


def _along_rows(leaf: Any, stored: StoredTensor) -> CompressedArray | None:
    """The compressed `[in, out]` whose groups run along the rows of the file; None where there is none."""
    if isinstance(leaf, View):
        straight = leaf.in_dims == leaf.out_dims == (-1,)
        return leaf.array if straight and leaf.order == ((0, 1) if stored.transposed else (1, 0)) else None
    return leaf if is_compressed(leaf) and stored.transposed else None
