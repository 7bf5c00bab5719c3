"""Claims of task-oriented transfer: few labels go further through an adapted foundation model and a curated set.

python -m benchmarks.claims.task_oriented_transfer [--data DIR] [--seeds 0 1 2 3 4] [--parts digits mnist]

Digits 5 to 9 are the task, 10 labels each (2 of them held back for early stopping). A fifth of the gallery is digits 5
to 9; the rest in equal parts digits 0 to 4, digits with their quarters shuffled, inverted digits, textures, and (mnist)
grey photographs of CIFAR-10. A convolutional network trained on that mixture without labels, to tell two views of an
image from other images, stands for the foundation model; the student has a tenth of its parameters. The parts: "digits"
of scikit-learn (`pip install -e '.[claims]'`), and with --data "mnist" (DIR/images/mnist, pooled to 14x14 pixels, and
DIR/images/cifar10).

All arms have the same first weights, as many steps of the student, and the same finetuning on the labels at the end.
Labels, gallery, test images and networks are drawn from the seed. Both rates of every arm were chosen on other seeds:
digits on 100 to 102, of three and three; mnist on 100, of two and two.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, conclude
from benchmarks.resnet import read_cifar10
from effjax.distill import (
    adapt,
    agnostic_loss,
    curate,
    init_projection,
    query_counts,
    transfer_loss,
)
from effjax.models.cnn import apply_cnn, cnn_features, init_cnn
from train.distill_transfer import in_parts, view_loss, with_head
from train.images import TransferData, pooled, read_labelled, transfer_data

SEEDS = (0, 1, 2, 3, 4)
SETS = ("random", "best_matches", "query_balanced", "in domain")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes and what was chosen.

    Attributes:
        teacher, student: widths of their convolutions.
        gallery: images without labels.
        n: size of a transfer set.
        sizes: of the sets by which accuracy against size is drawn.
        pretraining: steps of the foundation model.
        steps: of the student before the finetuning, 128 images each.
        rates: of those steps and of the finetuning, chosen for each arm.
    """

    teacher: tuple[int, ...]
    student: tuple[int, ...]
    gallery: int
    n: int
    sizes: tuple[int, ...]
    pretraining: int
    steps: int
    rates: dict[str, tuple[float, float]]


ARMS = {
    "from scratch": ("labels", ""),
    "pretrained on other classes": ("other labels", ""),
    "agnostic, random set": ("agnostic", "random"),
    "agnostic, query-balanced set": ("agnostic", "query_balanced"),
    "oriented, random set": ("oriented", "random"),
    "oriented, best matches": ("oriented", "best_matches"),
    "oriented, query-balanced set": ("oriented", "query_balanced"),
    "oriented, all in domain": ("oriented", "in domain"),
}
SETTINGS = {
    "digits": Setting(
        teacher=(48, 96, 192),
        student=(16, 32, 64),
        gallery=2500,
        n=250,
        sizes=(62, 125, 250, 500, 1000),
        pretraining=600,
        steps=960,
        rates={
            "from scratch": (2e-2, 3e-3),
            "pretrained on other classes": (3e-3, 1e-2),
            "agnostic, random set": (2e-2, 3e-3),
            "agnostic, query-balanced set": (3e-3, 1e-3),
            "oriented, random set": (3e-3, 1e-2),
            "oriented, best matches": (1e-2, 1e-3),
            "oriented, query-balanced set": (1e-2, 1e-3),
            "oriented, all in domain": (1e-2, 1e-3),
        },
    ),
    "mnist": Setting(
        teacher=(32, 64, 128, 128),
        student=(16, 32, 64),
        gallery=20_000,
        n=2000,
        sizes=(250, 500, 1000, 2000, 4000),
        pretraining=1500,
        steps=480,
        rates={
            "from scratch": (2e-2, 1e-3),
            "pretrained on other classes": (2e-2, 3e-3),
            "agnostic, random set": (2e-2, 3e-3),
            "agnostic, query-balanced set": (1e-2, 3e-3),
            "oriented, random set": (1e-2, 3e-3),
            "oriented, best matches": (2e-2, 3e-3),
            "oriented, query-balanced set": (2e-2, 3e-3),
            "oriented, all in domain": (1e-2, 1e-3),
        },
    ),
}
SIZED = ("oriented, random set", "oriented, query-balanced set")  # accuracy against the size of the set
ADAPT_STEPS, ADAPT_RATES = 200, {"head": 1e-2, "full": 1e-4}
FINETUNE_STEPS, FEW = 200, 32
BATCH = 128


