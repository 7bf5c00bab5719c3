"""Claims of FAIR: devices of different sizes train one table together, better than without the small ones.

python -m benchmarks.claims.fair_embedding [--data DIR]    (DIR/recsys/ml-1m-implicit; without it only synthetic data)
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bars import Bar, conclude
from benchmarks.movielens import read_liked
from effjax.sketch import Subspace, average

SEEDS = (0, 1, 2)
RATES = (1e-2, 3e-2)  # of devices
TOP = 20
INIT = 0.1  # deviation of vectors at the start


@dataclasses.dataclass(frozen=True)
class Task:
    """Implicit feedback of users on devices of different sizes.

    Attributes:
        train: `bool[users, items]`.
        test: the same, disjoint; a validation split likewise.
        ratios: compression of each user's device.
        features: length of a vector.
        visits: devices a round.
        rounds, steps: of the server, and local steps of Adam a visit.
        batch: positives a local step.
    """

    train: np.ndarray
    valid: np.ndarray | None
    test: np.ndarray
    ratios: np.ndarray
    features: int
    visits: int
    rounds: int
    steps: int
    batch: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.train.shape[1], self.features

    @property
    def padding(self) -> np.ndarray:
        """Items that nobody has."""
        had = self.train | self.test if self.valid is None else self.train | self.test | self.valid
        return np.logical_not(had.any(axis=0))


def synthetic(seed: int, ratio: float, taste: float = 3.0, popular: float = 1.0) -> Task:
    """200 users, 1,000 items: 30 % on large devices like one half of the catalogue, the others the other half."""
    rng = np.random.default_rng(seed)
    users, items, rank = 200, 1000, 4
    large = np.arange(users) < 60
    scores = taste * rng.normal(size=(users, rank)) @ rng.normal(size=(rank, items)) / rank**0.5
    scores += popular * rng.normal(size=items) + 6.0 * (large[:, None] == (np.arange(items) < items // 2))
    order = np.argsort(-(scores + rng.gumbel(size=scores.shape)), axis=1)[:, :55]
    order = rng.permuted(order, axis=1)
    train, test = np.zeros((2, users, items), bool)
    np.put_along_axis(train, order[:, :40], True, 1)
    np.put_along_axis(test, order[:, 40:], True, 1)
    ratios = np.where(large, 1.0, ratio)
    return Task(train, None, test, ratios, 16, visits=20, rounds=120, steps=20, batch=40)


def movielens(root: str, seed: int) -> Task:
    """ml-1m, ratings from 3 on, its 240 most active users and 1,024 commonest items; devices of 2x, 8x and 64x."""
    matrices = read_liked(Path(root) / "recsys/ml-1m-implicit")
    # As many visits a user as the synthetic task has need a small crowd; 64 divides the cells, so that spaces nest.
    active = np.argsort(-matrices["train"].sum(1), kind="stable")[:240]
    common = np.argsort(-matrices["train"].sum(0), kind="stable")[:1024]
    train, valid, test = (matrices[split][np.ix_(active, common)] for split in ("train", "valid", "test"))
    ratios = np.array([2.0, 8.0, 64.0])[np.random.default_rng(seed).permutation(len(active)) % 3]
    return Task(train, valid, test, ratios, 16, visits=24, rounds=120, steps=20, batch=64)


@dataclasses.dataclass(frozen=True)
class Arm:
    """What devices hold, and which take part.

    Attributes:
        held: "own" (the space of the device), "full" (no compression), "low rank" (FedHM), or "inconsistent" (a device
            reads the items in an order of its own, which makes its hash another one).
        delta: the server adds changes.
        drop: only devices of the smallest ratio take part.
        alone: the others still fit the vector of their user to the table as it is.
    """

    held: str = "own"
    delta: bool = False
    drop: bool = False
    alone: bool = False


ARMS = {
    "full": Arm(held="full"),
    "FAIR": Arm(),
    "FAIR, delta": Arm(delta=True),
    "small devices dropped": Arm(drop=True),
    "dropped, own vectors fitted": Arm(drop=True, alone=True),
    "inconsistent hashing": Arm(held="inconsistent"),
    "low rank (FedHM)": Arm(held="low rank"),
}


REAL = {name: ARMS[name] for name in ARMS if name not in ("low rank (FedHM)", "small devices dropped")}


def rank_of(shape: tuple[int, int], ratio: float) -> int:
    """FedHM's rank at a ratio; 0 where two factors cannot be that small."""
    n, d = shape
    return min(int(n * d / ratio / (n + d)), d)


