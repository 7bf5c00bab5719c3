"""Claims of the Nadaraya-Watson sketch: losses of unseen examples in constant time, and fewer steps where data repeats.

    python -m benchmarks.claims.nws --data DIR [--seeds 0 1 2 3 4] [--parts estimate toy real]

DIR/images/mnist and, for the part "real", DIR/images/cifar10 (JPEG, read with Pillow). Three parts:

- estimate: the sketch against exact Nadaraya-Watson sums, on the losses of a half-trained network.
- toy: redundant digits. Five classes of 1,900 near-copies each, five of 50 originals; a network 64-64-10, 32 examples a
  step, judged on even classes. Once with the examples seen again and again, once in a single pass over five times as
  many, where a table of old losses knows nothing of what comes; and with a tenth of the labels wrong.
- real: MNIST and CIFAR-10 as they are, in seconds of this machine.

The settings of the sampler were chosen on seed 100.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, conclude
from benchmarks.mnist import read_mnist
from benchmarks.resnet import normalized, read_cifar10
from effjax.data import NWS, ExactLoss, NWSketch, Sampled, Spec, StaleLoss, Uniform, all_losses, sampled_step
from effjax.distill import apply_mlp, init_mlp
from effjax.hashing.lsh import SignProjections, angle, angular_collision
from effjax.models.cnn import apply_cnn, init_cnn

SEEDS = (0, 1, 2, 3, 4)
Part = tuple[np.ndarray, np.ndarray]
Examples = tuple[jax.Array, jax.Array]
EVERY = 10  # steps between two evaluations, and between two full passes of exact losses


# Training -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A network, its examples and how it is trained.

    Attributes:
        init: from a key to parameters.
        apply: from parameters and inputs to logits.
        train, test: inputs and labels.
        features: `float[n, dim]`, what is hashed.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]
    train: Examples
    test: Examples
    features: jax.Array
    optimizer: optax.GradientTransformation
    batch: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Curve:
    """Accuracy in percent after every so many steps, the seconds of training until then, and those of the set-up."""

    steps: list[int]
    accuracy: list[float]
    seconds: list[float]
    setup: float

    def first(self, accuracy: float) -> int | None:
        """The place of the first evaluation that reaches it."""
        return next((i for i, a in enumerate(self.accuracy) if a >= accuracy), None)

    def steps_to(self, accuracy: float) -> float:
        place = self.first(accuracy)
        return float("inf") if place is None else self.steps[place]

    def seconds_to(self, accuracy: float) -> float:
        place = self.first(accuracy)
        return float("inf") if place is None else self.setup + self.seconds[place]


class Trainer:
    """Compiles a sampler's program once for a task, and runs it with many seeds."""

    def __init__(self, task: Task, sampler: Any, every: int = EVERY):
        self.task, self.sampler, self.every = task, sampler, every

        def losses(params: Any, examples: Examples) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(task.apply(params, examples[0]), examples[1])

        step = sampled_step(sampler, losses, task.optimizer, task.batch)

        @partial(jax.jit, donate_argnums=0)
        def several(run: Sampled, keys: jax.Array, examples: Examples) -> Sampled:
            if isinstance(sampler, ExactLoss):
                found = all_losses(losses, run.params, examples, 500)
                run = dataclasses.replace(run, sampler=sampler.refresh(run.sampler, found))
            return jax.lax.scan(lambda run, key: (step(run, key, examples)[0], None), run, keys)[0]

        @jax.jit
        def accuracy(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            pieces = jax.lax.map(lambda part: task.apply(params, part).argmax(-1), x.reshape(-1, 500, *x.shape[1:]))
            return 100 * (pieces.reshape(-1) == y).mean()

        self.several, self.accuracy = several, accuracy

    def start(self, seed: int, train: Examples, features: jax.Array) -> Sampled:
        params = self.task.init(jax.random.key(seed))
        state = self.sampler.init(len(train[1]), Spec(seed=seed, features=features))
        return Sampled.start(params, self.task.optimizer, state)

    def __call__(self, seed: int, train: Examples | None = None, features: jax.Array | None = None) -> Curve:
        task = self.task
        train, features = train or task.train, task.features if features is None else features
        jax.block_until_ready(self.several(self.start(seed, train, features), self._keys(seed, 0), train))  # compiles
        began = time.perf_counter()
        run = jax.block_until_ready(self.start(seed, train, features))
        setup, spent = time.perf_counter() - began, 0.0
        curve = Curve([], [], [], setup if isinstance(self.sampler, NWS) else 0.0)
        for first in range(0, task.steps, self.every):
            began = time.perf_counter()
            run = jax.block_until_ready(self.several(run, self._keys(seed, first), train))
            spent += time.perf_counter() - began
            curve.steps.append(first + self.every)
            curve.seconds.append(spent)
            curve.accuracy.append(float(self.accuracy(run.params, *task.test)))
        return curve

    def _keys(self, seed: int, first: int) -> jax.Array:
        return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(first + jnp.arange(self.every))


# Redundant digits -----------------------------------------------------------------------------------------------------


def small_digits(images: np.ndarray) -> np.ndarray:
    """28 x 28 as 8 x 8: padded to 32, means of 4 x 4, of mean 0 and deviation 1 over all pixels."""
    padded = np.pad(images.reshape(-1, 28, 28) / 255.0, ((0, 0), (2, 2), (2, 2)))
    small = padded.reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64)
    return ((small - small.mean()) / small.std()).astype(np.float32)


