"""The one training loop: mesh from a flag, jitted sharded step, checkpoints with exact resume, progress, metrics."""

import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from effjax.errors import ConfigError, EffjaxError

AXES = ("data", "fsdp")

Batch = Any  # a pytree of arrays whose leading axis is the batch
LossFn = Callable[..., tuple[jax.Array, jax.Array]]  # (params, batch, key), and what is frozen where something is


class NonFiniteLossError(EffjaxError, FloatingPointError):
    """The loss or its gradient became NaN or infinite; nothing was saved after the last good step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the loop needs beside the loss, the parameters and the data.

    Attributes:
        steps: optimizer steps in all, counted from the very first run.
        learning_rate: peak of the schedule: linear warm-up, then a cosine to zero at `steps`.
        warmup: steps of warm-up.
        weight_decay: AdamW's decoupled decay, for kernels alone (not norms, biases or embeddings).
        clip: largest global norm of a gradient.
        seed: of parameters, data order and whatever the loss draws.
        mesh: axis sizes, such as "data=1" or "data=4,fsdp=2".
        log_every: steps between two lines of progress; the metrics file has every step.
        eval_every: steps between two held-out evaluations; 0 for only the last.
        save_every: steps between two checkpoints.
        keep: checkpoints kept, the oldest goes first.
        stop_at: save and leave after this step, as SIGTERM would make the run do; 0 for never.
    """

    steps: int = 2600
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    mesh: str = "data=1"
    log_every: int = 20
    eval_every: int = 200
    save_every: int = 200
    keep: int = 2
    stop_at: int = 0

    def __post_init__(self):
        for name in ("steps", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.warmup < self.steps:
            raise ConfigError(f"warmup={self.warmup}: must be at least 0 and below steps={self.steps}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on.

    Attributes:
        step: int32 scalar, steps done; also the position in the data, since a batch is a function of the step.
        params: the parameters.
        opt_state: what optax keeps.
        key: uint32 key data (not a typed key, so that a checkpoint is plain arrays); folded with `step` at each step.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def init_state(init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step: `init(key)`, an empty optimizer, and a key of its own for the steps."""
    init_key, key = jax.random.split(jax.random.key(seed))
    params = init(init_key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key_data(key))


def make_mesh(spec: str) -> Mesh:
    """Builds the mesh that a flag describes; axes not named have size one.

    Raises:
        ConfigError: an unknown axis, a size that is not a positive integer, or more devices than there are.

    Example:
        >>> dict(make_mesh("data=1").shape)
        {'data': 1, 'fsdp': 1}
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in spec.split(","):
        name, _, size = part.strip().partition("=")
        if name not in sizes or not size.isdigit() or int(size) < 1:
            raise ConfigError(f"mesh {spec!r}: cannot read {part!r}; write axis=size with axes {', '.join(AXES)}")
        sizes[name] = int(size)
    wanted, devices = math.prod(sizes.values()), jax.devices()
    if wanted > len(devices):
        raise ConfigError(f"mesh {spec!r} needs {wanted} devices, {len(devices)} exist: lower an axis")
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices[:wanted])


def partition_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Shards the largest dimension that `fsdp` divides; vectors and scalars stay whole.

    Example:
        >>> partition_spec((256, 640), 2)
        PartitionSpec(None, 'fsdp')
    """
    fitting = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or len(shape) < 2 or not fitting:
        return PartitionSpec()
    axis = max(fitting, key=lambda axis: (shape[axis], -axis))
    return PartitionSpec(*(None,) * axis, "fsdp")


def make_optimizer(config: LoopConfig) -> optax.GradientTransformation:
    """AdamW under global-norm clipping, with warm-up and a cosine to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, config.steps)

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.ndim >= 2 and getattr(path[-1], "key", None) == "kernel", params
        )

    adamw = optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=config.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def make_step(loss_fn: LossFn, optimizer: optax.GradientTransformation):
    """Builds `step(state, batch) -> (state, metrics)`, metrics being (sum, count) pairs that add over steps and hosts.

    Args:
        loss_fn: `(params, batch, key) -> (sum, count)`, the summed loss and how many terms it has. What a step is given
            beside state and batch follows the key.
        optimizer: any optax transformation.
    """

    def step(state: TrainState, batch: Batch, *frozen: Any) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def mean_loss(params):
            total, count = loss_fn(params, batch, key, *frozen)
            return total / count, (total, count)

        grads, loss = jax.grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": (optax.tree.norm(grads), jnp.ones(()))}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step


