"""llm-compressor as a process of its own: makes its environment where there is none, and hands it jobs one by one."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
REQUIREMENTS, WORKER = HERE / "llmcompressor-requirements.txt", HERE / "_llmcompressor_worker.py"
GROUPED, CHANNELWISE = "re:.*(q|k|v|o|gate|up|down)_proj$", "re:.*down_proj$"


def environment(directory: Path) -> Path:
    """The interpreter of an environment with the pinned packages, made first where `directory` has none.

    Raises:
        subprocess.CalledProcessError: pip could not install them.
    """
    python, done = directory / "bin" / "python", directory / "requirements.txt"
    wanted = REQUIREMENTS.read_text(encoding="utf-8")
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making the environment of llm-compressor (about 1.5 GB) in {directory}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and alone: where a build for the processor is at hand, the rest then takes it as it is.
    torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
    subprocess.run([*install, torch], check=True)
    subprocess.run([*install, "--requirement", REQUIREMENTS], check=True)
    done.write_text(wanted, encoding="utf-8")
    return python


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one run; `cpu` is the processor time of all threads, which other processes disturb less."""

    wall: float
    cpu: float


class Worker:
    """A running worker; use as a context manager."""

    def __init__(self, python: Path, log: Path) -> None:
        self._log = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [python, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        hello = self._answer()
        self.versions, self.import_s = hello["versions"], hello["import_s"]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()

    def run(
        self,
        model: Path,
        tokens: Path,
        recipe: dict[str, Any],
        *,
        batch: int,
        threads: int,
        save: Path | None = None,
    ) -> dict[str, float]:
        """The answer to one job, see `_llmcompressor_worker.py`.

        Raises:
            RuntimeError: the worker ended; the message has the end of its log.
        """
        job = {
            "model": str(model),
            "tokens": str(tokens),
            "recipe": recipe,
            "batch": batch,
            "threads": threads,
            "save": None if save is None else str(save),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.flush()
            tail = Path(self._log.name).read_text(encoding="utf-8")[-3000:]
            raise RuntimeError(f"llm-compressor ended with status {self._process.returncode}:\n{tail}")
        return json.loads(line)


def gptq_recipe(
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    act_order: bool,
    damping: float,
    channelwise_down: bool,
) -> dict[str, Any]:
    """Arguments of `GPTQModifier`.

    Args:
        bits, symmetric, damping: as in `ej.quantize.GPTQ`.
        group_size: inputs that share a scale, or None for per channel.
        act_order: most active inputs first, with the groups of the matrix (its "static" order).
        channelwise_down: whether `down_proj` is per channel, because groups do not divide its inputs.
    """

    def group(targets: str, size: int | None) -> dict[str, Any]:
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "observer": "memoryless_minmax"}
        weights |= {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
        return {"targets": [targets], "weights": weights}

    groups = {"group_0": group(GROUPED, group_size)}
    if channelwise_down and group_size is not None:
        groups = {"group_0": group(GROUPED.replace("|down", ""), group_size), "group_1": group(CHANNELWISE, None)}
    return {
        "config_groups": groups,
        "ignore": ["lm_head"],
        "actorder": "static" if act_order else None,
        "dampening_frac": damping,
        "block_size": 128,
    }


def save_tokens(path: Path, windows: np.ndarray) -> Path:
    np.save(path, windows.astype(np.int32))
    return path
