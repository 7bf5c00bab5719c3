"""Merges two vision models into one backbone: one masks what is clicked, one knows classes by name (SAM-CLIP).

On synthetic scenes. Both models are trained first, each on images of its own: the segmenter on scenes of several
objects, the classifier on images of one, against fixed vectors that stand for texts. Then a new head is put on the
segmenter's encoder and trained alone, and in the last stage all is, with a few scenes replayed. What is saved masks
clicks, names images, and masks what is named.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.data.scenes import SHAPES, Scenes, clicks, make_scenes
from effjax.distill import (
    apply_text_head,
    in_turn,
    init_text_head,
    mask_loss,
    text_head_loss,
    text_segment,
)
from effjax.errors import ConfigError
from effjax.io.checkpoint import save_checkpoint
from effjax.models.promptable import apply_promptable, init_promptable
from effjax.models.transformer import unit
from effjax.models.vit import Pooling, ViT, apply_vit, init_vit
from train.command import same_settings
from train.config import LoopConfig
from train.finetune import PASSING
from train.processes import is_main
from train.stages import in_parts, stage

Params = dict[str, Any]
SCALE = 10.0  # of the classifier's cosines while it is trained
KEPT_CLICKS = 8  # at each replayed scene, of which a step takes some


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamClipConfig(LoopConfig):
    """The scenes, the networks, the four stages and the loop.

    Attributes:
        experiment: "sam_clip".
        out: folder for the runs of all stages, and the finished `model/`.
        resume: go on from the newest checkpoints in `out`.
        size: side of the images.
        patch, width, layers, heads: of the encoders.
        text_layers: blocks of the classifier's head on the merged backbone.
        dim: of the space of texts.
        scenes: images of several objects, for the segmenter.
        singles: images of one, for the classifier.
        heldout: images of either kind that are judged on, and as many to choose the threshold of the ground.
        replay: share of the scenes that the last stage sees.
        batch: images of the classifier's kind a step.
        replay_batch: scenes a step, also of the segmenter's own training.
        clicks: at each of them.
        base_steps, base_rate: of the segmenter.
        aux_steps, aux_rate: of the classifier.
        probe_steps, probe_rate: of the head alone.
        steps, learning_rate: of the last stage.
        lam: weight of the masks in it.
        old_rate: learning rate of encoder and mask head in it, over that of the new head.
        pooling: of the new head's patches.
    """

    out: Path
    experiment: Literal["sam_clip"] = "sam_clip"
    resume: bool = False
    size: int = 24
    patch: int = 4
    width: int = 48
    layers: int = 2
    heads: int = 2
    text_layers: int = 1
    dim: int = 32
    scenes: int = 8000
    singles: int = 4000
    heldout: int = 500
    replay: float = 0.05
    batch: int = 64
    replay_batch: int = 32
    clicks: int = 2
    base_steps: int = 1200
    base_rate: float = 2e-3
    aux_steps: int = 600
    aux_rate: float = 2e-3
    probe_steps: int = 100
    probe_rate: float = 2e-3
    steps: int = 340
    learning_rate: float = 1e-3
    lam: float = 10.0
    old_rate: float = 0.1
    pooling: Pooling = "max"
    warmup: int = 20
    weight_decay: float = 1e-2
    eval_every: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.replay <= 1 or self.lam < 0 or self.old_rate < 0:
            raise ConfigError(
                f"replay={self.replay}, lam={self.lam}, old_rate={self.old_rate}: replay is from 0 to 1, and nothing "
                "is negative"
            )
        if not 1 <= self.clicks <= KEPT_CLICKS:
            raise ConfigError(f"clicks={self.clicks}: must be from 1 to {KEPT_CLICKS}")
        _ = self.vit

    @property
    def vit(self) -> ViT:
        """Sizes of the encoders."""
        names = ("patch", "width", "layers", "heads")
        return ViT(size=(self.size, self.size), stem=True, **{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Images of both models, what is judged on, and what the classes are called.

    Attributes:
        scenes, singles: to train on.
        judged, judged_singles: held out.
        chosen: held out too, to choose thresholds on.
        texts: a vector of length 1 for each shape.
    """

    scenes: Scenes
    singles: Scenes
    judged: Scenes
    judged_singles: Scenes
    chosen: Scenes
    texts: np.ndarray


def make_data(config: SamClipConfig) -> Data:
    """All of a run's images; those held out are of other seeds."""
    seeds, size = np.random.SeedSequence(config.seed).generate_state(6), config.size
    texts = np.random.default_rng(seeds[5]).normal(size=(len(SHAPES), config.dim)).astype(np.float32)
    return Data(
        scenes=make_scenes(int(seeds[0]), config.scenes, size=size),
        singles=make_scenes(int(seeds[1]), config.singles, size=size, objects=(1, 1)),
        judged=make_scenes(int(seeds[2]), config.heldout, size=size),
        judged_singles=make_scenes(int(seeds[3]), config.heldout, size=size, objects=(1, 1)),
        chosen=make_scenes(int(seeds[4]), config.heldout, size=size),
        texts=texts / np.linalg.norm(texts, axis=1, keepdims=True),
    )


