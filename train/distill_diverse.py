"""Distils a small network on images from a committee: one teacher sees the whole image, one what the student sees.

The student sees the image pooled. Both teachers are trained first, on all training images; the student has the labels
of some of them, and asks the teachers (`effjax.distill.diverse_loss`). The module that asks is not saved.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.distill import (
    Batch,
    Committee,
    Diverse,
    Teacher,
    apply_mlp,
    diverse_init,
    diverse_loss,
    halves,
    init_mlp,
    strip,
)
from effjax.errors import ConfigError
from effjax.io.checkpoint import save_checkpoint
from train.command import same_settings
from train.config import LoopConfig
from train.finetune import PASSING
from train.images import pooled, read_labelled
from train.loop import fit
from train.processes import is_main, to_host
from train.step import make_optimizer

LO, HI = halves(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiverseConfig(LoopConfig):
    """The images, the networks and the loop.

    Attributes:
        experiment: "diverse".
        out: folder for the runs of the teachers and the student, and the finished `model/`.
        resume: go on from the newest checkpoints in `out`.
        data: .npz with `images [n, height, width]` and integer `labels [n]`, a directory that holds images/mnist, or
            None for the digits of scikit-learn.
        pool: side of the squares of pixels whose mean the student sees.
        foundation: hidden widths of the teacher that sees the image.
        complementary: hidden widths of the teacher that sees what the student sees.
        student: its hidden widths.
        heldout: share of the images that is judged on.
        labelled: share of the other images whose labels the student has.
        teacher_steps: of either teacher, at `teacher_rate`.
        teacher_rate: their learning rate.
        module_rate: learning rate of the module over that of the student.
        weight, logits, ground, ask, entropy, temperature: see `effjax.distill.Diverse`; the best of the claim's.
        skip_after: step after which teachers of low importance are left out, example by example; 0 for never.
        batch: images a step.
    """

    out: Path
    experiment: Literal["diverse"] = "diverse"
    resume: bool = False
    data: Path | None = None
    pool: int = 2
    foundation: tuple[int, int] = (256, 128)
    complementary: tuple[int, int] = (96, 64)
    student: tuple[int, int] = (10, 10)
    heldout: float = 0.4
    labelled: float = 0.3
    teacher_steps: int = 1500
    teacher_rate: float = 2e-3
    module_rate: float = 0.1
    weight: float = 1.0
    logits: float = 1.0
    ground: float = 0.5
    ask: float = 0.5
    entropy: float = 0.05
    temperature: float = 4.0
    skip_after: int = 500
    batch: int = 64
    steps: int = 1500
    learning_rate: float = 2e-2
    warmup: int = 0
    weight_decay: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        for name in ("heldout", "labelled"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be between 0 and 1")
        _ = self.terms

    @property
    def terms(self) -> Diverse:
        """The weights of the loss."""
        names = [field.name for field in dataclasses.fields(Diverse) if field.name != "threshold"]
        return Diverse(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Whole and pooled images, flat in [0, 1], and labels; the first ones are the student's."""

    whole: Any
    pooled: Any
    labels: Any

    def __getitem__(self, index: Any) -> "Images":
        return Images(whole=self.whole[index], pooled=self.pooled[index], labels=self.labels[index])


def read_images(config: DiverseConfig) -> tuple[Images, Images]:
    """Images to train on and held out, in an order drawn from the seed.

    Raises:
        ConfigError: see `read_labelled` and `pooled`; too few images.
    """
    images, labels = read_labelled(config.data)
    small = pooled(images, config.pool)
    order = np.random.default_rng(config.seed).permutation(len(images))
    whole, small, labels = images[order], small[order], labels[order]
    judged = round(config.heldout * len(whole))
    if not 0 < judged < len(whole) or labels.min() < 0:
        raise ConfigError(f"{len(whole)} images, labels from {labels.min()}: give more images, and labels from 0 on")
    every = Images(whole=whole.reshape(len(whole), -1), pooled=small.reshape(len(whole), -1), labels=labels)
    return every[judged:], every[:judged]


