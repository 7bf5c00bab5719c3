"""Distils a task with few labels into a small network on images, through a large unlabelled gallery.

A convolutional network trained on the gallery without labels, to tell two views of an image from other images, stands
for the foundation model. It is adapted to the task's few labels, a transfer set is curated from the gallery, the
student learns what the adapted model says of it, and is finetuned on the labels (`effjax.distill.curate`,
`transfer_loss`, `keep_best`). Every phase has a folder in `--out`; with `--resume` an interrupted run goes on within
the phase it was in.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.distill import (
    KeepBest,
    agnostic_loss,
    curate,
    init_projection,
    keep_best,
    label_loss,
    project,
    query_counts,
    symmetric_contrastive_loss,
    transfer_loss,
)
from effjax.errors import ConfigError
from effjax.io.checkpoint import save_checkpoint
from effjax.models.cnn import apply_cnn, cnn_features, init_cnn
from train.command import same_settings
from train.config import LoopConfig
from train.finetune import PASSING
from train.images import Part, TransferData, pooled, read_labelled, shifted, transfer_data, warped
from train.loop import fit
from train.processes import is_main, to_host
from train.step import make_optimizer

AT_ONCE = 500  # images that are embedded or judged
PROJECTED = 64  # features by which views are compared


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig(LoopConfig):
    """The images, the networks and the phases; `steps` and `learning_rate` are those of the transfer.

    Attributes:
        experiment: "transfer".
        out: folder for the runs of the phases, and the finished `model/`.
        resume: go on from the newest checkpoints in `out`.
        data: .npz with `images [n, height, width]` and integer `labels [n]`, a directory that holds images/mnist, or
            None for the digits of scikit-learn. The upper half of the classes is the task.
        pool: side of the squares of pixels whose mean is one pixel of what networks see.
        per_class: labels of each class of the task, a fifth of them held back.
        gallery: images without labels, a fifth of them of the task's classes.
        n: size of the transfer set; 0 leaves the transfer out: the student is finetuned from scratch.
        curation: how it is chosen: "query_balanced", "best_matches", "random", or "in_domain", all that is of the task.
        oriented: learn what the adapted model says; --no-oriented: the embeddings of the model as it came.
        teacher, student: widths of their convolutions.
        pretrain_steps, pretrain_rate: of the foundation model.
        adapt: "head" trains its new head alone, "full" all of it after that; early stopping keeps the better.
        adapt_steps, adapt_rate: of either; the rate of all of it is a hundredth of that of the head.
        finetune_steps, finetune_rate: of the student on the labels.
        temperature: of the transfer.
        batch: images a step.
    """

    out: Path
    experiment: Literal["transfer"] = "transfer"
    resume: bool = False
    data: Path | None = None
    pool: int = 1
    per_class: int = 10
    gallery: int = 2500
    n: int = 250
    curation: Literal["query_balanced", "best_matches", "random", "in_domain"] = "query_balanced"
    oriented: bool = True
    teacher: tuple[int, ...] = (48, 96, 192)
    student: tuple[int, ...] = (16, 32, 64)
    pretrain_steps: int = 600
    pretrain_rate: float = 2e-3
    adapt: Literal["head", "full"] = "full"
    adapt_steps: int = 200
    adapt_rate: float = 1e-2
    finetune_steps: int = 200
    finetune_rate: float = 1e-3
    temperature: float = 1.0
    batch: int = 128
    steps: int = 960
    learning_rate: float = 1e-2
    warmup: int = 0
    weight_decay: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        if self.n < 0 or not self.temperature > 0:
            raise ConfigError(f"n={self.n}, temperature={self.temperature}: must be at least 0, and positive")
        for name in ("pretrain_steps", "adapt_steps", "finetune_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phases:
    """Runs one phase after the other, each in a folder of its own; None where one was interrupted."""

    config: TransferConfig

    def __call__(
        self,
        name: str,
        loss_fn: Callable[..., Any],
        init: Any,
        batch_at: Callable[[int], Any],
        *,
        steps: int,
        rate: float,
        only: str | None = None,
        judge: Callable[[Any], jax.Array] | None = None,
    ) -> Any:
        """A phase of the loop.

        Args:
            name: of its folder.
            loss_fn: `(params, batch, key) -> losses`, a value an image.
            init: parameters, or `key -> params`; the former where a part is trained alone.
            batch_at: `step -> batch`.
            steps, rate: how many, and the peak of the rate.
            only: part of the parameters that is trained alone.
            judge: held-out loss, by which the parameters are chosen; None for the last.

        Returns:
            Parameters on the host, or None where the phase did not end.
        """
        config = self.config
        stop_at = config.stop_at if name == "transfer" else 0
        loop = config.of_part(steps=steps, learning_rate=rate, warmup=0, stop_at=stop_at)
        optimizer = make_optimizer(loop)
        if only is not None:
            rest = optax.masked(optax.set_to_zero(), {part: part != only for part in init})
            optimizer = optax.chain(rest, optimizer, rest)  # neither in the norm that is clipped, nor decayed
        if judge is not None:
            optimizer = keep_best(optimizer, judge)

        def summed(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            losses = loss_fn(params, batch, key)
            return losses.sum(), jnp.asarray(losses.size, jnp.float32)

        state = fit(summed, init, batch_at, loop, config.out / name, resume=config.resume, optimizer=optimizer)
        if int(state.step) < steps:
            print(f"stopped in phase {name} at step {int(state.step)} of {steps}; go on with --resume")
            return None
        if judge is None:
            return to_host(state.params)
        best = state.opt_state
        assert isinstance(best, KeepBest)
        return to_host(best.or_better(state.params, judge(state.params)).params)

    def on_labels(self, name: str, params: Any, labelled: Part, heldout: Part, **options: Any) -> Any:
        """A phase of cross entropy on shifted images, stopped early by the labels held back."""
        config, held = self.config, jax.tree.map(jnp.asarray, heldout)

        def judge(params: Any) -> jax.Array:
            return label_loss(params, apply_cnn, held)

        def losses(params: Any, batch: Any, key: jax.Array) -> jax.Array:
            del key
            return optax.softmax_cross_entropy_with_integer_labels(apply_cnn(params, batch[0]), batch[1])

        def batch_at(step: int) -> Any:
            rng = np.random.default_rng((config.seed, step))
            ids = rng.integers(0, len(labelled[1]), config.batch)
            return shifted(labelled[0][ids], rng), labelled[1][ids]

        return self(name, losses, params, batch_at, judge=judge, **options)


@functools.partial(jax.jit, static_argnames="apply")
def in_parts(apply: Callable[[Any, jax.Array], jax.Array], params: Any, images: Any) -> jax.Array:
    """`apply(params, images)`, some images at a time."""
    return jax.lax.map(lambda image: apply(params, image[None])[0], images, batch_size=AT_ONCE)


def accuracy(params: Any, part: Part) -> float:
    """Share of images whose label comes first."""
    return float((in_parts(apply_cnn, params, part[0]).argmax(-1) == part[1]).mean())


def with_head(params: Any, key: jax.Array, labels: int) -> Any:
    """The network with a new head."""
    width = params["head"]["kernel"].shape[0]
    return params | {"head": init_cnn(key, 1, labels, (width,))["head"]}


def view_loss(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
    """What a view of an image gives is found among those of others by what another view gives (SimCLR, ICML 2020)."""
    views = jnp.concatenate([warped(k, images) for k in jax.random.split(key)])
    each = project(params["projection"], cnn_features(params["net"], views))
    return symmetric_contrastive_loss(each[: len(images)], each[len(images) :], scale=5.0)


def foundation(phase: Phases, gallery: np.ndarray, labels: int) -> Any:
    """A network trained without labels: what a view of an image gives finds what another view gives."""
    config = phase.config

    def init(key: jax.Array) -> Any:
        of_net, of_projection = jax.random.split(key)
        projection = init_projection(of_projection, config.teacher[-1], PROJECTED)
        return {"net": init_cnn(of_net, 1, labels, config.teacher), "projection": projection}

    def batch_at(step: int) -> Any:
        return gallery[np.random.default_rng((config.seed, step)).integers(0, len(gallery), config.batch)]

    return phase("foundation", view_loss, init, batch_at, steps=config.pretrain_steps, rate=config.pretrain_rate)


def chosen(config: TransferConfig, data: TransferData, vfm: Any, gallery: np.ndarray) -> tuple[np.ndarray, float]:
    """Rows of the transfer set, and the entropy in bits of how many lie next to each labelled image."""
    queries = in_parts(cnn_features, vfm, np.concatenate([data.labelled[0], data.heldout[0]]))
    if config.curation == "in_domain":
        ids = np.flatnonzero(data.in_domain)[: config.n]
    else:
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        ids = np.asarray(curate(queries, gallery, min(config.n, len(gallery)), mode=config.curation, key=key))
    share = np.asarray(query_counts(queries, gallery[ids])) / len(ids)
    return ids, float(-(share[share > 0] * np.log2(share[share > 0])).sum())


def distill(config: TransferConfig) -> dict[str, float] | None:
    """Runs the phases and writes `config.out / "model"`.

    Returns:
        Accuracies on the task's test images of the student, before finetuning and after, and of the adapted model; the
        share of the transfer set that is of the task, and the entropy of its queries; or None when it was stopped.
    """
    images, labels = read_labelled(config.data)
    data = transfer_data(
        pooled(images, config.pool)[..., None],
        labels,
        seed=config.seed,
        per_class=config.per_class,
        gallery=config.gallery,
        test=4000,
    )
    same_settings(config, PASSING, data="digits" if config.data is None else config.data.name)
    phase, keys = Phases(config=config), jax.random.split(jax.random.key(config.seed), 4)
    count = int(data.test[1].max()) + 1
    found = foundation(phase, data.gallery, count)
    if found is None:
        return None
    vfm = found["net"]
    adapted = with_head(vfm, keys[0], count)
    scopes = {"head": ("head", config.adapt_rate), "full": (None, config.adapt_rate / 100)}
    for scope in ("head",) if config.adapt == "head" else ("head", "full"):
        only, rate = scopes[scope]
        few = data.labelled, data.heldout
        adapted = phase.on_labels(f"adapted_{scope}", adapted, *few, steps=config.adapt_steps, rate=rate, only=only)
        if adapted is None:
            return None
    student = init_cnn(keys[1], 1, count, config.student)
    figures = {"teacher": accuracy(adapted, data.test)}
    if config.n:
        embeddings = np.asarray(in_parts(cnn_features, vfm, data.gallery))
        ids, entropy = chosen(config, data, vfm, embeddings)
        x = data.gallery[ids]
        figures |= {"of_the_task": float(data.in_domain[ids].mean()), "entropy": entropy}
        if config.oriented:
            told = np.asarray(in_parts(apply_cnn, adapted, x), np.float16)
            trained = {"student": student}
        else:
            told = embeddings[ids]
            projection = init_projection(keys[2], config.student[-1], config.teacher[-1])
            trained = {"student": student, "projection": projection}

        def losses(params: Any, batch: Any, key: jax.Array) -> jax.Array:
            del key
            shown, told = batch
            if config.oriented:
                return transfer_loss(params["student"], apply_cnn, shown, told, temperature=config.temperature)
            return agnostic_loss(told, cnn_features(params["student"], shown), params["projection"])

        def batch_at(step: int) -> Any:
            rng = np.random.default_rng((config.seed, step))
            rows = rng.integers(0, len(x), config.batch)
            return shifted(x[rows], rng), told[rows]

        found = phase("transfer", losses, trained, batch_at, steps=config.steps, rate=config.learning_rate)
        if found is None:
            return None
        student = found["student"]
    figures["before_finetuning"] = accuracy(student, data.test)
    options: dict[str, Any] = {"steps": config.finetune_steps, "rate": config.finetune_rate}
    student = phase.on_labels("finetuned", student, data.labelled, data.heldout, **options)
    if student is None:
        return None
    figures = {"accuracy": accuracy(student, data.test)} | figures
    described = {"model_type": "cnn", "channels": 1, "labels": count, "widths": list(config.student)}
    card = (
        f"# A student of an adapted foundation model\n\nAccuracy on {len(data.test[1])} test images, {count} classes: "
        f"{figures['accuracy']:.4f}; its teacher {figures['teacher']:.4f}. {config.per_class} labels a class"
        + (f", {config.n} images without labels, curation {config.curation}.\n" if config.n else ".\n")
    )
    if is_main():
        save_checkpoint(config.out / "model", student, config=described, card=card, overwrite=True)
    return figures
