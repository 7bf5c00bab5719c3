"""Dense models on disk: one tiny and tied, one with a head of its own, in several files and another dtype."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from effjax.io.safetensors_file import write_file
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from effjax.models.hf import save_hf, to_hf_tensors

TINY = DecoderConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32, tied, one file."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    params = jax.jit(Decoder(TINY).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    save_hf(directory, TINY, params)
    return directory


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bfloat16 but for a float64 norm, with a head, in two files."""
    import dataclasses
    import json

    config = dataclasses.replace(TINY, tie_word_embeddings=False)
    directory = tmp_path_factory.mktemp("models") / "sharded"
    params = jax.jit(Decoder(config).init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))["params"]
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in to_hf_tensors(config, params).items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    directory.mkdir()
    names, index = list(tensors), {}
    for number, own in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        write_file(directory / file, {name: tensors[name] for name in own}, metadata={"format": "pt"})
        index |= dict.fromkeys(own, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (directory / "config.json").write_text(json.dumps(config.to_hf() | {"torch_dtype": "bfloat16"}))
    return directory


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """Calibration windows."""
    return np.random.default_rng(0).integers(0, TINY.vocab_size, (5, 12)).astype(np.int32)
