"""Models in Hugging Face directories: config.json, safetensors (one or sharded), tokenizer.json; in and out."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.arrays.base import is_compressed
from effjax.errors import CheckpointError, ConfigError
from effjax.io.directory import renamed_when_whole
from effjax.io.safetensors_file import TensorEntry, read_entries
from effjax.models.config import DecoderConfig, token_ids
from effjax.models.decoder import OPT_OFFSET, DecoderApply, stack_layers, unstack_layers
from effjax.paths import leaves_with_paths, nest

PyTree = Any
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OLD_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # not a parameter; early Llama files


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A decoder ready to run.

    Attributes:
        config: its configuration; `eos_token_ids` are those that generation stops at.
        params: parameters, as `Decoder(config)` takes them.
        tokenizer: a `tokenizers.Tokenizer`, or None where the directory has none.
        source: the hub id, or the name of the directory (never its path).
    """

    config: DecoderConfig
    params: PyTree
    tokenizer: Any
    source: str

    @property
    def apply(self) -> DecoderApply:
        """`apply({"params": params}, tokens, cache=..., lengths=...)`."""
        return DecoderApply(self.config)

    def encode(self, text: str) -> list[int]:
        """Token ids, with the model's first token in front where it has one.

        Raises:
            ConfigError: there is no tokenizer, or it makes an id that the model has no embedding for.
        """
        ids = self._need_tokenizer().encode(text).ids
        bos = self.config.bos_token_id
        if bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        if ids and max(ids) >= self.config.vocab_size:
            raise ConfigError(
                f"{self.source}: the tokenizer makes token {max(ids)}, but vocab_size is {self.config.vocab_size}; "
                "take the tokenizer.json that belongs to this model"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return self._need_tokenizer().decode(ids)

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ConfigError(f"{self.source}: has no tokenizer.json; put one into the directory, or pass token ids")
        return self.tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One parameter on disk: its path in the tree, and whether the file holds it as `[out, in]`."""

    path: str
    transposed: bool
    shape: tuple[int, ...]  # on disk


def load_model(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: Any = None,
    scan_layers: bool = False,
    revision: str | None = None,
) -> LoadedModel:
    """Reads a decoder from a directory, or from the hub by its id.

    Tensors are read one at a time; kernels are turned from `[out, in]` to `[in, out]`. Where the configuration says how
    the weights are quantized (`quantization_config`), they become compressed leaves with the stored codes and scales;
    see `effjax.models.quantized_hf`.

    Args:
        path_or_id: a directory with config.json, model.safetensors (or shards with an index) and, if texts shall go in
            and out, tokenizer.json; a .gguf file; or a hub id such as `"Qwen/Qwen2.5-0.5B"` (needs `huggingface_hub`
            and a network).
        dtype: of the parameters, and what compressed leaves materialize to; None keeps what is on disk.
        scan_layers: stacks the layers for `nn.scan`.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: nothing there, a damaged file, or missing, unexpected or wrongly shaped tensors (all of them
            are named), or a weight that is not finite.
        ConfigError: config.json describes no decoder that this package runs.

    Example:
        >>> model = load_model("path/to/stories260K")  # doctest: +SKIP
        >>> logits = model.apply({"params": model.params}, jnp.asarray([model.encode("Once upon")]))  # doctest: +SKIP
    """
    from effjax.models.quantized_hf import is_quantized, load_quantized

    if os.fspath(path_or_id).endswith(".gguf") and Path(path_or_id).is_file():
        return _load_gguf(Path(path_or_id), dtype, scan_layers)
    directory, source = find_directory(path_or_id, revision)
    if is_quantized(directory):
        return load_quantized(directory, source, dtype=dtype, scan_layers=scan_layers).model
    config = read_config(directory, scan_layers=scan_layers)
    params = read_dense(config, all_entries(directory), expected_tensors(config), source, dtype=dtype)
    return LoadedModel(config=config, params=params, tokenizer=read_tokenizer(directory), source=source)


def _load_gguf(file: Path, dtype: Any, scan_layers: bool) -> LoadedModel:
    from effjax.io.formats.gguf_model import read_model

    model = read_model(file, dtype=dtype)
    if not scan_layers:
        return model
    config = dataclasses.replace(model.config, scan_layers=True)
    return dataclasses.replace(model, config=config, params=stack_layers(model.params))


def read_dense(
    config: DecoderConfig,
    entries: dict[str, TensorEntry],
    expected: dict[str, StoredTensor],
    source: str,
    *,
    dtype: Any = None,
    leaves: dict[str, Any] | None = None,
) -> PyTree:
    """The parameter tree of `expected` tensors, which are all there are in `entries`, and of `leaves` by path.

    Raises:
        CheckpointError: see `load_model`.
    """
    check_entries(entries, expected, source)
    flat: dict[str, Any] = dict(leaves or {})
    for name, tensor in expected.items():
        weight = read_finite(name, entries[name])
        weight = (weight.T if tensor.transposed else weight).astype(dtype or weight.dtype)
        flat_path, layer = tensor.path, None
        if config.scan_layers and (match := re.match(r"layers_(\d+)/", tensor.path)):
            flat_path, layer = "layers/" + tensor.path[match.end() :], int(match[1])
        if layer is None:
            flat[flat_path] = jnp.asarray(weight)
        else:
            stacked = flat.setdefault(flat_path, np.empty((config.num_hidden_layers, *weight.shape), weight.dtype))
            stacked[layer] = weight
    if config.tie_word_embeddings and "lm_head.weight" in entries:
        head = read_finite("lm_head.weight", entries["lm_head.weight"])
        table = embedding_name(config)
        if head.tobytes() != entries[table].read().tobytes():
            raise CheckpointError(
                f"{source}: tie_word_embeddings is true, but lm_head.weight differs from {table}; "
                "write tie_word_embeddings false to use the head"
            )
    return nest({path: leaf if is_compressed(leaf) else jnp.asarray(leaf) for path, leaf in flat.items()})


def read_config(directory: Path, *, quantized: bool = False, **changes: Any) -> DecoderConfig:
    """The configuration of a model directory, with the stop tokens of generation_config.json where there is one.

    A tokenizer_config.json that names no `bos_token`, or says `add_bos_token` false, leaves `bos_token_id` None. How
    weights are quantized is passed over with `quantized`, and refused without.
    """
    entries = read_json(directory / "config.json")
    if quantized:
        entries.pop("quantization_config", None)
    try:
        config = DecoderConfig.from_hf(entries, **changes)
    except ConfigError as error:
        name = "" if str(error).startswith("config.json") else "config.json: "
        raise ConfigError(f"{name}{error}") from None
    if (directory / "generation_config.json").exists():
        generation = read_json(directory / "generation_config.json")
        if generation.get("eos_token_id") is not None:
            stops = token_ids(generation["eos_token_id"], "generation_config.json: eos_token_id")
            config = dataclasses.replace(config, eos_token_ids=stops)
    if (directory / "tokenizer_config.json").exists():
        tokens = read_json(directory / "tokenizer_config.json")
        if tokens.get("bos_token") is None or tokens.get("add_bos_token") is False:
            config = dataclasses.replace(config, bos_token_id=None)
    return config


def to_hf_tensors(config: DecoderConfig, params: PyTree) -> dict[str, np.ndarray]:
    """Parameters under their Hugging Face names, kernels as `[out, in]`.

    Raises:
        CheckpointError: a parameter is missing, unexpected, compressed, wrongly shaped or not finite (all are named).
    """
    flat = dict(leaves_with_paths(unstack_layers(params) if "layers" in params else params))
    expected = expected_tensors(config)
    wanted = {tensor.path: (name, tensor) for name, tensor in expected.items()}
    problems = [f"missing {path}" for path in wanted if path not in flat]
    problems += [f"unexpected {path}" for path in flat if path not in wanted]
    tensors: dict[str, np.ndarray] = {}
    for path, (name, tensor) in wanted.items():
        leaf = flat.get(path)
        if leaf is None:
            continue
        if is_compressed(leaf):
            problems.append(
                f"{path} is compressed ({type(leaf).__name__}): use effjax.materialize(params) first, or "
                "effjax.models.quantized_save.save_quantized_hf"
            )
            continue
        weight = np.asarray(leaf)
        weight = weight.T if tensor.transposed and weight.ndim == 2 else weight
        if weight.shape != tensor.shape:
            found = list(np.shape(leaf))
            problems.append(
                f"{path} has shape {found}, expected {list(tensor.shape[:: -1 if tensor.transposed else 1])}"
            )
        elif not np.isfinite(weight).all():
            problems.append(f"{path} has values that are not finite")
        tensors[name] = np.ascontiguousarray(weight)
    if problems:
        raise CheckpointError("these parameters do not fit the configuration: " + "; ".join(problems))
    return tensors


def save_hf(
    directory: str | os.PathLike[str],
    config: DecoderConfig,
    params: PyTree,
    tokenizer_json: str | None = None,
    *,
    files: dict[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a directory that `load_model` and `transformers` read: first under a temporary name, renamed when whole.

    Args:
        directory: to make; its parent must exist.
        config: what `params` belong to.
        params: dense parameters, scanned or unrolled, kept in their dtype.
        tokenizer_json: the text of tokenizer.json (`tokenizer.to_str()`).
        files: further texts by file name, such as `{"README.md": card}`.
        overwrite: replaces a directory that exists already.

    Raises:
        CheckpointError: parameters that do not fit (nothing is written), a directory that exists already, or a disk
            that is full (nothing is left behind).
        ConfigError: layers of different widths, for which `config.json` has no place.
    """
    from safetensors.numpy import save_file

    refuse_own_widths(config)
    tensors = to_hf_tensors(config, params)
    target = Path(directory)
    entries = config.to_hf() | {"torch_dtype": tensors[embedding_name(config)].dtype.name}
    texts = {"config.json": json.dumps(entries, indent=2) + "\n"} | (files or {})
    if tokenizer_json is not None:
        texts["tokenizer.json"] = tokenizer_json
    with renamed_when_whole(target, overwrite=overwrite) as temporary:
        save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")


def refuse_own_widths(config: DecoderConfig) -> None:
    """Raises ConfigError where layers have widths of their own: no program but this one would read the files."""
    if isinstance(config.intermediate_size, tuple):
        raise ConfigError(
            f"the layers' intermediate_size differ, {list(config.intermediate_size)}, and config.json of a "
            f"{config.model_type} model has one for all: write it with effjax.io.save_checkpoint, or cut equally many "
            "neurons from each layer, with Structured(scope='group')"
        )


def find_directory(path_or_id: str | os.PathLike[str], revision: str | None) -> tuple[Path, str]:
    """The directory, from the disk or fetched from the hub, and how to call the model."""
    path = Path(path_or_id)
    if path.is_dir():
        return path, path.resolve().name
    text = os.fspath(path_or_id)
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text):
        raise CheckpointError(
            f"{path.name}: no such directory; give a directory with config.json and {_WEIGHTS}, or a hub id "
            "'owner/name'"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{text}: no such directory, and to fetch it from the hub huggingface_hub is needed (pip install "
            "huggingface_hub)"
        ) from error
    patterns = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "*.safetensors",
        _INDEX,
    ]
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=patterns)), text
    except Exception as error:  # the hub client raises its own, the network's and the cache's errors
        raise CheckpointError(
            f"{text}: no such directory, and the hub did not deliver it ({type(error).__name__}: {error}); check the "
            "id and "
            "the network, or give a directory"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.name} is missing in {file.resolve().parent.name}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file.name} is damaged ({error}); copy it again") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file.name} must hold an object, found a {type(entries).__name__}")
    return entries


