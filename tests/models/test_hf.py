"""Hugging Face directories: dtypes, shards, round trips, and every damage named."""

import dataclasses
import json
import os
import sys
import types

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from effjax.errors import CheckpointError, ConfigError
from effjax.models import embedded
from effjax.models.decoder import stack_layers, unstack_layers
from effjax.models.hf import load_model, read_config, save_hf
from tests.models.families import FAMILIES, hf_tensors, write_checkpoint

CONFIG = FAMILIES["llama2"]
DOWN = "model.layers.1.mlp.down_proj.weight"
TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 3}, "unk_token": "<unk>"},
    }
)


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "model", CONFIG)


def shard(directory, tensors, cut=9):
    """Splits the tensors over two files with an index."""
    (directory / "model.safetensors").unlink(missing_ok=True)
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:cut], "model-2.safetensors": names[cut:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_kernels_are_turned_and_named(checkpoint):
    model = load_model(checkpoint)
    tensors = hf_tensors(CONFIG)
    np.testing.assert_array_equal(model.params["layers_1"]["mlp"]["down_proj"]["kernel"], tensors[DOWN].T)
    np.testing.assert_array_equal(model.params["embed"]["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(model.params["lm_head"]["kernel"], tensors["lm_head.weight"].T)
    assert model.source == "model" and model.tokenizer is None
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model.params))
    chex.assert_trees_all_equal(load_model(checkpoint, scan_layers=True).params, stack_layers(model.params))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_dtype_on_disk_is_kept_unless_asked(tmp_path, dtype):
    tensors = {name: x.astype(dtype) for name, x in hf_tensors(CONFIG).items()}
    directory = write_checkpoint(tmp_path, CONFIG, tensors)
    model = load_model(directory)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype(dtype)}
    np.testing.assert_array_equal(model.params["layers_1"]["mlp"]["down_proj"]["kernel"], tensors[DOWN].T)
    wide = load_model(directory, dtype=jnp.float32, scan_layers=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide.params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        wide.params["layers"]["mlp"]["down_proj"]["kernel"][1], tensors[DOWN].T.astype(np.float32)
    )


def test_shards_equal_one_file(checkpoint):
    one = load_model(checkpoint)
    shard(checkpoint, hf_tensors(CONFIG))
    chex.assert_trees_all_equal(load_model(checkpoint).params, one.params)


@pytest.mark.parametrize("family", ["llama2", "qwen2_window_tied", "qwen3"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_save_and_load(tmp_path, family, scan_layers):
    model = load_model(write_checkpoint(tmp_path / "a", FAMILIES[family]), dtype=jnp.bfloat16, scan_layers=scan_layers)
    save_hf(tmp_path / "b", model.config, model.params, TOKENIZER, files={"README.md": "card"})
    again = load_model(tmp_path / "b", scan_layers=scan_layers)
    assert again.config == model.config
    chex.assert_trees_all_equal(again.params, model.params)
    assert again.encode("a") == [1, 3] and (tmp_path / "b" / "README.md").read_text() == "card"
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"], "no temporary directory is left"


def test_same_parameters_give_the_same_bytes(checkpoint, tmp_path):
    model = load_model(checkpoint)
    for name in ("a", "b"):
        save_hf(tmp_path / name, model.config, model.params)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_every_tensor_that_does_not_fit_is_named(checkpoint):
    tensors = hf_tensors(CONFIG)
    del tensors["model.norm.weight"], tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors[DOWN] = tensors[DOWN].T
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((40, 24), np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((40, 24), np.int32)
    write_checkpoint(checkpoint, CONFIG, tensors)
    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint)
    for words in (
        "missing model.norm.weight [24]",
        "missing model.layers.0.self_attn.q_proj.weight [24, 24]",
        "unexpected model.layers.2.mlp.up_proj.weight [40, 24]",
        f"{DOWN} has shape [40, 24], config.json says [24, 40]",
        "model.layers.0.mlp.up_proj.weight is int32, expected bfloat16, float16, float32",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(checkpoint, value):
    tensors = hf_tensors(CONFIG)
    tensors[DOWN][3, 5] = value
    write_checkpoint(checkpoint, CONFIG, tensors)
    with pytest.raises(CheckpointError, match=rf"{DOWN} has 1 values that are NaN or infinite, the first at \[3, 5\]"):
        load_model(checkpoint)


def test_tied_head_that_is_stored_too(tmp_path):
    entries = FAMILIES["llama2_all_heads_tied"]
    tensors = hf_tensors(entries)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    model = load_model(write_checkpoint(tmp_path, entries, tensors))
    assert "lm_head" not in model.params
    tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_model(write_checkpoint(tmp_path, entries, tensors))


def test_stop_and_first_tokens_come_from_the_files_beside(checkpoint):
    assert read_config(checkpoint).eos_token_ids == (2,)
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (checkpoint / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    config = read_config(checkpoint)
    assert config.eos_token_ids == (5, 6) and config.bos_token_id == 1
    for text in ('{"bos_token": null}', '{"bos_token": "<s>", "add_bos_token": false}'):
        (checkpoint / "tokenizer_config.json").write_text(text)
        assert read_config(checkpoint).bos_token_id is None
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match="generation_config.json: eos_token_id must be a token id"):
        read_config(checkpoint)


def _truncate(directory):
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-100])


def _rename_shard(directory):
    shard(directory, hf_tensors(CONFIG))
    (directory / "model-2.safetensors").unlink()


def _wrong_index(directory):
    weight_map = shard(directory, hf_tensors(CONFIG)) | {DOWN: "model-1.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _twice_in_shards(directory):
    shard(directory, hf_tensors(CONFIG))
    first = load_file(directory / "model-1.safetensors")
    save_file(first | load_file(directory / "model-2.safetensors"), directory / "model-2.safetensors")


def _index_leads_away(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')


def _pickle_only(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "100 bytes are missing at the end; the file is truncated or damaged"),
        (_rename_shard, "model-2.safetensors is missing"),
        (_wrong_index, f"{DOWN} is in model-2.safetensors, but the index says model-1.safetensors"),
        (_twice_in_shards, "lm_head.weight is in model-1.safetensors and in model-2.safetensors"),
        (_index_leads_away, "'../b.safetensors' is not a plain file name"),
        (_pickle_only, "pytorch_model.bin is a pickle, which is not read: convert it to safetensors"),
        (lambda d: (d / "config.json").unlink(), "config.json is missing in model"),
        (lambda d: (d / "config.json").write_text("{"), "config.json is damaged"),
        (lambda d: (d / "config.json").write_text("[1]"), "config.json must hold an object"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json is damaged"),
    ],
)
def test_damaged_directories(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint)


def test_wrong_config_is_a_config_error(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"num_key_value_heads": 3}))
    with pytest.raises(ConfigError, match="num_key_value_heads 3 does not divide"):
        load_model(checkpoint)


