"""Distilling from the command line: online and from a store, compressed teachers and students, exact resume, errors."""

import dataclasses
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.cli import main as effjax_main
from effjax.distill import apply_mlp
from effjax.errors import ConfigError
from effjax.io.checkpoint import load_checkpoint, save_checkpoint
from effjax.models.decoder import Decoder
from effjax.models.hf import load_model, save_hf
from tests.cli.conftest import CONFIG, WORDS, byte_tokenizer
from train.distill import main
from train.distill_diverse import DiverseConfig
from train.distill_lm import LmDistillConfig

FLAGS = [
    "--steps",
    "4",
    "--warmup",
    "1",
    "--batch",
    "8",
    "--context",
    "24",
    "--save-every",
    "2",
    "--temperature",
    "1.5",
]
SMALL = ["--layers", "1", "--hidden", "16", "--heads", "2", "--kv-heads", "1", "--intermediate", "24"]
STORE = ["--top-k", "258"]  # all labels


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A dense teacher, an 8-bit copy of it, a pruned one, and a text."""
    root = tmp_path_factory.mktemp("distill")
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    params = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 2 * x, params)  # outputs that differ from even ones
    tokenizer = byte_tokenizer().to_str()
    save_hf(root / "big", config, params, tokenizer)
    quantized = ej.quantize_params(params, ej.quantize.RTN(bits=8, group_size=None))
    masked = ej.apply_mask(params, ej.prune_mask(params, ej.prune.Magnitude(sparsity=0.5)))
    for name, tree in {"eight": quantized, "pruned": masked}.items():
        save_checkpoint(root / name, tree, config=config.to_hf(), tokenizer_json=tokenizer)
    (root / "text.txt").write_text(WORDS * 12)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    np.savez(
        root / "images.npz", images=rng.random((60, 4, 4)) + 2 * np.eye(3, 16)[labels].reshape(-1, 4, 4), labels=labels
    )
    return root


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.distill", *map(str, flags)])
    main()


def lm(monkeypatch, tiny, out, *flags):
    where = ["--experiment", "lm", "--teacher", tiny / "eight", "--text", tiny / "text.txt", "--out", out]
    run(monkeypatch, *where, *FLAGS, *flags)


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stored(tiny):
    """A run from a store of a compressed teacher's outputs, without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        lm(patch, tiny, tiny / "whole", *SMALL, "--store", tiny / "store", *STORE)
    return tiny / "whole"


def test_a_smaller_student_learns_and_loads(tiny, stored, capsys):
    loaded = load_checkpoint(stored / "model")
    assert loaded.params["layers_0"]["mlp"]["up_proj"]["kernel"].shape == (16, 24)
    found = records(stored)
    assert [record["step"] for record in found] == [1, 2, 3, 4] and found[-1]["loss"] < found[0]["loss"]
    assert {"teacher_loss", "heldout_loss", "divergence"} < set(found[-1])
    assert effjax_main(["generate", str(stored / "model"), "--prompt", "the", "--max-new-tokens", "3"]) == 0
    assert "the" in capsys.readouterr().out


def test_resumed_is_uninterrupted(tiny, stored, monkeypatch, tmp_path, capsys):
    flags = [*SMALL, "--store", tiny / "store", *STORE]
    before = {file.name: file.stat().st_mtime_ns for file in (tiny / "store").iterdir()}
    lm(monkeypatch, tiny, tmp_path / "run", *flags, "--stop-at", "3")
    assert "stopped at step 3 of 4; go on with --resume" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"was begun with weight=0.9, not 0.5: go on with the same"):
        lm(monkeypatch, tiny, tmp_path / "run", *flags, "--weight", "0.5", "--resume")
    lm(monkeypatch, tiny, tmp_path / "run", *flags, "--resume")
    for name in ("model.safetensors", "effjax.json", "README.md"):
        assert (tmp_path / "run" / "model" / name).read_bytes() == (stored / "model" / name).read_bytes(), name
    assert {file.name: file.stat().st_mtime_ns for file in (tiny / "store").iterdir()} == before  # written once


def test_a_teacher_beside_the_student_on_a_mesh_is_a_store_of_all_labels(tiny, stored, monkeypatch, tmp_path):
    lm(monkeypatch, tiny, tmp_path, *SMALL, "--mesh", "data=2,fsdp=4")
    losses = [[record["loss"] for record in records(out)] for out in (tmp_path, stored)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-3)


