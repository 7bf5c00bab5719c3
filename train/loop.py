"""The one training loop: a jitted sharded step, checkpoints with exact resume, progress, metrics, evaluation.

The loop is one step ahead of what it reads: while a step runs, the next batch is made and put on the devices, and only
then the metrics of the step before are waited for. Before anything is evaluated or saved it has caught up.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from effjax.errors import ConfigError, EffjaxError
from effjax.io.safetensors_file import write_file
from effjax.paths import path_str
from train.checkpoint import FOLDER, Checkpoints
from train.config import LoopConfig
from train.input import PositionedIterator, Source, open_source
from train.metrics import MetricsLog, means, progress
from train.processes import is_main, stop_flag
from train.program import Program, build
from train.sharding import Rules, make_mesh
from train.step import LossFn, Metrics, TrainState


class NonFiniteLossError(EffjaxError, FloatingPointError):
    """The loss or its gradient became NaN or infinite; nothing was saved after the last good step."""


def fit(
    loss_fn: LossFn,
    init: Any,
    data: Source,
    config: LoopConfig,
    out: Path,
    *,
    resume: bool = False,
    evaluate: Callable[..., Mapping[str, float]] | None = None,
    frozen: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    rules: Rules | None = None,
    unit: str = "examples",
) -> TrainState:
    """Trains until `config.steps`, `config.stop_at` or SIGTERM, and returns the last state.

    Args:
        loss_fn: `(params, batch, key) -> (sum, count)`, or `(sum, count, {name: (sum, count)})` with more to record.
        init: `key -> params`, traced once to lay the parameters out on the mesh; or the parameters to go on from.
        data: `step -> batch` on the host, a function of the step alone; or `train.input.Batches`; or an iterator over
            the rows of this process with `get_state` and `set_state`, whose state goes into the checkpoints.
        config: steps, optimizer, mesh, precision and checkpoints.
        out: folder for `checkpoints/`, `metrics.jsonl` and `tensorboard/`; all processes see the same.
        resume: go on from the newest checkpoint in `out`; without it `out` must hold none.
        evaluate: `params -> {name: value}`, called every `config.eval_every` steps and after the last.
        frozen: arrays of the model that are not trained, laid out as parameters are; the last argument of `loss_fn` and
            `evaluate`, where given.
        optimizer: None for `make_optimizer(config)`.
        rules: which dimensions of a parameter are cut over which axes of the mesh; see `train.sharding.params_layout`.
        unit: what the count of `loss_fn` counts, for the line of progress.

    Raises:
        ConfigError: `out` holds a run that `resume` was not asked for, the mesh or the batch does not fit, or the data
            end too early.
        CheckpointError: the newest checkpoint is of another run.
        NonFiniteLossError: the loss or its gradient became NaN or infinite. The batch lies in `out`.
    """
    mesh = make_mesh(config.mesh)
    program = build(loss_fn, init, config, mesh, frozen=frozen, optimizer=optimizer, rules=rules)
    rest = () if frozen is None else (frozen,)
    rest = jax.device_put(rest, jax.tree.map(lambda x: x.sharding, program.frozen))
    batches = open_source(data, program.across)
    return drive(program, batches, config, Path(out), rest, resume=resume, evaluate=evaluate, unit=unit)


def drive(
    program: Program,
    batches: PositionedIterator,
    config: LoopConfig,
    out: Path,
    rest: tuple[Any, ...] = (),
    *,
    resume: bool = False,
    evaluate: Callable[..., Mapping[str, float]] | None = None,
    unit: str = "examples",
) -> Any:
    """The loop of `fit`, around a step that was built elsewhere.

    Args:
        program: its metrics need "loss" and "grad_norm"; its state needs `params`, and may hold whatever else.
        batches: rows of this process.
        rest: what the step and `evaluate` get after state or parameters and batch.
        config, out, resume, evaluate, unit: as for `fit`.

    Raises:
        as `fit` does.
    """
    mesh = program.mesh
    with jax.set_mesh(mesh), Checkpoints(out / FOLDER, config.keep) as checkpoints, stop_flag() as stop:
        latest = checkpoints.latest
        if latest is None:
            state, first = program.start(), 0
        elif resume:
            (state, position), first = checkpoints.restore(latest, program.shapes), latest
            batches.set_state(position)
        else:
            raise ConfigError(f"{out} already holds a run at step {latest}: pass resume, or name another folder")

        with _Recorder(config, out, first, checkpoints, unit) as recorder:
            if is_main() and mesh.size > 1:
                whole, each = program.state_bytes
                print(f"mesh {config.mesh}: state of {whole / 1e6:,.1f} MB, {each / 1e6:,.1f} MB on each device")
                print("".join(f"{line}\n" for line in program.report), end="", flush=True)
            for done in range(first + 1, config.steps + 1):
                try:
                    batch = next(batches)
                except StopIteration:
                    raise ConfigError(f"the data end after {done - 1} of steps={config.steps}: repeat them") from None
                arrays = program.put(batch, stop.is_set())
                began = time.perf_counter()
                state, measured = program.step(state, arrays, *rest)
                recorder.follow(done, measured, batch, began)
                stopping = recorder.stopping if jax.process_count() > 1 else stop.is_set()
                last = done in (config.steps, config.stop_at) or stopping
                if evaluate and (done == config.steps or (config.eval_every and done % config.eval_every == 0)):
                    recorder.catch_up(lambda params=state.params: evaluate(params, *rest))
                if last or done % config.save_every == 0:
                    recorder.catch_up()
                    checkpoints.save(done, state, batches.get_state())
                if last:
                    break
    return state


class _Recorder(contextlib.ExitStack):
    """Reads the metrics of each step one step late, refuses what is not finite, and writes the rest down."""

    def __init__(self, config: LoopConfig, out: Path, first: int, checkpoints: Checkpoints, unit: str):
        super().__init__()
        self._config, self._out, self._checkpoints = config, out, checkpoints
        self._pending: tuple[int, Metrics, Any, float] | None = None
        self._read_at = 0.0
        self.stopping = False  # a process has asked to stop, as all of them know at the same step
        if is_main():
            self._log = self.enter_context(MetricsLog(out, first, tensorboard=config.tensorboard))
            self._show = self.enter_context(progress(config, first, unit))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        try:
            # What was measured before the data or an evaluation failed is worth its line.
            if error is not None and not isinstance(error, NonFiniteLossError):
                self.catch_up()
        finally:
            super().__exit__(kind, error, trace)

    def follow(self, step: int, measured: Metrics, batch: Any, began: float) -> None:
        """Takes the metrics of a step that runs, and reads those of the step before."""
        self.catch_up()
        self._pending = step, measured, batch, began

    def catch_up(self, evaluate: Callable[[], Mapping[str, float]] | None = None) -> None:
        """Waits for the step that runs.

        Args:
            evaluate: more figures of that step; called when it is known to be good.

        Raises:
            NonFiniteLossError: it is not.
        """
        if self._pending is None:
            return
        (step, measured, batch, began), self._pending = self._pending, None
        record = means(step, measured)
        self.stopping = record.pop("stop", 0) > 0
        record["seconds"] = round(max(time.perf_counter() - max(began, self._read_at), 1e-6), 6)
        if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
            raise NonFiniteLossError(self._failed(record, batch))
        if evaluate is not None:
            record |= {name: float(value) for name, value in evaluate().items()}
        if is_main():
            self._log.write(record)
            self._show(record, evaluate is not None)
        self._read_at = time.perf_counter()

    def _failed(self, record: Mapping[str, float], batch: Any) -> str:
        """Keeps the batch; the message."""
        step, of = int(record["step"]), "" if jax.process_count() == 1 else f".process_{jax.process_index()}"
        file = self._out / f"failed_step_{step}{of}.safetensors"
        leaves = jax.tree_util.tree_leaves_with_path(batch)
        write_file(file, {path_str(path) or "batch": np.asarray(leaf) for path, leaf in leaves})
        saved = self._checkpoints.latest
        again = "begin again" if saved is None else f"resume from step {saved} in {self._out}"
        return (
            f"loss is {record['loss']} and the gradient norm {record['grad_norm']} at step {step}, whose batch is "
            f"in {file}: lower learning_rate={self._config.learning_rate} or {again}"
        )
