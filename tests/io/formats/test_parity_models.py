"""Directories that we write, run by transformers; bitsandbytes' quantizer against ours. Needs the extra `parity`."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.io.formats import bitsandbytes as bnb
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from effjax.models.hf import LoadedModel, load_model
from effjax.models.quantized_save import save_quantized_hf

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # torch and transformers warn about themselves
]
CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)


@pytest.mark.parametrize(
    "method",
    [
        ej.quantize.RTN(bits=4, group_size=32, symmetric=True),
        ej.quantize.RTN(bits=8, group_size=None, symmetric=True),
    ],
    ids=["grouped", "per channel"],
)
def test_compressed_tensors_in_transformers(method, tmp_path):
    """The logits that transformers computes from our directory are ours.

    Symmetric grids only: transformers 5.24 with compressed-tensors 0.20 prepares unpacked zero points and then refuses
    the packed ones that compressed-tensors itself writes.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    params = Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    model = LoadedModel(config=CONFIG, params=ej.quantize_params(params, method), tokenizer=None, source="tiny")
    verdicts = save_quantized_hf(tmp_path / "ours", model, format="compressed-tensors")
    assert all(verdict.exact for verdict in verdicts)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", dtype=torch.float32
    ).eval()
    tokens = np.random.default_rng(0).integers(0, 64, (2, 12))
    with torch.no_grad():
        theirs = reference(torch.from_numpy(tokens)).logits.float().numpy()
    ours = ej.lift(model.apply)({"params": load_model(tmp_path / "ours").params}, jnp.asarray(tokens))
    np.testing.assert_allclose(theirs, ours, atol=2e-3)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("inputs", [128, 96])
def test_bitsandbytes(kind, nested, inputs):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    w = np.random.default_rng(0).normal(size=(24, inputs)).astype(np.float32)
    packed, state = functional.quantize_4bit(
        torch.from_numpy(w), blocksize=64, quant_type=kind, compress_statistics=nested
    )
    tensors = {"weight": packed.numpy()}
    for name, x in state.as_dict(packed=True).items():
        tensors[f"weight.{name}"] = x.numpy()
    leaf = bnb.read("m", tensors, shape=(inputs, 24), dtype="float32")
    # Flattened first: their CPU code (0.50) takes wrong scales where blocks reach over rows of the matrix.
    state.shape = torch.Size((1, w.size))
    theirs = functional.dequantize_4bit(packed, state).float().numpy().reshape(w.shape)
    np.testing.assert_allclose(np.asarray(leaf.materialize()).T, theirs, rtol=1e-6, atol=1e-7)
    if kind == "nf4" and not nested:
        scheme = bnb.scheme_for(leaf, group_size=64)
        written = bnb.write(leaf, dataclasses.replace(scheme, dtype="float32"))
        assert sorted(written) == sorted(tensors)
        for name, x in tensors.items():
            if "quant_state" in name:
                assert json.loads(written[name].tobytes()) == json.loads(x.tobytes())
            else:
                np.testing.assert_array_equal(written[name], x)
        ours = bnb.nearest(w.T, scheme, dtype="float32")
        assert (np.asarray(ours.codes) == np.asarray(leaf.codes)).mean() > 0.999