def test_a_pruned_student_stays_pruned_and_a_quantized_one_quantized(tiny, monkeypatch, tmp_path):
    flags = ["--weight", "1", "--steps", "3", "--learning-rate", "1e-3", "--student"]
    lm(monkeypatch, tiny, tmp_path / "pruned", *flags, tiny / "pruned")
    path = "layers_0", "mlp", "up_proj", "kernel"

    def kernel(directory):
        found = load_checkpoint(directory).params
        for name in path:
            found = found[name]
        return found

    before, after = (np.asarray(kernel(d)) for d in (tiny / "pruned", tmp_path / "pruned" / "model"))
    np.testing.assert_array_equal(before == 0, after == 0)
    assert (before == 0).mean() == pytest.approx(0.5, abs=0.02) and (before != after).any()
    lm(monkeypatch, tiny, tmp_path / "eight", *flags, tiny / "eight")
    before, after = kernel(tiny / "eight"), kernel(tmp_path / "eight" / "model")
    np.testing.assert_array_equal(before.codes, after.codes)
    assert (np.asarray(before.scales) != np.asarray(after.scales)).any()
    assert load_model(tiny / "big").config.num_hidden_layers == 1  # the teacher is as it was


def committee(monkeypatch, tiny, out, *flags):
    sizes = ["--foundation", 16, 8, "--complementary", 12, 8, "--student", 5, 4, "--teacher-steps", 6, "--batch", 8]
    steps = ["--steps", 6, "--skip-after", 3, "--save-every", 2, "--data", tiny / "images.npz"]
    run(monkeypatch, "--experiment", "diverse", "--out", out, *sizes, *steps, *flags)


def test_a_committee_teaches_and_the_student_loads(tiny, monkeypatch, tmp_path, capsys):
    mesh = "--mesh", "data=2"
    committee(monkeypatch, tiny, tmp_path / "whole", *mesh)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("accuracy", "kept", "foundation", "complementary"))
    loaded = load_checkpoint(tmp_path / "whole" / "model")
    assert set(loaded.params) == {"layer_0", "layer_1", "layer_2"} and loaded.config["widths"] == [4, 5, 4, 3]
    assert apply_mlp(loaded.params, jnp.ones((2, 4))).shape == (2, 3)
    # As a kill after the fourth step leaves it; the teachers are not trained again.
    shutil.copytree(tmp_path / "whole", tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    committee(monkeypatch, tiny, tmp_path / "run", "--resume", *mesh)
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    a, b = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "run"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--hidden", "20", "--heads", "3"], "hidden=20 does not divide into heads=3"),
        (["--text", "nowhere.txt"], "--text nowhere.txt: cannot be read as UTF-8 text"),
        (["--student", "default"], "--student default: has 2048 labels of a tokenizer that is not the one"),
    ],
)
def test_errors_are_one_line(tiny, monkeypatch, tmp_path, flags, text):
    with pytest.raises(SystemExit, match=f"error: .*{text}"):
        lm(monkeypatch, tiny, tmp_path / "out", *flags)


def test_images_that_do_not_fit(tiny, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"error: images \[60, 4, 4\], pool=3: give a pool"):
        committee(monkeypatch, tiny, tmp_path / "out", "--pool", 3)
    with pytest.raises(SystemExit, match="error: --data .*nowhere.npz: cannot be read as images and labels"):
        committee(monkeypatch, tiny, tmp_path / "out", "--data", "nowhere.npz")


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LmDistillConfig, {"weight": 1.5}, "weight=1.5: must be from 0 to 1"),
        (LmDistillConfig, {"temperature": 0.0}, "temperature=0.0: must be positive"),
        (LmDistillConfig, {"student": "x", "layers": 2}, "--student has its own sizes: leave out layers=2"),
        (DiverseConfig, {"labelled": 1.0}, "labelled=1.0: must be between 0 and 1"),
        (DiverseConfig, {"ground": -1.0}, "ground=-1.0: must be at least 0"),
    ],
)
def test_settings_that_cannot_work(config, changes, message, tmp_path):
    text = {"text": tmp_path} if config is LmDistillConfig else {}
    with pytest.raises(ConfigError, match=message):
        config(out=tmp_path, **text, **changes)
