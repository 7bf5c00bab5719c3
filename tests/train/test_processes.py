"""Two processes over gloo: the same losses as one, one signal stops both, exact resume; what joining refuses."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from effjax.errors import ConfigError
from tests.train.worker import main
from train.processes import join

ROOT = Path(__file__).resolve().parents[2]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one_and_a_signal_to_one_stops_both(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.train.worker", str(tmp_path / "two")]
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    runs = [subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(2)]
    try:
        printed = [run.communicate(timeout=150)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], printed
    main(tmp_path / "one")
    alone = capsys.readouterr().out
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    assert len(losses(tmp_path / "one")) == 9
    for text in printed:
        # The step that ran when the signal came, and the one that was under way when both knew.
        assert "stopped at 6" in text
        assert "step 9/9" in printed[0] and "step 9/9" not in printed[1]

    def kernel(text):
        return float(text.rpartition("kernel (16, 32) ")[2].split()[0])

    assert [kernel(text) for text in printed] == [pytest.approx(kernel(alone), rel=1e-5)] * 2


def test_joining_needs_to_know_who(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID='': set JAX_NUM_PROCESSES=N and JAX_PROCESS_ID=0 ... N-1"):
        join()
