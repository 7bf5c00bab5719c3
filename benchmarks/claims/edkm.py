"""Claims of eDKM: gradients of dense DKM in a hundredth of its memory, and the accuracy of clustered training.

python -m benchmarks.claims.edkm [--data DIR]    (DIR/images/mnist: the four MNIST files as npz and idx.gz)
"""

import jax

jax.config.update("jax_num_cpu_devices", 8)  # before a backend starts: the sharded index is measured on eight

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import linen as nn  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

import effjax as ej  # noqa: E402
from benchmarks.bars import Bar, conclude  # noqa: E402
from benchmarks.mnist import read_mnist  # noqa: E402
from effjax.quantize import DKM, EDKM, RTN, dkm_soft, edkm_soft  # noqa: E402
from effjax.quantize.centroids import nearest  # noqa: E402

DEVICES = 8
SEEDS = (0, 1, 2)
RATES = (3e-4, 1e-3, 3e-3)
WIDTHS = (64, 32)
BATCH = 256
EPOCHS = {"fp32": 6, "finetune": 2}
COLD = 0.02  # the temperature ends at this fraction of where it began
WHERE = "*/kernel"


def weights(n: int) -> jax.Array:
    """Gaussian weights of deviation 0.02 that bfloat16 holds."""
    return (0.02 * jax.random.normal(jax.random.key(0), (n,))).astype(jnp.bfloat16).astype(jnp.float32)


def pulled(fn: Callable[..., Any]) -> Callable[..., Any]:
    def gradient(w: jax.Array, c: jax.Array, tau: jax.Array, g: jax.Array) -> Any:
        (_, centroids), pull = jax.vjp(fn, w, c, tau)
        return pull((g, jnp.zeros_like(centroids)))

    return gradient


def largest_difference(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def kept_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """Bytes that the closure of `vjp` holds for the backward pass."""
    closure = jax.eval_shape(lambda *a: jax.vjp(fn, *a)[1], *args)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(closure))


def one_matrix(n: int, entries: int, iterations: int, *, repeats: int = 5) -> dict[str, float]:
    """Gradients, bytes and times of one weight: dense, dense recomputed in the backward pass, unique."""
    w, c, tau = weights(n), jnp.linspace(-0.06, 0.06, entries), jnp.float32(1e-4)
    g = jax.random.normal(jax.random.key(1), w.shape)
    dense, unique = partial(dkm_soft, iterations=iterations), partial(edkm_soft, iterations=iterations)
    arms = {"dense": dense, "remat": jax.checkpoint(dense), "unique": unique}
    out: dict[str, Any] = {"weights": n, "entries": entries, "iterations": iterations}
    out["distinct"] = len(np.unique(np.asarray(w)))
    programs = {name: jax.jit(pulled(fn)).lower(w, c, tau, g).compile() for name, fn in arms.items()}
    results = {name: jax.block_until_ready(program(w, c, tau, g)) for name, program in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(w, c, tau, g))
            times[name].append(time.perf_counter() - began)
    for name in arms:
        out[f"{name} kept bytes"] = kept_bytes(arms[name], w, c, tau)
        out[f"{name} temporary bytes"] = int(programs[name].memory_analysis().temp_size_in_bytes)
        out[f"{name} seconds"] = statistics.median(times[name])
    for i, name in enumerate(("weights", "centroids")):
        out[f"gradient difference, {name}"] = largest_difference(results["unique"][i], results["dense"][i])
    return out


def sharded_kept_bytes(n: int, entries: int) -> tuple[int, float]:
    """Bytes that one of eight devices keeps, and the difference of its gradient from the unsharded one."""
    w, c, tau = weights(n), jnp.linspace(-0.06, 0.06, entries), jnp.float32(1e-4)
    g = jax.random.normal(jax.random.key(1), w.shape)
    alone = jax.jit(pulled(edkm_soft))(w, c, tau, g)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = partial(edkm_soft, axis="data")
    with jax.set_mesh(mesh):
        everywhere = NamedSharding(mesh, PartitionSpec())
        args = jax.device_put((w, c, tau), everywhere)
        together = jax.jit(pulled(spread))(*args, jax.device_put(g, everywhere))
        closure = jax.jit(lambda *a: jax.vjp(spread, *a)[1])(*args)
    kept = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(closure))
    return kept, max(largest_difference(a, b) for a, b in zip(together[:2], alone[:2], strict=True))


