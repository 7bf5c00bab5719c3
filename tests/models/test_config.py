"""Configurations: what is read, what is written, and what is refused with which words."""

import dataclasses
import json

import pytest

from effjax.errors import ConfigError
from effjax.models.config import DecoderConfig, RopeScaling
from tests.models.families import FAMILIES

LLAMA, MISTRAL, QWEN2, OPT = (FAMILIES[name] for name in ("llama2", "mistral", "qwen2_window_tied", "opt"))


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family):
    config = DecoderConfig.from_hf(FAMILIES[family], scan_layers=True, dtype="bfloat16")
    assert DecoderConfig.from_hf(config.to_hf(), scan_layers=True, dtype="bfloat16") == config
    assert hash(config) == hash(dataclasses.replace(config))


def test_families_differ_as_they_should():
    read = {name: DecoderConfig.from_hf(entries) for name, entries in FAMILIES.items()}
    assert [name for name, c in read.items() if c.qkv_bias] == [
        "llama_biases",
        "qwen2",
        "qwen2_window_tied",
        "qwen3_tied_bias",
        "opt",
    ]
    assert [name for name, c in read.items() if c.o_bias] == ["llama_biases", "qwen3_tied_bias", "opt"]
    assert [name for name, c in read.items() if c.qk_norm] == ["qwen3", "qwen3_tied_bias"]
    assert [name for name, c in read.items() if c.sliding_window] == ["mistral", "qwen2_window_tied"]
    assert read["llama3"].rope_scaling == RopeScaling(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )


