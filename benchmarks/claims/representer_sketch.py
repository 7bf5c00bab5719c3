"""Claims of the Representer Sketch: a network's accuracy from a table 50 times smaller, read by hashing.

python -m benchmarks.claims.representer_sketch --data DIR [--tasks digits,adult,mnist,bibtex]

The digits come with scikit-learn (`pip install -e '.[claims]'`), DIR/images/mnist, DIR/tabular/adult and
DIR/extreme/bibtex are as in the other claims. Digits and MNIST are told odd from even; bookmarks of bibtex with one of
its ten commonest tags from those without.
"""

import argparse
import csv
import dataclasses
import lzma
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.bars import Bar, conclude
from benchmarks.mnist import read_mnist
from benchmarks.tagged import read_tagged
from effjax.sketch import (
    RepresenterKernel,
    RepresenterSketch,
    build_sketch,
    distillation_loss,
    init_representer,
    query_sketch,
    refit_sketch,
)

SEEDS = (0, 1, 2)
HASH_SEEDS = 5
RATES = (1e-3, 3e-3, 1e-2)  # of distilled small networks; chosen on held-out examples
HIDDEN = (512, 256, 128)  # of the teacher
CLIP = 4.0  # of the teacher's logits

Data = dict[str, tuple[jax.Array, jax.Array]]  # "train", "held out", "test": inputs, labels of 0 and 1
Net = list[tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A data set, how long to train on it, and the kernel and tables for it."""

    load: Callable[[Path, int], Data]
    teacher_steps: int
    narrow_steps: int  # of the network whose first layer is where the projection begins; 0 for a random projection
    steps: int
    batch: int
    noise: float
    dim: int
    points: int
    width: float
    hashes: int
    norm: float
    refit: int  # steps of conjugate gradients on the counts
    copies: int  # of the training inputs for that, each with noise of its own
    shapes: tuple[tuple[int, int], ...]  # rows and buckets; the first is the one of the bars


def parts(x: np.ndarray, y: np.ndarray, train: int, held: int, seed: int) -> Data:
    order = np.random.default_rng(seed).permutation(len(x))
    cuts = {"train": order[:train], "held out": order[train : train + held], "test": order[train + held :]}
    return {name: (jnp.asarray(x[ids], jnp.float32), jnp.asarray(y[ids], jnp.float32)) for name, ids in cuts.items()}


def digits(folder: Path, seed: int) -> Data:
    del folder
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("representer_sketch: the digits come with scikit-learn: pip install -e '.[claims]'") from None
    x, y = load_digits(return_X_y=True)
    x = x / 16
    return parts(x - x.mean(0), y % 2, 1147, 200, seed)


def mnist(folder: Path, seed: int) -> Data:
    def ready(x: np.ndarray, y: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(x / np.float32(255) - 0.1307, jnp.float32), jnp.asarray(y % 2, jnp.float32)

    (x, y), test = read_mnist(folder)
    order = np.random.default_rng(seed).permutation(len(x))
    return {
        "train": ready(x[order[5000:]], y[order[5000:]]),
        "held out": ready(x[order[:5000]], y[order[:5000]]),
        "test": ready(*test),
    }


def adult(folder: Path, seed: int) -> Data:
    def rows(name: str) -> list[list[str]]:
        with lzma.open(folder / "tabular" / "adult" / name, "rt") as file:
            return [row for row in list(csv.reader(file, skipinitialspace=True))[1:] if len(row) == 15]

    train, test = rows("adult.data.csv.xz"), rows("adult.test.csv.xz")
    numbers = (0, 2, 4, 10, 11, 12)
    columns = []
    for i in range(14):
        values = [row[i] for row in train + test]
        if i in numbers:
            column = np.asarray(values, np.float64)
            column = np.log1p(column) if i in (2, 10, 11) else column
            columns.append(((column - column.mean()) / column.std())[:, None])
        else:
            kinds, code = np.unique(values, return_inverse=True)
            columns.append(np.eye(len(kinds))[code])
    x, n = np.concatenate(columns, 1).astype(np.float32), len(train)
    y = np.asarray([">50K" in row[14] for row in train + test], np.float32)
    order = np.random.default_rng(seed).permutation(n)
    cuts = {"train": order[3000:], "held out": order[:3000], "test": np.arange(n, len(x))}
    return {name: (jnp.asarray(x[ids]), jnp.asarray(y[ids])) for name, ids in cuts.items()}


def bibtex(folder: Path, seed: int) -> Data:
    (x, tags), (test_x, test_tags) = (read_tagged(folder, "bibtex", part) for part in ("train", "test"))
    common = {tag for tag, _ in Counter(tag for row in tags for tag in row).most_common(10)}
    found = parts(x, np.asarray([not common.isdisjoint(row) for row in tags]), len(x) - 800, 800, seed)
    test = np.asarray([not common.isdisjoint(row) for row in test_tags])
    return found | {"test": (jnp.asarray(test_x), jnp.asarray(test, jnp.float32))}


def net(key: jax.Array, sizes: tuple[int, ...]) -> Net:
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [(jax.random.normal(k, (n, m)) * jnp.sqrt(2 / n), jnp.zeros(m)) for k, n, m in pairs]


@jax.jit
def logits(layers: Net, x: jax.Array) -> jax.Array:
    for w, b in layers[:-1]:
        x = jax.nn.relu(x @ w + b)
    return x @ layers[-1][0] + layers[-1][1]


def numbers(layers: Net) -> int:
    return sum(x.size for x in jax.tree.leaves(layers))


def multiply_adds(layers: Net) -> int:
    return sum(w.size for w, _ in layers)


@partial(jax.jit, static_argnames=("loss", "steps", "batch"))
def train(
    loss: Callable[..., jax.Array],
    params: Any,
    x: jax.Array,
    y: jax.Array,
    key: jax.Array,
    rate: jax.Array,
    noise: jax.Array,
    *rest: Any,
    steps: int,
    batch: int,
) -> Any:
    """Adam with a cosine schedule on random batches with noise added to the inputs."""
    optimizer = optax.scale_by_adam()

    def step(carry: Any, at: Any) -> tuple[Any, None]:
        (params, moments), (key, i) = carry, at
        for_ids, for_noise = jax.random.split(key)
        ids = jax.random.randint(for_ids, (batch,), 0, x.shape[0])
        inputs = x[ids] + noise * jax.random.normal(for_noise, (batch, x.shape[1]))
        gradient = jax.grad(loss)(params, inputs, y[ids], *rest)
        updates, moments = optimizer.update(gradient, moments, params)
        speed = -rate * 0.5 * (1 + jnp.cos(jnp.pi * i / steps))
        # A rate for each of several students where their parameters are stacked.
        updates = jax.tree.map(
            lambda u: speed.reshape(-1, *(1,) * (u.ndim - 1)) * u if speed.ndim else speed * u, updates
        )
        return (optax.apply_updates(params, updates), moments), None

    along = (jax.random.split(key, steps), jnp.arange(steps))
    return jax.lax.scan(step, (params, optimizer.init(params)), along)[0][0]


def label_loss(layers: Net, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(logits(layers, x)[:, 0], y).mean()


def imitation_loss(students: Net, x: jax.Array, y: jax.Array, teacher: Net, norm: jax.Array) -> jax.Array:
    """Of student networks, stacked, against the clipped logits of their teacher."""
    target = jnp.clip(logits(teacher, x), -CLIP, CLIP)
    return jnp.square(jax.vmap(logits, (0, None))(students, x) - target).mean((1, 2)).sum()


def kernel_loss(kernel: RepresenterKernel, x: jax.Array, y: jax.Array, teacher: Net, norm: jax.Array) -> jax.Array:
    return distillation_loss(kernel, x, jnp.clip(logits(teacher, x), -CLIP, CLIP), norm=norm)[0]


def narrow(layers: tuple[jax.Array, Net], x: jax.Array) -> jax.Array:
    """A network behind a linear layer as narrow as the kernel's projection."""
    return logits(layers[1], x @ layers[0])


def narrow_loss(layers: tuple[jax.Array, Net], x: jax.Array, y: jax.Array, teacher: Net) -> jax.Array:
    return jnp.square(narrow(layers, x) - jnp.clip(logits(teacher, x), -CLIP, CLIP)).mean()


def narrow_projection(task: Task, teacher: Net, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array | None:
    """The first layer of a narrow network that imitates the teacher, its outputs made uncorrelated on the inputs."""
    if not task.narrow_steps:
        return None
    keys = jax.random.split(key, 3)
    layers = (
        jax.random.normal(keys[0], (x.shape[1], task.dim)) / x.shape[1] ** 0.5,
        net(keys[1], (task.dim, 128, 128, 1)),
    )
    fitted, _ = train(
        narrow_loss,
        layers,
        x,
        y,
        keys[2],
        jnp.float32(1e-3),
        jnp.float32(task.noise),
        teacher,
        steps=task.narrow_steps,
        batch=task.batch,
    )
    return fitted @ jnp.linalg.inv(jnp.linalg.cholesky(jnp.cov((x @ fitted).T))).T


def accuracy(y: jax.Array, labels: jax.Array) -> float:
    return 100 * float(((y[:, 0] > 0) == (labels > 0.5)).mean())


def pruned(layers: Net, keep: int) -> Net:
    """The `keep` numbers of largest size stay; their places are not counted, in favour of pruning."""
    sizes = jnp.concatenate([jnp.abs(x).ravel() for x in jax.tree.leaves(layers)])
    least = jnp.sort(sizes)[-keep]
    return jax.tree.map(lambda x: jnp.where(jnp.abs(x) >= least, x, 0), layers)


@partial(jax.jit, static_argnames=("rows", "buckets"))
def sketched(kernel: RepresenterKernel, key: jax.Array, x: jax.Array, *, rows: int, buckets: int) -> jax.Array:
    """A sketch with fresh hash functions, queried: the mean, and the median of the means of ten groups."""
    sketch = build_sketch(kernel, rows=rows, buckets=buckets, key=key)
    lsh = sketch.hash_functions()
    return jnp.stack([query_sketch(sketch, x, hash_functions=lsh, groups=g) for g in (None, 10)])


@partial(jax.jit, static_argnames=("rows", "buckets", "steps"))
def refitted(
    kernel: RepresenterKernel,
    key: jax.Array,
    train: tuple[jax.Array, jax.Array],
    x: jax.Array,
    *,
    rows: int,
    buckets: int,
    steps: int,
) -> jax.Array:
    """The same sketch, its counts fitted to the teacher's clipped logits; queried by the mean."""
    sketch = refit_sketch(build_sketch(kernel, rows=rows, buckets=buckets, key=key), *train, steps=steps)
    return query_sketch(sketch, x)


def sketch_numbers(kernel: RepresenterKernel, rows: int, buckets: int) -> int:
    abstract = jax.eval_shape(lambda k: build_sketch(k, rows=rows, buckets=buckets, key=jax.random.key(0)), kernel)
    return abstract.nbytes // 4


def sketch_operations(kernel: RepresenterKernel, rows: int) -> int:
    """Multiply-adds: projecting, hashing with dense directions, combining codes; and one addition a look-up."""
    n, dim = kernel.projection.shape
    return n * dim + rows * kernel.hashes * (dim + 1) + rows * kernel.alpha.shape[1]


def one_seed(task: Task, data: Data, seed: int) -> tuple[dict[str, float], Net, RepresenterKernel]:
    (x, y), (held_x, held_y), (test_x, test_y) = data["train"], data["held out"], data["test"]
    keys = jax.random.split(jax.random.key(seed), 6)
    options = {"batch": task.batch}
    width, noise = x.shape[1], jnp.float32(task.noise)
    teacher = net(keys[0], (width, *HIDDEN, 1))
    teacher = train(label_loss, teacher, x, y, keys[1], jnp.float32(1e-3), noise, steps=task.teacher_steps, **options)
    scores = {"teacher": accuracy(logits(teacher, test_x), test_y)}
    start = init_representer(
        keys[2],
        x,
        outputs=1,
        dim=task.dim,
        points=task.points,
        width=task.width,
        hashes=task.hashes,
        projection=narrow_projection(task, teacher, x, y, keys[5]),
    )
    rest = (teacher, jnp.float32(task.norm))
    kernel = train(kernel_loss, start, x, y, keys[3], jnp.float32(5e-3), noise, *rest, steps=task.steps, **options)
    exact = kernel(test_x)
    scores["kernel"] = accuracy(exact, test_y)
    for rows, buckets in task.shapes:
        name, used = f"{rows}x{buckets}", sketch_numbers(kernel, rows, buckets)
        found = [
            sketched(kernel, jax.random.key(100 + i), test_x, rows=rows, buckets=buckets) for i in range(HASH_SEEDS)
        ]
        noisy = jnp.concatenate([x] * task.copies)
        noisy += noise * jax.random.normal(keys[4], noisy.shape)
        to_imitate = noisy, jnp.clip(logits(teacher, noisy), -CLIP, CLIP)
        shape = {"rows": rows, "buckets": buckets, "steps": task.refit}
        fits = [refitted(kernel, jax.random.key(100 + i), to_imitate, test_x, **shape) for i in range(HASH_SEEDS)]
        scores[f"sketch {name}"] = statistics.mean(accuracy(f, test_y) for f in fits)
        scores[f"sketch, not refitted {name}"] = statistics.mean(accuracy(f[0], test_y) for f in found)
        scores[f"sketch, median of means {name}"] = statistics.mean(accuracy(f[1], test_y) for f in found)
        scores[f"rmse {name}"] = float(jnp.sqrt(jnp.mean(jnp.square(jnp.stack(found)[:, 0] - exact))))
        scores[f"pruned {name}"] = accuracy(logits(pruned(teacher, used), test_x), test_y)
        hidden = max(1, round((used - 1) / (width + 2)))
        small = net(keys[4], (width, hidden, 1))
        stacked = jax.tree.map(lambda w: jnp.stack([w] * len(RATES)), small)
        stacked = train(
            imitation_loss, stacked, x, y, keys[3], jnp.asarray(RATES), noise, *rest, steps=task.steps, **options
        )
        swept = [jax.tree.map(lambda w, i=i: w[i], stacked) for i in range(len(RATES))]
        best = max(swept, key=lambda s: accuracy(logits(s, held_x), held_y))
        scores[f"distilled {name}"] = accuracy(logits(best, test_x), test_y)
    return scores, teacher, kernel


def bias(kernel: RepresenterKernel, x: jax.Array, rows: int, buckets: int) -> tuple[float, float]:
    """Over 200 hash seeds: the median and the 99th percentile of the bias over its standard error."""
    run = jax.jit(lambda key: sketched(kernel, key, x, rows=rows, buckets=buckets)[0, :, 0])
    found = np.stack([run(jax.random.key(1000 + i)) for i in range(200)])
    off = np.abs(found.mean(0) - np.asarray(kernel(x))[:, 0]) / (found.std(0, ddof=1) / np.sqrt(200))
    return float(np.median(off)), float(np.percentile(off, 99))


def microseconds(run: Callable[[jax.Array], jax.Array], x: jax.Array, seconds: float = 0.5) -> float:
    """The median of calls, each of which is waited for."""
    run(x).block_until_ready()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 20:
        began = time.perf_counter()
        run(x).block_until_ready()
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def timing(teacher: Net, kernel: RepresenterKernel, x: jax.Array, rows: int, buckets: int) -> dict[str, float]:
    """Microseconds a call at one query and at 256: the network by XLA, the sketch by XLA and natively; interleaved."""
    sketch: RepresenterSketch = build_sketch(kernel, rows=rows, buckets=buckets, key=jax.random.key(0))
    lsh = sketch.hash_functions()

    def ask(implementation: str) -> Callable[[jax.Array], jax.Array]:
        run = partial(query_sketch, implementation=implementation)
        return partial(jax.jit(lambda s, f, x: run(s, x, hash_functions=f)), sketch, lsh)

    arms = {"network": partial(logits, teacher), "sketch, XLA": ask("reference"), "sketch, native": ask("cpu")}
    out: dict[str, list[float]] = {}
    for _ in range(3):
        for batch in (1, 256):
            for name, run in arms.items():
                out.setdefault(f"{name}, batch {batch}", []).append(microseconds(run, x[:batch]))
    return {name: min(times) for name, times in out.items()}


def rmse_ratio(kernel: RepresenterKernel, x: jax.Array) -> float:
    """Error of the sketch with 1,000 rows over that with 100; the root of a tenth is 0.316."""
    exact, errors = kernel(x), []
    for rows in (100, 1000):
        found = [sketched(kernel, jax.random.key(i), x, rows=rows, buckets=32)[0] - exact for i in range(HASH_SEEDS)]
        errors.append(float(jnp.sqrt(jnp.mean(jnp.square(jnp.stack(found))))))
    return errors[1] / errors[0]


def report(name: str, task: Task, folder: Path) -> tuple[dict[str, Bar], dict[str, Any]]:
    seeds = []
    for seed in SEEDS:
        data = task.load(folder, seed)
        scores, teacher, kernel = one_seed(task, data, seed)
        seeds.append(scores)
        print(f"{name}, seed {seed}: " + ", ".join(f"{k} {v:.2f}" for k, v in scores.items()), flush=True)
    mean = {k: statistics.mean(s[k] for s in seeds) for k in seeds[0]}

    def spread(arm: str) -> str:
        each = [s[arm] for s in seeds]
        return f"{mean[arm]:.2f} ({min(each):.2f}, {max(each):.2f})"

    print(f"\n{name}: test accuracy, %, mean (least, most) of {len(SEEDS)} seeds; {HASH_SEEDS} hash seeds each")
    print(f"  teacher of {numbers(teacher):,} numbers: {spread('teacher')}; kernel: {spread('kernel')}")
    extra: dict[str, Any] = {f"{name}: {k}": v for k, v in mean.items()}
    saved = {}
    for rows, buckets in task.shapes:
        shape, used = f"{rows}x{buckets}", sketch_numbers(kernel, rows, buckets)
        storage = numbers(teacher) / used
        work = multiply_adds(teacher) / sketch_operations(kernel, rows)
        saved[shape] = (storage, work)
        print(f"  {shape}: {used:,} numbers, storage {storage:.1f}x, operations {work:.1f}x")
        print(f"    rmse of the kernel       {spread(f'rmse {shape}')}")
        for arm in ("sketch", "sketch, not refitted", "sketch, median of means", "pruned", "distilled"):
            print(f"    {arm:<24} {spread(f'{arm} {shape}')}")
    extra[f"{name}: storage and operations"] = saved
    rows, buckets = task.shapes[0]
    first = f"{rows}x{buckets}"
    x = data["test"][0]
    times = timing(teacher, kernel, x, rows, buckets)
    for batch in (1, 256):
        arms = ", ".join(f"{k.split(', batch')[0]} {v:.1f}" for k, v in times.items() if k.endswith(f"batch {batch}"))
        print(f"  {first}, microseconds for {batch}: {arms}")
    extra[f"{name}: microseconds"] = times
    middle, high = bias(kernel, x[:200], rows, buckets)
    extra[f"{name}: bias over standard error, median"] = middle
    drop = mean["teacher"] - mean[f"sketch {first}"]
    bars = {
        f"{name} {first}: storage, times smaller": Bar(saved[first][0], low=50, paper="up to 114"),
        f"{name} {first}: operations, times fewer": Bar(saved[first][1], low=30, paper="up to 59"),
        f"{name} {first}: teacher minus sketch, points": Bar(drop, high=2.5, paper="0"),
        f"{name} {first}: teacher minus sketch, points, goal": Bar(drop, high=1, paper="0"),
        f"{name}: bias over standard error, 200 seeds, 99 % of queries": Bar(high, high=3),
    }
    if name == "digits":  # where the bars were set
        ahead = mean[f"sketch {first}"] - mean[f"pruned {first}"]
        bars[f"digits {first}: sketch minus pruned, points"] = Bar(ahead, low=10)
        bars["digits: rmse of 1,000 rows over that of 100"] = Bar(rmse_ratio(kernel, x), low=0.25, high=0.45)
    print(flush=True)
    return bars, extra


TASKS = {
    "digits": Task(
        load=digits,
        teacher_steps=600,
        narrow_steps=0,
        steps=3000,
        batch=128,
        noise=0.15,
        dim=8,
        points=200,
        width=1.5,
        hashes=2,
        norm=2e-4,
        refit=5,
        copies=8,
        shapes=((300, 8), (150, 8)),
    ),
    "adult": Task(
        load=adult,
        teacher_steps=600,
        narrow_steps=0,
        steps=2000,
        batch=256,
        noise=0.15,
        dim=8,
        points=150,
        width=2.0,
        hashes=1,
        norm=2e-4,
        refit=20,
        copies=1,
        shapes=((200, 16),),
    ),
    "mnist": Task(
        load=mnist,
        teacher_steps=800,
        narrow_steps=8000,
        steps=6000,
        batch=128,
        noise=0.1,
        dim=8,
        points=400,
        width=1.5,
        hashes=2,
        norm=2e-4,
        refit=40,
        copies=1,
        shapes=((300, 16),),
    ),
    "bibtex": Task(
        load=bibtex,
        teacher_steps=300,
        narrow_steps=0,
        steps=2000,
        batch=128,
        noise=0.15,
        dim=8,
        points=200,
        width=1.5,
        hashes=2,
        norm=2e-4,
        refit=5,
        copies=4,
        shapes=((300, 16),),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="directory that holds images/ and tabular/")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of " + ", ".join(TASKS))
    args = parser.parse_args()
    bars: dict[str, Bar] = {}
    extra: dict[str, Any] = {}
    for name in args.tasks.split(","):
        more, figures = report(name, TASKS[name], Path(args.data))
        bars, extra = bars | more, extra | figures
    return conclude("representer_sketch", bars, extra)


if __name__ == "__main__":
    raise SystemExit(main())
