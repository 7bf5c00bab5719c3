"""CLIPTeX: contrastive training of images and texts that goes on with labels of task experts beside it.

Salehi et al., CLIP meets Model Zoo Experts: Pseudo-Supervision for Visual Enhancement (2023). Every expert has a light
head on the patches of the image tower, which is thrown away at the end. The experts' labels were made before
(`effjax.distill.pseudo_labels`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from effjax.distill.contrastive import symmetric_contrastive_loss
from effjax.distill.merge import cosine_loss
from effjax.distill.pseudo_labels import IGNORE, Kind, Labels
from effjax.errors import ConfigError
from effjax.models.clip import Clip, encode_image, encode_text, scale
from effjax.models.transformer import dense, init_dense

Params = dict[str, Any]


def class_loss(
    logits: Float[Array, "batch *places classes"], labels: Int[Array, "batch *places"]
) -> Float[Array, "batch"]:
    """Cross entropy, the mean over places whose label is not `IGNORE`; 0, and no gradient, where there is none.

    Example:
        >>> labels = jnp.array([[0, 255], [255, 255]])
        >>> [round(float(x), 4) for x in class_loss(jnp.zeros((2, 2, 4)), labels)]  # ln 4
        [1.3863, 0.0]
    """
    known = labels != IGNORE
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.where(known, labels, 0))
    places = tuple(range(1, labels.ndim))
    return jnp.where(known, losses, 0).sum(places) / jnp.maximum(known.sum(places), 1)


def depth_loss(found: Float[Array, "batch *places"], labels: Float[Array, "batch *places"]) -> Float[Array, "batch"]:
    """Mean distance of the two depths after each was shifted to median 0 and scaled to mean size 1.

    So it asks only which is nearer and by what share (Ranftl et al., Towards Robust Monocular Depth Estimation, 2020,
    equations 5 and 6, without trimming).

    Example:
        >>> labels = jnp.array([[0.0, 0.3, 1.0]])
        >>> round(float(depth_loss(5 * labels - 2, labels)[0]), 4), bool(depth_loss(-labels, labels)[0] > 1)
        (0.0, True)
    """

    def aligned(x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1).astype(jnp.float32)
        x = x - jnp.median(x, axis=1, keepdims=True)
        return x / jnp.maximum(jnp.abs(x).mean(1, keepdims=True), 1e-3)

    return jnp.abs(aligned(found) - aligned(labels)).mean(1)


def normal_loss(
    found: Float[Array, "batch *places 3"], labels: Float[Array, "batch *places 3"]
) -> Float[Array, "batch"]:
    """Mean of `1 - cos` of the angle between the two directions."""
    distance = cosine_loss(labels, found)
    return distance.reshape(len(distance), -1).mean(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """An expert's labels as a task beside the contrastive one.

    Attributes:
        name: of the labels.
        head_init: `key -> params`.
        head_apply: `(params, patches [batch, rows, columns, width]) -> found`.
        loss: `(found, labels) -> [batch]`.
        weight: of the loss; at 0 the task is left out.
    """

    name: str
    head_init: Callable[[jax.Array], Any]
    head_apply: Callable[[Any, jax.Array], jax.Array]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ConfigError(f"{self.name}: weight={self.weight}: must be at least 0")


def linear_task(name: str, kind: Kind, width: int, *, classes: int = 0, weight: float = 1.0) -> TaskSpec:
    """A task whose head is one linear layer at every patch: the encoder has to learn the rest.

    Args:
        name: of the labels.
        kind: of the labels.
        width: of the patches' features.
        classes: for that kind.
        weight: of the loss.

    Raises:
        ConfigError: classes without a number of them.

    Example:
        >>> task = linear_task("things", "classes", 8, classes=5)
        >>> head = task.head_init(jax.random.key(0))
        >>> task.head_apply(head, jnp.ones((2, 3, 3, 8))).shape
        (2, 3, 3, 5)
    """
    if kind == "classes" and classes < 1:
        raise ConfigError(f"{name}: classes={classes}: say how many the expert tells apart")
    outputs = {"classes": classes, "depth": 1, "normals": 3}[kind]

    def head_apply(head: Any, patches: jax.Array) -> jax.Array:
        found = dense(head, patches)
        return found[..., 0] if kind == "depth" else found

    return TaskSpec(
        name=name,
        head_init=lambda key: init_dense(key, width, outputs),
        head_apply=head_apply,
        loss={"classes": class_loss, "depth": depth_loss, "normals": normal_loss}[kind],
        weight=weight,
    )


def init_heads(key: jax.Array, clip: Params, tasks: Sequence[TaskSpec]) -> Params:
    """The parameters to train: "clip" as it is, and "heads" of the tasks."""
    keys = jax.random.split(key, max(1, len(tasks)))
    return {"clip": clip, "heads": {task.name: task.head_init(k) for task, k in zip(tasks, keys, strict=False)}}


def strip_heads(params: Params) -> Params:
    """What is served: both towers, without the heads."""
    return params["clip"]


def cliptex_losses(config: Clip, params: Params, batch: Any, tasks: Sequence[TaskSpec]) -> dict[str, jax.Array]:
    """Each loss's mean over the batch.

    Args:
        config: of both towers.
        params: from `init_heads`.
        batch: images, texts `[batch, length]`, and labels by name, of the grid of patches.
        tasks: those of weight 0 are left out.

    Returns:
        "contrastive" and the names of the tasks.

    Raises:
        ConfigError: labels of another grid than the patches, or none for a task.
    """
    images, words, labels = batch
    u, patches = encode_image(config, params["clip"], images)
    v = encode_text(config, params["clip"], words)
    losses = {"contrastive": symmetric_contrastive_loss(u, v, scale=scale(params["clip"])).mean()}
    for task in tasks:
        if task.weight == 0:
            continue
        if task.name not in labels or labels[task.name].shape[1:3] != patches.shape[1:3]:
            given = list(labels[task.name].shape) if task.name in labels else "nothing"
            raise ConfigError(
                f"labels of {task.name!r}: {given} for patches {list(patches.shape)}: store labels at the grid of the "
                "patches"
            )
        losses[task.name] = task.loss(task.head_apply(params["heads"][task.name], patches), labels[task.name]).mean()
    return losses


def weighted_sum(losses: Mapping[str, jax.Array], tasks: Sequence[TaskSpec]) -> jax.Array:
    """The contrastive loss, and those of the tasks by their weights."""
    total = losses["contrastive"]
    for task in tasks:
        if task.weight:
            total = total + task.weight * losses[task.name]
    return total


def balanced(tasks: Sequence[TaskSpec], losses: Mapping[str, float]) -> tuple[TaskSpec, ...]:
    """Tasks whose losses weigh as much as the contrastive one, times the weights they had.

    Args:
        tasks: whose weight is a factor.
        losses: as measured in the first steps; then the weights stay.

    Example:
        >>> task = linear_task("depth", "depth", 8, weight=0.5)
        >>> [task.weight for task in balanced([task], {"contrastive": 3.0, "depth": 1.5})]
        [1.0]
    """
    shared = losses["contrastive"]
    return tuple(
        dataclasses.replace(task, weight=task.weight * shared / max(losses[task.name], 1e-9)) if task.weight else task
        for task in tasks
    )


def flip(
    images: Float[np.ndarray, "batch height width channels"],
    labels: Labels,
    kinds: Mapping[str, Kind],
    which: Bool[np.ndarray, "batch"],
) -> tuple[np.ndarray, Labels]:
    """Mirrors some images left to right, and their labels with them; normals then point to the other side.

    Texts that say left or right have to be changed by who knows the language.

    Args:
        images: not changed in place.
        labels: of them.
        kinds: of the labels.
        which: images to mirror.

    Example:
        >>> normals = np.array([[[[0.6, 0.0, 0.8], [0.0, 0.0, 1.0]]]])
        >>> images, labels = flip(np.zeros((1, 2, 4, 1)), {"n": normals}, {"n": "normals"}, np.array([True]))
        >>> (labels["n"] + 0.0).tolist()
        [[[[0.0, 0.0, 1.0], [-0.6, 0.0, 0.8]]]]
    """

    def mirrored(x: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[which] = x[which][:, :, ::-1]
        return x

    turned = {name: mirrored(x) for name, x in labels.items()}
    for name, kind in kinds.items():
        if kind == "normals" and name in turned:
            turned[name][which, ..., 0] *= -1
    return mirrored(images), turned
