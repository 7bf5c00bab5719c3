"""Fine-tuning from the command line: every method on a tiny model, exact resume, files that load, errors in a line."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.arrays import Adapter, Codebook
from effjax.cli import main as effjax_main
from effjax.errors import ConfigError
from effjax.io.checkpoint import load_checkpoint
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from effjax.models.hf import load_model, save_hf
from effjax.recipe import Recipe
from effjax.sketch import SpaLLM
from effjax.sparsity.relu import relufy
from tests.cli.conftest import CONFIG, WORDS, byte_tokenizer
from train.finetune import FinetuneConfig, main

FLAGS = ["--steps", "4", "--warmup", "1", "--batch", "8", "--context", "24", "--save-every", "2", "--calibration", "2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("finetune")
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    save_hf(root / "tiny", config, params, byte_tokenizer().to_str())
    (root / "text.txt").write_text(WORDS * 12)
    return root


def run(monkeypatch, tiny, out, *flags):
    where = ["--model", str(tiny / "tiny"), "--text", str(tiny / "text.txt"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train.finetune", *where, *FLAGS, *flags])
    main()


@pytest.fixture(scope="module")
def tuned(tiny):
    """A run without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        run(patch, tiny, tiny / "whole", "--method", "spallm", "--bits", "2", "--groups", "2")
    return tiny / "whole"


def test_tables_alone_are_trained_and_the_result_loads(tiny, tuned, capsys):
    loaded = load_checkpoint(tuned / "model")
    assert Recipe.from_dict(loaded.recipe).rules == ((None, SpaLLM(bits=2, groups=2)),)
    leaf = loaded.params["layers_0"]["attention"]["q_proj"]["kernel"]
    assert isinstance(leaf, Codebook) and leaf.tables.shape == (2, 32, 4) and leaf.tables.dtype == np.float16
    original = load_model(tiny / "tiny").params
    np.testing.assert_array_equal(loaded.params["final_norm"]["scale"], original["final_norm"]["scale"])
    records = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert effjax_main(["generate", str(tuned / "model"), "--prompt", "the", "--max-new-tokens", "3"]) == 0
    assert "the" in capsys.readouterr().out


def test_resumed_is_uninterrupted(tiny, tuned, monkeypatch, tmp_path, capsys):
    sketch = ["--method", "spallm", "--bits", "2", "--groups", "2"]
    run(monkeypatch, tiny, tmp_path / "run", *sketch, "--stop-at", "3")
    assert "stopped at step 3 of 4; go on with --resume" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="was begun with bits=2, not 3: go on with the same"):
        run(monkeypatch, tiny, tmp_path / "run", "--bits", "3", "--groups", "2", "--resume")
    run(monkeypatch, tiny, tmp_path / "run", *sketch, "--resume")
    names = ["model.safetensors", "effjax.json", "README.md"]
    for name in names:
        assert (tmp_path / "run" / "model" / name).read_bytes() == (tuned / "model" / name).read_bytes(), name


def test_same_losses_on_a_mesh(tiny, tuned, monkeypatch, tmp_path):
    run(monkeypatch, tiny, tmp_path, "--bits", "2", "--groups", "2", "--mesh", "data=2,fsdp=4")
    found = [
        [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (tmp_path, tuned)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_other_methods(tiny, monkeypatch, tmp_path, method, capsys):
    flags = ["--method", method, "--rank", "2", "--group-size", "16", "--steps", "2"]
    relu = ["--relu-stage", "2", "--relu-shift", "0.25"] if method == "full" else []
    run(monkeypatch, tiny, tmp_path / "out", *flags, *relu)
    tuned = DecoderConfig.from_hf(load_checkpoint(tmp_path / "out" / "model").config)
    own = load_model(tiny / "tiny").config
    assert tuned == (relufy(own, stage=2, shift=0.25) if relu else own)
    assert "values of" in capsys.readouterr().out
    leaf = load_checkpoint(tmp_path / "out" / "model").params["layers_0"]["mlp"]["up_proj"]["kernel"]
    if method == "full":
        assert not ej.arrays.is_compressed(leaf)
    else:
        assert isinstance(leaf.parts[1], Adapter) and np.asarray(leaf.parts[1].b).any()


def test_what_the_command_line_compressed_is_tuned_as_it_is(tiny, monkeypatch, tmp_path):
    text, small = str(tiny / "text.txt"), tmp_path / "small"
    calibration = ["--calibration", text, "--calibration-windows", "2", "--calibration-length", "24"]
    sketch = ["--method", "spallm", "--bits", "2", "--set", "groups=2"]
    assert effjax_main(["compress", str(tiny / "tiny"), *sketch, *calibration, "--out", str(small)]) == 0
    where = ["train.finetune", "--model", str(small), "--text", text, *FLAGS, "--out"]
    monkeypatch.setattr(sys, "argv", [*where, str(tmp_path / "tuned"), "--steps", "2"])
    main()
    paths = small, tmp_path / "tuned" / "model"
    before, after = (load_checkpoint(d).params["layers_0"]["mlp"]["up_proj"]["kernel"] for d in paths)
    assert after.tables.shape == (2, 64, 4)
    np.testing.assert_array_equal(after.codes, before.codes)
    assert (np.asarray(after.tables) != np.asarray(before.tables)).any()
    monkeypatch.setattr(sys, "argv", [*where, str(tmp_path / "full"), "--method", "full"])
    with pytest.raises(SystemExit, match="error: --method full trains dense weights, and this model is compressed"):
        main()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--groups", "3"], r"kernel \[32, 16\]: groups=3 must divide its 32 inputs"),
        (["--context", "64"], "context=64: tiny has 64 positions"),
        (["--text", "nowhere.txt"], "--text nowhere.txt: cannot be read as UTF-8 text"),
        (["--method", "qlora"], r"kernel \[32, 16\]: group_size=64 does not divide its 32 inputs"),
    ],
)
def test_errors_are_one_line(tiny, monkeypatch, tmp_path, flags, text):
    with pytest.raises(SystemExit, match=f"error: .*{text}"):
        run(monkeypatch, tiny, tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, "bits=9: choose 1 to 8"),
        ({"heldout": 1.0}, "heldout=1.0: must be between 0 and 1"),
        ({"rank": 0}, "rank=0: must be at least 1"),
        ({"relu_shift": 0.5}, "relu_shift=0.5: needs relu_stage=1 or 2"),
    ],
)
def test_settings_that_cannot_work(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(text=tmp_path, out=tmp_path, **changes)
