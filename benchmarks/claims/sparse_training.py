"""Claims of sparse networks that were never trained dense: scores before training, and masks that move.

    python -m benchmarks.claims.sparse_training --data DIR [--seeds 0 1 2]

MNIST (DIR/images/mnist), a ReLU network of 784, 100, 50 and 10 units, all arms from the same parameters and batches,
trained by the loop of `train/`. Static masks are random (every layer alike, or by Erdos-Renyi-Kernel), of SNIP, of
GraSP and of SynFlow; RigL starts from the Erdos-Renyi-Kernel mask, GraNet from one of half the weights. Biases stay.
The learning rate and the settings of RigL and GraNet were chosen on seed 100.
"""

import argparse
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import effjax as ej
from benchmarks.bars import Bar, conclude
from benchmarks.mnist import Part, read_mnist
from train.config import LoopConfig
from train.loop import fit
from train.step import make_optimizer

SIZES = (784, 100, 50, 10)
SPARSITIES = (0.8, 0.95)
TRAIN, BATCH, STEPS = 10_000, 100, 1000
EVERY, UNTIL = 50, 750  # steps between two changes of a mask, and until the last: three quarters, as in the papers
RATE = 4e-3
ROUNDS = 30  # of SynFlow's small cuts; 100 in the paper
SCORED = 1000  # images that SNIP and GraSP see: a hundred a class
TEMPERATURE = 200.0  # of GraSP's logits, as its authors have it
WHERE = "*/kernel"
STATIC = ("random", "random, ERK", "SNIP", "GraSP", "SynFlow")
MOVING = ("RigL", "GraNet")
PAPERS = {
    "SNIP": "above random",
    "GraSP": "above random, most at high sparsity",
    "SynFlow": "above random, empties no layer",
    "RigL": "above static and SET",
    "GraNet": "above RigL",
}


def init(key: jax.Array) -> Any:
    keys = jax.random.split(key, len(SIZES))
    return {
        f"layer_{i}": {"kernel": jax.random.normal(keys[i], (n, m)) * np.sqrt(2 / n), "bias": jnp.zeros(m)}
        for i, (n, m) in enumerate(zip(SIZES[:-1], SIZES[1:], strict=True))
    }


def apply(params: Any, x: jax.Array) -> jax.Array:
    for i in range(len(params)):
        x = (jax.nn.relu(x) if i else x) @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
    return x


def loss(params: Any, x: jax.Array, labels: jax.Array, temperature: float = 1.0) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x) / temperature, labels).mean()


def first_mask(arm: str, params: Any, part: Part, sparsity: float, seed: int) -> Any:
    """The mask that training begins with, and that a static arm keeps."""
    key = jax.random.key(seed + 1)
    highest = ej.prune.Highest(sparsity=sparsity, scope="global")
    some = jnp.asarray(part[0][:SCORED]), jnp.asarray(part[1][:SCORED])
    if arm == "random":
        return ej.prune_mask(params, ej.prune.Random(sparsity=sparsity), where=WHERE, key=key)
    if arm == "SNIP":
        return ej.prune_mask(ej.prune.snip(loss, params, *some), highest, where=WHERE)
    if arm == "GraSP":
        scores = ej.prune.grasp(partial(loss, temperature=TEMPERATURE), params, *some)
        return ej.prune_mask(scores, highest, where=WHERE)
    if arm == "SynFlow":
        return ej.prune.synflow(apply, params, some[0][:1], sparsity=sparsity, rounds=ROUNDS, where=WHERE)
    start = 0.5 if arm == "GraNet" else sparsity
    shapes = {f"{name}/kernel": tuple(layer["kernel"].shape) for name, layer in params.items()}
    shares = ej.prune.erk_sparsities(shapes, start)
    # A dense layer has a mask too: GraNet prunes it later.
    rules = [(path, ej.prune.Random(sparsity=share)) for path, share in shares.items()]
    return ej.prune_mask(params, rules, key=key)


def optimizer_of(arm: str, mask: Any, sparsity: float, config: LoopConfig) -> optax.GradientTransformation:
    plain = make_optimizer(config)
    if arm == "GraNet":
        return ej.prune.sparse_training(
            plain, mask, ej.prune.GraNet(sparsity=sparsity, initial=0.5, until=UNTIL, every=EVERY)
        )
    moves = EVERY if arm == "RigL" else STEPS + 1  # a static mask is one that never moves
    return ej.prune.sparse_training(plain, mask, ej.prune.RigL(until=UNTIL, every=moves))


