"""A decoder's configuration from the metadata of a GGUF file, and back.

Architectures: `llama` (also what Mistral models are stored as), `qwen2`, `qwen3`. What GGUF cannot say, such as a
sliding window or `dynamic` rotary scaling, is refused on writing; so is on reading what the decoder does not run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from effjax.errors import CheckpointError, ConfigError
from effjax.models.config import DecoderConfig, RopeScaling
from effjax.models.rope import frequencies

ROPE_FACTORS = "rope_freqs.weight"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_ADDS_BOS = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "tekken",
)  # these put the first token in front unless told not to
_STOPS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def read_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: np.ndarray | None, source: str
) -> DecoderConfig:
    """The configuration that the metadata describes.

    Args:
        metadata: of the file.
        shapes: of its tensors, slowest axis first: they decide the vocabulary, the biases and whether the head is tied.
        rope_factors: the tensor `rope_freqs.weight`, by which rotary frequencies are divided, or None.
        source: what errors call the file.

    Raises:
        CheckpointError: an entry is missing or of the wrong type.
        ConfigError: a model that the decoder does not run.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"{source}: general.architecture {architecture!r} is not run; known are {ARCHITECTURES}")
    if metadata.get("split.count", 1) not in (0, 1):
        raise ConfigError(f"{source}: is one of {metadata['split.count']} parts; merge them with llama-gguf-split")

    def entry(key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        name = f"{architecture}.{key}"
        value = metadata.get(name, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one number a layer, all alike
        if value is None:
            raise CheckpointError(f"{source}: the metadata lacks {name}; convert the model anew")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(f"{source}: {name} is {value!r}, expected a number; convert the model anew")
        return _shortest(value) if isinstance(value, float) else value

    heads = entry("attention.head_count", int)
    width = entry("embedding_length", int)
    head_dim = entry("attention.key_length", int, width // heads if heads > 0 else 0)
    for key, wanted in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim), ("expert_count", 0)):
        if (found := entry(key, int, wanted)) != wanted:
            raise ConfigError(f"{source}: {architecture}.{key} is {found}; this decoder needs {wanted}")
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise CheckpointError(f"{source}: token_embd.weight is missing or no matrix; convert the model anew")
    if (said := entry("vocab_size", int, embedding[0])) != embedding[0]:
        raise CheckpointError(f"{source}: {architecture}.vocab_size is {said} but token_embd.weight has {embedding[0]}")
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blk.")})
    if (said := entry("block_count", int)) != blocks:
        raise CheckpointError(
            f"{source}: {architecture}.block_count is {said} but there are tensors of {blocks} blocks"
        )
    window = entry("attention.sliding_window", int, 0) or None
    theta = entry("rope.freq_base", (int, float), 10000.0)
    config = DecoderConfig(
        model_type="mistral" if window and architecture == "llama" else architecture,
        vocab_size=embedding[0],
        hidden_size=width,
        intermediate_size=entry("feed_forward_length", int),
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=entry("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        rms_norm_eps=entry("attention.layer_norm_rms_epsilon", float),
        rope_theta=theta,
        max_position_embeddings=entry("context_length", int),
        sliding_window=window,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        o_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
        tie_word_embeddings="output.weight" not in shapes,
        bos_token_id=_first_token(metadata),
        eos_token_ids=tuple(dict.fromkeys(metadata[key] for key in _STOPS if key in metadata)),
    )
    scaling = _linear_scaling(source, metadata.get(f"{architecture}.rope.scaling.type"), entry)
    if rope_factors is not None:
        original = metadata.get(f"{architecture}.rope.scaling.original_context_length")
        scaling = _llama3_scaling(source, config, rope_factors, original)
    return dataclasses.replace(config, rope_scaling=scaling)


def to_metadata(config: DecoderConfig) -> dict[str, Any]:
    """The metadata that a reader shapes the model by, without the tokenizer.

    Raises:
        ConfigError: GGUF or its readers cannot hold what the configuration says.
    """
    c = config
    if c.sliding_window is not None:
        raise ConfigError(
            f"sliding_window {c.sliding_window} is ignored by readers of {architecture_of(c)!r} in GGUF; set "
            "sliding_window None if texts stay shorter than the window"
        )
    if c.hidden_act != "silu":
        raise ConfigError(
            f"hidden_act {c.hidden_act!r} has no place in GGUF: its readers run {architecture_of(c)!r} with SiLU"
        )
    if c.model_type == "qwen3" and c.qkv_bias:
        raise ConfigError("qwen3 with attention_bias has no place in GGUF: its readers load no such biases")
    if len(c.eos_token_ids) > len(_STOPS):
        raise ConfigError(f"eos_token_ids {c.eos_token_ids}: GGUF names at most {len(_STOPS)}; leave the others out")
    entries: dict[str, Any] = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.one_width("GGUF"),
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": float(c.rope_theta),
        "vocab_size": c.vocab_size,
    }
    scaling = c.rope_scaling
    if scaling is not None and scaling.rope_type == "dynamic":
        raise ConfigError("rope_scaling 'dynamic' has no place in GGUF; set rope_scaling None if texts stay short")
    if scaling is not None and scaling.rope_type == "linear":
        entries |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    if scaling is not None and scaling.rope_type == "llama3":
        entries["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
    tokens: dict[str, Any] = dict(zip(_STOPS, c.eos_token_ids, strict=False))
    tokens["tokenizer.ggml.add_bos_token"] = c.bos_token_id is not None
    if c.bos_token_id is not None:
        tokens["tokenizer.ggml.bos_token_id"] = c.bos_token_id
    return {f"{architecture_of(c)}.{key}": value for key, value in entries.items()} | tokens


def architecture_of(config: DecoderConfig) -> str:
    """`general.architecture`: Mistral models are stored as `llama`."""
    return "llama" if config.model_type == "mistral" else config.model_type


def rope_factors(config: DecoderConfig) -> np.ndarray | None:
    """What a reader divides every rotary frequency by, float32 [head_dim / 2], for `llama3` scaling; else None."""
    if config.rope_scaling is None or config.rope_scaling.rope_type != "llama3":
        return None
    return frequencies(dataclasses.replace(config, rope_scaling=None)) / frequencies(config)


def _linear_scaling(source: str, kind: Any, entry: Any) -> RopeScaling | None:
    if kind in (None, "none"):
        return None
    if kind != "linear":
        raise ConfigError(f"{source}: rope.scaling.type {kind!r} is not run; known are 'none' and 'linear'")
    factor = entry("rope.scaling.factor", (int, float))
    return None if factor == 1 else RopeScaling(rope_type="linear", factor=factor)


def _llama3_scaling(source: str, config: DecoderConfig, factors: np.ndarray, original: Any) -> RopeScaling | None:
    """The `llama3` parameters that give these factors: a file holds the factors, not what they were made from."""
    if factors.shape != (config.head_dim // 2,):
        raise CheckpointError(f"{source}: {ROPE_FACTORS} has shape {list(factors.shape)}, not [head_dim / 2]")
    factor = _shortest(np.float32(factors.max()))
    if factor == 1 and (factors == 1).all():
        return None
    lengths = dict.fromkeys(n for n in (original, 8192, config.max_position_embeddings) if type(n) is int and n > 0)
    for length in lengths if factor >= 1 else ():
        scaling = RopeScaling(
            rope_type="llama3",
            factor=round(factor, 3),
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=length,
        )
        made = rope_factors(dataclasses.replace(config, rope_scaling=scaling))
        if made is not None and np.allclose(made, factors, rtol=1e-4):
            return scaling
    raise ConfigError(
        f"{source}: {ROPE_FACTORS} is no 'llama3' scaling with low_freq_factor 1 and high_freq_factor 4; take the "
        "model's own directory with its config.json"
    )


def _first_token(metadata: Mapping[str, Any]) -> int | None:
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    default = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in _ADDS_BOS
    return bos if metadata.get("tokenizer.ggml.add_bos_token", default) else None


def _shortest(value: float | np.floating) -> float:
    """The shortest decimal that is this number in float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
