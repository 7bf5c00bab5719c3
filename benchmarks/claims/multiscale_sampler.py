"""Claims of multi-scale variable batches: a quarter fewer operations at equal accuracy, better calibrated, any scale.

    python -m benchmarks.claims.multiscale_sampler --data DIR [--seeds 0 1 2]

MNIST (DIR/images/mnist), a ResNet-8 with batch norm, base size 20 and 32 images a step, sizes 12 to 28. Arms of as
many epochs each: one size (SSc-FBS), many sizes with one batch (MSc-FBS), many sizes with batches of equal pixels
(MSc-VBS), and a range of sizes that grows for 60 % of the training; and one size for as many operations as MSc-VBS.
The learning rate follows the share of epochs that is done, not the steps, which differ.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, conclude
from benchmarks.mnist import Part, read_mnist
from benchmarks.resnet import STAGES, resnet, resnet_in_training
from effjax.data import MultiScale, Shape, growing_range, relative_cost

SEEDS = (0, 1, 2)
BASE = Shape(20, 20, 32)
LOW, HIGH = 12, 28
TRAIN, TEST, EPOCHS = 4096, 1000, 8
SIZES = (12, 16, 20, 24, 28)
RATE, LAST_RATE, DECAY = 0.03, 1e-4, 5e-4
WIDTHS = (8, 16, 32)
OPTIMIZER = optax.chain(optax.add_decayed_weights(DECAY), optax.trace(decay=0.9))


def sampler(kind: Any) -> MultiScale:
    return MultiScale(
        kind=kind, base=(BASE.height, BASE.width), batch=BASE.batch, low=LOW, high=HIGH, scales=5, divisor=4
    )


@dataclasses.dataclass(frozen=True)
class Arm:
    """How a network is trained: the sampler, whether its range grows, and the share of the epochs."""

    sampler: MultiScale
    grows: bool = False
    share: float = 1.0


ARMS = {
    "SSc-FBS": Arm(sampler("ssc_fbs")),
    "MSc-FBS": Arm(sampler("msc_fbs")),
    "MSc-VBS": Arm(sampler("msc_vbs")),
    "MSc-VBS, curriculum": Arm(sampler("msc_vbs"), grows=True),
    "SSc-FBS, operations of MSc-VBS": Arm(sampler("ssc_fbs"), share=0.765),
}


def plan(arm: Arm, n: int, epochs: int, seed: int) -> list[tuple[float, Any]]:
    """Progress and step, from the first to the last."""
    steps = []
    for epoch in range(epochs):
        bounds = growing_range(epoch / (epochs - 1), LOW, HIGH, until=0.6) if arm.grows else None
        own = list(arm.sampler.epoch(n, epoch, seed=seed, bounds=bounds))
        steps += [((epoch + i / len(own)) / epochs, step) for i, step in enumerate(own)]
    return [(progress / arm.share, step) for progress, step in steps if progress < arm.share]


def init(seed: int) -> Any:
    """A ResNet of one block a stage, as `benchmarks.resnet` reads it."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def conv(n: int, m: int) -> jax.Array:
        return jax.random.normal(next(keys), (3, 3, n, m)) * (2 / (9 * n)) ** 0.5

    def norm(n: int) -> dict[str, jax.Array]:
        return {"scale": jnp.ones(n), "bias": jnp.zeros(n), "mean": jnp.zeros(n), "var": jnp.ones(n)}

    params: dict[str, Any] = {"conv": conv(1, WIDTHS[0]), "norm": norm(WIDTHS[0])}
    before = WIDTHS[0]
    for stage, width in zip(STAGES, WIDTHS, strict=True):
        convs = {"conv_1": conv(before, width), "conv_2": conv(width, width)}
        params[stage] = [convs | {"norm_1": norm(width), "norm_2": norm(width)}]
        before = width
    head = jax.random.normal(next(keys), (before, 10)) * before**-0.5
    return params | {"head": {"kernel": head, "bias": jnp.zeros(10)}}