def train_base(config: SamClipConfig, data: Data) -> Params | None:
    """The segmenter, on true masks."""

    def batch_at(step: int) -> Any:
        rng = np.random.default_rng((config.seed, 1, step))
        scenes = data.scenes[rng.integers(0, config.scenes, config.replay_batch)]
        points, masks = clicks(scenes, rng, config.clicks)
        return scenes.images, points, masks.astype(np.float32)

    def loss(params: Any, batch: Any) -> Any:
        return mask_loss(config.vit, params, batch), {}

    steps = {"steps": config.base_steps, "rate": config.base_rate}
    return stage(config, config.out / "base", loss, lambda key: init_promptable(key, config.vit), batch_at, **steps)


def init_classifier(config: SamClipConfig, key: jax.Array) -> Params:
    """An encoder with a head that has no blocks of its own."""
    of_encoder, of_head = jax.random.split(key)
    encoder = init_vit(of_encoder, config.vit)
    return {
        "encoder": encoder,
        "text_head": init_text_head(of_head, encoder, config.vit, dim=config.dim, layers=0),
    }


def embed(config: SamClipConfig, params: Params, images: jax.Array, pooling: Pooling) -> jax.Array:
    """Embeddings of images in the space of texts."""
    return apply_text_head(
        config.vit, params["text_head"], apply_vit(config.vit, params["encoder"], images), pooling=pooling
    )


