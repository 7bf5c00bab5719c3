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
    growing_range,
    sampled_step,
    selective_step,
)
from effjax.errors import ConfigError
from effjax.io.checkpoint import save_checkpoint
from train.checkpoint import newest
from train.command import run, same_settings
from train.config import LoopConfig
from train.finetune import PASSING
from train.loop import drive
from train.program import Program
from train.sample_scores import OF_IMAGES, SCORED, Scored, scores
from train.sample_tasks import Task, read_task
from train.sharding import BATCH_AXES, make_mesh
from train.step import make_optimizer

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
        kept_share: of the examples, that "el2n", "grand", "prototypes" and "dsir" leave.
        score_steps: of uniform training before "el2n", "grand" and "prototypes" judge.
        target: a text file, a text a line: "dsir" keeps windows that look like it.
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
    target: Path | None = None
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
        if self.dataset == "text" and OF_IMAGES & set(self.samplers):
            raise ConfigError("el2n and prototypes score images: leave them out of --samplers for text")
        if "dsir" in self.samplers and (self.dataset != "text" or self.target is None):
            raise ConfigError("dsir scores windows of text by a target: write --dataset text --target FILE")
        if self.accumulate != 1 or self.compute_dtype != "float32":
            raise ConfigError(
                "samplers need the losses of a whole batch in float32: leave accumulate and compute_dtype"
            )
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
        **dict.fromkeys(SCORED, Subset(keep=config.kept_share)),
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
    """The programs of one sampler, a step for each shape of images; `resumed` where a checkpoint gives the state."""

    def __init__(self, config: SampleConfig, task: Task, name: Name, optimizer: Any, *, resumed: bool = False):
        self.config, self.task, self.name, self.optimizer, self.resumed = config, task, name, optimizer, resumed
        self.sampler = make_sampler(config, name, task.n)
        self.whole = NamedSharding(make_mesh(config.mesh), PartitionSpec())
        self.steps: dict[Shape | None, Callable[..., Any]] = {}
        self.full = jax.jit(partial(all_losses, task.losses, batch=min(256, task.n)))

    def start(self) -> Sampled:
        """Parameters from the seed, and scores where the sampler needs them; the same on all devices."""
        config, task = self.config, self.task
        params = task.init(jax.random.key(config.seed))
        found = None
        if self.name in SCORED:  # a run that goes on has them in its checkpoint: zeros of their shape do
            found = jnp.zeros(task.n) if self.resumed else scores(self.name, config, task, self._scout)
        spec = Spec(seed=config.seed, features=task.features, scores=found)
        state = Sampled.start(params, self.optimizer, self.sampler.init(task.n, spec))
        return jax.device_put(state, self.whole)

    def _scout(self) -> Any:
        config = dataclasses.replace(self.config, samplers=("uniform",), scales="none")
        scout = Runner(config, self.task, "uniform", self.optimizer)
        state = scout.start()
        for number in range(config.score_steps):
            state, _ = scout.step(state, number, self.task.examples)
        return state.params

    def step(self, state: Sampled, number: Any, examples: Any) -> tuple[Sampled, Any]:
        """One step: a full pass before it where one is due."""
        number = int(number)
        if isinstance(self.sampler, ExactLoss) and number % self.sampler.every == 0:
            losses = self.full(state.params, examples)
            state = dataclasses.replace(state, sampler=self.sampler.refresh(state.sampler, losses))
        key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        return self._program(shape_of(self.config, self.task, number))(state, key, examples)

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
            self.steps[shape] = jax.jit(step, donate_argnums=0, out_shardings=self.whole)
        return self.steps[shape]

    def program(self) -> Program:
        """What the loop drives. Steps are compiled by trying them on a copy of the state, so that no curve shows it."""
        state, tried = self.start(), set()
        for number in range(self.config.steps):
            if (shape := shape_of(self.config, self.task, number)) not in tried:
                tried.add(shape)
                jax.block_until_ready(self.step(jax.tree.map(jnp.copy, state), number, self.task.examples))
        return Program(
            mesh=self.whole.mesh,  # type: ignore[arg-type]
            shapes=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.whole), state),
            across=self.whole,
            frozen=(self.task.examples,),
            report=[],
            start=lambda: state,
            step=self.step,
        )

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