def read_tokenizer(directory: Path) -> Any:
    """The `tokenizers.Tokenizer` of a directory, or None; raises CheckpointError when its file is damaged."""
    if not (directory / "tokenizer.json").exists():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the reader raises plain Exception
        raise CheckpointError(f"tokenizer.json is damaged ({error}); copy it again") from error


def all_entries(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of the directory, from one file or from the shards that the index names."""
    if (directory / _WEIGHTS).exists():
        return read_entries(directory / _WEIGHTS)
    if not (directory / _INDEX).exists():
        pickles = sorted(file.name for file in directory.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is not read: convert it to safetensors" if pickles else ""
        raise CheckpointError(f"{directory.resolve().name}: neither {_WEIGHTS} nor {_INDEX} is there{hint}")
    weight_map = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{_INDEX}: weight_map must map each tensor to a file name")
    entries: dict[str, TensorEntry] = {}
    problems: list[str] = []
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{_INDEX}: {file!r} is not a plain file name")
        if not (directory / file).exists():
            problems.append(f"{file} is missing")
            continue
        for name, entry in read_entries(directory / file).items():
            if name in entries:
                problems.append(f"{name} is in {entries[name].file.name} and in {file}")
            elif weight_map.get(name) != file:
                problems.append(f"{name} is in {file}, but the index says {weight_map.get(name)}")
            entries[name] = entry
    problems += [
        f"{name} is not in {file}, where the index says"
        for name, file in weight_map.items()
        if name not in entries and (directory / file).exists()
    ]
    if problems:
        raise CheckpointError(f"{_INDEX} does not fit the files: " + "; ".join(problems))
    return entries


# Of a layer's parts, ours and those of Hugging Face.
_LLAMA = {
    "attention_norm": "input_layernorm",
    **{f"attention/{part}_{kind}": f"self_attn.{part}_{kind}" for kind in ("proj", "norm") for part in "qkvo"},
    "mlp_norm": "post_attention_layernorm",
    **{f"mlp/{part}_proj": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_OPT = {
    "attention_norm": "self_attn_layer_norm",
    **{f"attention/{part}_proj": f"self_attn.{part}_proj" for part in "qkv"},
    "attention/o_proj": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "mlp/up_proj": "fc1",
    "mlp/down_proj": "fc2",
}


def expected_tensors(config: DecoderConfig) -> dict[str, StoredTensor]:
    """Hugging Face name to parameter, for everything that `config` promises."""
    c, expected = config, {}

    def add(name: str, path: str, *shape: int, transposed: bool = False) -> None:
        expected[name] = StoredTensor(path=path, transposed=transposed, shape=shape)

    def linear(name: str, path: str, inputs: int, outputs: int, bias: bool) -> None:
        add(f"{name}.weight", f"{path}/kernel", outputs, inputs, transposed=True)
        if bias:
            add(f"{name}.bias", f"{path}/bias", outputs)

    def norm(name: str, path: str) -> None:
        add(f"{name}.weight", f"{path}/scale", c.hidden_size)
        if c.is_opt:
            add(f"{name}.bias", f"{path}/bias", c.hidden_size)

    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    base, names = ("model.decoder", _OPT) if c.is_opt else ("model", _LLAMA)
    add(embedding_name(c), "embed/embedding", c.vocab_size, c.hidden_size)
    if c.is_opt:
        positions = c.max_position_embeddings + OPT_OFFSET
        add(f"{base}.embed_positions.weight", "embed/positions", positions, c.hidden_size)
    for i, width in enumerate(c.widths):
        name = {ours: f"{base}.layers.{i}.{theirs}" for ours, theirs in names.items()}
        path = {ours: f"layers_{i}/{ours}" for ours in names}
        norm(name["attention_norm"], path["attention_norm"])
        for part, outputs in (("q", queries), ("k", keys), ("v", keys)):
            ours = f"attention/{part}_proj"
            linear(name[ours], path[ours], c.hidden_size, outputs, c.qkv_bias)
        linear(name["attention/o_proj"], path["attention/o_proj"], queries, c.hidden_size, c.o_bias)
        if c.qk_norm:
            for part in ("q", "k"):
                ours = f"attention/{part}_norm"
                add(f"{name[ours]}.weight", f"{path[ours]}/scale", c.head_dim)
        norm(name["mlp_norm"], path["mlp_norm"])
        for ours in ("mlp/up_proj",) if c.is_opt else ("mlp/gate_proj", "mlp/up_proj"):
            linear(name[ours], path[ours], c.hidden_size, width, c.mlp_bias)
        linear(name["mlp/down_proj"], path["mlp/down_proj"], width, c.hidden_size, c.mlp_bias)
    norm(f"{base}.final_layer_norm" if c.is_opt else f"{base}.norm", "final_norm")
    if not c.tie_word_embeddings:
        add("lm_head.weight", "lm_head/kernel", c.vocab_size, c.hidden_size, transposed=True)
    return expected


def embedding_name(config: DecoderConfig) -> str:
    """What the token table is called on disk."""
    return "model.decoder.embed_tokens.weight" if config.is_opt else "model.embed_tokens.weight"


def check_entries(entries: dict[str, TensorEntry], expected: dict[str, StoredTensor], source: str) -> None:
    """Raises CheckpointError, with every missing, unexpected or wrongly shaped tensor by its name."""
    problems = [f"missing {name} {list(tensor.shape)}" for name, tensor in expected.items() if name not in entries]
    for name, entry in entries.items():
        if name not in expected:
            if name != "lm_head.weight" and not _OLD_BUFFER.fullmatch(name):  # a repeated tied head is compared later
                problems.append(f"unexpected {name} {list(entry.shape)}")
        elif entry.shape != expected[name].shape:
            problems.append(f"{name} has shape {list(entry.shape)}, config.json says {list(expected[name].shape)}")
        elif not jnp.issubdtype(entry.dtype, jnp.floating) or entry.dtype.itemsize < 2:
            problems.append(f"{name} is {entry.dtype.name}, expected bfloat16, float16, float32 or float64")
    if problems:
        raise CheckpointError(f"{source}: the tensors do not fit config.json: " + "; ".join(problems))


def read_finite(name: str, entry: TensorEntry) -> np.ndarray:
    """The tensor; raises CheckpointError when a value is not finite."""
    weight = entry.read()
    bad = ~np.isfinite(weight)
    if bad.any():
        at = [int(index) for index in np.argwhere(bad)[0]]
        raise CheckpointError(
            f"{entry.file.name}: {name} has {int(bad.sum())} values that are NaN or infinite, the first at {at}; copy "
            "the "
            "file again or ask its author"
        )
    return weight