def train_aux(config: SamClipConfig, data: Data) -> Params | None:
    """The classifier, contrastively against the vectors of the classes, with means of patches as CLIP's kind has it."""
    texts = jnp.asarray(data.texts)

    def batch_at(step: int) -> Any:
        ids = np.random.default_rng((config.seed, 2, step)).integers(0, config.singles, config.batch)
        return data.singles.images[ids], data.singles.shapes[ids, 0]

    def loss(params: Any, batch: Any) -> Any:
        logits = SCALE * embed(config, params, batch[0], "mean") @ texts.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), {}

    steps = {"steps": config.aux_steps, "rate": config.aux_rate}
    return stage(config, config.out / "aux", loss, partial(init_classifier, config), batch_at, **steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """What both models say of the images that the merged one learns from; it sees no label and no true mask.

    Attributes:
        images, embeddings: of the classifier.
        scenes, points, masks: of the segmenter, `KEPT_CLICKS` clicks at each scene; masks are probabilities.
    """

    images: np.ndarray
    embeddings: np.ndarray
    scenes: np.ndarray
    points: np.ndarray
    masks: np.ndarray


def ask_teachers(config: SamClipConfig, data: Data, base: Params, aux: Params) -> Targets:
    """Runs both models once."""
    replayed = data.scenes[: max(1, round(config.replay * config.scenes))]
    points, _ = clicks(replayed, np.random.default_rng((config.seed, 3)), KEPT_CLICKS)
    mask = jax.jit(lambda x, at: jax.nn.sigmoid(apply_promptable(config.vit, base, x, at)))
    return Targets(
        images=data.singles.images,
        embeddings=in_parts(jax.jit(lambda x: embed(config, aux, x, "mean")), data.singles.images),
        scenes=replayed.images,
        points=points,
        masks=in_parts(mask, replayed.images, points),
    )


def with_head(config: SamClipConfig, base: Params, key: jax.Array) -> Params:
    """The segmenter, and a new head on its encoder."""
    head = init_text_head(key, base["encoder"], config.vit, dim=config.dim, layers=config.text_layers)
    return base | {"text_head": head}


def probe(config: SamClipConfig, out: Path, params: Params, targets: Targets) -> Params | None:
    """Trains the new head alone."""

    def batch_at(step: int) -> Any:
        ids = np.random.default_rng((config.seed, 4, step)).integers(0, len(targets.images), config.batch)
        return targets.images[ids], targets.embeddings[ids]

    def loss(params: Any, batch: Any) -> Any:
        return text_head_loss(config.vit, params, batch, probe=True, pooling=config.pooling), {}

    rates = dict.fromkeys(params, 0.0) | {"text_head": 1.0}
    return stage(config, out, loss, params, batch_at, steps=config.probe_steps, rate=config.probe_rate, rates=rates)


def merge(
    config: SamClipConfig,
    out: Path,
    params: Params,
    targets: Targets,
    *,
    rates: Mapping[str, float] | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
) -> Params | None:
    """Trains on both models' outputs; with `lam=0` on the classifier's alone.

    Args:
        config: the weight of the masks, and the rate of what is not new.
        out: folder of this run.
        params: from `probe`.
        targets: from `ask_teachers`.
        rates: None for `old_rate` of encoder and mask head, and prompts that stay.
        evaluate: `params -> figures`.
    """

    def batch_at(step: int) -> Any:
        rng = np.random.default_rng((config.seed, 5, step))
        ids = rng.integers(0, len(targets.images), config.batch)
        rows = rng.integers(0, len(targets.scenes), config.replay_batch)
        at = rng.integers(0, KEPT_CLICKS, (config.replay_batch, config.clicks))
        replayed = targets.scenes[rows], targets.points[rows[:, None], at], targets.masks[rows[:, None], at]
        return (targets.images[ids], targets.embeddings[ids]), replayed

    both = in_turn(
        (partial(text_head_loss, config.vit, pooling=config.pooling), 1.0), (partial(mask_loss, config.vit), config.lam)
    )

    def loss(params: Any, batch: Any) -> Any:
        if not config.lam:
            value = text_head_loss(config.vit, params, batch[0], pooling=config.pooling)
            return value, {"text": value}
        value, (text, mask) = both(params, batch)
        return value, {"text": text, "mask": mask}

    usual = {"encoder": config.old_rate, "mask_head": config.old_rate, "text_head": 1.0, "prompt": 0.0}
    return stage(
        config,
        out,
        loss,
        params,
        batch_at,
        steps=config.steps,
        rate=config.learning_rate,
        rates=usual if rates is None else rates,
        evaluate=evaluate,
    )


def mask_iou(config: SamClipConfig, data: Data) -> Callable[[Params], float]:
    """Mean intersection over union of the masks of clicks, one at each held-out scene."""
    points, masks = clicks(data.judged, np.random.default_rng((config.seed, 6)))
    scores = jax.jit(partial(apply_promptable, config.vit))

    def judge(params: Params) -> float:
        found = in_parts(lambda x, at: scores(params, x, at), data.judged.images, points)[:, 0] > 0
        true = masks[:, 0]
        return float(((found & true).sum((1, 2)) / (found | true).sum((1, 2))).mean())

    return judge


def class_accuracy(config: SamClipConfig, data: Data, pooling: Pooling) -> Callable[[Params], float]:
    """Share of held-out images of one object whose class is named right."""
    found = jax.jit(lambda params, x: (embed(config, params, x, pooling) @ jnp.asarray(data.texts).T).argmax(-1))

    def judge(params: Params) -> float:
        named = in_parts(lambda x: found(params, x), data.judged_singles.images)
        return float((named == data.judged_singles.shapes[:, 0]).mean())

    return judge


def text_iou(config: SamClipConfig, data: Data) -> Callable[[Params], float]:
    """Mean over classes, the ground among them, of intersection over union of masks from texts on held-out scenes.

    A pixel is ground where no cosine exceeds a threshold, as is usual; it is chosen on scenes that are not judged.
    """
    texts = jnp.asarray(data.texts)
    cosines = jax.jit(lambda params, x: text_segment(config.vit, params["encoder"], params["text_head"], x, texts))

    def iou(found: np.ndarray, threshold: float, true: np.ndarray) -> float:
        named = np.where(found.max(-1) > threshold, 1 + found.argmax(-1), 0)
        count = np.bincount((true.astype(int) * (len(SHAPES) + 1) + named).ravel(), minlength=(len(SHAPES) + 1) ** 2)
        table = count.reshape(len(SHAPES) + 1, -1)
        return float((np.diag(table) / np.maximum(table.sum(0) + table.sum(1) - np.diag(table), 1)).mean())

    def judge(params: Params) -> float:
        chosen, judged = (in_parts(lambda x: cosines(params, x), s.images) for s in (data.chosen, data.judged))
        best = max(np.arange(-0.2, 1.0, 0.05), key=lambda t: iou(chosen, t, data.chosen.classes))
        return iou(judged, best, data.judged.classes)

    return judge


def distill(config: SamClipConfig) -> dict[str, float] | None:
    """Trains both models, merges them and writes `config.out / "model"`.

    Returns:
        Of the merged model and of the two: intersection over union of clicked masks, accuracy of names, intersection
        over union of masks from names. None when the run was stopped before its last step.
    """
    same_settings(config, PASSING)
    data = make_data(config)
    base = train_base(config, data)
    aux = None if base is None else train_aux(config, data)
    if base is None or aux is None:
        return None
    targets = ask_teachers(config, data, base, aux)
    params = probe(config, config.out / "probe", with_head(config, base, jax.random.key(config.seed)), targets)
    if params is None:
        return None
    masks, texts = mask_iou(config, data), text_iou(config, data)
    names = class_accuracy(config, data, config.pooling)

    def evaluate(params: Any) -> dict[str, float]:
        return {"mask_iou": masks(params), "accuracy": names(params)}

    params = merge(config, config.out, params, targets, evaluate=evaluate)
    if params is None:
        return None
    figures = evaluate(params) | {
        "text_iou": texts(params),
        "segmenter mask_iou": masks(base),
        "classifier accuracy": class_accuracy(config, data, "mean")(aux),
        "classifier text_iou": text_iou(config, data)(aux),
    }
    described = {"model_type": "sam_clip", "vit": dataclasses.asdict(config.vit), "shapes": list(SHAPES)}
    card = "# A segmenter that knows names\n\n" + "".join(f"- {name}: {x:.4f}\n" for name, x in figures.items())
    if is_main():
        whole = params | {"texts": np.asarray(unit(jnp.asarray(data.texts)))}
        save_checkpoint(config.out / "model", whole, config=described, card=card, overwrite=True)
    return figures
