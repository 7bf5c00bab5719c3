"""Distils a small network on images from a committee: one teacher sees the whole image, one what the student sees.

The student sees the image pooled. Both teachers are trained first, on all training images; the student has the labels
of some of them, and asks the teachers (`effjax.distill.diverse_loss`). The module that asks is not saved.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from effjax.distill import Batch, Committee, Teacher, apply_mlp, halves, init_mlp
from effjax.errors import ConfigError
from effjax.io.checkpoint import save_checkpoint
from train.ask import AskConfig, Student, train_student, train_teacher
from train.command import same_settings
from train.finetune import PASSING
from train.images import pooled, read_labelled
from train.processes import is_main

LO, HI = halves(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiverseConfig(AskConfig):
    """The images and the networks.

    Attributes:
        experiment: "diverse".
        data: .npz with `images [n, height, width]` and integer `labels [n]`, a directory that holds images/mnist, or
            None for the digits of scikit-learn.
        pool: side of the squares of pixels whose mean the student sees.
        foundation: hidden widths of the teacher that sees the image.
        complementary: hidden widths of the teacher that sees what the student sees.
        student: its hidden widths.
        heldout: share of the images that is judged on.
        labelled: share of the other images whose labels the student has.
    """

    experiment: Literal["diverse"] = "diverse"
    data: Path | None = None
    pool: int = 2
    foundation: tuple[int, int] = (256, 128)
    complementary: tuple[int, int] = (96, 64)
    student: tuple[int, int] = (10, 10)
    heldout: float = 0.4
    labelled: float = 0.3

    def __post_init__(self):
        super().__post_init__()
        for name in ("heldout", "labelled"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be between 0 and 1")


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


def distill(config: DiverseConfig) -> dict[str, float] | None:
    """Trains teachers and student and writes `config.out / "model"`.

    Returns:
        Held-out accuracies, and the share of passes through teachers that are kept; or None when the run was stopped
        before its last step.
    """
    train, heldout = read_images(config)
    same_settings(config, PASSING, data="digits" if config.data is None else config.data.name)
    labels = int(max(train.labels.max(), heldout.labels.max())) + 1

    def drawn(step: int, count: int) -> np.ndarray:
        return np.random.default_rng((config.seed, step)).integers(0, count, config.batch)

    views = {"foundation": "whole", "complementary": "pooled"}
    teachers = []
    for name, view in views.items():
        x = getattr(train, view)
        widths = (x.shape[1], *getattr(config, name), labels)

        def batch_at(step: int, x: np.ndarray = x) -> Any:
            ids = drawn(step, len(x))
            return x[ids], train.labels[ids]

        params = train_teacher(config, name, partial(init_mlp, widths=widths), apply_mlp, batch_at)
        if params is None:
            return None
        teachers.append(Teacher(params=params, apply_lo=LO, apply_hi=HI, split_dim=widths[1], out_dim=widths[2]))
    committee = Committee(teachers=tuple(teachers))
    own = train[: max(1, round(config.labelled * len(train.labels)))]
    seen = jax.tree.map(
        np.asarray, committee.observe(tuple(jnp.asarray(getattr(own, view)) for view in views.values()))
    )
    widths = (own.pooled.shape[1], *config.student, labels)

    def examples(ids: Any) -> Batch:
        return Batch(x=own.pooled[ids], y=own.labels[ids], seen=jax.tree.map(lambda x: x[ids], seen))

    found = train_student(
        config,
        committee,
        Student(init=partial(init_mlp, widths=widths), apply=student_apply, d1=widths[1], d2=widths[2]),
        lambda step: examples(drawn(step, len(own.labels))),
        examples(slice(None)),
        lambda params: {"accuracy": float(accuracy(params, heldout.pooled, heldout.labels))},
    )
    if found is None:
        return None
    student, figures = found
    for name, view, teacher in zip(views, views.values(), teachers, strict=True):
        figures[name] = float(accuracy(teacher.params, getattr(heldout, view), heldout.labels))
    described = {"model_type": "mlp", "widths": list(widths), "pool": config.pool}
    card = (
        f"# A student of a committee\n\nAccuracy on {len(heldout.labels)} held-out images: {figures['accuracy']:.4f}; "
        f"foundation teacher {figures['foundation']:.4f}, complementary teacher {figures['complementary']:.4f}.\n"
    )
    if is_main():
        save_checkpoint(config.out / "model", student, config=described, card=card, overwrite=True)
    return figures
