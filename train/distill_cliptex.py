"""Goes on training CLIP with the labels that task experts gave to its images (CLIPTeX).

On synthetic scenes with captions. Small experts of classes, depth and normals are trained on a few labelled scenes, and
label all others once, into a store on disk. CLIP is trained on images and captions alone, and then goes on with one
light head an expert beside. What is saved is CLIP, without the heads. Probes on frozen patches judge it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.data.scenes import LENGTH, SHAPES, WORDS, Scenes, edges, make_scenes
from effjax.distill import (
    Expert,
    LabelStore,
    TaskSpec,
    balanced,
    class_loss,
    cliptex_losses,
    depth_loss,
    flip,
    init_heads,
    linear_task,
    normal_loss,
    strip_heads,
    symmetric_contrastive_loss,
    weighted_sum,
    write_labels,
)
from effjax.errors import ConfigError
from effjax.io.checkpoint import save_checkpoint
from effjax.models.clip import Clip, encode_image, encode_text, init_clip, scale
from effjax.models.unet import apply_unet, init_unet
from effjax.models.vit import ViT
from train.command import same_settings
from train.config import LoopConfig
from train.finetune import PASSING
from train.processes import is_main
from train.stages import in_parts, stage

Params = dict[str, Any]
Name = Literal["classes", "depth", "normals"]
CLASSES = len(SHAPES) + 1
OUTPUTS: dict[Name, int] = {"classes": CLASSES, "depth": 1, "normals": 3}
BALANCED_OVER = 8  # batches, before the first step
LEFT, RIGHT = WORDS.index("left"), WORDS.index("right")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTexConfig(LoopConfig):
    """The scenes, the networks, the stages and the loop.

    Attributes:
        experiment: "cliptex".
        out: folder for the runs of all stages, the labels, and the finished `model/`.
        resume: go on from the newest checkpoints in `out`.
        size: side of the images.
        patch, width, layers, heads: of the image tower; labels are kept a patch.
        text_width, text_layers: of the text tower, with as many heads.
        dim: of the space that both meet in.
        scenes: images with captions.
        labelled: of them, that the experts learn from.
        heldout: images to judge on, and as many for the probes to learn from.
        experts: whose labels are used; none continues CLIP as it is.
        batch: pairs a step.
        expert_batch, expert_steps, expert_rate: of the experts' own training.
        clip_steps, clip_rate: of CLIP before.
        steps, learning_rate: of what goes on from it.
        task_weight: of every expert's loss, over that of the contrastive one when it begins.
        probe_steps: of each probe.
    """

    out: Path
    experiment: Literal["cliptex"] = "cliptex"
    resume: bool = False
    size: int = 24
    patch: int = 4
    width: int = 48
    layers: int = 2
    heads: int = 2
    text_width: int = 32
    text_layers: int = 1
    dim: int = 32
    scenes: int = 8000
    labelled: int = 800
    heldout: int = 500
    experts: tuple[Name, ...] = ("classes", "depth", "normals")
    batch: int = 64
    expert_batch: int = 32
    expert_steps: int = 1000
    expert_rate: float = 4e-3
    clip_steps: int = 800
    clip_rate: float = 2e-3
    steps: int = 400
    learning_rate: float = 1e-3
    task_weight: float = 1.0
    probe_steps: int = 300
    warmup: int = 20
    weight_decay: float = 1e-2
    eval_every: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.labelled <= self.scenes:
            raise ConfigError(f"labelled={self.labelled}: must be from 1 to scenes={self.scenes}")
        if len(set(self.experts)) < len(self.experts) or self.task_weight < 0:
            raise ConfigError(
                f"experts={self.experts}, task_weight={self.task_weight}: each at most once, and no less than 0"
            )
        _ = self.clip_sizes

    @property
    def clip_sizes(self) -> Clip:
        """Sizes of both towers."""
        names = ("patch", "width", "layers", "heads")
        sizes: Any = {name: getattr(self, name) for name in names}
        vit = ViT(size=(self.size, self.size), stem=True, **sizes)
        return Clip(
            image=vit,
            vocab=len(WORDS),
            length=LENGTH,
            width=self.text_width,
            layers=self.text_layers,
            heads=self.heads,
            dim=self.dim,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Scenes to train on (the first are labelled), for the probes to learn from, and to judge on."""

    scenes: Scenes
    probed: Scenes
    judged: Scenes
    judged_singles: Scenes