def memory_claims() -> tuple[dict[str, Bar], dict[str, Any]]:
    rows = [one_matrix(1 << 16, entries, iterations) for entries in (4, 8, 16) for iterations in (1, 3, 5)]
    rows += [one_matrix(1 << 20, 8, 3)]
    print(
        f"{'weights':>8} K  T distinct |   kept bytes: dense     unique  ratio | "
        "temporary: dense     unique  ratio | milliseconds"
    )
    for r in rows:
        kept, temp = (r[f"dense {what} bytes"] / r[f"unique {what} bytes"] for what in ("kept", "temporary"))
        print(
            f"{r['weights']:>8} {r['entries']:<2} {r['iterations']} {r['distinct']:>8} | {r['dense kept bytes']:>19,} "
            f"{r['unique kept bytes']:>10,} {kept:>5.0f}x | {r['dense temporary bytes']:>16,} "
            f"{r['unique temporary bytes']:>10,} {temp:>5.0f}x | dense {1e3 * r['dense seconds']:.1f}, recomputed "
            f"{1e3 * r['remat seconds']:.1f}, unique {1e3 * r['unique seconds']:.1f}"
        )
    large, small = rows[-1], next(r for r in rows if r["entries"] == 8 and r["iterations"] == 3)
    shard, difference = sharded_kept_bytes(1 << 20, 8)
    print(f"index over {DEVICES} devices: {shard:,} bytes kept by each; gradient differs by {difference:.1e}")
    gradient = max(v for r in rows for name, v in r.items() if name.startswith("gradient"))

    def ratio(row: dict[str, Any], what: str) -> float:
        return row[f"dense {what}"] / row[f"unique {what}"]

    bars = {
        "gradient, largest difference from dense": Bar(gradient, high=1e-4),
        "kept bytes, dense over unique, 2^20 weights": Bar(
            ratio(large, "kept bytes"), low=100, paper="16x on one device, 130x on 8"
        ),
        "temporary bytes, dense over unique, 2^20": Bar(ratio(large, "temporary bytes"), low=100),
        "kept bytes ratio, 2^16 weights": Bar(ratio(small, "kept bytes"), low=50),
        "temporary bytes ratio, 2^16": Bar(ratio(small, "temporary bytes"), low=20),
        "kept bytes, one device over one of 8": Bar(large["unique kept bytes"] / shard, low=7.5),
        "sharded gradient, largest difference": Bar(difference, high=1e-4),
    }
    extra = {
        "kept bytes, dense over one of 8 devices": large["dense kept bytes"] / shard,
        "recomputed: temporary bytes over unique": large["remat temporary bytes"] / large["unique temporary bytes"],
        "time, dense over unique, 2^20": ratio(large, "seconds"),
        "distinct values of 2^20": large["distinct"],
    }
    return bars, extra