def redundant(part: Part, seed: int, copies: int = 1) -> Part:
    """Five classes of `1900 * copies` near-copies of 180 images, five of `50 * copies` near-copies of 50."""
    rng = np.random.default_rng(seed)
    x, y = [], []
    for label, rare in enumerate(rng.permutation(10) < 5):
        own = rng.permutation(np.flatnonzero(part[1] == label))[: 50 if rare else 180]
        count = (50 if rare else 1900) * copies
        picked = part[0][own[np.arange(count) % len(own)]]
        noise = 0.0 if rare and copies == 1 else 0.15
        x.append(picked + noise * rng.normal(size=picked.shape))
        y.append(np.full(count, label))
    order = rng.permutation(sum(map(len, y)))
    return np.concatenate(x)[order].astype(np.float32), np.concatenate(y)[order].astype(np.int32)


def mislabelled(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng((seed, 1))
    return np.where(rng.random(len(labels)) < share, (labels + rng.integers(1, 10, len(labels))) % 10, labels).astype(
        np.int32
    )


def even_test(part: Part, each: int = 400) -> Examples:
    """`each` images of every class."""
    picked = np.concatenate([np.flatnonzero(part[1] == label)[:each] for label in range(10)])
    return jnp.asarray(part[0][picked]), jnp.asarray(part[1][picked], jnp.int32)


def toy_task(train: Part, test: Examples) -> Task:
    x, y = map(jnp.asarray, train)
    init = partial(init_mlp, widths=(64, 64, 10))
    return Task(
        init=init,
        apply=apply_mlp,
        train=(x, y),
        test=test,
        features=x,
        optimizer=optax.sgd(0.3),
        batch=32,
        steps=400,
    )


NWS_TOY = NWS(rows=32, hashes=12, pool=16, uniform=0.1)
TOY = {
    "uniform": Uniform(),
    "stale losses": StaleLoss(pool=16, uniform=0.1),
    "NWS": NWS_TOY,
    "NWS, weighted": dataclasses.replace(NWS_TOY, weighted=True),
    "exact losses": ExactLoss(every=EVERY, uniform=0.1),
}
ONE_PASS = {name: TOY[name] for name in ("uniform", "stale losses", "NWS", "NWS, weighted")}


def toy(images: Part, test: Part, seeds: tuple[int, ...]) -> dict[str, dict[str, list[Curve]]]:
    """Curves of every setting and arm, by seed."""
    pool, even = (small_digits(images[0]), images[1]), even_test((small_digits(test[0]), test[1]))
    settings: dict[str, tuple[dict[str, Any], int, float]] = {
        "many passes": (TOY, 1, 0.0),
        "one pass": (ONE_PASS, 21, 0.0),
        "labels wrong": (TOY, 1, 0.1),
    }
    found: dict[str, dict[str, list[Curve]]] = {}
    for setting, (arms, copies, noise) in settings.items():
        sets = []
        for seed in seeds:
            x, y = redundant(pool, seed, copies)
            sets.append((jnp.asarray(x), jnp.asarray(mislabelled(y, noise, seed) if noise else y)))
        for name, sampler in arms.items():
            trainer = Trainer(toy_task(sets[0], even), sampler)
            curves = [trainer(seed, train, train[0]) for seed, train in zip(seeds, sets, strict=True)]
            found.setdefault(setting, {})[name] = curves
            ends = " ".join(f"{curve.accuracy[-1]:.1f}" for curve in curves)
            print(f"{setting}, {name}: {ends}", file=sys.stderr, flush=True)
    return found


# The estimate ---------------------------------------------------------------------------------------------------------

ROWS = (8, 32, 128, 512)
WIDTHS = (2, 4, 6, 8, 10, 12)
INSERTED, QUERIED = 2000, 500


def ranks(x: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(x)).astype(np.float64)


def estimate(images: Part, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Errors by rows, rank correlations by hashes, and tails of means and of medians of means."""
    pool = small_digits(images[0]), images[1]
    errors: dict[int, list[float]] = {rows: [] for rows in ROWS}
    correlations: dict[int, list[float]] = {hashes: [] for hashes in WIDTHS}
    tails: dict[int, list[float]] = {groups: [] for groups in (1, 3, 9)}
    for seed in seeds:
        x, y = redundant(pool, seed)
        task = toy_task((x, y), even_test(pool))
        trainer = Trainer(dataclasses.replace(task, steps=200), Uniform(), every=200)
        run = trainer.start(seed, task.train, task.features)
        run = trainer.several(run, trainer._keys(seed, 0), task.train)
        losses = optax.softmax_cross_entropy_with_integer_labels(apply_mlp(run.params, task.train[0]), task.train[1])
        centred = task.train[0] - task.train[0].mean(0)
        inserted, queried = centred[:INSERTED], centred[INSERTED : INSERTED + QUERIED]
        seen, truth = losses[:INSERTED], losses[INSERTED : INSERTED + QUERIED]
        kernel = angular_collision(angle(queried[:, None], inserted), 6)
        exact = kernel @ seen / kernel.sum(1)

        def sketched(rows: int, hashes: int, key: int, queried=queried, inserted=inserted, seen=seen) -> tuple:
            lsh = SignProjections.make(jax.random.key(key), dim=64, rows=rows, hashes=hashes)
            return NWSketch.make(rows=rows, cells=lsh.buckets).insert(lsh(inserted), seen), lsh(queried)

        for rows in ROWS:
            draws = [sketched(rows, 6, 1000 * seed + i) for i in range(4)]
            errors[rows] += [float(jnp.abs(s.query(codes) / exact - 1).mean()) for s, codes in draws]
        for hashes in WIDTHS:
            sketch, codes = sketched(64, hashes, 1000 * seed)
            got = np.corrcoef(ranks(np.asarray(sketch.query(codes))), ranks(np.asarray(truth)))[0, 1]
            correlations[hashes].append(float(got))
        # Kernel sums of losses by 9 groups of 16 rows: how often they are off by two deviations of one group.
        sums, codes = sketched(9 * 16 * 20, 6, 1000 * seed + 7)
        hit = np.asarray(sums.sums.counts[jnp.arange(9 * 16 * 20), codes, 0])  # [queries, rows]
        means = hit.reshape(QUERIED, 20, 9, 16).mean(-1)
        centre = np.asarray(kernel @ seen)[:, None]
        limit = 2 * hit.std(1)[:, None] / 4
        for groups in tails:
            tails[groups].append(float((np.abs(np.median(means[:, :, :groups], -1) - centre) > limit).mean()))
    return {"error": errors, "rank correlation": correlations, "tail": tails}


# MNIST and CIFAR-10 ---------------------------------------------------------------------------------------------------


def real_tasks(data: Path, names: tuple[str, ...]) -> dict[str, Task]:
    tasks = {}
    if "MNIST" in names:
        parts = [(p[0].astype(np.float32) / 255, p[1].astype(np.int32)) for p in read_mnist(data)]
        (x, y), test = [(jnp.asarray(a), jnp.asarray(b)) for a, b in parts]
        tasks["MNIST"] = Task(
            init=partial(init_mlp, widths=(784, 256, 10)),
            apply=apply_mlp,
            train=(x, y),
            test=test,
            features=x,
            optimizer=optax.sgd(0.1),
            batch=128,
            steps=1000,
        )
    if "CIFAR-10" in names:
        images, labels = read_cifar10(data, "train_jpeg")
        x, y = jnp.asarray(normalized(images)), jnp.asarray(labels, jnp.int32)
        images, labels = read_cifar10(data, "test_decoded_2000")
        # Means of 4 x 4 pixels: 192 numbers tell images apart by what they show at large.
        features = x.reshape(-1, 8, 4, 8, 4, 3).mean((2, 4)).reshape(len(x), -1)
        tasks["CIFAR-10"] = Task(
            init=partial(init_cnn, channels=3, labels=10),
            apply=apply_cnn,
            train=(x, y),
            test=(jnp.asarray(normalized(images)), jnp.asarray(labels, jnp.int32)),
            features=features,
            optimizer=optax.adam(2e-3),
            batch=128,
            steps=400,
        )
    return tasks


REAL = {
    "uniform": Uniform(),
    "NWS": NWS(),
    "NWS, weighted": NWS(weighted=True),
    "exact losses": ExactLoss(every=50),
}


def real(data: Path, seeds: tuple[int, ...], names: tuple[str, ...]) -> dict[str, dict[str, list[Curve]]]:
    found: dict[str, dict[str, list[Curve]]] = {}
    for name, task in real_tasks(data, names).items():
        trainers = {arm: Trainer(task, sampler, every=50) for arm, sampler in REAL.items()}
        for seed in seeds:  # the arms in turn, so that a slow moment of the machine is not one arm's
            for arm, trainer in trainers.items():
                curve = trainer(seed)
                found.setdefault(name, {}).setdefault(arm, []).append(curve)
                print(
                    f"{name}, {arm}, seed {seed}: {curve.accuracy[-1]:.2f} in {curve.seconds[-1]:.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
    return found


# The report -----------------------------------------------------------------------------------------------------------


def mean(values: Any) -> float:
    return statistics.mean(values)


def show_toy(found: dict[str, dict[str, list[Curve]]]) -> dict[str, Bar]:
    bars: dict[str, Bar] = {}
    for setting, arms in found.items():
        table = Table(title=f"redundant digits, {setting}: accuracy in percent, mean of {len(arms['uniform'])} seeds")
        for column in ("arm", "150 steps", "250", "400", "each at 400", "steps to uniform's last", "ms a step"):
            table.add_column(column)
        target = mean(curve.accuracy[-1] for curve in arms["uniform"])
        steps: dict[str, float] = {}
        for arm, curves in arms.items():
            path = np.mean([curve.accuracy for curve in curves], 0)
            place = np.flatnonzero(path >= target)
            steps[arm] = curves[0].steps[place[0]] if len(place) else float("inf")
            at = [f"{path[curves[0].steps.index(step)]:.1f}" for step in (150, 250, 400)]
            each = " ".join(f"{curve.accuracy[-1]:.1f}" for curve in curves)
            speed = 1000 * mean(curve.seconds[-1] for curve in curves) / curves[0].steps[-1]
            table.add_row(arm, *at, each, f"{steps[arm]:.0f}", f"{speed:.3f}")
        Console(width=120).print(table)
        if setting == "labels wrong":
            continue
        bars[f"{setting}: steps to uniform's accuracy, share of uniform's"] = Bar(steps["NWS"] / 400, high=0.75)
        early = {arm: mean(curve.accuracy[curve.steps.index(150)] for curve in curves) for arm, curves in arms.items()}
        bars[f"{setting}: NWS less stale losses at step 150, points"] = Bar(early["NWS"] - early["stale losses"], low=0)
    return bars


def show_estimate(found: dict[str, Any]) -> dict[str, Bar]:
    error = {rows: mean(values) for rows, values in found["error"].items()}
    slope = float(np.polyfit(np.log(list(error)), np.log(list(error.values())), 1)[0])
    tail = {groups: mean(values) for groups, values in found["tail"].items()}
    print("mean relative error by rows:", ", ".join(f"{rows}: {value:.4f}" for rows, value in error.items()))
    ranked = ", ".join(f"{k}: {mean(v):.2f}" for k, v in found["rank correlation"].items())
    print("rank correlation with losses not seen, 64 rows, by hashes:", ranked)
    print("share of sums off by two deviations of 16 rows, by groups of 16:", tail)
    return {
        "estimate: relative error at 128 rows": Bar(error[128], high=0.10, paper="0.054 (digits)"),
        "estimate: slope of log error by log rows": Bar(slope, low=-0.6, high=-0.4, paper="-0.5 in theory"),
        # A median of 9 is off where 5 of 9 are, each with at most 1/4: P(Bin(9, 1/4) >= 5) = 0.049.
        "estimate: tail of medians of 9 groups": Bar(tail[9], high=0.049),
        "estimate: tail of medians of 9 groups, share of 1 group's": Bar(tail[9] / tail[1], high=0.1),
    }


def show_real(found: dict[str, dict[str, list[Curve]]]) -> dict[str, Bar]:
    bars: dict[str, Bar] = {}
    for name, arms in found.items():
        table = Table(title=f"{name}: {len(arms['uniform'])} seeds; time to uniform's last accuracy of the seed")
        for column in ("arm", "last accuracy, %, each", "steps", "seconds, hashing included", "ms a step"):
            table.add_column(column)
        seconds: dict[str, list[float]] = {}
        for arm, curves in arms.items():
            targets = [curve.accuracy[-1] for curve in arms["uniform"]]
            steps = [curve.steps_to(target) for curve, target in zip(curves, targets, strict=True)]
            seconds[arm] = [curve.seconds_to(target) for curve, target in zip(curves, targets, strict=True)]
            speed = 1000 * statistics.median(curve.seconds[-1] / curve.steps[-1] for curve in curves)
            each = " ".join(f"{curve.accuracy[-1]:.2f}" for curve in curves)
            took = " ".join(f"{s:.2f}" for s in seconds[arm])
            table.add_row(arm, each, " ".join(f"{s:.0f}" for s in steps), took, f"{speed:.2f}")
        Console(width=120).print(table)
        ratios = {
            arm: statistics.median(c.seconds[-1] / u.seconds[-1] for c, u in zip(curves, arms["uniform"], strict=True))
            for arm, curves in arms.items()
        }
        middle = {arm: statistics.median(values) for arm, values in seconds.items()}
        setup = mean(curve.setup for curve in arms["NWS"])
        print(f"{name}: hashing all examples once {setup:.2f} s; NWS step over uniform step {ratios['NWS']:.3f}")
        bars[f"{name}: NWS step over uniform step, time"] = Bar(ratios["NWS"], high=1.15)
        bars[f"{name}: seconds to uniform's accuracy, NWS over uniform"] = Bar(
            middle["NWS"] / middle["uniform"], high=1.0
        )
        bars[f"{name}: seconds to uniform's accuracy, NWS over exact losses"] = Bar(
            middle["NWS"] / middle["exact losses"] if middle["exact losses"] < float("inf") else 0.0, high=1.0
        )
    return bars


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.nws", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory that holds images/mnist, images/cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--parts", nargs="+", default=("estimate", "toy", "real"), choices=("estimate", "toy", "real"))
    parser.add_argument("--sets", nargs="+", default=("MNIST", "CIFAR-10"), choices=("MNIST", "CIFAR-10"))
    args = parser.parse_args(argv)
    if not (args.data / "images" / "mnist").is_dir():
        print(f"nws: --data {args.data} holds no images/mnist; name the directory that does", file=sys.stderr)
        return 2
    images, test = read_mnist(args.data)
    seeds, bars, extra = tuple(args.seeds), {}, {}
    if "estimate" in args.parts:
        extra["estimate"] = estimate(images, seeds)
        bars |= show_estimate(extra["estimate"])
    if "toy" in args.parts:
        curves = toy(images, test, seeds)
        bars |= show_toy(curves)
        extra["toy"] = {s: {a: [c.accuracy[-1] for c in cs] for a, cs in arms.items()} for s, arms in curves.items()}
    if "real" in args.parts:
        curves = real(args.data, seeds, tuple(args.sets))
        bars |= show_real(curves)
        extra["real"] = {s: {a: [c.accuracy[-1] for c in cs] for a, cs in arms.items()} for s, arms in curves.items()}
    return conclude("nws", bars, extra)


if __name__ == "__main__":
    raise SystemExit(main())