# Data -----------------------------------------------------------------------------------------------------------------


@functools.cache
def photographs(data: Path) -> np.ndarray:
    """Grey, 14 pixels wide."""
    grey = read_cifar10(data, "train_first4000_lossless")[0].mean(-1, dtype=np.float32) / 255
    return np.asarray(jax.image.resize(grey, (len(grey), 14, 14), "linear"))[..., None]


def read(part: str, data: Path | None, seed: int) -> TransferData:
    """Everything of one seed; `[n, height, width, 1]`."""
    images, labels = source(data if part == "mnist" else None)
    natural = photographs(data) if part == "mnist" and data is not None else None
    sizes = {"per_class": 10, "gallery": SETTINGS[part].gallery, "test": 4000}
    return transfer_data(images, labels, seed=seed, natural=natural, **sizes)


@functools.cache
def source(data: Path | None) -> tuple[np.ndarray, np.ndarray]:
    images, labels = read_labelled(data)
    return pooled(images, 1 if data is None else 2)[..., None], labels


# Training -------------------------------------------------------------------------------------------------------------


def moved(key: jax.Array, x: jax.Array) -> jax.Array:
    """Images moved by up to a pixel, all of a batch alike."""
    return jnp.roll(x, jax.random.randint(key, (2,), -1, 2), (1, 2))


Loss = Callable[[Any, jax.Array, jax.Array, Any], jax.Array]  # (params, key, images, what is told of them) -> losses


def by_views(params: Any, key: jax.Array, x: jax.Array, told: None) -> jax.Array:
    del told
    return view_loss(params, x, key)


