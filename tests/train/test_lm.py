"""The language-model trainer: tokenizer, data order, loss, and a command line whose directory loads and writes text."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data import python_docs
from effjax.errors import ConfigError
from effjax.models.decoder import Decoder
from effjax.models.generate import generate_text
from effjax.models.hf import load_model
from train.lm import (
    LmConfig,
    command_of,
    decoder_config,
    encode_documents,
    main,
    make_evaluate,
    make_loss,
    train_tokenizer,
    window_sampler,
)

TEXTS = [f"Return the item number {i} of the list.\n\n    >>> item({i})\n" for i in range(60)] + ["naïve — 数"]
FLAGS = "--steps 4 --warmup 1 --batch 2 --context 24 --vocab 300 --hidden 16 --intermediate 32 --layers 2 --heads 2"
FLAGS = [*FLAGS.split(), "--kv-heads", "1", "--learning-rate", "0.01", "--save-every", "2"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 290)


@pytest.fixture
def few_documents(monkeypatch):
    monkeypatch.setattr(python_docs, "documents", lambda split: TEXTS[:50] if split == "train" else TEXTS[50:])


def run(monkeypatch, out, *flags):
    monkeypatch.setattr(sys, "argv", ["train.lm", "--out", str(out), *FLAGS, *flags])
    main()


def test_any_text_survives_the_tokenizer(tokenizer):
    assert tokenizer.get_vocab_size() == 290
    for text in (*TEXTS, "\x00\ttabs and 😀", "  two  spaces "):
        ids = tokenizer.encode(text).ids
        assert ids[0] == 0 and tokenizer.decode(ids) == text
    assert tokenizer.to_str() == train_tokenizer(TEXTS, 290).to_str()


def test_windows_depend_on_seed_and_step_alone_and_half_begin_with_a_document(tokenizer):
    documents = encode_documents(tokenizer, TEXTS)
    first, again = (window_sampler(documents, batch=6, context=10, seed=1) for _ in range(2))
    first(0)
    np.testing.assert_array_equal(first(5), again(5))
    assert not np.array_equal(first(5), first(6))
    assert not np.array_equal(first(5), window_sampler(documents, batch=6, context=10, seed=2)(5))
    assert first(5).shape == (6, 11)
    assert all((first(step)[::2, 0] == 0).all() for step in range(10))
    with pytest.raises(ConfigError, match="context=100000: the corpus has only .* choose a shorter context"):
        window_sampler(documents, batch=6, context=100_000, seed=1)


def test_loss_is_the_sum_of_nats_and_noise_changes_the_inputs_only(tokenizer):
    config = LmConfig(out="", steps=2, warmup=0, vocab=290, hidden=16, intermediate=32, layers=1, heads=2, kv_heads=1)
    model = Decoder(decoder_config(config))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    rows = jnp.asarray(window_sampler(encode_documents(tokenizer, TEXTS), batch=2, context=8, seed=0)(0))
    total, count = jax.jit(make_loss(model, noise=0.5))(params, rows, jax.random.key(0))
    assert count == 16
    np.testing.assert_allclose(total, 16 * np.log(290), rtol=1e-5)  # zero weights: uniform over the vocabulary
    documents = encode_documents(tokenizer, TEXTS)
    figures = make_evaluate(model, documents, TEXTS, context=8)(params)
    np.testing.assert_allclose(figures["heldout_loss"], np.log(290), rtol=1e-5)
    bits = (sum(map(len, documents)) - 1) * np.log2(290) / sum(len(text.encode()) for text in TEXTS)
    np.testing.assert_allclose(figures["heldout_bits_per_byte"], bits, rtol=1e-5)


def test_command_line_writes_a_directory_that_loads_and_writes_text(few_documents, monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path)
    assert "heldout_loss" in capsys.readouterr().out
    model = load_model(tmp_path / "model")
    assert model.config.hidden_size == 16 and model.config.eos_token_ids == (1,)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    assert isinstance(generate_text(model, ["Return"], max_new_tokens=4)[0], str)
    card = (tmp_path / "model" / "README.md").read_text()
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (
        f"{last['heldout_loss']:.2f}" in card
        and "$ python -m train.lm --out runs/lm --steps 4" in card
        and "# steps 1 to 4" in card
    )
    assert str(tmp_path) not in card
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    run(monkeypatch, tmp_path, "--resume")
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before


def test_the_written_weights_are_the_trained_ones_rounded(few_documents, monkeypatch, tmp_path):
    run(monkeypatch, tmp_path)
    model = load_model(tmp_path / "model", dtype=jnp.float32)
    documents = encode_documents(model.tokenizer, TEXTS[50:])
    figures = make_evaluate(Decoder(model.config), documents, TEXTS[50:], context=24)(model.params)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert figures["heldout_loss"] == pytest.approx(last["heldout_loss"], abs=0.01)


def test_a_run_in_two_parts_lists_both_commands(few_documents, monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, "--stop-at", "3")
    assert "stopped at step 3 of 4; go on with --resume" in capsys.readouterr().out
    assert not (tmp_path / "model").exists()
    run(monkeypatch, tmp_path, "--resume")
    shown = [line for line in (tmp_path / "model" / "README.md").read_text().splitlines() if line.startswith("$ ")]
    assert [line.rpartition("  # ")[2] for line in shown] == ["steps 1 to 3", "steps 4 to 4"]
    assert "--stop-at 3" in shown[0] and "--resume" in shown[1]


def test_the_same_run_is_refused_and_errors_are_one_line(few_documents, monkeypatch, tmp_path):
    run(monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match="error: .* already holds a run at step 4: pass resume"):
        run(monkeypatch, tmp_path)
    with pytest.raises(SystemExit, match="error: vocab=5000: the corpus yields only"):
        run(monkeypatch, tmp_path / "other", "--vocab", "5000")


def test_command_names_what_differs_from_the_defaults(tmp_path):
    assert command_of(LmConfig(out=tmp_path)) == "python -m train.lm --out runs/lm"
    assert command_of(LmConfig(out=tmp_path, resume=True)) == "python -m train.lm --out runs/lm --resume"
    config = LmConfig(out=tmp_path, kv_heads=4, mesh="data=4,fsdp=2")
    assert command_of(config) == "python -m train.lm --out runs/lm --mesh data=4,fsdp=2 --kv-heads 4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"noise": 1.0}, r"noise=1.0: must be in \[0, 1\)"), ({"vocab": 100}, "vocab=100: must hold 256 bytes")],
)
def test_settings_that_cannot_work_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        LmConfig(out=tmp_path, **changes)


def test_help_reads_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "train.lm", "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "usage: python -m train.lm" in done.stdout and "--mesh" in done.stdout