def student_apply(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Early state, late state and logits."""
    early = LO(params, x)
    return (early, *HI(params, early))


@jax.jit
def accuracy(params: Any, x: Any, labels: Any) -> jax.Array:
    """Share of images whose label comes first."""
    return jnp.mean(jnp.argmax(apply_mlp(params, x), -1) == labels)


def train_teacher(config: DiverseConfig, name: str, widths: tuple[int, ...], x: np.ndarray, y: np.ndarray) -> Any:
    """A trained teacher, from its own folder in `config.out`; None where it was interrupted."""
    kept = {field.name: getattr(config, field.name) for field in dataclasses.fields(LoopConfig)}
    steps = {"steps": config.teacher_steps, "learning_rate": config.teacher_rate, "stop_at": 0, "warmup": 0}
    loop = LoopConfig(**kept | steps)

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        del key
        losses = optax.softmax_cross_entropy_with_integer_labels(apply_mlp(params, batch[0]), batch[1])
        return losses.sum(), jnp.asarray(losses.size, jnp.float32)

    def batch_at(step: int) -> Any:
        ids = np.random.default_rng((config.seed, step)).integers(0, len(x), config.batch)
        return x[ids], y[ids]

    state = fit(loss_fn, lambda key: init_mlp(key, widths), batch_at, loop, config.out / name, resume=config.resume)
    if int(state.step) < config.teacher_steps:
        return None
    params = to_host(state.params)
    return Teacher(params=params, apply_lo=LO, apply_hi=HI, split_dim=widths[1], out_dim=widths[2])


def distill(config: DiverseConfig) -> dict[str, float] | None:
    """Trains teachers and student and writes `config.out / "model"`.

    Returns:
        Held-out accuracies, and the share of passes through teachers that are kept; or None when the run was stopped
        before its last step.
    """
    train, heldout = read_images(config)
    same_settings(config, PASSING, data="digits" if config.data is None else config.data.name)
    labels = int(max(train.labels.max(), heldout.labels.max())) + 1
    views = {"foundation": "whole", "complementary": "pooled"}
    teachers = []
    for name, view in views.items():
        x = getattr(train, view)
        widths = (x.shape[1], *getattr(config, name), labels)
        teachers.append(train_teacher(config, name, widths, x, train.labels))
        if teachers[-1] is None:
            print(f"stopped while the {name} teacher was trained; go on with --resume")
            return None
    committee = Committee(teachers=tuple(teachers))
    own = train[: max(1, round(config.labelled * len(train.labels)))]
    seen = jax.tree.map(
        np.asarray, committee.observe(tuple(jnp.asarray(getattr(own, view)) for view in views.values()))
    )
    widths = (own.pooled.shape[1], *config.student, labels)

    def init(key: jax.Array) -> Any:
        of_student, of_module = jax.random.split(key)
        d1, d2 = config.student
        return diverse_init(of_module, init_mlp(of_student, widths), committee, d1=d1, d2=d2, hidden=64)

    def loss_fn(params: Any, batch: Any, key: jax.Array, committee: Committee) -> tuple[jax.Array, jax.Array]:
        del key
        batch, skip = batch
        value, _ = diverse_loss(params, student_apply, committee, batch, config.terms, skip=skip.all())
        return value * len(batch.y), jnp.asarray(len(batch.y), jnp.float32)

    def examples(ids: Any) -> Batch:
        return Batch(x=own.pooled[ids], y=own.labels[ids], seen=jax.tree.map(lambda x: x[ids], seen))

    def batch_at(step: int) -> Any:
        ids = np.random.default_rng((config.seed, step)).integers(0, len(own.labels), config.batch)
        return examples(ids), np.full(config.batch, 0 < config.skip_after <= step)

    @jax.jit
    def kept_share(params: Any, committee: Committee) -> jax.Array:
        everyone = examples(slice(None))
        return diverse_loss(params, student_apply, committee, everyone, config.terms, skip=True)[1].kept_share

    def evaluate(params: Any, committee: Committee) -> dict[str, float]:
        kept = kept_share(params, committee) if config.skip_after else 1.0
        return {"accuracy": float(accuracy(strip(params), heldout.pooled, heldout.labels)), "kept": float(kept)}

    slower = optax.masked(optax.scale(config.module_rate), {"student": False, "module": True})
    optimizer = optax.chain(make_optimizer(config), slower)
    state = fit(
        loss_fn,
        init,
        batch_at,
        config,
        config.out,
        resume=config.resume,
        evaluate=evaluate,
        frozen=committee,
        optimizer=optimizer,
    )
    if int(state.step) < config.steps:
        print(f"stopped at step {int(state.step)} of {config.steps}; go on with --resume")
        return None
    figures = evaluate(state.params, committee)
    for name, view, teacher in zip(views, views.values(), teachers, strict=True):
        figures[name] = float(accuracy(teacher.params, getattr(heldout, view), heldout.labels))
    described = {"model_type": "mlp", "widths": list(widths), "pool": config.pool}
    card = (
        f"# A student of a committee\n\nAccuracy on {len(heldout.labels)} held-out images: {figures['accuracy']:.4f}; "
        f"foundation teacher {figures['foundation']:.4f}, complementary teacher {figures['complementary']:.4f}.\n"
    )
    student = strip(to_host(state.params))
    if is_main():
        save_checkpoint(config.out / "model", student, config=described, card=card, overwrite=True)
    return figures