def make_data(config: ClipTexConfig) -> Data:
    """All of a run's scenes, each kind from a seed of its own."""
    seeds, size = np.random.SeedSequence((config.seed, 7)).generate_state(4), config.size
    return Data(
        scenes=make_scenes(int(seeds[0]), config.scenes, size=size),
        probed=make_scenes(int(seeds[1]), 2 * config.heldout, size=size),
        judged=make_scenes(int(seeds[2]), config.heldout, size=size),
        judged_singles=make_scenes(int(seeds[3]), config.heldout, size=size, objects=(1, 1)),
    )


def train_expert(config: ClipTexConfig, data: Data, kind: Name) -> Expert | None:
    """A small U-Net on the labelled scenes."""
    labelled = data.scenes[: config.labelled]
    truth = {"classes": labelled.classes.astype(np.int32), "depth": labelled.depth, "normals": labelled.normals}[kind]
    loss_of = {"classes": class_loss, "depth": depth_loss, "normals": normal_loss}[kind]

    def apply(params: Any, images: jax.Array) -> jax.Array:
        found = apply_unet(params, images)
        return found[..., 0] if kind == "depth" else found

    def batch_at(step: int) -> Any:
        ids = np.random.default_rng((config.seed, 8, step)).integers(0, config.labelled, config.expert_batch)
        return labelled.images[ids], truth[ids]

    params = stage(
        config,
        config.out / "experts" / kind,
        lambda params, batch: (loss_of(apply(params, batch[0]), batch[1]).mean(), {}),
        lambda key: init_unet(key, 3, OUTPUTS[kind]),
        batch_at,
        steps=config.expert_steps,
        rate=config.expert_rate,
    )
    return None if params is None else Expert(kind=kind, apply=jax.jit(lambda images: apply(params, images)))


def train_clip(config: ClipTexConfig, data: Data) -> Params | None:
    """CLIP on images and captions alone."""
    sizes = config.clip_sizes

    def loss(params: Any, batch: Any) -> Any:
        images, words = batch
        u, v = encode_image(sizes, params, images)[0], encode_text(sizes, params, words)
        return symmetric_contrastive_loss(u, v, scale=scale(params)).mean(), {}

    def batch_at(step: int) -> Any:
        images, words, _ = _batch(config, data, None, (9, step))
        return images, words

    steps = {"steps": config.clip_steps, "rate": config.clip_rate}
    return stage(config, config.out / "clip", loss, lambda key: init_clip(key, sizes), batch_at, **steps)


def _batch(config: ClipTexConfig, data: Data, labels: LabelStore | None, seed: tuple[int, int]) -> Any:
    """Images, captions and labels, half of them mirrored: left is right then, in the captions too."""
    rng = np.random.default_rng((config.seed, *seed))
    ids, which = rng.integers(0, config.scenes, config.batch), rng.random(config.batch) < 0.5
    found = {} if labels is None else labels.rows(ids)
    images, found = flip(data.scenes.images[ids], found, {} if labels is None else labels.kinds, which)
    words = data.scenes.captions[ids]
    turned = np.where(words == LEFT, RIGHT, np.where(words == RIGHT, LEFT, words))
    return images, np.where(which[:, None], turned, words), found


def tasks_of(config: ClipTexConfig) -> tuple[TaskSpec, ...]:
    """A linear head for each expert that is used."""
    return tuple(
        linear_task(name, name, config.width, classes=CLASSES if name == "classes" else 0, weight=config.task_weight)
        for name in config.experts
    )


