"""Trains with samplers side by side: accuracy against time and against examples, in one plot.

    python -m train.sample --data digits.npz --samplers uniform nws --out runs/sample
    python -m train.sample --data DIR --dataset cifar10 --samplers uniform nws el2n --scales msc_vbs --out runs/cifar
    python -m train.sample --dataset text --samplers uniform nws stale --out runs/text

Every sampler has a folder in `--out` with checkpoints and `metrics.jsonl`; `--resume` goes on within an epoch.
Sampling, training and what the sampler learns are one program on the device; the share of a step's time that the
sampler takes is measured and reported.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from effjax.data import (
    NWS,
    ExactLoss,
    LossReweighting,
    MultiScale,
    Sampled,
    SelectiveBackprop,
    SeTa,
    Shape,
    Spec,
    StaleLoss,
    Subset,
    Uniform,
    all_losses,
    el2n,
    growing_range,
    prototype_distances,
    sampled_step,
    selective_step,
)
from effjax.errors import ConfigError
from effjax.io.checkpoint import save_checkpoint
from train.command import run, same_settings
from train.config import LoopConfig
from train.finetune import PASSING
from train.sample_tasks import Task, read_task
from train.sharding import BATCH_AXES, make_mesh
from train.step import make_optimizer

Scored = Literal["el2n", "prototypes"]
Name = Literal["uniform", "nws", "nws_weighted", "stale", "exact", "selective", "seta", "reweighted"] | Scored
Scales = Literal["none", "ssc_fbs", "msc_fbs", "msc_vbs", "curriculum"]
CANDIDATES = 3  # forward passes of selective backprop, for each example that is trained on
TIMED = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig(LoopConfig):
    """The data, the samplers and the loop.

    Attributes:
        out: folder for a folder of each sampler, and `curves.png`.
        resume: go on from the newest checkpoints in `out`.
        dataset: "images" for `--data` as .npz with `images` and `labels`; "mnist" or "cifar10" for a directory that
            holds images/mnist or images/cifar10; "text" for windows of a text.
        data: that file or directory.
        text: a text file; None for the documentation that Python carries.
        samplers: trained one after another from the same parameters.
        scales: sizes of images: "none", or as `effjax.data.MultiScale`; "curriculum" is MSc-VBS with a growing range.
        batch: examples a step (at the base size).
        kept_share: of the examples, that "el2n" and "prototypes" leave.
        score_steps: of uniform training before "el2n" and "prototypes" judge.
        exact_every: steps between two full passes of "exact".
        pool: candidates of "nws" and "stale" for each example of the batch.
        context: tokens a window of text.
        heldout: share of the examples to judge on, where the data has no test set of its own.
    """

    out: Path
    resume: bool = False
    dataset: Literal["images", "mnist", "cifar10", "text"] = "images"
    data: Path | None = None
    text: Path | None = None
    samplers: tuple[Name, ...] = ("uniform", "nws")
    scales: Scales = "none"
    batch: int = 64
    kept_share: float = 0.5
    score_steps: int = 100
    exact_every: int = 50
    pool: int = 4
    context: int = 64
    heldout: float = 0.2
    steps: int = 500
    warmup: int = 10
    weight_decay: float = 1e-4
    eval_every: int = 50
    save_every: int = 100

    def __post_init__(self):
        super().__post_init__()
        if self.dataset != "text" and self.data is None:
            raise ConfigError(f"--dataset {self.dataset} needs --data: an .npz file, or the directory of the images")
        if not 0 < self.heldout < 1 or not 0 < self.kept_share <= 1:
            raise ConfigError(f"heldout={self.heldout}, kept_share={self.kept_share}: must be between 0 and 1")
        if self.scales != "none" and ("selective" in self.samplers or self.dataset == "text"):
            raise ConfigError(
                f"--scales {self.scales} is for images, and not for selective backprop: write --scales none"
            )
        if self.dataset == "text" and {"el2n", "prototypes"} & set(self.samplers):
            raise ConfigError("el2n and prototypes score images: leave them out of --samplers for text")
        if self.eval_every < 1:
            raise ConfigError(f"eval_every={self.eval_every}: the curves need at least 1")


def make_sampler(config: SampleConfig, name: Name, n: int) -> Any:
    """The sampler of this name, for `n` examples."""
    epochs = max(2, round(config.steps * config.batch / (0.45 * n)))
    return {
        "uniform": Uniform(),
        "reweighted": Uniform(),
        "nws": NWS(pool=config.pool),
        "nws_weighted": NWS(pool=config.pool, weighted=True),
        "stale": StaleLoss(pool=config.pool),
        "exact": ExactLoss(every=config.exact_every),
        "selective": SelectiveBackprop(),
        "el2n": Subset(keep=config.kept_share),
        "prototypes": Subset(keep=config.kept_share),
        "seta": SeTa(epochs=epochs, annealing=max(1, epochs // 10)),
    }[name]


def shape_of(config: SampleConfig, task: Task, step: int) -> Shape | None:
    """Size and batch of a step; None where images stay as they are."""
    if config.scales == "none":
        return None
    height, width = task.size
    kind = "msc_vbs" if config.scales == "curriculum" else config.scales
    low, high, divisor = round(0.57 * height), round(1.43 * height), 4
    sampler = MultiScale(
        kind=kind,
        base=(height, width),
        batch=config.batch,
        low=low,
        high=high,
        divisor=divisor,
        devices=make_mesh(config.mesh).size,
    )
    bounds = growing_range(step / config.steps, low, high, until=0.6) if config.scales == "curriculum" else None
    return sampler.shape_at(step, seed=config.seed, bounds=bounds)


class Runner:
    """The programs of one sampler, a step for each shape of images."""

    def __init__(self, config: SampleConfig, task: Task, name: Name, optimizer: Any):
        self.config, self.task, self.name, self.optimizer = config, task, name, optimizer
        self.sampler = make_sampler(config, name, task.n)
        self.steps: dict[Shape | None, Callable[..., Any]] = {}
        self.full = jax.jit(partial(all_losses, task.losses, batch=min(256, task.n)))

    def start(self) -> Sampled:
        """Parameters from the seed, and scores where the sampler needs them."""
        config, task = self.config, self.task
        params = task.init(jax.random.key(config.seed))
        scores = self._scores() if self.name in ("el2n", "prototypes") else None
        spec = Spec(seed=config.seed, features=task.features, scores=scores)
        return Sampled.start(params, self.optimizer, self.sampler.init(task.n, spec))

    def _scores(self) -> jax.Array:
        config, task = dataclasses.replace(self.config, samplers=("uniform",), scales="none"), self.task
        scout = Runner(config, task, "uniform", self.optimizer)
        state = scout.start()
        for step in range(config.score_steps):
            state, _ = scout.step(state, step)
        logits = jax.jit(task.logits)(state.params)
        if self.name == "el2n":
            return el2n(logits, task.examples[1])
        return prototype_distances(logits, task.labels, key=jax.random.key(config.seed))

    def step(self, state: Sampled, number: int) -> tuple[Sampled, Any]:
        """One step: a full pass before it where one is due."""
        shape = shape_of(self.config, self.task, number)
        if isinstance(self.sampler, ExactLoss) and number % self.sampler.every == 0:
            losses = self.full(state.params, self.task.examples)
            state = dataclasses.replace(state, sampler=self.sampler.refresh(state.sampler, losses))
        key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        return self._program(shape)(state, key, self.task.examples)

    def _program(self, shape: Shape | None) -> Callable[..., Any]:
        if shape not in self.steps:
            batch = self.config.batch if shape is None else shape.batch
            size = {} if shape is None else {"size": (shape.height, shape.width)}

            def losses(params: Any, drawn: Any) -> jax.Array:
                """Every device has its part of the batch."""
                drawn = jax.lax.with_sharding_constraint(drawn, PartitionSpec(BATCH_AXES))
                return self.task.losses(params, drawn, **size)

            if isinstance(self.sampler, SelectiveBackprop):
                step = selective_step(self.sampler, losses, self.optimizer, batch, CANDIDATES * batch)
            else:
                reweight = LossReweighting() if self.name == "reweighted" else None
                step = sampled_step(self.sampler, losses, self.optimizer, batch, reweight=reweight)
            self.steps[shape] = jax.jit(step, donate_argnums=0)
        return self.steps[shape]

    def overhead(self, state: Any) -> float:
        """Seconds of a draw and an update alone, the median of several."""

        @jax.jit
        def only(state: Any, key: jax.Array) -> Any:
            ids, weights = self.sampler.draw(state, key, self.config.batch)
            return self.sampler.update(state, ids, weights), ids

        times = []
        for number in range(TIMED + 1):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(only(state, jax.random.key(number)))
            times.append(time.perf_counter() - began)
        return float(np.median(times[1:]))


def train_one(config: SampleConfig, task: Task, name: Name) -> dict[str, float] | None:
    """Trains with one sampler and writes its folder; None where it was stopped."""
    out = config.out / name
    optimizer = make_optimizer(config)
    runner = Runner(config, task, name, optimizer)
    file, records = out / "metrics.jsonl", []
    options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, create=True)
    with ocp.CheckpointManager((out / "checkpoints").absolute(), options=options) as checkpoints:
        whole = NamedSharding(make_mesh(config.mesh), PartitionSpec())
        state, first = jax.device_put(runner.start(), whole), checkpoints.latest_step() or 0
        if first and not config.resume:
            raise ConfigError(f"{out} already holds a run at step {first}: pass --resume, or name another folder")
        if first:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = checkpoints.restore(first, args=ocp.args.StandardRestore(target))
            lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
            records = [line for line in lines if line["step"] <= first]
        last = {"seconds": 0.0, "examples": 0, "overhead": 0.0} | (records[-1] if records else {})
        seconds, seen, step_times = last["seconds"], last["examples"], []
        compiled: set[Shape | None] = set()
        for number in range(first, config.steps):
            shape = shape_of(config, task, number)
            if shape not in compiled:  # outside of the clock
                jax.block_until_ready(runner.step(jax.tree.map(jnp.array, state), number))
                compiled.add(shape)
            began = time.perf_counter()
            state, _ = jax.block_until_ready(runner.step(state, number))
            step_times.append(time.perf_counter() - began)
            seconds, seen, done = seconds + step_times[-1], seen + (shape.batch if shape else config.batch), number + 1
            ends = done in (config.steps, config.stop_at)
            if done % config.eval_every == 0 or done % config.save_every == 0 or ends:
                figures = {name: float(value) for name, value in task.evaluate(state.params).items()}
                records.append({"step": done, "seconds": seconds, "examples": seen, **figures})
                print(f"{name}: step {done}/{config.steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()))
            if done % config.save_every == 0 or ends:
                checkpoints.save(done, args=ocp.args.StandardSave(state))
                checkpoints.wait_until_finished()
                file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            if ends and done < config.steps:
                return None
    if step_times:
        share = min(1.0, runner.overhead(state.sampler) / float(np.median(step_times)))
        (out / "overhead.json").write_text(json.dumps({"sampler_share_of_step": share}) + "\n", encoding="utf-8")
    params = jax.tree.map(np.asarray, state.params)
    (config.out / "model").mkdir(exist_ok=True)
    save_checkpoint(config.out / "model" / name, params, config=task.described, overwrite=True)
    return records[-1] | json.loads((out / "overhead.json").read_text(encoding="utf-8"))


def plot(config: SampleConfig, measure: str) -> None:
    """Writes `curves.png`: every sampler's curve against seconds, and against examples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    axes = {"seconds": "seconds", "examples": "examples trained on"}
    for panel, (by, label) in zip(panels, axes.items(), strict=True):
        for name in config.samplers:
            lines = (config.out / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines]
            panel.plot([r[by] for r in records], [r[measure] for r in records], marker=".", label=name)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(measure)
    panels[0].legend()
    figure.savefig(config.out / "curves.png", dpi=120)


def sample(config: SampleConfig) -> dict[str, float] | None:
    """Trains with every sampler; the figures of the last evaluation of each."""
    mesh = make_mesh(config.mesh)
    if config.batch % mesh.size:
        raise ConfigError(f"batch={config.batch}: mesh {config.mesh!r} has {mesh.size} devices; choose a multiple")
    task = read_task(config)
    same_settings(
        config, PASSING, data=config.data.name if config.data else "", text=str(config.text and config.text.name)
    )
    whole = NamedSharding(mesh, PartitionSpec())
    task = dataclasses.replace(task, examples=jax.device_put(task.examples, whole))
    figures: dict[str, float] = {}
    for name in config.samplers:
        with jax.set_mesh(mesh):
            found = train_one(config, task, name)
        if found is None:
            print(f"stopped at step {config.stop_at} of {config.steps} with {name}; go on with --resume")
            return None
        figures |= {f"{name} {what}": found[what] for what in (task.measure, "seconds", "sampler_share_of_step")}
    plot(config, task.measure)
    return figures


def main() -> None:
    run(SampleConfig, sample, prog="python -m train.sample", description=__doc__)


if __name__ == "__main__":
    main()