def fit(
    loss_fn: LossFn,
    init: Any,
    batch_at: Callable[[int], Batch],
    config: LoopConfig,
    out: Path,
    *,
    resume: bool = False,
    evaluate: Callable[..., Mapping[str, float]] | None = None,
    frozen: Any = None,
    optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
    """Trains until `config.steps`, `config.stop_at` or SIGTERM, and returns the last state.

    Args:
        loss_fn: `(params, batch, key) -> (sum, count)`.
        init: `key -> params`, traced once to lay the parameters out on the mesh; or the parameters to go on from.
        batch_at: `step -> batch` on the host, a function of the step alone: that is what makes resuming exact.
        config: steps, optimizer, mesh and checkpoints.
        out: folder for `checkpoints/` and `metrics.jsonl`.
        resume: go on from the newest checkpoint in `out`; without it `out` must hold none.
        evaluate: `params -> {name: value}`, called every `config.eval_every` steps and after the last.
        frozen: arrays of the model that are not trained, laid out as parameters are; the last argument of `loss_fn` and
            `evaluate`, where given.
        optimizer: None for `make_optimizer(config)`.

    Raises:
        ConfigError: `out` holds a run that `resume` was not asked for, or the mesh does not fit.
        NonFiniteLossError: the loss or its gradient became NaN or infinite.
    """
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config) if optimizer is None else optimizer

    given, rest = () if callable(init) else (init,), () if frozen is None else (frozen,)

    def fresh(*params: Any) -> TrainState:
        return init_state((lambda _: params[0]) if params else init, optimizer, config.seed)

    def laid_out(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: NamedSharding(mesh, partition_spec(leaf.shape, mesh.shape["fsdp"])), tree)

    abstract = jax.eval_shape(fresh, *given)
    layout, across = laid_out(abstract), NamedSharding(mesh, PartitionSpec(AXES))
    rest = jax.device_put(rest, laid_out(rest))
    step = jax.jit(
        make_step(loss_fn, optimizer),
        in_shardings=(layout, across, *laid_out(rest)),
        out_shardings=(layout, None),
        donate_argnums=0,
    )
    options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, create=True)
    with (
        jax.set_mesh(mesh),
        ocp.CheckpointManager(Path(out).absolute() / "checkpoints", options=options) as checkpoints,
        _stop_flag() as stop,
    ):
        latest = checkpoints.latest_step()
        if latest is None:
            state, first = jax.jit(fresh, out_shardings=layout)(*given), 0
        elif resume:
            target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, layout)
            state, first = checkpoints.restore(latest, args=ocp.args.StandardRestore(target)), latest
        else:
            raise ConfigError(f"{out} already holds a run at step {latest}: pass resume, or name another folder")

        with _Metrics(Path(out) / "metrics.jsonl", first) as metrics, _progress(config, first) as show:
            for index in range(first, config.steps):
                began = time.perf_counter()
                state, measured = step(state, jax.device_put(batch_at(index), across), *rest)
                done = index + 1
                record = _record(done, measured, began)
                if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
                    raise NonFiniteLossError(
                        f"loss is {record['loss']} and the gradient norm {record['grad_norm']} at step {done}: lower "
                        f"learning_rate={config.learning_rate} or resume from step {checkpoints.latest_step()} in {out}"
                    )
                last = done in (config.steps, config.stop_at) or stop.is_set()
                if evaluate and (done == config.steps or (config.eval_every and done % config.eval_every == 0)):
                    record |= {name: float(value) for name, value in evaluate(state.params, *rest).items()}
                metrics.write(record)
                show(record)
                if last or done % config.save_every == 0:
                    checkpoints.save(done, args=ocp.args.StandardSave(state))
                if last:
                    break
        checkpoints.wait_until_finished()
    return state


def _record(done: int, measured: Mapping[str, tuple[jax.Array, jax.Array]], began: float) -> dict[str, float]:
    """Means of the metrics; reading them waits for the step, so the time is the step's."""
    values = {name: (float(total), float(count)) for name, (total, count) in measured.items()}
    record = {"step": done} | {name: total / count for name, (total, count) in values.items()}
    return record | {"count": values["loss"][1], "seconds": round(time.perf_counter() - began, 4)}


class _Metrics:
    """A JSON-lines file; lines of steps that a resumed run will repeat are dropped first."""

    def __init__(self, path: Path, first: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def write(self, record: Mapping[str, float]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


@contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that the loop saves and leaves between two steps."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may take signals
        yield flag
        return
    before = signal.signal(signal.SIGTERM, lambda *_: flag.set())
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(config: LoopConfig, first: int) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A live bar on a terminal, a plain line every `log_every` steps elsewhere."""
    speed: list[float] = []

    def describe(record: Mapping[str, float]) -> str:
        speed.append(record["count"] / record["seconds"])
        rate = float(np.median(speed[-50:]))
        extra = "".join(f"  {k} {v:.4f}" for k, v in record.items() if k not in _BASE_FIELDS)
        return f"loss {record['loss']:.4f}{extra}  {rate:,.0f} tokens/s"

    if sys.stdout.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task("training", total=config.steps, completed=first)
            yield lambda record: bar.update(task, completed=record["step"], description=describe(record))
        return

    began = time.perf_counter()

    def line(record: Mapping[str, float]) -> None:
        text, done = describe(record), int(record["step"])
        if done % config.log_every == 0 or done == config.steps or set(record) - _BASE_FIELDS:
            left = (time.perf_counter() - began) / (done - first) * (config.steps - done)
            print(f"step {done}/{config.steps}  {text}  {left / 60:.1f} min left", flush=True)

    yield line


_BASE_FIELDS = frozenset({"step", "loss", "grad_norm", "count", "seconds"})