def test_newer_and_older_spellings_agree():
    old = LLAMA | {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    assert DecoderConfig.from_hf(old) == DecoderConfig.from_hf(new)
    plain = new | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    assert DecoderConfig.from_hf(plain).rope_scaling is None


@pytest.mark.parametrize(
    ("changes", "written"),
    [
        ({}, "silu"),
        ({"hidden_act": "relu"}, "relu"),
        ({"hidden_act": "relu", "relu_shift": 0.5}, "shifted_relu"),
        ({"hidden_act": "relu", "norm_relu": True}, "shifted_relu"),
    ],
)
def test_activations_that_others_lack_are_written_under_a_name_that_they_refuse(changes, written):
    config = dataclasses.replace(DecoderConfig.from_hf(LLAMA), **changes)
    assert config.to_hf()["hidden_act"] == written
    assert DecoderConfig.from_hf(config.to_hf()) == config


def test_several_stop_tokens_and_defaults():
    config = DecoderConfig.from_hf(
        {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"eos_token_id": [2, 7]}
    )
    assert config.eos_token_ids == (2, 7) and config.num_key_value_heads == 4 and config.head_dim == 6
    assert DecoderConfig.from_hf(MISTRAL | {"layer_types": ["sliding_attention"] * 2}).sliding_window == 6
    assert DecoderConfig.from_hf(QWEN2 | {"layer_types": ["full_attention"] * 2}).sliding_window is None
    assert DecoderConfig.from_hf(QWEN2 | {"max_window_layers": 2}).sliding_window is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "must hold an object"),
        ({"vocab_size": 3}, "model_type is missing; write one of"),
        (LLAMA | {"model_type": "gpt2"}, r"model_type 'gpt2' is not known; this decoder runs \['llama'"),
        (LLAMA | {"model_type": ["llama"]}, "model_type .* is not known"),
        ({"model_type": "llama", "vocab_size": 32}, "missing hidden_size, intermediate_size, num_hidden_layers"),
        ({k: v for k, v in MISTRAL.items() if k != "num_key_value_heads"}, "missing num_key_value_heads"),
        (LLAMA | {"hidden_size": 24.0}, "hidden_size must be a positive whole number, found 24.0"),
        (LLAMA | {"vocab_size": True}, "vocab_size must be a positive whole number, found True"),
        (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        (LLAMA | {"hidden_size": 26}, "hidden_size 26 does not divide into num_attention_heads 4; write head_dim"),
        (LLAMA | {"head_dim": 7}, "head_dim 7 is odd"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; this decoder has"),
        (LLAMA | {"hidden_act": "shifted_relu", "relu_shift": "a"}, "relu_shift must be a finite number, found 'a'"),
        (LLAMA | {"hidden_act": "shifted_relu", "norm_relu": 1}, "norm_relu must be true or false, found 1"),
        (
            OPT | {"do_layer_norm_before": False},
            "do_layer_norm_before False is not run; this decoder runs OPT with True",
        ),
        (OPT | {"word_embed_proj_dim": 12}, "word_embed_proj_dim 12 differs from hidden_size"),
        (OPT | {"activation_function": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"model_type": "opt", "vocab_size": 3}, "missing hidden_size, intermediate_size, num_hidden_layers"),
        (LLAMA | {"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        (LLAMA | {"rope_theta": "big"}, "rope_theta must be a positive number"),
        (LLAMA | {"sliding_window": 4}, "sliding_window contradicts model_type 'llama'"),
        (LLAMA | {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, found 'no'"),
        (LLAMA | {"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        (LLAMA | {"bos_token_id": -1}, "bos_token_id must be a token id"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config says the weights are already"),
        (LLAMA | {"rope_scaling": "linear"}, "rope_scaling must be an object or null, found 'linear'"),
        (
            LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type 'yarn'; this decoder runs 'default'",
        ),
        (LLAMA | {"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling has rope_type"),
        (LLAMA | {"rope_scaling": {"factor": 2.0}}, "rope_scaling has rope_type None"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "linear needs a positive number factor, found None"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor 0.5 is below 1"),
        (
            LLAMA | {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
            "type 'linear' and rope_type",
        ),
        (
            FAMILIES["llama3"] | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "llama3 needs .* low_freq_factor",
        ),
        (LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta 10000.0 contradicts"),
        (QWEN2 | {"attention_bias": False}, "attention_bias False contradicts model_type 'qwen2'"),
        (QWEN2 | {"max_window_layers": 1}, "sliding_window 6 holds for 1 of 2 layers"),
        (MISTRAL | {"layer_types": ["sliding_attention"]}, "layer_types must list 2 times"),
        (MISTRAL | {"layer_types": ["sliding_attention", "linear"]}, r"unknown \['linear'\]"),
        (MISTRAL | {"sliding_window": 0}, "sliding_window must be a positive whole number, found 0"),
        (LLAMA | {"mlp_bias": 3}, "mlp_bias must be true or false"),
    ],
)
def test_refused(entries, message):
    with pytest.raises(ConfigError, match=message):
        DecoderConfig.from_hf(entries)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": (8, 4)}, "intermediate_size has 2 widths for 1 layers"),
        ({"intermediate_size": (8, 0), "num_hidden_layers": 2}, "intermediate_size must be a positive whole number"),
        ({"model_type": "qwen2", "qkv_bias": False}, "qkv_bias False contradicts model_type 'qwen2'"),
        ({"model_type": "mistral", "o_bias": True}, "o_bias needs a model_type with attention_bias"),
        ({"qkv_bias": True}, "write qkv_bias and o_bias alike"),
        ({"model_type": "qwen3", "mlp_bias": True}, "mlp_bias contradicts model_type 'qwen3'"),
        ({"eos_token_ids": [2]}, "eos_token_ids must be a tuple"),
        ({"model_type": "opt", "hidden_act": "silu"}, "'opt' has learned positions and ReLUs: rope_scaling None and"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; this decoder has 'silu' and 'relu'"),
        ({"hidden_act": "relu", "relu_shift": float("inf")}, "relu_shift must be a finite number, found inf"),
        ({"relu_shift": 0.5}, "relu_shift and norm_relu need hidden_act 'relu', found 'silu'"),
        ({"norm_relu": True}, "relu_shift and norm_relu need hidden_act 'relu', found 'silu'"),
        ({"head_dim": 2, "rope_scaling": RopeScaling(rope_type="dynamic", factor=2.0)}, "head_dim of 4 or more"),
    ],
)
def test_refused_when_made_by_hand(changes, message):
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ConfigError, match=message):
        DecoderConfig(**(sizes | changes))


def test_a_width_a_layer():
    sizes = dict(vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    config = DecoderConfig(**sizes, intermediate_size=(8, 4))
    assert config.widths == (8, 4) and config.of_layer(1).one_width("a test") == 4
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    alike = DecoderConfig(**sizes, intermediate_size=(8, 8))
    assert (
        alike == DecoderConfig(**sizes, intermediate_size=8) and alike.of_layer(1) is alike and alike.widths == (8, 8)
    )