def test_save_refuses_before_writing(checkpoint, tmp_path):
    model = load_model(checkpoint)
    broken = jax.tree.map(lambda x: x, model.params)
    del broken["final_norm"]
    broken["extra"] = jnp.zeros(3)
    broken["layers_0"]["mlp"]["up_proj"]["kernel"] = jnp.zeros((3, 24))
    broken["layers_0"]["mlp"]["down_proj"]["kernel"] = jnp.full((40, 24), jnp.nan)
    with pytest.raises(CheckpointError) as caught:
        save_hf(tmp_path / "out", model.config, broken)
    for words in (
        "missing final_norm/scale",
        "unexpected extra",
        "layers_0/mlp/up_proj/kernel has shape [3, 24], expected [24, 40]",
        "layers_0/mlp/down_proj/kernel has values that are not finite",
    ):
        assert words in str(caught.value)
    with pytest.raises(CheckpointError, match="model exists already; choose another name"):
        save_hf(checkpoint, model.config, model.params)
    with pytest.raises(CheckpointError, match="its parent directory does not exist"):
        save_hf(tmp_path / "no" / "out", model.config, model.params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_overwriting_replaces_everything(checkpoint):
    model = load_model(checkpoint)
    (checkpoint / "old.txt").write_text("old")
    save_hf(checkpoint, model.config, model.params, overwrite=True)
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["model"]


def test_full_disk_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    model = load_model(checkpoint)

    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(CheckpointError, match="out cannot be written .*No space left.*; nothing was left behind"):
        save_hf(tmp_path / "out", model.config, model.params)
    with pytest.raises(CheckpointError, match="No space left"):
        save_hf(checkpoint, model.config, model.params, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    chex.assert_trees_all_equal(load_model(checkpoint).params, model.params)


def test_hub_id(checkpoint, monkeypatch):
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision, "tokenizer.json" in allow_patterns))
        if name == "someone/offline":
            raise ConnectionError("no route")
        return str(checkpoint)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    model = load_model("someone/small.model-1", revision="v1")
    assert model.source == "someone/small.model-1" and asked == [("someone/small.model-1", "v1", True)]
    with pytest.raises(
        CheckpointError, match="the hub did not deliver it .ConnectionError: no route.; check the id and"
    ):
        load_model("someone/offline")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="huggingface_hub is needed .pip install huggingface_hub"):
        load_model("someone/small")


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "a/b/c", "/absent/model"])
def test_no_such_directory(name):
    with pytest.raises(CheckpointError, match="no such directory; give a directory with config.json"):
        load_model(name)


def test_embedded_model_missing_or_there(checkpoint, monkeypatch):
    package = checkpoint.parent / "package"
    monkeypatch.setattr(embedded.importlib.resources, "files", lambda name: package if name == "effjax" else None)
    with pytest.raises(CheckpointError, match="the embedded model .* is not installed; reinstall effjax, or train it"):
        embedded.load_default()
    (package / "assets").mkdir(parents=True)
    checkpoint.rename(package / "assets" / "default_model")
    model = embedded.load_default(scan_layers=True, dtype=jnp.bfloat16)
    assert model.config == dataclasses.replace(read_config(package / "assets" / "default_model"), scan_layers=True)
    assert unstack_layers(model.params)["layers_1"]["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16