def go_on(
    config: ClipTexConfig,
    out: Path,
    data: Data,
    clip: Params,
    labels: LabelStore | None,
    *,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
) -> Params | None:
    """Continues CLIP with the experts of the configuration; without any this is CLIP-FT, the baseline of the rest.

    Args:
        config: its `experts` need to be in the store.
        out: folder of this run.
        data: the scenes.
        clip: to go on from.
        labels: None without experts.
        evaluate: `clip params -> figures`.
    """
    sizes, tasks = config.clip_sizes, tasks_of(config)
    params = init_heads(jax.random.key(config.seed), clip, tasks)
    if tasks:
        measure = jax.jit(lambda params, batch: cliptex_losses(sizes, params, batch, tasks))
        found = [measure(params, _batch(config, data, labels, (10, i))) for i in range(BALANCED_OVER)]
        tasks = balanced(tasks, {name: float(np.mean([x[name] for x in found])) for name in found[0]})

    def loss(params: Any, batch: Any) -> Any:
        losses = cliptex_losses(sizes, params, batch, tasks)
        return weighted_sum(losses, tasks), losses

    trained = stage(
        config,
        out,
        loss,
        params,
        lambda step: _batch(config, data, labels if tasks else None, (11, step)),
        steps=config.steps,
        rate=config.learning_rate,
        evaluate=None if evaluate is None else lambda params: evaluate(strip_heads(params)),
    )
    return None if trained is None else strip_heads(trained)