def gradient(params: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
    """Of the mean loss, and the parameters with running statistics moved on."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits, after = resnet_in_training(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), after

    return jax.grad(loss, has_aux=True)(params)


def resized(images: jax.Array, height: int, width: int) -> jax.Array:
    shape = (len(images), height, width, 1)
    return jax.image.resize(images, shape, "bilinear", antialias=True)


@partial(jax.jit, static_argnums=(2, 3), donate_argnums=(0, 1))
def train_step(params: Any, state: Any, height: int, width: int, images: Any, labels: Any, rate: Any) -> Any:
    grads, after = gradient(params, resized(images, height, width), labels)
    updates, state = OPTIMIZER.update(grads, state, params)

    def moved(path: Any, new: jax.Array, update: jax.Array) -> jax.Array:
        return new if path[-1].key in ("mean", "var") else new - rate * update

    return jax.tree_util.tree_map_with_path(moved, after, updates), state


@cache
def operations(shape: Shape) -> float:
    """Of a step at this shape: forward and backward, as the compiler counts them."""
    params = jax.eval_shape(partial(init, 0))
    images = jax.ShapeDtypeStruct((shape.batch, shape.height, shape.width, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((shape.batch,), jnp.int32)
    found = jax.jit(gradient).lower(params, images, labels).cost_analysis()
    return float(found["flops"])


def batch_of(train: Part, ids: np.ndarray, rng: np.random.Generator) -> Part:
    """Images shifted by up to two pixels, and labels."""
    padded = np.pad(train[0][ids], ((0, 0), (2, 2), (2, 2)))
    at = rng.integers(0, 5, (2, len(ids), 1, 1)) + np.arange(28).reshape(1, 1, -1, 1)
    rows, columns = at[0], at[1].transpose(0, 2, 1)
    return padded[np.arange(len(ids))[:, None, None], rows, columns][..., None], train[1][ids]


@dataclasses.dataclass(frozen=True)
class Run:
    """What an arm cost and reached.

    Attributes:
        operations: of all steps.
        pixels: an image, over those of the base size.
        images: in all steps.
        seconds: of all steps, without compilation.
        accuracy: in percent, by size of the test images.
        shifted: mean accuracy in percent at the base size under noise, blur and low contrast.
        calibration: expected calibration error in percent at the base size.
        largest: pixels of the largest step over those of the base.
    """

    operations: float
    pixels: float
    images: int
    seconds: float
    accuracy: dict[int, float]
    shifted: float
    calibration: float
    largest: float


def train(arm: Arm, data: Part, test: Part, seed: int) -> Run:
    steps = plan(arm, TRAIN, EPOCHS, seed)
    params = init(seed)
    state = OPTIMIZER.init(params)
    for shape in {step.shape for _, step in steps}:  # compiled before the clock runs
        images, labels = batch_of(data, np.zeros(shape.batch, int), np.random.default_rng(0))
        copy = jax.tree.map(jnp.array, (params, state))
        jax.block_until_ready(train_step(*copy, shape.height, shape.width, images, labels, np.float32(0.1)))
    rng, seconds = np.random.default_rng(seed), 0.0
    for progress, step in steps:
        images, labels = batch_of(data, step.ids, rng)
        rate = LAST_RATE + (RATE - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2
        began = time.perf_counter()
        params, state = jax.block_until_ready(
            train_step(params, state, step.shape.height, step.shape.width, images, labels, np.float32(rate))
        )
        seconds += time.perf_counter() - began
    shapes = [step.shape for _, step in steps]
    clean = test[0][..., None]

    def judged(images: np.ndarray, size: int = BASE.height) -> float:
        return correct(probabilities(params, np.asarray(resized(images, size, size))), test[1])

    return Run(
        operations=sum(map(operations, shapes)),
        pixels=relative_cost(shapes, BASE),
        images=sum(shape.batch for shape in shapes),
        seconds=seconds,
        accuracy={size: judged(clean, size) for size in SIZES},
        shifted=statistics.mean(map(judged, shifts(clean))),
        calibration=expected_calibration_error(
            probabilities(params, np.asarray(resized(clean, BASE.height, BASE.width))), test[1]
        ),
        largest=max(shape.pixels for shape in shapes) / BASE.pixels,
    )


@jax.jit
def _probabilities(params: Any, images: jax.Array) -> jax.Array:
    return jax.nn.softmax(resnet(params, images))


def probabilities(params: Any, images: np.ndarray) -> np.ndarray:
    return np.concatenate([_probabilities(params, images[i : i + 500]) for i in range(0, len(images), 500)])


def correct(found: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float((found.argmax(-1) == labels).mean())


def shifts(images: np.ndarray) -> list[np.ndarray]:
    """Noise of 0.1, a blur of one pixel, half the contrast."""
    noisy = images + np.random.default_rng(0).normal(0, 0.1, images.shape).astype(np.float32)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    blurred = sum(padded[:, i : i + 28, j : j + 28] for i in range(3) for j in range(3)) / 9
    return [noisy, np.asarray(blurred, np.float32), images / 2]


def expected_calibration_error(found: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over bins of confidence of equal width, in percent (Guo et al. 2017)."""
    confidence, right = found.max(-1), found.argmax(-1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(right[place == b].mean() - confidence[place == b].mean()) * (place == b).mean() for b in set(place)]
    return 100 * float(sum(gaps))


def show(runs: dict[str, list[Run]]) -> dict[str, Bar]:
    base = runs["SSc-FBS"]
    table = Table(title=f"MNIST, {TRAIN:,} images, {EPOCHS} epochs, mean of {len(base)} seeds; SSc-FBS is 1")
    columns = ("arm", "operations", "time", "largest step", "accuracy at 20", "mean of sizes", "shifted", "ECE, %")
    for column in columns:
        table.add_column(column)
    mean: dict[str, dict[str, float]] = {}
    for arm, found in runs.items():
        ratios = {
            "operations": [r.operations / b.operations for r, b in zip(found, base, strict=True)],
            "time": [r.seconds / b.seconds for r, b in zip(found, base, strict=True)],
            "accuracy": [r.accuracy[BASE.height] for r in found],
            "sizes": [statistics.mean(r.accuracy.values()) for r in found],
            "shifted": [r.shifted for r in found],
            "calibration": [r.calibration for r in found],
        }
        mean[arm] = {name: statistics.mean(values) for name, values in ratios.items()}
        spread = {name: f"{statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for name, v in ratios.items()}
        table.add_row(
            arm,
            spread["operations"],
            spread["time"],
            f"{max(r.largest for r in found):.2f}",
            *list(spread.values())[2:],
        )
    Console(width=200).print(table)
    by_size = {
        arm: {size: round(statistics.mean(r.accuracy[size] for r in found), 2) for size in SIZES}
        for arm, found in runs.items()
    }
    for arm, found in by_size.items():
        print(f"{arm}: accuracy by size {found}")
    vbs, grown, one = mean["MSc-VBS"], mean["MSc-VBS, curriculum"], mean["SSc-FBS"]
    # Operations that the compiler counts, against pixels, the arms' images being of as many epochs.
    counted = [
        (r.operations / b.operations) / (r.pixels * r.images / (b.pixels * b.images))
        for r, b in zip(runs["MSc-VBS"], base, strict=True)
    ]
    plans = [step.shape for epoch in range(50) for step in sampler("msc_vbs").epoch(TRAIN, epoch)]
    expected = relative_cost(sampler("msc_vbs").table(), BASE)
    return {
        "MSc-VBS: operations": Bar(vbs["operations"], high=0.80, paper="0.77"),
        "MSc-VBS: operations over pixels": Bar(statistics.mean(counted), low=0.98, high=1.02),
        "formula over 50 epochs of plans": Bar(relative_cost(plans, BASE) / expected, low=0.98, high=1.02),
        "MSc-VBS: time": Bar(vbs["time"], high=0.90),
        "MSc-VBS: accuracy less SSc-FBS, points": Bar(vbs["accuracy"] - one["accuracy"], low=-0.3, paper="kept"),
        "MSc-VBS: mean of sizes less SSc-FBS, points": Bar(vbs["sizes"] - one["sizes"], low=5),
        "MSc-VBS: ECE less SSc-FBS, points": Bar(vbs["calibration"] - one["calibration"], high=0),
        "curriculum: operations": Bar(grown["operations"], high=0.70, paper="below 0.70"),
        "curriculum: accuracy less SSc-FBS, points": Bar(grown["accuracy"] - one["accuracy"], low=-0.5),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.multiscale_sampler", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory that holds images/mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--arms", nargs="+", default=tuple(ARMS), choices=tuple(ARMS))
    args = parser.parse_args(argv)
    if not (args.data / "images" / "mnist").is_dir():
        print(f"multiscale_sampler: --data {args.data} holds no images/mnist; name the one that does", file=sys.stderr)
        return 2
    (x, y), (tx, ty) = read_mnist(args.data)
    test = tx[:TEST].reshape(-1, 28, 28).astype(np.float32) / 255, ty[:TEST].astype(np.int32)
    runs: dict[str, list[Run]] = {}
    for seed in args.seeds:
        own = np.random.default_rng(seed).permutation(len(x))[:TRAIN]
        data = x[own].reshape(-1, 28, 28).astype(np.float32) / 255, y[own].astype(np.int32)
        for name in args.arms:
            runs.setdefault(name, []).append(train(ARMS[name], data, test, seed))
            last = runs[name][-1]
            print(f"seed {seed}, {name}: {json.dumps(dataclasses.asdict(last))}", file=sys.stderr, flush=True)
    extra = {name: list(map(dataclasses.asdict, found)) for name, found in runs.items()}
    return conclude("multiscale_sampler", show(runs), extra)


if __name__ == "__main__":
    raise SystemExit(main())
