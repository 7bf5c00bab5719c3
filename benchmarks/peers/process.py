"""llm-compressor as a process of its own, and the recipes that it is given."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import worker

HERE = Path(__file__).parent
REQUIREMENTS, WORKER = HERE / "llmcompressor-requirements.txt", HERE / "_llmcompressor_worker.py"
GROUPED, CHANNELWISE = "re:.*(q|k|v|o|gate|up|down)_proj$", "re:.*down_proj$"


def environment(directory: Path) -> Path:
    """The interpreter of an environment with llm-compressor; see `worker.environment`."""
    return worker.environment(directory, REQUIREMENTS, "llm-compressor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one run; `cpu` is the processor time of all threads, which other processes disturb less."""

    wall: float
    cpu: float


class Worker(worker.Worker):
    """A running llm-compressor."""

    def __init__(self, python: Path, log: Path) -> None:
        super().__init__("llm-compressor", [python, WORKER], log)
        self.versions, self.import_s = self.hello["versions"], self.hello["import_s"]

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
        """The answer to one job, see `_llmcompressor_worker.py` and `worker.Worker.ask`."""
        job = {
            "model": str(model),
            "tokens": str(tokens),
            "recipe": recipe,
            "batch": batch,
            "threads": threads,
            "save": None if save is None else str(save),
        }
        return self.ask(job)


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