@dataclasses.dataclass(frozen=True)
class Device:
    """How one kind of device holds the table: what it gets, the rows it reads, the table it stands for. All pure.

    Attributes:
        space: its subspace.
        rank: of its two factors, or 0 where it holds none.
        ordered: whether it reads the items in an order of its own.
    """

    space: Subspace
    rank: int = 0
    ordered: bool = False

    def receive(self, table: jax.Array, order: jax.Array) -> Any:
        if self.rank:
            u, s, v = jnp.linalg.svd(table, full_matrices=False)
            root = jnp.sqrt(s[: self.rank])
            return u[:, : self.rank] * root, root[:, None] * v[: self.rank]
        return self.space.compress(table[jnp.argsort(order)] if self.ordered else table)

    def rows(self, w: Any, ids: jax.Array, order: jax.Array) -> jax.Array:
        if self.rank:
            return w[0][ids] @ w[1]
        return self.space.lookup(w, order[ids] if self.ordered else ids)

    def table(self, w: Any, order: jax.Array) -> jax.Array:
        return self.rows(w, jnp.arange(self.space.shape[0]), order)


def kinds(arm: Arm, task: Task) -> dict[float, Device]:
    """The devices by ratio."""
    found = {}
    for ratio in sorted(set(task.ratios.tolist())):
        space = Subspace(shape=task.shape, ratio=1.0 if arm.held == "full" else ratio)
        if arm.held == "low rank" and ratio > 1:
            if not rank_of(task.shape, ratio):
                raise ValueError(f"no factors of rank 1 at a compression of {ratio:g}")
            found[ratio] = Device(Subspace(shape=task.shape), rank=rank_of(task.shape, ratio))
        else:
            found[ratio] = Device(space, ordered=arm.held == "inconsistent" and not space.whole)
    return found


def order_of(user: jax.Array, items: int) -> jax.Array:
    return jax.random.permutation(jax.random.fold_in(jax.random.key(99), user), items)


@partial(jax.jit, static_argnames=("device", "steps", "batch", "frozen"))
def visit(
    device: Device,
    table: Any,
    who: Any,
    users: Any,
    liked: Any,
    key: Any,
    rate: Any,
    *,
    steps: int,
    batch: int,
    frozen: bool = False,
) -> tuple[Any, jax.Array]:
    """Devices of one kind train at once from the server's table: what they hold then, and their users' vectors."""

    def train(who: jax.Array, user: jax.Array, liked: jax.Array, key: jax.Array) -> Any:
        order = order_of(who, table.shape[0])
        got = device.receive(table, order)
        ranked = jnp.argsort(~liked)  # what the user likes, then the rest

        def step(carry: Any, now: Any) -> Any:
            (state, first, second), (t, key) = carry, now
            positive, negative = jax.random.split(key)
            ids = ranked[jax.random.randint(positive, (batch,), 0, jnp.maximum(liked.sum(), 1))]
            others = jax.random.randint(negative, (batch,), 0, table.shape[0])

            def loss(state: Any) -> jax.Array:
                w, user = (got, state) if frozen else state
                margin = (device.rows(w, ids, order) - device.rows(w, others, order)) @ user
                counted = ~liked[others]
                return -(counted * jax.nn.log_sigmoid(margin)).sum() / jnp.maximum(counted.sum(), 1)

            g = jax.grad(loss)(state)
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, g)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, g)
            a, b = 1 - 0.9**t, 1 - 0.999**t
            move = lambda p, m, v: p - rate * (m / a) / (jnp.sqrt(v / b) + 1e-8)  # noqa: E731
            return (jax.tree.map(move, state, first, second), first, second), None

        start = user if frozen else (got, user)
        zeros = jax.tree.map(jnp.zeros_like, start)
        now = jnp.arange(1.0, steps + 1), jax.random.split(key, steps)
        end: Any
        (end, _, _), _ = jax.lax.scan(step, (start, zeros, zeros), now)
        w, user = (got, end) if frozen else end
        # What has no common space is sent as the table it stands for.
        return (device.table(w, order) if device.rank or device.ordered else w), user

    return jax.vmap(train)(who, users, liked, jax.random.split(key, len(who)))


