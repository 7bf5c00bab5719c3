"""Small configurations of every family, and weights from a rule, so that goldens need no weights on disk."""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LENGTH = 20
POSITIONS = (0, 9, LENGTH - 1)  # whose logits are kept

_BASE = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama2": _BASE | {"model_type": "llama"},
    "llama2_all_heads_tied": _BASE | {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama_biases": _BASE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_relu": _BASE | {"model_type": "llama", "hidden_act": "relu"},
    "llama3": _BASE | {"model_type": "llama", "rope_theta": 500.0, "head_dim": 12, "rope_scaling": _LLAMA3},
    "llama_linear": _BASE | {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_dynamic": _BASE
    | {"model_type": "llama", "max_position_embeddings": 12, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "mistral": _BASE | {"model_type": "mistral", "sliding_window": 6},
    "mistral_no_window": _BASE | {"model_type": "mistral", "sliding_window": None},
    "qwen2": _BASE | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 6, "rms_norm_eps": 1e-6},
    "qwen2_window_tied": _BASE
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 0,
        "tie_word_embeddings": True,
    },
    "qwen3": _BASE | {"model_type": "qwen3", "head_dim": 8, "rope_theta": 1e6},
    "qwen3_tied_bias": _BASE
    | {"model_type": "qwen3", "head_dim": 10, "attention_bias": True, "tie_word_embeddings": True},
    "opt": {
        "model_type": "opt",
        "vocab_size": 32,
        "hidden_size": 24,
        "word_embed_proj_dim": 24,
        "ffn_dim": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor called `name`, the same on every machine and in every process."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    draws = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    if "norm" in name:
        return (1 + 0.2 * draws).astype(np.float32)
    if name.endswith("bias"):
        return (0.3 * draws).astype(np.float32)
    return (draws if "embed" in name else 1.5 * draws / np.sqrt(shape[-1])).astype(np.float32)


def tokens(rows: int = 1, length: int = LENGTH, vocab_size: int = 32) -> np.ndarray:
    """int32 `[rows, length]`, always the same."""
    return np.random.Generator(np.random.PCG64(7)).integers(0, vocab_size, (rows, length), np.int32)


def hf_tensors(config: dict) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, written down here a second time, apart from the importer's own list."""
    if config["model_type"] == "opt":
        return _opt_tensors(config)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, config["num_key_value_heads"] * head_dim
    qkv_bias = config.get("attention_bias", config["model_type"] == "qwen2")
    o_bias = config.get("attention_bias", False)
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{norm}.weight"] = (hidden,)
        for part, out, inp, bias in (
            ("self_attn.q_proj", queries, hidden, qkv_bias),
            ("self_attn.k_proj", keys, hidden, qkv_bias),
            ("self_attn.v_proj", keys, hidden, qkv_bias),
            ("self_attn.o_proj", hidden, queries, o_bias),
            ("mlp.gate_proj", config["intermediate_size"], hidden, config.get("mlp_bias", False)),
            ("mlp.up_proj", config["intermediate_size"], hidden, config.get("mlp_bias", False)),
            ("mlp.down_proj", hidden, config["intermediate_size"], config.get("mlp_bias", False)),
        ):
            shapes[f"{at}{part}.weight"] = (out, inp)
            if bias:
                shapes[f"{at}{part}.bias"] = (out,)
        if config["model_type"] == "qwen3":
            for part in ("q_norm", "k_norm"):
                shapes[f"{at}self_attn.{part}.weight"] = (head_dim,)
    return {name: weight(name, shape) for name, shape in shapes.items()}


def _opt_tensors(config: dict) -> dict[str, np.ndarray]:
    hidden, ffn, at = config["hidden_size"], config["ffn_dim"], "model.decoder."
    shapes: dict[str, tuple[int, ...]] = {
        f"{at}embed_tokens.weight": (config["vocab_size"], hidden),
        f"{at}embed_positions.weight": (config["max_position_embeddings"] + 2, hidden),
    }
    linears = {f"self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")}
    linears |= {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}
    vectors = [f"{at}final_layer_norm"]
    for i in range(config["num_hidden_layers"]):
        vectors += [f"{at}layers.{i}.{norm}" for norm in ("self_attn_layer_norm", "final_layer_norm")]
        for part, shape in linears.items():
            shapes |= {f"{at}layers.{i}.{part}.weight": shape, f"{at}layers.{i}.{part}.bias": shape[:1]}
    shapes |= {f"{name}.{kind}": (hidden,) for name in vectors for kind in ("weight", "bias")}
    return {name: weight(name, shape) for name, shape in shapes.items()}


def write_checkpoint(directory: Path, config: dict, tensors: dict[str, np.ndarray] | None = None) -> Path:
    """A Hugging Face directory without a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(hf_tensors(config) if tensors is None else tensors, directory / "model.safetensors")
    return directory
