"""Claims of STABLE-RPS: better than ROAST, pruning and smaller models at equal numbers of weights; stable; continuous.

python -m benchmarks.claims.stable_rps --data DIR    (DIR/images/mnist: the four MNIST files as npz and idx.gz)
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import effjax as ej
from benchmarks.bars import Bar, conclude
from benchmarks.mnist import read_mnist
from effjax.sketch import (
    ROAST,
    SharedParams,
    StableRPS,
    expand,
    scale_gradients,
    scale_updates,
    share_params,
    slot_scales,
)

SEEDS = (0, 1, 2)
WIDTHS = (128, 64)
RATIOS = (10, 30, 100)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TRAIN, HELD_OUT = 20_000, 5_000
BATCH, EPOCHS = 100, 5
ROAST_STD = 0.04  # the default of the authors' code
STARTS: tuple[tuple[Any, float], ...] = (("init", 1.0), ("fit", 1e-3))
SPREADS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
Data = dict[str, tuple[jax.Array, jax.Array]]


def load(root: str) -> Data:
    def split(x: np.ndarray, y: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(x / 255.0, jnp.float32), jnp.asarray(y, jnp.int32)

    (x, y), test = read_mnist(Path(root))
    return {
        "train": split(x[:TRAIN], y[:TRAIN]),
        "held out": split(x[-HELD_OUT:], y[-HELD_OUT:]),
        "test": split(*test),
    }


def init(seed: int, widths: tuple[int, ...] = WIDTHS) -> dict[str, Any]:
    """Kernels of deviation `sqrt(2 / in)`, zero biases."""
    sizes = (784, *widths, 10)
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return {
        f"layer_{i}": {"kernel": jax.random.normal(k, (n, m)) * (2 / n) ** 0.5, "bias": jnp.zeros(m)}
        for i, (k, n, m) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def forward(params: Any, x: jax.Array) -> jax.Array:
    for i in range(len(params)):
        layer = params[f"layer_{i}"]
        x = (jax.nn.relu(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def kernel_weights(widths: tuple[int, ...]) -> int:
    sizes = (784, *widths, 10)
    return sum(n * m for n, m in zip(sizes[:-1], sizes[1:], strict=True))


def smaller(ratio: float) -> dict[str, tuple[int, ...]]:
    """The widest networks of one and of two hidden layers whose kernels have at most a `ratio`-th of the weights."""
    shapes = {
        "two layers": [(h, max(h // 2, 1)) for h in range(1, WIDTHS[0] + 1)],
        "one layer": [(h,) for h in range(1, WIDTHS[0] + 1)],
    }
    limit = kernel_weights(WIDTHS) / ratio
    return {name: max(w for w in widths if kernel_weights(w) <= limit) for name, widths in shapes.items()}


def unchanged(tree: Any, frozen: Any) -> Any:
    del frozen
    return tree


@dataclasses.dataclass(frozen=True)
class Arm:
    """How a network is held and trained.

    Attributes:
        start: the trained state of a seed, and what is frozen.
        dense: from both to parameters.
        before, after: around the optimiser.
    """

    start: Callable[[int], tuple[Any, Any]]
    dense: Callable[[Any, Any], Any] = unchanged
    before: Callable[[Any, Any], Any] = unchanged
    after: Callable[[Any, Any], Any] = unchanged

    @property
    def how(self) -> tuple[Any, Any, Any]:
        """What a program is compiled for."""
        return self.dense, self.before, self.after


def dense_arm(widths: tuple[int, ...] = WIDTHS) -> Arm:
    return Arm(lambda seed: (init(seed, widths), None))


def read_table(trained: SharedParams, frozen: Any) -> Any:
    return ej.materialize(expand(ej.combine(trained, frozen[0])))


def scaled_gradients(gradients: Any, frozen: Any) -> Any:
    return scale_gradients(gradients, frozen[1])


def scaled_updates(updates: Any, frozen: Any) -> Any:
    return scale_updates(updates, frozen[1])


def shared_arm(method: Any, start: Callable[[int], Any] = init) -> Arm:
    """ROAST follows the plain gradient of its table, STABLE-RPS the scaled one."""

    def begin(seed: int) -> tuple[Any, Any]:
        shared = share_params(start(seed), method, key=jax.random.key(1000 + seed))
        trained, frozen = ej.partition(shared)
        return trained, (frozen, slot_scales(shared))

    if isinstance(method, ROAST):
        return Arm(begin, read_table)
    return Arm(begin, read_table, scaled_gradients, scaled_updates)


def pruned_arm(ratio: float, scope: Any, start: Callable[[int], Any] = init) -> Arm:
    """Weights under the mask are zero and stay so; positions are not counted, in favour of pruning."""

    def begin(seed: int) -> tuple[Any, Any]:
        params = start(seed)
        return params, ej.prune_mask(params, ej.prune.Magnitude(sparsity=1 - 1 / ratio, scope=scope))

    return Arm(begin, ej.apply_mask)


OPTIMISERS = {"adam": optax.scale_by_adam(), "sgd": optax.trace(decay=0.9)}


@partial(jax.jit, static_argnums=(0, 1))
def epoch(how: Any, name: str, carry: Any, frozen: Any, x: jax.Array, y: jax.Array, order: Any, rates: Any) -> Any:
    """One pass in the given order; the learning rates are an argument, so that a sweep is one program."""
    dense, before, after = how

    def step(carry: Any, now: Any) -> Any:
        (state, opt), (rows, rate) = carry, now

        def loss(state: Any) -> jax.Array:
            logits = forward(dense(state, frozen), x[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

        value, gradient = jax.value_and_grad(loss)(state)
        updates, opt = OPTIMISERS[name].update(before(gradient, frozen), opt)
        updates = after(jax.tree.map(lambda u: -rate * u, updates), frozen)
        return (jax.tree.map(jnp.add, state, updates), opt), value

    return jax.lax.scan(step, carry, (order, rates))


def train(arm: Arm, data: Data, seed: int, rate: float, name: str = "adam", epochs: int = EPOCHS) -> Any:
    """The dense parameters at the end; the learning rate falls along a cosine."""
    state, frozen = arm.start(seed)
    carry = state, OPTIMISERS[name].init(state)
    shuffle = np.random.default_rng(seed)
    progress = np.arange(epochs * TRAIN // BATCH) / (epochs * TRAIN // BATCH)
    rates = np.float32(rate * (1 + np.cos(np.pi * progress)) / 2).reshape(epochs, -1)
    for now in rates:
        order = shuffle.permutation(TRAIN).reshape(-1, BATCH)
        carry, losses = epoch(arm.how, name, carry, frozen, *data["train"], order, now)
        if not np.isfinite(losses).all():
            break
    return arm.dense(carry[0], frozen)


@jax.jit
def correct(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return (forward(params, x).argmax(-1) == y).mean()


def accuracy(params: Any, data: Data, split: str = "test") -> float:
    return 100 * float(correct(params, *data[split]))


def best_of(choices: dict[str, Arm], data: Data) -> tuple[list[float], str, float]:
    """Accuracy of all seeds with the choice and learning rate that did best on held-out images of the first seed."""
    held_out: dict[tuple[str, float], float] = {}
    ends = {}
    for name, arm in choices.items():
        for rate in RATES:
            ends[name, rate] = train(arm, data, SEEDS[0], rate)
            held_out[name, rate] = accuracy(ends[name, rate], data, "held out")
    name, rate = max(held_out, key=lambda key: held_out[key])
    rest = [train(choices[name], data, seed, rate) for seed in SEEDS[1:]]
    return [accuracy(params, data) for params in (ends[name, rate], *rest)], name, rate


@partial(jax.jit, static_argnums=0)
def gradient_of(how: Any, state: Any, frozen: Any, x: jax.Array, y: jax.Array) -> Any:
    def loss(state: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(forward(how[0](state, frozen), x), y).mean()

    return jax.grad(loss)(state)


def train_op_by_op(arm: Arm, data: Data, rate: float, name: str) -> Any:
    """One pass with the optimiser outside of the compiled program, every operation rounded on its own.

    Inside, the compiler contracts products and sums, differently for a table and for the weights themselves.
    """
    state, frozen = arm.start(0)
    opt = OPTIMISERS[name].init(state)
    x, y = data["train"]
    for first in range(0, TRAIN, BATCH):
        gradient = gradient_of(arm.how, state, frozen, x[first : first + BATCH], y[first : first + BATCH])
        updates, opt = OPTIMISERS[name].update(arm.before(gradient, frozen), opt)
        state = jax.tree.map(jnp.add, state, arm.after(jax.tree.map(lambda u: -rate * u, updates), frozen))
    return arm.dense(state, frozen)


def continuity(data: Data) -> dict[str, float]:
    """Largest difference of a weight between dense training and ratio 1 after an epoch, over the largest weight."""
    arms = {f"{start}": shared_arm(StableRPS(ratio=1, start=start, table_std=std)) for start, std in STARTS}
    found = {}
    for name, rate in (("sgd", 0.03), ("adam", 1e-3)):
        ways = {
            "op by op": partial(train_op_by_op, data=data, rate=rate, name=name),
            "compiled": partial(train, data=data, seed=0, rate=rate, name=name, epochs=1),
        }
        for way, run in ways.items():
            dense = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(run(dense_arm()))])
            for start, arm in arms.items():
                end = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(run(arm))])
                found[f"{name}, {way}, {start}"] = float(np.abs(end - dense).max() / np.abs(dense).max())
    return found


def ordering(data: Data) -> tuple[dict[str, list[float]], dict[str, str]]:
    scores: dict[str, list[float]] = {}
    chosen: dict[str, str] = {}

    def add(name: str, choices: dict[str, Arm]) -> None:
        scores[name], choice, rate = best_of(choices, data)
        chosen[name] = f"{rate:g}" + (f", {choice}" if choice else "")
        values = " ".join(f"{v:.2f}" for v in scores[name])
        print(f"{name:<36} {statistics.mean(scores[name]):6.2f}   {values}   (rate {chosen[name]})", flush=True)

    add("1 dense", {"": dense_arm()})
    trained = {seed: train(dense_arm(), data, seed, float(chosen["1 dense"])) for seed in SEEDS}
    add("1 STABLE-RPS", {"": shared_arm(StableRPS(ratio=1))})
    add("1 ROAST", {"": shared_arm(ROAST(ratio=1, table_std=ROAST_STD))})
    for ratio in RATIOS:
        add(f"{ratio} STABLE-RPS", {"": shared_arm(StableRPS(ratio=ratio))})
        add(f"{ratio} ROAST", {"": shared_arm(ROAST(ratio=ratio, table_std=ROAST_STD))})
        add(f"{ratio} smaller dense", {name: dense_arm(widths) for name, widths in smaller(ratio).items()})
        scopes = ("leaf", "global")
        add(f"{ratio} pruned at initialisation", {scope: pruned_arm(ratio, scope) for scope in scopes})
        add(f"{ratio} trained, pruned, trained", {s: pruned_arm(ratio, s, trained.__getitem__) for s in scopes})
        if ratio == RATIOS[0]:
            fit = StableRPS(ratio=ratio, start="fit")
            add(f"{ratio} trained, shared, trained", {"": shared_arm(fit, trained.__getitem__)})
    return scores, chosen


def stability(data: Data) -> dict[str, dict[float, list[float]]]:
    """Accuracy over the spread of the table, at the learning rate that is best at the authors' spread."""
    found: dict[str, dict[float, list[float]]] = {}
    ratio = 10
    for optimiser_name, rates in (("sgd", (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)), ("adam", (1e-3, 3e-3, 1e-2))):
        for name, make in (("ROAST", ROAST), ("STABLE-RPS", StableRPS)):
            arms = {std: shared_arm(make(ratio=ratio, table_std=std)) for std in SPREADS}
            tune = shared_arm(make(ratio=ratio, table_std=ROAST_STD))
            ends = {rate: train(tune, data, SEEDS[0], rate, optimiser_name, 2) for rate in rates}
            rate = max(ends, key=lambda rate: accuracy(ends[rate], data, "held out"))
            rows = {
                std: [accuracy(train(arm, data, seed, rate, optimiser_name, 2), data) for seed in SEEDS]
                for std, arm in arms.items()
            }
            found[f"{name}, {optimiser_name}"] = rows
            text = "  ".join(f"{std:g}: {statistics.mean(v):.2f}" for std, v in rows.items())
            print(f"{name:<11} {optimiser_name:<5} rate {rate:<6g} table_std {text}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="directory that holds images/mnist")
    data = load(parser.parse_args().data)
    apart = continuity(data)
    print("ratio 1 against dense, one epoch:", ", ".join(f"{name} {value:.2e}" for name, value in apart.items()))
    print(f"\n784-{WIDTHS[0]}-{WIDTHS[1]}-10, {kernel_weights(WIDTHS)} weights in kernels; smaller networks:")
    for ratio in RATIOS:
        print(f"  {ratio}x:", ", ".join(f"{name} {w} ({kernel_weights(w)})" for name, w in smaller(ratio).items()))
    print(f"{'ratio, arm':<36} accuracy, % (mean of {len(SEEDS)} seeds, each)", flush=True)
    scores, chosen = ordering(data)
    spreads = stability(data)
    mean = {name: statistics.mean(values) for name, values in scores.items()}
    bars = {
        **{
            f"ratio 1, {how}, largest difference from dense": Bar(
                max(v for name, v in apart.items() if name.startswith(how)), high=1e-6, paper="the dense model"
            )
            for how in ("sgd, op by op", "adam, op by op", "sgd, compiled", "adam, compiled")
        },
        "ratio 1: STABLE-RPS minus dense, points": Bar(mean["1 STABLE-RPS"] - mean["1 dense"], low=-0.01),
    }
    for ratio in RATIOS:
        ours = mean[f"{ratio} STABLE-RPS"]
        for other in ("ROAST", "smaller dense", "pruned at initialisation", "trained, pruned, trained"):
            informed = "informed pruning wins at low ratios" if other.startswith("trained") else "better"
            bars[f"{ratio}x: STABLE-RPS minus {other}, points"] = Bar(
                ours - mean[f"{ratio} {other}"], low=0, paper=informed
            )
    for name in ("sgd", "adam"):
        ours = [statistics.mean(v) for v in spreads[f"STABLE-RPS, {name}"].values()]
        theirs = [statistics.mean(v) for v in spreads[f"ROAST, {name}"].values()]
        bars[f"{name}: STABLE-RPS, worst minus best over table_std, points"] = Bar(min(ours) - max(ours), low=-1)
        bars[f"{name}: spreads at which ROAST stays below 50 %"] = Bar(sum(v < 50 for v in theirs), low=1)
    extra = {f"accuracy, {name.replace(' ', 'x ', 1)}": values for name, values in scores.items()}
    return conclude("stable_rps", bars, {**extra, "rates": chosen, "over table_std": spreads})


if __name__ == "__main__":
    raise SystemExit(main())