@partial(jax.jit, static_argnames="device")
def ranks(device: Device, table: jax.Array, who: Any, users: Any, seen: Any, wanted: Any) -> jax.Array:
    """NDCG@20 and the share of the twenty that hit, of users of one kind, by what their device can hold."""
    gain = 1 / jnp.log2(jnp.arange(TOP) + 2.0)

    def one(user: Any) -> jax.Array:
        who, vector, seen, wanted = user
        order = order_of(who, table.shape[0])
        held = device.table(device.receive(table, order), order) if device.ordered else shared
        _, top = jax.lax.top_k(jnp.where(seen, -jnp.inf, held @ vector), TOP)
        hits = wanted[top]
        ideal = jnp.where(jnp.arange(TOP) < wanted.sum(), gain, 0).sum()
        return jnp.stack([(hits * gain).sum() / jnp.maximum(ideal, 1e-9), hits.mean()])

    still = jnp.arange(table.shape[0])
    shared = device.table(device.receive(table, still), still)
    return jax.lax.map(one, (who, users, seen, wanted), batch_size=64)


def measure(task: Task, devices: dict[float, Device], table: Any, users: jax.Array, split: str) -> np.ndarray:
    """Mean NDCG@20 and hit rate@20 of all users with something to find, and the NDCG of each kind of device."""
    wanted = getattr(task, split)
    seen = task.train | (task.valid if split == "test" and task.valid is not None else False) | task.padding
    found, counted = np.zeros((len(users), 2)), wanted.any(1)
    for ratio, device in devices.items():
        who = np.flatnonzero(task.ratios == ratio)
        found[who] = ranks(device, table, who, users[who], seen[who], wanted[who])
    mean = found[counted].mean(0)
    by_kind = [found[counted & (task.ratios == ratio), 0].mean() for ratio in devices]
    return np.array([*mean, *by_kind])


def popularity(task: Task) -> np.ndarray:
    """Everyone is shown what most users have."""
    table = jnp.tile(jnp.asarray(task.train.sum(0), jnp.float32)[:, None], (1, task.features))
    devices = dict.fromkeys(kinds(Arm(), task), Device(Subspace(shape=task.shape)))
    return measure(task, devices, table, jnp.ones((len(task.train), task.features)), "test")