class MLP(nn.Module):
    """A classifier small enough that two bits a weight hurt it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in WIDTHS:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StraightThrough(DKM):
    """The usual baseline: hard k-means weights forward, the gradient passed on as if they were the weights."""

    def soft(self, w: jax.Array, centroids: jax.Array, tau: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = jnp.sort(centroids)
        code = nearest(w[:, None, :], c[None, None]).reshape(-1)
        sums, n = jnp.zeros_like(c).at[code].add(w.reshape(-1)), jnp.zeros_like(c).at[code].add(1)
        c = jnp.where(n > 0, sums / jnp.maximum(n, 1), c)
        return w + jax.lax.stop_gradient(c[code].reshape(w.shape) - w), c


Data = dict[str, tuple[jax.Array, jax.Array]]


def load(directory: str) -> Data:
    def ready(x: np.ndarray, y: np.ndarray) -> tuple[jax.Array, jax.Array]:
        flat = (x.astype(np.float32) / 255 - 0.1307) / 0.3081
        return jnp.asarray(flat), jnp.asarray(y.astype(np.int32))

    (x, y), test = read_mnist(Path(directory))
    return {"train": ready(x[:-5000], y[:-5000]), "held out": ready(x[-5000:], y[-5000:]), "test": ready(*test)}


MODEL = MLP()


def loss_of(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = ej.lift(MODEL.apply)({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def right(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return 100 * (ej.lift(MODEL.apply)({"params": params}, x).argmax(-1) == y).mean()


def accuracy(params: Any, data: Data, part: str = "test") -> float:
    return float(right(params, *data[part]))


@partial(jax.jit, static_argnums=0)
def run_steps(
    method: Any, carry: Any, x: jax.Array, y: jax.Array, order: jax.Array, rate: jax.Array, total: jax.Array
) -> Any:
    """Adam with a cosine schedule over the batches `order [steps, batch]`."""

    def step(carry: Any, ids: jax.Array) -> tuple[Any, jax.Array]:
        params, moments, state, count = carry
        done = count / total

        def loss(params: Any) -> tuple[jax.Array, Any]:
            soft, moved = params, state
            if method is not None:
                soft, moved = ej.quantize.palettize(params, method, state, where=WHERE, temperature=COLD**done)
            logits = MODEL.apply({"params": soft}, x[ids])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[ids]).mean(), moved

        (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = optax.scale_by_adam().update(gradient, moments, params)
        speed = -rate * 0.5 * (1 + jnp.cos(jnp.pi * done))
        params = optax.apply_updates(params, jax.tree.map(lambda u: speed * u, updates))
        return (params, moments, state, count + 1), value

    return jax.lax.scan(step, carry, order)


def train(
    params: Any, data: Data, rate: float, epochs: int, seed: int, method: Any = None, watch: Any = None
) -> tuple[Any, Any]:
    """Trained parameters and clusters; `watch(params, state, fraction)` is called five times."""
    x, y = data["train"]
    n = x.shape[0] // BATCH * BATCH
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(x.shape[0])[:n].reshape(-1, BATCH) for _ in range(epochs)])
    state = None if method is None else ej.quantize.init_clusters(params, method, where=WHERE)
    carry = (params, optax.scale_by_adam().init(params), state, jnp.float32(0))
    parts = [order] if watch is None else np.array_split(order[: len(order) // 5 * 5], 5)
    for part in parts:
        carry, _ = run_steps(method, carry, x, y, jnp.asarray(part), jnp.float32(rate), jnp.float32(len(order)))
        if watch is not None:
            watch(carry[0], carry[2], float(carry[3]) / len(order))
    return carry[0], carry[2]


def gap_report(data: Data, method: Any) -> tuple[list[float], Callable[[Any, Any, float], None]]:
    """Collects loss with soft weights minus loss with hard ones, on held-out images."""
    gaps: list[float] = []
    x, y = data["held out"]

    def watch(params: Any, state: Any, done: float) -> None:
        soft, moved = ej.quantize.palettize(params, method, state, where=WHERE, temperature=COLD**done)
        gaps.append(float(loss_of(soft, x, y) - loss_of(ej.quantize.harden(params, moved), x, y)))

    return gaps, watch


def trajectories(params: Any, data: Data) -> tuple[float, float]:
    """Distance of dense and unique training after 50 steps, over the norm of the parameters, and over the way gone."""
    x, y = data["train"]
    order = jnp.asarray(np.random.default_rng(0).permutation(x.shape[0])[: 50 * BATCH].reshape(50, BATCH))
    ends = []
    for method in (DKM(bits=2, round_to="bfloat16"), EDKM(bits=2)):
        state = ej.quantize.init_clusters(params, method, where=WHERE)
        carry = (params, optax.scale_by_adam().init(params), state, jnp.float32(0))
        (end, *_), _ = run_steps(method, carry, x, y, order, jnp.float32(1e-3), jnp.float32(50))
        ends.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(end)]))
    begin = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    apart = np.linalg.norm(ends[0] - ends[1])
    return float(apart / np.linalg.norm(ends[0])), float(apart / np.linalg.norm(ends[0] - begin))


def accuracy_claims(data: Data) -> tuple[dict[str, Bar], dict[str, Any]]:
    models = []
    for seed in SEEDS:
        params = MODEL.init(jax.random.key(seed), data["train"][0][:1])["params"]
        models.append(train(params, data, 2e-3, EPOCHS["fp32"], seed)[0])
    scores: dict[str, list[float]] = {"32 fp32": [accuracy(params, data) for params in models]}
    extra: dict[str, Any] = {}
    for bits in (2, 1, 3):
        uniform = RTN(bits=bits, group_size=None, symmetric=bits == 1)
        for name, method in (("RTN", uniform), ("k-means", DKM(bits=bits))):
            hard = [ej.quantize_params(params, method, where=WHERE) for params in models]
            scores[f"{bits} {name}"] = [accuracy(params, data) for params in hard]
        arms: dict[str, Any] = {"straight-through": StraightThrough(bits=bits), "eDKM": EDKM(bits=bits)}
        if bits == 2:
            arms["dense DKM"] = DKM(bits=2, round_to="bfloat16")
        for name, method in arms.items():
            tune = partial(train, data=data, epochs=EPOCHS["finetune"], method=method)
            swept = {rate: tune(models[0], rate=rate, seed=10) for rate in RATES}
            held_out = {rate: accuracy(ej.quantize.harden(*end), data, "held out") for rate, end in swept.items()}
            best = max(held_out, key=lambda rate: held_out[rate])
            ends = [swept[best], *(tune(models[i], rate=best, seed=10 + i) for i in range(1, len(SEEDS)))]
            scores[f"{bits} {name}"] = [accuracy(ej.quantize.harden(*end), data) for end in ends]
            extra[f"learning rate, {bits} bits, {name}"] = best
            found = ", ".join(f"{value:.2f} % at {rate:g}" for rate, value in held_out.items())
            print(f"{bits} bits, {name}, held out: {found}", flush=True)
    gaps, watch = gap_report(data, EDKM(bits=2))
    params, state = train(models[0], data, 1e-3, EPOCHS["finetune"], 10, EDKM(bits=2), watch)
    print("loss with soft minus hard weights, 2 bits, fifths of training:", ", ".join(f"{gap:+.4f}" for gap in gaps))
    print(f"\n{'bits':>4} {'arm':<18} accuracy, % (mean of {len(SEEDS)} seeds, each)")
    for name, values in scores.items():
        bits, arm = name.split(" ", 1)
        print(f"{bits:>4} {arm:<18} {statistics.mean(values):6.2f}   " + " ".join(f"{v:.2f}" for v in values))
    mean = {name: statistics.mean(values) for name, values in scores.items()}
    hard = ej.quantize.harden(params, state)
    kernels = [(params[name]["kernel"], hard[name]["kernel"]) for name in params]
    share = sum(q.nbytes for _, q in kernels) / sum(w.nbytes for w, _ in kernels)
    near, of_way = trajectories(models[0], data)
    bars = {
        "2 bits: eDKM minus k-means, points": Bar(mean["2 eDKM"] - mean["2 k-means"], low=3),
        "2 bits: eDKM minus fp32, points": Bar(mean["2 eDKM"] - mean["32 fp32"], low=-2),
        "dense and unique after 50 steps, apart over norm": Bar(near, high=1e-3),
        "2 bits: exported bytes over fp32": Bar(share, high=2 / 32 + 0.02),
    }
    table = {f"accuracy, {name.replace(' ', ' bits, ', 1)}": value for name, value in mean.items()}
    return bars, {**table, **extra, "dense and unique apart, over the way gone": of_way, "soft minus hard": gaps}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="directory that holds images/mnist; without it only memory and gradients")
    data = parser.parse_args().data
    bars, extra = memory_claims()
    if data:
        more, figures = accuracy_claims(load(data))
        bars, extra = bars | more, extra | figures
    print(
        "The paper reports 130x for saved tensors on 8 workers, 16x from uniquification on one; its baseline and ours "
        "are not the same program, so the ratios are not either."
    )
    return conclude("edkm", bars, extra)


if __name__ == "__main__":
    raise SystemExit(main())
