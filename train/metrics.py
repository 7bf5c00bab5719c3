"""What a run says about itself: a line of JSON a step, TensorBoard's event files, a live line of progress."""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from effjax.errors import ConfigError
from train.config import LoopConfig
from train.step import Metrics

BASE_FIELDS = frozenset({"step", "loss", "grad_norm", "count", "seconds"})


def means(step: int, measured: Metrics) -> dict[str, float]:
    """Means of (sum, count) pairs, and the count of the loss; reading them waits for the step.

    What counts nothing has the mean 0; a sum that is not finite stays so.

    Example:
        >>> means(3, {"loss": (6.0, 4.0), "hits": (0.0, 0.0)})
        {'step': 3, 'hits': 0.0, 'loss': 1.5, 'count': 4.0}
    """
    read = jax.device_get(measured)  # all at once
    values = {name: (float(total), float(count)) for name, (total, count) in read.items()}
    record = {name: total / count if count else total for name, (total, count) in values.items()}
    return {"step": step} | record | {"count": values["loss"][1]}


class MetricsLog:
    """`metrics.jsonl`, and `tensorboard/` where asked for; lines of steps that a resumed run will repeat are dropped.

    Args:
        out: folder of the run.
        first: steps done when it goes on.
        tensorboard: write event files too.

    Raises:
        ConfigError: `tensorboard`, and the package that writes them is missing.
    """

    def __init__(self, out: Path, first: int, *, tensorboard: bool = False):
        self._events = _event_writer(out / "tensorboard", first) if tensorboard else None
        out.mkdir(parents=True, exist_ok=True)
        path = out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first]
        fresh = out / "metrics.jsonl.new"
        fresh.write_text("".join(line + "\n" for line in kept))
        os.replace(fresh, path)  # a kill leaves the old lines or the new ones
        self._file = path.open("a")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, record: Mapping[str, float]) -> None:
        """One step's; what is written survives the process."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._events is not None:
            for name in record.keys() - {"step"}:
                self._events.add_scalar(name, record[name], int(record["step"]))


def _event_writer(folder: Path, first: int) -> Any:
    try:
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found]
    except ImportError:
        raise ConfigError(
            "tensorboard=True: event files need the package tensorboardX; pip install 'effjax[train]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=first + 1, flush_secs=10)


@contextmanager
def progress(config: LoopConfig, first: int, unit: str) -> Iterator[Callable[[Mapping[str, float], bool], None]]:
    """A live bar on a terminal, a plain line every `log_every` steps elsewhere.

    Args:
        config: steps and how often.
        first: steps done when the run goes on.
        unit: of the rate.

    Yields:
        `(record, evaluated)`: shows a step; one that was evaluated has a line of its own.
    """
    speed: deque[float] = deque(maxlen=50)

    def describe(record: Mapping[str, float]) -> str:
        rate = float(np.median(speed))
        extra = "".join(f"  {k} {v:.4f}" for k, v in record.items() if k not in BASE_FIELDS)
        return f"loss {record['loss']:.4f}{extra}  {rate:,.0f} {unit}/s"

    if sys.stdout.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task("training", total=config.steps, completed=first)

            def live(record: Mapping[str, float], evaluated: bool) -> None:
                del evaluated
                speed.append(record["count"] / record["seconds"])
                bar.update(task, completed=record["step"], description=describe(record))

            yield live
        return

    began = time.perf_counter()

    def line(record: Mapping[str, float], evaluated: bool) -> None:
        speed.append(record["count"] / record["seconds"])
        done = int(record["step"])
        if done % config.log_every == 0 or done == config.steps or evaluated:
            left = (time.perf_counter() - began) / (done - first) * (config.steps - done)
            print(f"step {done}/{config.steps}  {describe(record)}  {left / 60:.1f} min left", flush=True)

    yield line