def by_labels(params: Any, key: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(apply_cnn(params["net"], moved(key, x)), y)


def by_outputs(params: Any, key: jax.Array, x: jax.Array, told: jax.Array) -> jax.Array:
    return transfer_loss(params["net"], apply_cnn, moved(key, x), told)


def by_embeddings(params: Any, key: jax.Array, x: jax.Array, told: jax.Array) -> jax.Array:
    return agnostic_loss(told, cnn_features(params["net"], moved(key, x)), params["projection"])


LOSSES: dict[str, Loss] = {
    "labels": by_labels,
    "other labels": by_labels,
    "agnostic": by_embeddings,
    "oriented": by_outputs,
}


@functools.partial(jax.jit, static_argnames=("loss", "steps"))
def train(
    loss: Loss, params: Any, x: jax.Array, told: Any, ids: jax.Array, count: Any, key: Any, rate: Any, *, steps: int
) -> Any:
    """AdamW on the first `count` of the rows `ids`; one program for sets of all sizes."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(rate, steps))

    def step(carry: Any, t: jax.Array) -> Any:
        params, state = carry
        of_rows, of_loss = jax.random.split(jax.random.fold_in(key, t))
        rows = ids[jax.random.randint(of_rows, (BATCH,), 0, count)]
        batch = x[rows], jax.tree.map(lambda part: part[rows], told)
        gradient = jax.grad(lambda params: loss(params, of_loss, *batch).mean())(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[0][0]


@functools.partial(jax.jit, static_argnames=("steps", "only"))
def on_labels(
    params: Any, labelled: Any, heldout: Any, key: jax.Array, rate: Any, *, steps: int, only: str = ""
) -> Any:
    """`adapt`, all of the network or a part alone, images moved by up to a pixel."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(rate, steps))
    if only:
        optimizer = optax.chain(optimizer, optax.masked(optax.set_to_zero(), {name: name != only for name in params}))
    options = {"steps": steps, "batch": FEW, "key": key, "augment": moved}
    return adapt(params, apply_cnn, labelled, heldout, optimizer, **options)


def accuracy(params: Any, part: Any) -> float:
    return 100 * float((in_parts(apply_cnn, params, part[0]).argmax(-1) == part[1]).mean())


# A seed ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """What the arms of a seed share.

    Attributes:
        others, labelled, heldout, test: images and labels.
        gallery: images.
        student: first weights.
        embeddings: of the gallery, by the foundation model as it came.
        told: what the adapted model says of the gallery.
        sets: rows of the gallery by curation, as many as the largest size.
        figures: accuracy of the adapted model, and of each set the share in domain and the entropy of its queries.
    """

    others: Any
    labelled: Any
    heldout: Any
    test: Any
    gallery: jax.Array
    student: Any
    embeddings: jax.Array
    told: jax.Array
    sets: dict[str, jax.Array]
    figures: dict[str, Any]
    keys: jax.Array


def build(part: str, data: Path | None, seed: int) -> World:
    """Trains the foundation model, adapts it to the task, embeds and labels the gallery, curates."""
    setting, drawn = SETTINGS[part], read(part, data, seed)
    keys = jax.random.split(jax.random.key(seed), 8)
    others, labelled, heldout, test = (
        jax.tree.map(jnp.asarray, p) for p in (drawn.others, drawn.labelled, drawn.heldout, drawn.test)
    )
    count, gallery = int(test[1].max()) + 1, jnp.asarray(drawn.gallery)
    start = {
        "net": init_cnn(keys[0], 1, count, setting.teacher),
        "projection": init_projection(keys[1], setting.teacher[-1], 64),
    }
    every = jnp.arange(len(gallery)), len(gallery), keys[1], 2e-3
    vfm = train(by_views, start, gallery, None, *every, steps=setting.pretraining)["net"]
    adapted = with_head(vfm, keys[2], count)
    for scope, rate in ADAPT_RATES.items():
        only = "head" if scope == "head" else ""
        adapted = on_labels(adapted, labelled, heldout, keys[3], rate, steps=ADAPT_STEPS, only=only)
    embeddings = in_parts(cnn_features, vfm, gallery)
    queries = in_parts(cnn_features, vfm, jnp.concatenate([labelled[0], heldout[0]]))
    most = max(setting.sizes)
    sets: dict[str, jax.Array] = {
        mode: curate(queries, embeddings, most, mode=mode, key=keys[4]) for mode in SETS if mode != "in domain"
    }
    inside = np.flatnonzero(drawn.in_domain)
    sets["in domain"] = jnp.asarray(np.resize(inside, most))
    precision, entropy = {}, {}
    for name, ids in sets.items():
        chosen = np.asarray(ids[: setting.n])
        precision[name] = float(drawn.in_domain[chosen].mean())
        share = np.asarray(query_counts(queries, embeddings[chosen])) / len(chosen)
        entropy[name] = float(-(share[share > 0] * np.log2(share[share > 0])).sum())
    figures = {"teacher": accuracy(adapted, test), "precision": precision, "entropy": entropy}
    return World(
        others=others,
        labelled=labelled,
        heldout=heldout,
        test=test,
        gallery=gallery,
        student=init_cnn(keys[5], 1, count, setting.student),
        embeddings=embeddings,
        told=in_parts(apply_cnn, adapted, gallery).astype(jnp.float16),
        sets=sets,
        figures=figures | {"base": float(drawn.in_domain.mean()), "queries": len(queries)},
        keys=keys,
    )


def student_of(world: World, setting: Setting, name: str, n: int) -> Any:
    """The student before its finetuning."""
    (kind, curation), start, rate = ARMS[name], {"net": world.student}, setting.rates[name][0]
    if kind == "labels":
        data = *world.labelled, jnp.arange(len(world.labelled[1])), len(world.labelled[1])
    elif kind == "other labels":
        start = {"net": with_head(world.student, world.keys[7], int(world.others[1].max()) + 1)}
        data = *world.others, jnp.arange(len(world.others[1])), len(world.others[1])
    else:
        told = world.told if kind == "oriented" else world.embeddings
        data = world.gallery, told, world.sets[curation], n
        if kind == "agnostic":
            width = world.embeddings.shape[-1]
            start["projection"] = init_projection(world.keys[7], setting.student[-1], width)
    net = train(LOSSES[kind], start, *data, world.keys[6], rate, steps=setting.steps)["net"]
    # A head of other classes, or none that was trained, begins anew.
    return net | {"head": world.student["head"]} if kind in ("other labels", "agnostic") else net


def run_arm(world: World, setting: Setting, name: str, n: int) -> tuple[float, float]:
    """Accuracy before the finetuning and after."""
    student, rate = student_of(world, setting, name, n), setting.rates[name][1]
    tuned = on_labels(student, world.labelled, world.heldout, world.keys[3], rate, steps=FINETUNE_STEPS)
    return accuracy(student, world.test), accuracy(tuned, world.test)


# FLOPs ----------------------------------------------------------------------------------------------------------------


def flops_of(run: Callable[..., Any], *args: Any) -> float:
    """Of one call, as the compiler counts them."""
    found = jax.jit(run).lower(*args).cost_analysis()
    return float(found["flops"])  # type: ignore[index]


def ledger(world: World, setting: Setting) -> dict[str, float]:
    """GFLOPs of the phases."""
    shape, count = world.gallery.shape[1:], int(world.test[1].max()) + 1
    teacher, student = (init_cnn(jax.random.key(0), 1, count, w) for w in (setting.teacher, setting.student))
    few, many, key = jnp.zeros((FEW, *shape)), jnp.zeros((BATCH, *shape)), jax.random.key(0)

    def labels(params: Any, x: jax.Array) -> Any:
        return jax.grad(lambda p: by_labels({"net": p}, key, x, jnp.zeros(len(x), jnp.int32)).mean())(params)

    def outputs(params: Any, x: jax.Array) -> Any:
        return jax.grad(lambda p: by_outputs({"net": p}, key, x, jnp.zeros((len(x), count))).mean())(params)

    def embeddings(params: Any, x: jax.Array) -> Any:
        return jax.grad(lambda p: by_embeddings(p, key, x, jnp.zeros((len(x), setting.teacher[-1]))).mean())(params)

    projection = init_projection(jax.random.key(0), setting.student[-1], setting.teacher[-1])
    each = flops_of(apply_cnn, teacher, many) / BATCH
    queries, e = world.figures["queries"], setting.teacher[-1]
    # Of the curation the products of all queries with all of the gallery.
    found = {
        "adapt the teacher": len(ADAPT_RATES) * ADAPT_STEPS * flops_of(labels, teacher, few),
        "embed the gallery": each * setting.gallery,
        "curate": 2 * queries * setting.gallery * e,
        "label the set": each * setting.n,
        "transfer, oriented": setting.steps * flops_of(outputs, student, many),
        "transfer, agnostic": setting.steps * flops_of(embeddings, {"net": student, "projection": projection}, many),
        "labels in its place": setting.steps * flops_of(labels, student, many),
        "finetune": FINETUNE_STEPS * flops_of(labels, student, few),
    }
    return {name: value / 1e9 for name, value in found.items()}


# The claim ------------------------------------------------------------------------------------------------------------

Rows = dict[str, list[float]]


def mean(values: list[float]) -> float:
    return statistics.mean(values)


def cell(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{mean(values):.2f} ± {error:.2f}"


def compare(part: str, data: Path | None, seeds: list[int]) -> tuple[dict[str, Bar], dict[str, Any]]:
    """All arms of all seeds, the ablations, and the bars."""
    setting = SETTINGS[part]
    before, after = ({name: [] for name in ARMS} for _ in range(2))
    by_size: dict[str, Rows] = {name: {str(n): [] for n in setting.sizes} for name in SIZED}
    worlds: list[dict[str, Any]] = []
    flops: dict[str, float] = {}
    for seed in seeds:
        began = time.perf_counter()
        world = build(part, data, seed)
        worlds.append(world.figures)
        flops = flops or ledger(world, setting)
        for name in ARMS:
            first, last = run_arm(world, setting, name, setting.n)
            before[name].append(first)
            after[name].append(last)
        for name, sizes in by_size.items():
            for n in setting.sizes:
                sizes[str(n)].append(after[name][-1] if n == setting.n else run_arm(world, setting, name, n)[1])
        print(f"{part}, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    show(part, seeds, before, after, worlds, by_size, flops)
    means = {name: mean(values) for name, values in after.items()}
    balanced, random, inside = (means[f"oriented, {s}"] for s in ("query-balanced set", "random set", "all in domain"))
    precision = {name: mean([w["precision"][name] for w in worlds]) for name in SETS}
    base = mean([w["base"] for w in worlds])
    bars = {
        "query-balanced over from scratch, points": Bar(balanced - means["from scratch"], low=5),
        "query-balanced over agnostic, points": Bar(balanced - means["agnostic, random set"], low=1),
        "query-balanced over random, points": Bar(balanced - random, low=1),
        "best matches over random, points": Bar(means["oriented, best matches"] - random, low=1),
        "precision of query-balanced over base rate": Bar(precision["query_balanced"] / base, low=3),
        "precision of best matches over base rate": Bar(precision["best_matches"] / base, low=3),
        "gap from random to in domain closed, query-balanced": Bar((balanced - random) / (inside - random), low=0.5),
    }
    figures = {
        "accuracy": after,
        "before finetuning": before,
        "seeds": worlds,
        "by size": by_size,
        "GFLOPs": flops,
    }
    return {f"{part}: {name}": bar for name, bar in bars.items()}, figures


def show(
    part: str,
    seeds: list[int],
    before: Rows,
    after: Rows,
    worlds: list[dict[str, Any]],
    by_size: dict[str, Rows],
    flops: dict[str, float],
) -> None:
    """Prints the tables."""
    teacher = [world["teacher"] for world in worlds]
    scratch = mean(after["from scratch"])
    table = Table(title=f"{part}: accuracy in % (± s.e.), {len(seeds)} seeds; the adapted teacher {cell(teacher)}")
    for column in ("arm", "before finetuning", "after", "each", "gap to the teacher closed", "in domain", "bits"):
        table.add_column(column)
    for name, values in after.items():
        curation = ARMS[name][1]
        closed = (mean(values) - scratch) / (mean(teacher) - scratch)
        each = " ".join(f"{v:.1f}" for v in values)
        kinds = ("precision", "entropy") if curation else ()
        told = [f"{mean([world[kind][curation] for world in worlds]):.2f}" for kind in kinds]
        table.add_row(name, cell(before[name]), cell(values), each, f"{closed:.2f}", *told)
    sizes = Table(title=f"{part}: accuracy against the size of the set, oriented")
    for column in ("arm", *next(iter(by_size.values()))):
        sizes.add_column(column)
    for mode, rows in by_size.items():
        sizes.add_row(mode, *(cell(values) for values in rows.values()))
    work = Table(title=f"{part}: GFLOPs of the phases")
    for column in flops:
        work.add_column(column)
    work.add_row(*(f"{value:.2f}" for value in flops.values()))
    console = Console(width=150)
    for shown in (table, sizes, work):
        console.print(shown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory that holds images/mnist and images/cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--parts", nargs="+", choices=sorted(SETTINGS), help="all that there are data for")
    args = parser.parse_args()
    parts = args.parts or ["digits", *(["mnist"] if args.data else [])]
    if "mnist" in parts and args.data is None:
        raise SystemExit("mnist needs --data: the directory that holds images/mnist and images/cifar10")
    bars: dict[str, Bar] = {}
    figures: dict[str, Any] = {}
    for part in parts:
        found, figures[part] = compare(part, args.data, args.seeds)
        bars |= found
    return conclude("task_oriented_transfer", bars, json.loads(json.dumps(figures)))


if __name__ == "__main__":
    raise SystemExit(main())