class Judge:
    """Figures of a CLIP on held-out scenes: linear probes on its frozen patches, retrieval and names."""

    def __init__(self, config: ClipTexConfig, data: Data):
        self.config, self.data, sizes = config, data, config.clip_sizes
        self._image = jax.jit(lambda params, images: encode_image(sizes, params, images))
        self._text = jax.jit(lambda params, words: encode_text(sizes, params, words))
        self._truth = {
            name: self._coarse(scenes) for name, scenes in (("probed", data.probed), ("judged", data.judged))
        }

    def __call__(self, params: Params) -> dict[str, float]:
        probed, judged = (self._patches(params, s.images) for s in (self.data.probed, self.data.judged))
        learn, true = self._truth["probed"], self._truth["judged"]
        classes = self._probe(probed, learn["classes"], CLASSES)(judged).argmax(-1)
        edge = jax.nn.softmax(self._probe(probed, learn["edges"], 2)(judged))[..., 1]
        return {
            "class_iou": mean_iou(np.asarray(classes), true["classes"], CLASSES),
            "depth_error": float(np.abs(regressed(probed, learn["depth"], judged) - true["depth"]).mean()),
            "edge_precision": average_precision(np.asarray(edge).ravel(), true["edges"].ravel() == 1),
            **self._zero_shot(params),
        }

    def _coarse(self, scenes: Scenes) -> dict[str, Any]:
        """Four labels a patch, flat: the targets of the probes, at two labels a side."""
        half = self.config.patch // 2

        def squares(x: np.ndarray) -> np.ndarray:
            n, side = len(x), self.config.size // self.config.patch
            return x.reshape(n, side, 2, half, side, 2, half).transpose(0, 1, 4, 2, 5, 3, 6).reshape(n * side**2, 4, -1)

        return {
            "classes": np.asarray(squares(scenes.classes)[..., half // 2 * (half + 1)], np.int32),
            "depth": squares(scenes.depth).mean(-1),
            "edges": squares(edges(scenes.instances)).any(-1).astype(np.int32),
        }

    def _patches(self, params: Params, images: np.ndarray) -> np.ndarray:
        grid = in_parts(lambda x: self._image(params, x)[1], images)
        return grid.reshape(-1, grid.shape[-1])

    def _probe(self, patches: np.ndarray, labels: np.ndarray, classes: int) -> Callable[[np.ndarray], jax.Array]:
        """A linear layer from a frozen patch to four labels."""
        middle, size = patches.mean(0), patches.std(0) + 1e-6
        optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, self.config.probe_steps))

        def logits(params: Any, x: Any) -> jax.Array:
            return ((x - middle) / size @ params["kernel"] + params["bias"]).reshape(*x.shape[:-1], 4, classes)

        def loss(params: Any, x: Any, y: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

        @jax.jit
        def step(params: Any, state: Any, x: Any, y: Any) -> Any:
            updates, state = optimizer.update(jax.grad(loss)(params, x, y), state)
            return optax.apply_updates(params, updates), state

        params = {"kernel": jnp.zeros((patches.shape[1], 4 * classes)), "bias": jnp.zeros(4 * classes)}
        state, rng = optimizer.init(params), np.random.default_rng(self.config.seed)
        for _ in range(self.config.probe_steps):
            ids = rng.integers(0, len(patches), 2048)
            params, state = step(params, state, patches[ids], labels[ids])
        return lambda x: logits(params, x)

    def _zero_shot(self, params: Params) -> dict[str, float]:
        """Names of single objects by the best caption of any colour, and captions found among 100 others."""
        words = {word: i for i, word in enumerate(WORDS)}
        colours = WORDS[words["of"] + 1 : words[SHAPES[0]]]
        captions = np.zeros((len(SHAPES), len(colours), LENGTH), np.int32)
        for i, shape in enumerate(SHAPES):
            for j, colour in enumerate(colours):
                captions[i, j, :3] = words["a"], words[colour], words[shape]
        texts = np.asarray(self._text(params, captions.reshape(-1, LENGTH)))
        texts = texts.reshape(len(SHAPES), len(colours), -1).mean(1)  # an ensemble of prompts a class
        texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
        singles, judged = self.data.judged_singles, self.data.judged
        u = in_parts(lambda x: self._image(params, x)[0], singles.images)
        accuracy = ((u @ texts.T).argmax(-1) == singles.shapes[:, 0]).mean()
        u = in_parts(lambda x: self._image(params, x)[0], judged.images)
        v = in_parts(lambda x: self._text(params, x), judged.captions)
        found = []
        for at in range(0, len(u) - 99, 100):
            cosines = u[at : at + 100] @ v[at : at + 100].T
            found.append((cosines >= np.diag(cosines)[:, None]).sum(1) == 1)
        return {"accuracy": float(accuracy), "retrieval": float(np.mean(found)) if found else float("nan")}


def mean_iou(found: np.ndarray, true: np.ndarray, classes: int) -> float:
    """Mean over classes of intersection over union.

    Example:
        >>> round(mean_iou(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), 2), 4)
        0.5833
    """
    table = np.bincount((true.astype(int) * classes + found).ravel(), minlength=classes**2).reshape(classes, classes)
    hits = np.diag(table)
    return float((hits / np.maximum(table.sum(0) + table.sum(1) - hits, 1)).mean())


def average_precision(scores: np.ndarray, true: np.ndarray) -> float:
    """Mean of the precision at each true one, in the order of the scores.

    Example:
        >>> round(average_precision(np.array([0.9, 0.8, 0.1]), np.array([True, False, True])), 4)
        0.8333
    """
    ordered = true[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(ordered) / np.arange(1, len(ordered) + 1)
    return float(precision[ordered].mean())


def regressed(x: np.ndarray, y: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Predictions for `judged` of a linear regression from `x` to `y`, with a small penalty."""
    x, judged = (np.concatenate([part, np.ones((len(part), 1), part.dtype)], 1) for part in (x, judged))
    square = x.T.astype(np.float64) @ x + 1e-3 * len(x) * np.diag([1.0] * (x.shape[1] - 1) + [0.0])
    return judged @ np.linalg.solve(square, x.T @ y)


def distill(config: ClipTexConfig) -> dict[str, float] | None:
    """Trains experts and CLIP, labels all scenes, goes on with the labels, and writes `config.out / "model"`.

    Returns:
        What probes make of the result and of CLIP before (see `Judge`). None when the run was stopped before its last
        step.
    """
    same_settings(config, PASSING)
    data = make_data(config)
    labels = None
    if config.experts:
        experts = {}
        for kind in config.experts:
            expert = train_expert(config, data, kind)
            if expert is None:
                return None
            experts[kind] = expert
        teacher = f"seed {config.seed}, {config.expert_steps} steps"
        labels = write_labels(config.out / "labels", experts, data.scenes.images, teacher=teacher, factor=config.patch)
    clip = train_clip(config, data)
    if clip is None:
        return None
    judge = Judge(config, data)
    params = go_on(config, config.out, data, clip, labels, evaluate=judge)
    if params is None:
        return None
    figures = judge(params) | {f"before {name}": value for name, value in judge(clip).items()}
    described = {"model_type": "clip", "sizes": dataclasses.asdict(config.clip_sizes), "words": list(WORDS)}
    card = "# CLIP with labels of experts\n\n" + "".join(f"- {name}: {x:.4f}\n" for name, x in figures.items())
    if is_main():
        save_checkpoint(config.out / "model", params, config=described, card=card, overwrite=True)
    return figures