def federate(task: Task, arm: Arm, seed: int, rate: float) -> tuple[np.ndarray, float]:
    """The figures at the best of six evaluations, and its score: on validation, or on the test where there is none."""
    devices = kinds(arm, task)
    rng = np.random.default_rng(seed)
    plain = arm.held == "own"
    home = Subspace(shape=task.shape, ratio=min(task.ratios) if plain else 1.0)
    key, user_key, table_key = jax.random.split(jax.random.key(seed), 3)
    users = INIT * jax.random.normal(user_key, (len(task.train), task.features))
    server = home.compress(INIT * jax.random.normal(table_key, task.shape))
    liked = jnp.asarray(task.train)
    members = {r: np.flatnonzero((task.ratios == r) & task.train.any(1)) for r in devices}
    taking = [min(devices)] if arm.drop else list(devices)
    sizes = {r: max(1, round(task.visits * len(members[r]) / sum(len(members[t]) for t in taking))) for r in taking}
    static: dict[str, Any] = {"steps": task.steps, "batch": task.batch}
    best, best_score = np.zeros(2), -1.0
    for turn in range(1, task.rounds + 1):
        table, vectors, spaces, weights = home.expand(server), [], [], []
        for r in taking:
            key, own = jax.random.split(key)
            who = rng.choice(members[r], min(sizes[r], len(members[r])), replace=False)
            w, new = visit(devices[r], table, who, users[who], liked[who], own, rate, **static)
            users = users.at[who].set(new)
            counts = task.train[who].sum(1)
            sent = jnp.tensordot(jnp.float32(counts / counts.sum()), w, 1)  # one kind has one space: its mean suffices
            vectors.append(sent if plain or arm.held == "full" else sent.reshape(-1))
            spaces.append(devices[r].space if plain else home)
            weights.append(float(counts.sum()))
        server = average(server, vectors, spaces, weights, space=home, delta=arm.delta)
        if turn % (task.rounds // 6) == 0:
            table, fitted = home.expand(server), users
            if arm.alone:
                for r in set(devices) - set(taking):
                    key, own = jax.random.split(key)
                    who = members[r]
                    alone = {"frozen": True, "steps": 100, "batch": task.batch}
                    _, new = visit(devices[r], table, who, users[who], liked[who], own, rate, **alone)
                    fitted = fitted.at[who].set(new)
            score = measure(task, devices, table, fitted, "test" if task.valid is None else "valid")[0]
            if score > best_score:
                best, best_score = measure(task, devices, table, fitted, "test"), float(score)
    return best, best_score


def compare(name: str, tasks: Sequence[Task], rates: Sequence[float], arms: dict[str, Arm]) -> dict[str, Any]:
    """NDCG of all arms and seeds; the learning rate is that of the best score of the first seed."""
    ratios = ", ".join(f"{r:g}x" for r in sorted(set(tasks[0].ratios.tolist())))
    print(f"\n{name}: NDCG@20 (each seed), hit rate@20, NDCG@20 of devices of {ratios}", flush=True)
    scores: dict[str, Any] = {}

    def add(arm: str, rows: list[np.ndarray], rate: str) -> None:
        scores[arm] = [float(row[0]) for row in rows]
        mean = np.mean(rows, 0)
        each, kind = (" ".join(f"{v:.3f}" for v in values) for values in (scores[arm], mean[2:]))
        print(f"{arm:<28} {mean[0]:.4f} ({each})  {mean[1]:.4f}  {kind}  {rate}", flush=True)

    add("popularity", [popularity(task) for task in tasks], "")
    for arm_name, arm in arms.items():
        try:
            kinds(arm, tasks[0])
        except ValueError as error:
            print(f"{arm_name:<28} cannot be built: {error}", flush=True)
            continue
        first = {rate: federate(tasks[0], arm, SEEDS[0], rate) for rate in rates}
        rate = max(rates, key=lambda rate: first[rate][1])
        rest = [federate(task, arm, seed, rate)[0] for task, seed in zip(tasks[1:], SEEDS[1:], strict=True)]
        add(arm_name, [first[rate][0], *rest], f"rate {rate:g}")
    return scores


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="directory that holds recsys/ml-1m-implicit; without it only synthetic data")
    data = parser.parse_args().data
    quarter = compare("synthetic, 30 % 1x, 70 % 4x", [synthetic(s, 4) for s in SEEDS], RATES, ARMS)
    tiny = {name: ARMS[name] for name in ("FAIR", "FAIR, delta", "small devices dropped", "low rank (FedHM)")}
    small = compare("synthetic, 30 % 1x, 70 % 32x", [synthetic(s, 32) for s in SEEDS], RATES, tiny)
    mean = {name: statistics.mean(values) for name, values in quarter.items()}
    little = {name: statistics.mean(values) for name, values in small.items()}
    bars = {
        "synthetic: FAIR over small devices dropped": Bar(mean["FAIR"] / mean["small devices dropped"], low=1.5),
        "synthetic: FAIR over inconsistent hashing": Bar(mean["FAIR"] / mean["inconsistent hashing"], low=1.5),
        "synthetic, 32x: FAIR over popularity": Bar(little["FAIR"] / little["popularity"], low=1),
        "synthetic, 32x: FAIR by changes (delta) over popularity": Bar(
            little["FAIR, delta"] / little["popularity"], low=1
        ),
        "synthetic, 32x: low rank is built": Bar(float("low rank (FedHM)" in little), high=0),
    }
    figures: dict[str, Any] = {"synthetic 4x": quarter, "synthetic 32x": small}
    if data:
        real = compare("ml-1m, 2x, 8x and 64x", [movielens(data, s) for s in SEEDS], RATES, REAL)
        figures["ml-1m"] = real
        mean = {name: statistics.mean(values) for name, values in real.items()}
        best = max(mean["FAIR"], mean["FAIR, delta"])
        for other in ("popularity", "dropped, own vectors fitted", "inconsistent hashing"):
            bars[f"ml-1m: the better FAIR over {other}"] = Bar(best / mean[other], low=1)
    return conclude("fair_embedding", bars, figures)


if __name__ == "__main__":
    raise SystemExit(main())