class _Numbers:
    """The number of each step, which is all that a step needs of the host."""

    def __init__(self):
        self.following = 0

    def __next__(self) -> np.ndarray:
        self.following += 1
        return np.asarray(self.following - 1, np.int32)

    def get_state(self) -> dict[str, int]:
        return {"following": self.following}

    def set_state(self, state: dict[str, int]) -> None:
        self.following = state["following"]


def train_one(config: SampleConfig, task: Task, name: Name) -> dict[str, float] | None:
    """Trains with one sampler and writes its folder; None where it was stopped."""
    out = config.out / name
    resumed = config.resume and newest(out, config.keep) is not None
    runner = Runner(config, task, name, make_optimizer(config), resumed=resumed)
    state = drive(
        runner.program(),
        _Numbers(),
        config,
        out,
        (task.examples,),
        resume=config.resume,
        evaluate=lambda params, _: task.evaluate(params),
    )
    records = read_records(out)
    if records[-1]["step"] < config.steps:
        return None
    share = runner.overhead(state.sampler) / float(np.median([record["seconds"] for record in records]))
    params = jax.tree.map(np.asarray, state.params)
    (config.out / "model").mkdir(exist_ok=True)
    save_checkpoint(config.out / "model" / name, params, config=task.described, overwrite=True)
    return curve(records, task.measure)[-1] | {"sampler_share_of_step": min(1.0, share)}


def read_records(out: Path) -> list[dict[str, float]]:
    """The loop's record of every step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def curve(records: list[dict[str, float]], measure: str) -> list[dict[str, float]]:
    """What was measured, with the seconds and the examples that it took until then."""
    seconds, examples = (np.cumsum([record[field] for record in records]) for field in ("seconds", "count"))
    return [
        {"seconds": float(after), "examples": float(seen), measure: record[measure]}
        for record, after, seen in zip(records, seconds, examples, strict=True)
        if measure in record
    ]


def plot(config: SampleConfig, measure: str) -> None:
    """Writes `curves.png`: every sampler's curve against seconds, and against examples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    axes = {"seconds": "seconds", "examples": "examples trained on"}
    for panel, (by, label) in zip(panels, axes.items(), strict=True):
        for name in config.samplers:
            points = curve(read_records(config.out / name), measure)
            panel.plot([p[by] for p in points], [p[measure] for p in points], marker=".", label=name)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(measure)
    panels[0].legend()
    figure.savefig(config.out / "curves.png", dpi=120)


def sample(config: SampleConfig) -> dict[str, float] | None:
    """Trains with every sampler; the figures of the last evaluation of each."""
    if jax.process_count() > 1:
        raise ConfigError("train.sample holds all examples on every device: run it in one process")
    mesh = make_mesh(config.mesh)
    if config.batch % mesh.size:
        raise ConfigError(f"batch={config.batch}: mesh {config.mesh!r} has {mesh.size} devices; choose a multiple")
    task = read_task(config)
    named = {field: path.name if (path := getattr(config, field)) else "" for field in ("data", "text", "target")}
    same_settings(config, PASSING, **named)
    whole = NamedSharding(mesh, PartitionSpec())
    task = dataclasses.replace(task, examples=jax.device_put(task.examples, whole))
    figures: dict[str, float] = {}
    for name in config.samplers:
        with jax.set_mesh(mesh):
            found = train_one(config, task, name)
        if found is None:
            done = int(read_records(config.out / name)[-1]["step"])
            print(f"stopped at step {done} of {config.steps} with {name}; go on with --resume")
            return None
        figures |= {f"{name} {what}": found[what] for what in (task.measure, "seconds", "sampler_share_of_step")}
    plot(config, task.measure)
    return figures


def main() -> None:
    run(SampleConfig, sample, prog="python -m train.sample", description=__doc__)


if __name__ == "__main__":
    main()