def accuracy(arm: str, sparsity: float, parts: tuple[Part, Part], seed: int, folder: Path) -> tuple[float, float]:
    """Percent right on the test images, and the share of kernels' weights that are zero."""
    (images, labels), (x, y) = parts
    params = init(jax.random.key(seed))
    config = LoopConfig(
        steps=STEPS, learning_rate=RATE, warmup=50, weight_decay=0.01, seed=seed, log_every=STEPS, save_every=STEPS
    )
    optimizer = make_optimizer(config)
    if arm != "dense":
        mask = first_mask(arm, params, parts[0], sparsity, seed)
        params, optimizer = ej.apply_mask(params, mask), optimizer_of(arm, mask, sparsity, config)
    rng = np.random.default_rng(seed)
    rows = np.concatenate([rng.permutation(TRAIN) for _ in range(STEPS * BATCH // TRAIN)]).reshape(STEPS, BATCH)

    def batch(step: int) -> dict[str, np.ndarray]:
        return {"x": images[rows[step]], "y": labels[rows[step]]}

    def summed(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        del key
        return loss(params, batch["x"], batch["y"]) * BATCH, jnp.float32(BATCH)

    state = fit(summed, params, batch, config, folder, optimizer=optimizer)
    right = 100 * float((apply(state.params, x).argmax(-1) == y).mean())
    kernels = [np.asarray(layer["kernel"]) for layer in state.params.values()]
    return right, 1 - sum(int((k != 0).sum()) for k in kernels) / sum(k.size for k in kernels)


def parts_of(data: Path, seed: int) -> tuple[Part, Part]:
    """Images to train on, another choice for every seed, and those to test on, as shares of white less their mean."""
    (images, labels), test = read_mnist(data)
    chosen = np.random.default_rng(seed).permutation(len(images))[:TRAIN]

    def scaled(x: np.ndarray) -> np.ndarray:
        return ((x / 255 - 0.1307) / 0.3081).astype(np.float32)

    return (scaled(images[chosen]), labels[chosen].astype(np.int32)), (scaled(test[0]), test[1].astype(np.int32))


def one_seed(data: Path, seed: int) -> dict[str, float]:
    """Accuracy by arm and sparsity."""
    parts, found = parts_of(data, seed), {}
    with tempfile.TemporaryDirectory() as folder:
        for sparsity in (0.0, *SPARSITIES):
            for arm in (*STATIC, *MOVING) if sparsity else ("dense",):
                name = f"{arm}, {sparsity:.0%}" if sparsity else arm
                right, zero = accuracy(arm, sparsity, parts, seed, Path(folder) / name)
                # Moved weights begin at zero, and an unlucky one may not have left it.
                assert zero > sparsity - 1e-3, f"{name}: {zero:.2%} of the weights are zero"
                found[name] = right
                print(f"seed {seed}, {name}: {right:.2f} % right, {zero:.2%} zero", file=sys.stderr)
    return found


def bars_of(mean: dict[str, float]) -> dict[str, Bar]:
    """Every method above random at 95 %, moving masks above static and near dense at 80 %."""
    bars = {}
    for arm in ("SNIP", "GraSP", "SynFlow", *MOVING):
        gain = mean[f"{arm}, 95%"] - mean["random, 95%"]
        bars[f"{arm} less random at 95 %, points"] = Bar(gain, low=0, paper=PAPERS[arm])
    bars["RigL less its first mask, static, at 95 %, points"] = Bar(
        mean["RigL, 95%"] - mean["random, ERK, 95%"], low=0, paper="3.0 on ResNet-50 at 80 %"
    )
    bars["GraNet less RigL at 95 %, points"] = Bar(mean["GraNet, 95%"] - mean["RigL, 95%"], low=0, paper="above RigL")
    for arm in MOVING:
        bars[f"dense less {arm} at 80 %, points"] = Bar(
            mean["dense"] - mean[f"{arm}, 80%"], high=1, paper="1 to 2 on ResNet-50"
        )
    return bars


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.sparse_training", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory that holds images/mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    args = parser.parse_args(argv)
    if not (args.data / "images" / "mnist").is_dir():
        print(
            f"sparse_training: --data {args.data} holds no images/mnist; name the directory that does", file=sys.stderr
        )
        return 2
    runs = [one_seed(args.data, seed) for seed in args.seeds]
    kept = {name: [run[name] for run in runs] for name in runs[0]}
    mean = {name: statistics.mean(values) for name, values in kept.items()}
    table = Table(title=f"MNIST, {TRAIN:,} images: percent right, mean of {len(runs)} seeds (each)")
    for column in ("arm", *(f"{s:.0%} zero" for s in SPARSITIES)):
        table.add_column(column)

    def cell(name: str) -> str:
        return f"{mean[name]:.2f} ({' '.join(f'{v:.2f}' for v in kept[name])})"

    table.add_row("dense", *[cell("dense")] * len(SPARSITIES))
    for arm in (*STATIC, *MOVING):
        table.add_row(arm, *(cell(f"{arm}, {s:.0%}") for s in SPARSITIES))
    Console(width=140).print(table)
    return conclude("sparse_training", bars_of(mean), kept)


if __name__ == "__main__":
    raise SystemExit(main())
