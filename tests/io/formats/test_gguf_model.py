"""Whole decoders in GGUF: in and out, exact or refused, whatever is wrong with the file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.arrays import Quantized, Sum, View
from effjax.errors import CheckpointError, ConfigError, EffjaxError
from effjax.io.formats.gguf import read_gguf
from effjax.io.formats.gguf_model import read_model, write_model
from effjax.io.formats.gguf_types import BY_NAME
from effjax.io.formats.gguf_writer import NewTensor, write_gguf
from effjax.models.config import DecoderConfig, RopeScaling
from effjax.models.decoder import Decoder, stack_layers
from effjax.models.embedded import load_default

SIZES = dict(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
LLAMA3 = RopeScaling(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
CONFIGS = {
    "llama": dict(num_key_value_heads=2, bos_token_id=1, eos_token_ids=(2,), rms_norm_eps=1e-5),
    "llama with biases": dict(qkv_bias=True, o_bias=True, mlp_bias=True, head_dim=16, tie_word_embeddings=True),
    "qwen2": dict(model_type="qwen2", rope_theta=1e6, eos_token_ids=(2, 3)),
    "qwen3": dict(model_type="qwen3", head_dim=16, tie_word_embeddings=True),
    "linear": dict(rope_scaling=RopeScaling(rope_type="linear", factor=2.5)),
    "llama3": dict(rope_scaling=LLAMA3, rope_theta=500000.0, head_dim=64, max_position_embeddings=131072),
}
CONFIG = DecoderConfig(**SIZES | CONFIGS["llama"])


def make_params(config: DecoderConfig, dtype=np.float32):
    """Random parameters of every shape that the decoder takes."""
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), shapes)


PARAMS = make_params(CONFIG)


materialize = jax.jit(ej.materialize)


def same(a, b) -> bool:
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
    return all(jax.tree.leaves(equal))


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_there_and_back(tmp_path, name):
    config = DecoderConfig(**SIZES | CONFIGS[name])
    params = make_params(config)
    verdicts = write_model(tmp_path / "m.gguf", config, params)
    assert all(verdict.exact and verdict.kind == "F32" and not verdict.reason for verdict in verdicts)
    model = read_model(tmp_path / "m.gguf")
    assert model.config == config and model.tokenizer is None and model.source == "m.gguf"
    assert same(model.params, params)
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_mistral_is_stored_as_llama(tmp_path):
    config = dataclasses.replace(CONFIG, model_type="mistral")
    write_model(tmp_path / "m.gguf", config, PARAMS)
    assert read_gguf(tmp_path / "m.gguf").metadata["general.architecture"] == "llama"
    assert read_model(tmp_path / "m.gguf").config == dataclasses.replace(config, model_type="llama")


@pytest.mark.parametrize("name", ["llama with biases", "qwen2"])
def test_rows_of_queries_and_keys(tmp_path, name):
    """Llama files hold the rows of a head as pairs (0, half), (1, half + 1), …; Qwen files as they are."""
    config = DecoderConfig(**SIZES | CONFIGS[name])
    params = make_params(config)
    write_model(tmp_path / "m.gguf", config, params)
    tensors = read_gguf(tmp_path / "m.gguf").tensors
    half = config.head_dim // 2
    for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        kernel = np.asarray(params["layers_1"]["attention"][f"{part}_proj"]["kernel"])
        bias = np.asarray(params["layers_1"]["attention"][f"{part}_proj"]["bias"])
        columns = [
            head * config.head_dim + (i // 2 + half * (i % 2) if name.startswith("llama") else i)
            for head in range(heads)
            for i in range(config.head_dim)
        ]
        np.testing.assert_array_equal(tensors[f"blk.1.attn_{part}.weight"].read(), kernel[:, columns])
        np.testing.assert_array_equal(tensors[f"blk.1.attn_{part}.bias"].read(), bias[columns])
    value = tensors["blk.1.attn_v.weight"].read()
    np.testing.assert_array_equal(value, params["layers_1"]["attention"]["v_proj"]["kernel"])


def test_metadata(tmp_path):
    write_model(tmp_path / "small.gguf", CONFIG, PARAMS)
    assert read_gguf(tmp_path / "small.gguf").metadata == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "small",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "llama.context_length": 2048,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 48,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.model": "none",
    }


@pytest.mark.parametrize("dtype, kind", [(jnp.bfloat16, "BF16"), (jnp.float16, "F16")])
def test_dense_weights_keep_their_dtype(tmp_path, dtype, kind):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    kinds = {verdict.name: verdict.kind for verdict in write_model(tmp_path / "m.gguf", CONFIG, params)}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == kind
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    model = read_model(tmp_path / "m.gguf")
    assert same(jax.tree.map(lambda x: x.astype(dtype), model.params), params)
    assert model.params["layers_0"]["mlp"]["up_proj"]["kernel"].dtype == dtype
    again = read_model(tmp_path / "m.gguf", dtype=jnp.float32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(again.params)} == {"float32"}


def test_compressed_there_and_back(tmp_path):
    """Codes and scales survive, stacked layers and the order of rows included; the verdicts say so."""
    rules = [
        ("*/attention/*/kernel", ej.quantize.RTN(bits=4, group_size=32, symmetric=True)),
        ("*/mlp/gate_proj/kernel", ej.quantize.RTN(bits=8, group_size=None, symmetric=True)),
        ("*/mlp/*/kernel", ej.quantize.RTN(bits=3, group_size=32, symmetric=False)),
    ]
    qparams = ej.quantize_params(PARAMS, rules)
    verdicts = {v.name: v for v in write_model(tmp_path / "m.gguf", CONFIG, qparams)}
    assert all(verdict.exact for verdict in verdicts.values())
    assert verdicts["blk.1.attn_k.weight"].kind == "Q4_0" and verdicts["blk.1.ffn_gate.weight"].kind == "Q8_0"
    model = read_model(tmp_path / "m.gguf")
    leaf = model.params["layers_1"]["attention"]["k_proj"]["kernel"]
    original = qparams["layers_1"]["attention"]["k_proj"]["kernel"]
    assert isinstance(leaf, Quantized) and same(leaf, original)
    assert same(materialize(model.params), materialize(qparams))
    write_model(tmp_path / "stacked.gguf", CONFIG, stack_layers(qparams))
    assert same(read_model(tmp_path / "stacked.gguf").params, model.params)


@pytest.mark.parametrize("type, head", [("q8_0", "Q8_0"), ("q4_0", "Q8_0")])
def test_rounded_models_run_and_are_kept(tmp_path, type, head):
    """A dense model rounded on request; what is read runs compressed, and is written again byte for byte."""
    verdicts = {v.name: v for v in write_model(tmp_path / "a.gguf", CONFIG, PARAMS, type=type, approximate=True)}
    assert verdicts["blk.0.ffn_up.weight"].kind == type.upper() and verdicts["output.weight"].kind == head
    assert verdicts["blk.0.ffn_up.weight"].reason == "it is dense" and verdicts["blk.0.attn_norm.weight"].exact
    model = read_model(tmp_path / "a.gguf")
    assert isinstance(model.params["embed"]["embedding"], View)
    dense = materialize(model.params)
    for name, part in (("blk.0.ffn_up.weight", "up_proj"), ("blk.0.ffn_down.weight", "down_proj")):
        difference = dense["layers_0"]["mlp"][part]["kernel"] - PARAMS["layers_0"]["mlp"][part]["kernel"]
        assert 0 < verdicts[name].error == float(jnp.abs(difference).max()) < 0.6
    tokens = jnp.array([[1, 5, 7, 9, 40, 3]])
    compressed = jax.jit(ej.lift(model.apply))({"params": model.params}, tokens)
    np.testing.assert_allclose(compressed, jax.jit(model.apply)({"params": dense}, tokens), rtol=2e-3, atol=2e-3)
    assert all(v.exact for v in write_model(tmp_path / "b.gguf", model.config, model.params))
    first, second = read_gguf(tmp_path / "a.gguf").tensors, read_gguf(tmp_path / "b.gguf").tensors
    assert {name: (x.kind, x.raw().tobytes()) for name, x in first.items()} == {
        name: (x.kind, x.raw().tobytes()) for name, x in second.items()
    }


def test_k_quants_are_read_exactly(tmp_path):
    """A file of Q4_K, Q5_K, Q6_K, Q5_0 and Q4_1, as made by llama-quantize: runs compressed, equal to dense."""
    config = DecoderConfig(**SIZES | dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1, head_dim=16))
    write_model(tmp_path / "dense.gguf", config, make_params(config))
    found = read_gguf(tmp_path / "dense.gguf")
    kinds = {"attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q6_K", "ffn_up": "Q5_0", "ffn_gate": "Q4_1"}
    kinds |= {"token_embd": "Q6_K", "ffn_down": "Q4_K", "output": "Q4_K"}
    rng = np.random.default_rng(0)
    tensors = {}
    for name, tensor in found.tensors.items():
        kind = BY_NAME[kinds.get(name.removesuffix(".weight").split(".")[-1], "F32")]
        data = tensor.raw()
        if kind.name != "F32":
            blocks = rng.integers(0, 256, (tensor.shape[0], tensor.shape[1] // kind.elements, kind.nbytes), np.uint8)
            for at in {"Q6_K": (208,), "Q5_0": (0,)}.get(kind.name, (0, 2)):
                size = (1e-4 if kind.name.endswith("K") else 1e-2) * rng.normal(size=(*blocks.shape[:2], 1))
                blocks[..., at : at + 2] = size.astype(np.float16).view(np.uint8)
            data = blocks
        tensors[name] = NewTensor(kind=kind, shape=tensor.shape, data=lambda data=data: data)
    write_gguf(tmp_path / "k.gguf", found.metadata, tensors)
    model = read_model(tmp_path / "k.gguf")
    attention = model.params["layers_0"]["attention"]
    assert isinstance(attention["q_proj"]["kernel"], Sum) and isinstance(attention["v_proj"]["kernel"], Quantized)
    assert isinstance(model.params["embed"]["embedding"], View)
    # Against the tensors read one by one, with the rows of the queries put in order by hand.
    raw = np.asarray(materialize(read_gguf(tmp_path / "k.gguf").tensors["blk.0.attn_q.weight"].read()))
    halves = raw.reshape(256, 4, 8, 2).swapaxes(2, 3).reshape(256, 64)
    np.testing.assert_array_equal(attention["q_proj"]["kernel"].materialize(), halves)
    tokens = jnp.array([[1, 5, 7, 9, 40, 3]])
    compressed = jax.jit(ej.lift(model.apply))({"params": model.params}, tokens)
    dense = jax.jit(model.apply)({"params": materialize(model.params)}, tokens)
    np.testing.assert_allclose(compressed, dense, rtol=1e-3, atol=1e-3)
    with pytest.raises(CheckpointError, match="blk.0.attn_q.weight: a Sum is not one scale times whole numbers"):
        write_model(tmp_path / "again.gguf", config, model.params)
    verdicts = write_model(tmp_path / "again.gguf", config, model.params, approximate=True)
    assert {v.kind for v in verdicts if v.reason.startswith("a Sum")} == {"Q8_0"}


def edited(path: str, leaf):
    """`PARAMS` with one leaf replaced."""
    return jax.tree_util.tree_map_with_path(
        lambda key, x: leaf(x) if jax.tree_util.keystr(key, simple=True, separator="/") == path else x, PARAMS
    )


def rtn(**settings):
    return lambda w: ej.quantize.RTN(**settings).quantize(w)


KERNEL = "layers_0/mlp/down_proj/kernel"


@pytest.mark.parametrize(
    "path, edit, type, message",
    [
        ("", None, "q8_0", r"16 tensors cannot be .* 'q8_0' .token_embd.weight: it is dense; .*; and 12 more.; pass"),
        ("", None, "f16", "token_embd.weight: its float32 values are no F16 numbers"),
        (KERNEL, rtn(bits=4, group_size=16), "keep", "blk.0.ffn_down.weight: its groups of 16 inputs are no"),
        (KERNEL, rtn(bits=4, group_size=32, scale_dtype="float32"), "keep", "its scales are no float16"),
        (KERNEL, lambda w: ej.quantize.NF4().compress(w), "keep", "a Codebook is not one scale times whole"),
        ("embed/embedding", rtn(bits=8, group_size=None), "keep", "token_embd.weight: its groups do not run along"),
    ],
)
def test_approximate_only_on_request(tmp_path, path, edit, type, message):
    params = edited(path, edit)
    with pytest.raises(CheckpointError, match=message):
        write_model(tmp_path / "m.gguf", CONFIG, params, type=type)
    assert list(tmp_path.iterdir()) == []
    verdicts = write_model(tmp_path / "m.gguf", CONFIG, params, type=type, approximate=True)
    rounded = [verdict for verdict in verdicts if not verdict.exact]
    assert rounded and all(0 < verdict.error < 1 and verdict.reason for verdict in rounded)
    assert read_model(tmp_path / "m.gguf").config == CONFIG


def test_rows_that_are_no_blocks(tmp_path):
    config = dataclasses.replace(CONFIG, intermediate_size=44)
    verdicts = write_model(tmp_path / "m.gguf", config, make_params(config), type="q4_0", approximate=True)
    kinds = {verdict.name: (verdict.kind, verdict.reason) for verdict in verdicts}
    assert kinds["blk.0.ffn_down.weight"] == ("F16", "rows of 44 weights are no whole blocks, so it is F16")
    assert kinds["blk.0.ffn_up.weight"][0] == "Q4_0"


def with_nan(x):
    return x.at[0].set(jnp.nan)


def infinite_scales(w):
    return rtn(group_size=None)(w).replace(scales=jnp.full((1, 32), jnp.inf))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda: {"embed": PARAMS["embed"]}, "missing final_norm/scale; missing layers_0/attention/k_proj/kernel"),
        (lambda: PARAMS | {"extra": jnp.zeros(2)}, "unexpected extra"),
        (lambda: edited("final_norm/scale", lambda x: x[1:]), r"final_norm/scale has shape \[31\], expected \[32\]"),
        (lambda: edited("final_norm/scale", with_nan), "final_norm/scale has values that are not finite"),
        (lambda: edited(KERNEL, infinite_scales), f"{KERNEL} has values that are not finite"),
    ],
)
def test_parameters_that_do_not_fit(tmp_path, edit, message):
    params = edit()
    with pytest.raises(CheckpointError, match=f"these parameters do not fit the configuration: .*{message}"):
        write_model(tmp_path / "m.gguf", CONFIG, params, approximate=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="mistral", sliding_window=16), "sliding_window 16 is ignored by readers of 'llama'"),
        (
            dict(rope_scaling=RopeScaling(rope_type="dynamic", factor=2.0)),
            "rope_scaling 'dynamic' has no place",
        ),
        (dict(model_type="qwen3", qkv_bias=True, o_bias=True), "qwen3 with attention_bias has no place in GGUF"),
        (dict(hidden_act="relu"), "hidden_act 'relu' has no place in GGUF: its readers run 'llama' with SiLU"),
        (dict(eos_token_ids=(1, 2, 3, 4)), r"eos_token_ids \(1, 2, 3, 4\): GGUF names at most 3"),
    ],
)
def test_configurations_without_a_place(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        write_model(tmp_path / "m.gguf", dataclasses.replace(CONFIG, **changes), PARAMS)


def test_values_beyond_float16(tmp_path):
    with pytest.raises(CheckpointError, match="blk.0.ffn_down.weight: has values beyond F16; choose another type"):
        write_model(tmp_path / "m.gguf", CONFIG, edited(KERNEL, lambda w: 1e6 * w), type="f16", approximate=True)
    with pytest.raises(CheckpointError, match="type='q5_0': choose keep, q4_0, q8_0, f16, bf16 or f32"):
        write_model(tmp_path / "m.gguf", CONFIG, PARAMS, type="q5_0")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"general.architecture": "gemma"}, ConfigError, "general.architecture 'gemma' is not run; known are"),
        ({"split.count": np.uint16(3)}, ConfigError, "is one of 3 parts; merge them with llama-gguf-split"),
        ({"llama.block_count": None}, CheckpointError, "the metadata lacks llama.block_count"),
        ({"llama.block_count": 2**40}, CheckpointError, "llama.block_count is 1099511627776 but"),
        ({"llama.block_count": "2"}, CheckpointError, "llama.block_count is '2', expected a number"),
        (
            {"llama.embedding_length": 64},
            CheckpointError,
            r"attn_q.weight has shape \[32, 32\], the metadata says",
        ),
        (
            {"llama.attention.head_count": 0},
            ConfigError,
            "num_attention_heads must be a positive whole number, found 0",
        ),
        ({"llama.attention.value_length": 16}, ConfigError, "llama.attention.value_length is 16; this decoder needs 8"),
        ({"llama.rope.dimension_count": 4}, ConfigError, "llama.rope.dimension_count is 4; this decoder needs 8"),
        ({"llama.expert_count": 8}, ConfigError, "llama.expert_count is 8; this decoder needs 0"),
        ({"llama.vocab_size": 49}, CheckpointError, "llama.vocab_size is 49 but token_embd.weight has 48"),
        ({"llama.rope.scaling.type": "yarn"}, ConfigError, "rope.scaling.type 'yarn' is not run"),
        ({"tokenizer.huggingface.json": "{"}, CheckpointError, "tokenizer.huggingface.json is damaged"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, changes, error, message):
    write_model(tmp_path / "m.gguf", CONFIG, PARAMS)
    found = read_gguf(tmp_path / "m.gguf")
    tensors = {name: copied(tensor) for name, tensor in found.tensors.items()}
    metadata = {key: value for key, value in (found.metadata | changes).items() if value is not None}
    write_gguf(tmp_path / "x.gguf", metadata, tensors)
    with pytest.raises(error, match=message):
        read_model(tmp_path / "x.gguf")


def copied(tensor) -> NewTensor:
    return NewTensor(kind=tensor.kind, shape=tensor.shape, data=tensor.raw)


def test_defaults_of_older_files(tmp_path):
    """Files leave out what readers know, and name the heads once a layer."""
    write_model(tmp_path / "m.gguf", CONFIG, PARAMS)
    found = read_gguf(tmp_path / "m.gguf")
    left_out = ("key_length", "value_length", "dimension_count", "freq_base", "vocab_size", "add_bos_token")
    metadata = {key: value for key, value in found.metadata.items() if not key.endswith(left_out)}
    metadata |= {"tokenizer.ggml.model": "llama", "llama.attention.head_count_kv": np.array([2, 2], np.int32)}
    metadata |= {"llama.attention.sliding_window": 64, "tokenizer.ggml.eot_token_id": 7}
    write_gguf(tmp_path / "x.gguf", metadata, {name: copied(x) for name, x in found.tensors.items()})
    wanted = dataclasses.replace(CONFIG, model_type="mistral", sliding_window=64, eos_token_ids=(2, 7))
    assert read_model(tmp_path / "x.gguf").config == wanted


def test_tensors_that_do_not_fit(tmp_path):
    write_model(tmp_path / "m.gguf", CONFIG, PARAMS)
    found = read_gguf(tmp_path / "m.gguf")
    tensors = {name: copied(tensor) for name, tensor in found.tensors.items()}
    del tensors["output_norm.weight"]
    tensors["rope.freqs"] = NewTensor(kind=BY_NAME["F32"], shape=(2,), data=lambda: np.zeros(2, np.float32))
    tensors["blk.0.ffn_norm.weight"] = NewTensor(kind=BY_NAME["I8"], shape=(32,), data=lambda: np.zeros(32, np.int8))
    write_gguf(tmp_path / "x.gguf", found.metadata, tensors)
    with pytest.raises(CheckpointError, match=r"x.gguf: .* missing output_norm.weight \[32\]; ") as caught:
        read_model(tmp_path / "x.gguf")
    for what in ("unexpected rope.freqs [2]", "blk.0.ffn_norm.weight is I8, expected F32, F16, BF16 or blocks"):
        assert what in str(caught.value)


def test_rope_factors_of_no_known_scaling(tmp_path):
    config = DecoderConfig(**SIZES | CONFIGS["llama3"])
    write_model(tmp_path / "m.gguf", config, make_params(config))
    found = read_gguf(tmp_path / "m.gguf")
    for factors, message in [
        (np.linspace(1, 8, 32, dtype=np.float32), "rope_freqs.weight is no 'llama3' scaling with low_freq_factor 1"),
        (np.full(32, 0.5, np.float32), "rope_freqs.weight is no 'llama3' scaling"),
        (np.ones(4, np.float32), r"rope_freqs.weight has shape \[4\], not \[head_dim / 2\]"),
        (np.ones(32, np.float16), "rope_freqs.weight is no vector of F32"),
    ]:
        kind = BY_NAME["F32" if factors.dtype == np.float32 else "F16"]
        other = NewTensor(kind=kind, shape=factors.shape, data=lambda factors=factors: factors)
        tensors = {name: copied(tensor) for name, tensor in found.tensors.items()} | {"rope_freqs.weight": other}
        write_gguf(tmp_path / "x.gguf", found.metadata, tensors, overwrite=True)
        with pytest.raises(EffjaxError, match=message):
            read_model(tmp_path / "x.gguf")


def test_default_model_with_its_tokenizer(tmp_path):
    model = load_default()
    text = model.tokenizer.to_str()
    write_model(tmp_path / "m.gguf", model.config, model.params, tokenizer_json=text)
    again = read_model(tmp_path / "m.gguf")
    assert again.config == model.config and same(again.params["embed"], model.params["embed"])
    assert again.tokenizer.to_str() == text
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    write_model(tmp_path / "bare.gguf", model.config, model.params)
    beside = read_model(tmp_path / "bare.gguf")
    sentence = "def f(x):\n    return x"
    assert beside.encode(sentence) == again.encode(sentence) == model.encode(sentence)
    assert json.loads(again.tokenizer.to_str()) == json.loads(beside.tokenizer.to_str())


@given(data=st.data())
@settings(max_examples=60)
def test_any_edit_of_a_model_is_refused_or_finite(tmp_path_factory, data):
    """Every byte of the header and the first scales may change: an error of ours, or finite parameters."""
    file = tmp_path_factory.getbasetemp() / "model.gguf"
    if not file.exists():
        write_model(file, CONFIG, PARAMS, type="q8_0", approximate=True)
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, 3000))
        raw[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
    other = file.with_name("edited.gguf")
    other.write_bytes(raw)
    try:
        params = read_model(other).params
    except EffjaxError:
        return
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(params) if leaf.dtype != np.uint8)
