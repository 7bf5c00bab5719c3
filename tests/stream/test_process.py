"""`effjax compress` in processes of its own: killed for real, and with its memory counted by the system."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from effjax.io import verify_checkpoint
from effjax.io.safetensors_file import layout, put
from effjax.models.config import DecoderConfig
from effjax.models.hf import expected_tensors
from effjax.stream.work import read_journal, work_directory
from tests.cli.conftest import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = DecoderConfig(
    vocab_size=258,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_ids=(1,),
    tie_word_embeddings=True,
)
METHODS = {
    "data-free": "--method rtn --bits 4 --group-size 32",
    "calibrated": "--method low_rank --set rank=4 weighted=true --calibration text.txt --calibration-windows 4",
}


def write_model(directory: Path, config: DecoderConfig, dtype: type) -> int:
    """A model of repeated random numbers; returns the bytes of its weights."""
    import json

    directory.mkdir()
    file, kind = directory / "model.safetensors", np.dtype(dtype)
    tensors = expected_tensors(config)
    head, entries = layout(file, {name: (kind, tensor.shape) for name, tensor in tensors.items()})
    block = (np.random.default_rng(0).standard_normal(2**22) / 32).astype(kind)
    with file.open("wb") as stream:
        stream.write(head)
        for entry in entries.values():
            if len(entry.shape) == 1:
                put(stream, entry, iter([np.ones(entry.shape, kind)]))
            else:
                size = int(np.prod(entry.shape))
                put(stream, entry, (block[: min(2**22, size - start)] for start in range(0, size, 2**22)))
    (directory / "config.json").write_text(json.dumps(config.to_hf() | {"torch_dtype": kind.name}))
    (directory / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return sum(entry.nbytes for entry in entries.values())


def start(work: Path, flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "effjax.cli", "compress", "model", *flags.split()],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished_units(out: Path) -> int:
    return sum("unit" in line for line in read_journal(work_directory(out) / "journal.jsonl")[0])


@pytest.mark.parametrize("kind", METHODS)
def test_killed_and_gone_on_with(kind, tmp_path):
    write_model(tmp_path / "model", CONFIG, np.float32)
    (tmp_path / "text.txt").write_text("Some text to calibrate a model with, of no meaning whatever. " * 20)
    flags = f"{METHODS[kind]} --shard-size 40KB"
    whole = start(tmp_path, f"{flags} --out small")
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    (tmp_path / "small").rename(tmp_path / "whole")
    out, rng = tmp_path / "small", np.random.default_rng(len(kind))
    process = start(tmp_path, f"{flags} --out small")
    until = int(rng.integers(1, 4))
    deadline = time.monotonic() + 300
    while finished_units(out) < until and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(float(rng.uniform(0, 0.05)))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    survived = finished_units(out)
    assert process.returncode == -signal.SIGKILL and survived >= until and not out.exists()
    again = start(tmp_path, f"{flags} --out small")
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert f"{survived} of" in err and "were done before" in err
    assert f"went on after {survived} of" in err
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir()) and len(names) > 7
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "small", "text.txt", "whole"]


def test_memory_stays_under_the_budget(tmp_path):
    """A model of 704 MiB under a budget of 512 MiB, of which the program itself takes more than half."""
    config = DecoderConfig(
        vocab_size=16000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=16,
        tie_word_embeddings=True,
    )
    size = write_model(tmp_path / "model", config, np.float32)
    budget = 512 * 2**20
    assert size > 1.15 * budget
    process = start(tmp_path, "--method rtn --bits 4 --memory 512MiB --out small")
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    said = re.search(r"peak memory ([\d.]+) MB of 537 MB", err)
    assert said is not None and 100e6 < float(said[1]) * 1e6 < budget, err
    assert verify_checkpoint(tmp_path / "small") == []
    refused = start(tmp_path, "--method rtn --bits 4 --memory 200MiB --out none")
    _, err = refused.communicate(timeout=500)
    assert refused.returncode == 2 and re.search(r"a budget of 200 MiB cannot hold .*; allow at least \d+ MiB", err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "small"]
