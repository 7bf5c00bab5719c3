"""Against the packages `gguf` (reader, writer and quantizers) and `xllamacpp` (llama.cpp itself)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.io.formats.gguf import read_gguf
from effjax.io.formats.gguf_blocks import decode, quantize
from effjax.io.formats.gguf_model import read_model, write_model
from effjax.io.formats.gguf_types import BY_NUMBER
from effjax.models.config import RopeScaling
from effjax.models.decoder import Decoder
from effjax.models.embedded import load_default

pytestmark = pytest.mark.parity
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # else (0,)
SMALL = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=False
)
LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def test_sizes_of_all_types():
    import gguf

    for number, (elements, nbytes) in gguf.GGML_QUANT_SIZES.items():
        kind = BY_NUMBER[int(number)]
        assert (kind.name, kind.elements, kind.nbytes) == (number.name, elements, nbytes)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16"])
def test_dequantisation(kind):
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    rng, size = np.random.default_rng(0), BY_NUMBER[int(number)].nbytes
    raw = rng.integers(0, 128, (7, 3, size), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        raw[..., at : at + 2] = rng.normal(size=(7, 3, 1)).astype(np.float16).view(np.uint8)
    raw = raw.reshape(7, -1)
    found = ej.materialize(decode(BY_NUMBER[int(number)], raw, name="w"))
    np.testing.assert_array_equal(np.asarray(found).T.astype(np.float32), gguf.dequantize(raw, number))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_quantisation_gives_the_same_bytes(kind):
    import gguf

    rng = np.random.default_rng(0)
    w = (rng.normal(size=(64, 256)) * 10.0 ** rng.integers(-4, 4, (64, 1))).astype(np.float32)
    w[0, :32] = 0
    np.testing.assert_array_equal(quantize(w, kind), gguf.quantize(w, gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_gguf_reads_what_we_write(tmp_path, type):
    import gguf

    model = load_default()
    text = model.tokenizer.to_str()
    write_model(tmp_path / "m.gguf", model.config, model.params, tokenizer_json=text, type=type, approximate=True)
    theirs, ours = gguf.GGUFReader(tmp_path / "m.gguf"), read_gguf(tmp_path / "m.gguf")
    assert {tensor.name for tensor in theirs.tensors} == set(ours.tensors)
    for tensor in theirs.tensors:
        values = np.asarray(ej.materialize(ours.tensors[tensor.name].read()))
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(values.T.astype(np.float32), expected.reshape(values.T.shape))
    for key, value in ours.metadata.items():
        field = theirs.get_field(key)
        assert field is not None
        contents = field.contents()
        assert contents == (value.tolist() if isinstance(value, np.ndarray) else value)


def test_we_read_what_gguf_writes(tmp_path):
    import gguf

    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_uint64("large", 2**40)
    writer.add_array("list", ["a", "b"])
    writer.add_bool("yes", True)
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind, gguf.quantize(w, number), raw_dtype=number)
    writer.add_tensor("F16", w.astype(np.float16))
    writer.add_tensor("F32", w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "w.gguf")
    assert (found.metadata["large"], found.metadata["list"], found.metadata["yes"]) == (2**40, ["a", "b"], True)
    for tensor in gguf.GGUFReader(tmp_path / "w.gguf").tensors:
        values = np.asarray(ej.materialize(found.tensors[tensor.name].read())).astype(np.float32)
        np.testing.assert_array_equal(values.T, gguf.dequantize(tensor.data, tensor.tensor_type))


@pytest.mark.parametrize(
    "changes, type, tolerance",
    [
        ({}, "f32", 0.01),  # llama.cpp keeps keys and values in float16
        ({}, "q8_0", 0.15),  # and rounds the inputs of quantized products to 8 bits
        ({}, "q4_0", 0.15),
        (SMALL | dict(model_type="qwen2", qkv_bias=True), "f32", 0.02),
        (SMALL | dict(model_type="qwen3", head_dim=32), "f32", 0.02),
        (SMALL | dict(qkv_bias=True, o_bias=True, mlp_bias=True, head_dim=32), "f32", 0.02),
        (SMALL | dict(rope_scaling=RopeScaling(rope_type="linear", factor=4.0)), "f32", 0.02),
        (SMALL | dict(rope_scaling=LLAMA3, rope_theta=500000.0, max_position_embeddings=131072), "f32", 0.02),
    ],
)
def test_llama_cpp_gives_the_same_probabilities(tmp_path, changes, type, tolerance):
    """Our file in llama.cpp against our own run of it: the ten likeliest successors, and the tokens of a text."""
    import xllamacpp

    model = load_default(dtype=jnp.float32)
    config = dataclasses.replace(model.config, **{"head_dim": 16 if "hidden_size" in changes else 64} | changes)
    text = "def forward(self, x): return the value of the list"
    tokens = model.encode(text)
    params = model.params
    if changes:
        params = Decoder(config).init(jax.random.key(0), jnp.asarray([tokens]))["params"]
        params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(1), x.shape), params)
    text_of_tokenizer = model.tokenizer.to_str()
    write_model(tmp_path / "m.gguf", config, params, tokenizer_json=text_of_tokenizer, type=type, approximate=True)
    again = read_model(tmp_path / "m.gguf")
    logits = jax.jit(ej.lift(again.apply))({"params": again.params}, jnp.asarray([tokens]))[0, -1]
    ours = np.asarray(jax.nn.log_softmax(logits))

    settings = xllamacpp.CommonParams()
    settings.model.path = str(tmp_path / "m.gguf")
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.cpuparams.n_threads = 256, 1, False, 1
    server = xllamacpp.Server(settings)
    for prompt in (tokens, text):
        answer = server.handle_completions({"prompt": prompt, "n_predict": 1, "n_probs": 10, "temperature": 0})
        assert answer["usage"]["prompt_tokens"] == len(tokens)
        likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        assert len(likeliest) == 10
        assert max(abs(entry["logprob"] - ours[entry["id"]]) for entry in likeliest) < tolerance
