"""Claims of SpaLLM: tuned tables against QLoRA at equal trainable values, one product at inference, users in one batch.

python -m benchmarks.claims.spallm --data DIR
(DIR/models/stories260K/hf and DIR/text: tinystories_sample/tinystories_sample.txt, tiny_shakespeare/input.txt)
"""

import argparse
import dataclasses
import functools
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

import effjax as ej
from benchmarks.bars import Bar, conclude
from benchmarks.language_models import Task, missing, stories
from effjax.arrays import Adapter, Codebook, Sum
from effjax.evaluate import windows_from_text
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from effjax.paths import map_with_paths
from effjax.sketch import LqLora, SpaLLM, for_users, partition_tables, scale_by_spread, stack_tables

SEEDS = (0, 1, 2)
STEPS, BATCH, LENGTH = 250, 8, 64
RATES = tuple(2e-3 * 2.5 ** (i / 2) for i in range(-4, 12))  # a sweep goes on until the best has worse neighbours
SHAKESPEARE = "text/tiny_shakespeare/input.txt"
ALIKE = {2: 2, 3: 4, 4: 8}  # bits of one table a column, and the rank of as many trainable values
DOWN = "*/mlp/down_proj/kernel"  # its 172 inputs are four groups of 43, where others have one of 64


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to tune.

    Attributes:
        name: in the table.
        make: `make(params, stats, key)` to the compressed tree.
        split: of that tree into what is trained and the rest.
        guess: where in `RATES` its sweep starts.
        relative: steps are shares of the spread of an output's tables.
    """

    name: str
    make: Callable[[Any, Any, jax.Array], Any]
    split: Callable[[Any], tuple[Any, Any]]
    guess: int = 6
    relative: bool = False


def sketch(bits: int, groups: int) -> Callable[[Any, Any, jax.Array], Any]:
    return lambda params, stats, key: ej.sketch_params(
        params, SpaLLM(bits=bits, groups=groups, table_dtype="float32"), stats=stats
    )


def rounded(bits: int, clip: Any = "mse") -> Callable[[Any, Any, jax.Array], Any]:
    """QLoRA's base in blocks of 64 (of 43): NF4, or at other widths, and without clipping, a uniform grid."""

    def method(size: int) -> Any:
        if bits == 4 and clip == "mse":
            return ej.quantize.NF4(block_size=size)
        return ej.quantize.RTN(bits=bits, group_size=size, clip=clip)

    return lambda params, stats, key: ej.quantize_params(params, [(DOWN, method(43)), ("*/kernel", method(64))])


def with_lora(base: Callable[[Any, Any, jax.Array], Any], rank: int) -> Callable[[Any, Any, jax.Array], Any]:
    return lambda params, stats, key: ej.add_lora(base(params, stats, key), rank, key=key)


def by_turns(bits: int, rank: int) -> Callable[[Any, Any, jax.Array], Any]:
    def method(size: int) -> LqLora:
        return LqLora(bits=bits, group_size=size, grid="nf4" if bits == 4 else "uniform", rank=rank)

    return lambda params, stats, key: ej.sketch_params(params, [(DOWN, method(43)), ("*/kernel", method(64))])


def kernels(params: Any) -> tuple[Any, Any]:
    """All dense matrices of the blocks trained, the rest frozen."""

    def keep(wanted: bool) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if (path[-1].key == "kernel") == wanted else None, params
        )

    return keep(True), keep(False)


def arms() -> list[Arm]:
    tuned: dict[str, Any] = {"split": partition_tables, "guess": 10, "relative": True}
    found = [Arm("SpaLLM G=4, 2 bits", sketch(2, 4), **tuned)]
    for bits, rank in ALIKE.items():
        found.append(Arm(f"SpaLLM G=1, {bits} bits", sketch(bits, 1), **tuned))
        found.append(Arm(f"QLoRA rank {rank}, {bits} bits", with_lora(rounded(bits), rank), ej.partition_adapters, 8))
    for bits, rank in ALIKE.items():  # rounded to nearest, no more: the baseline where the bars were set
        plain = with_lora(rounded(bits, "absmax"), rank)
        found.append(Arm(f"QLoRA rank {rank}, {bits} bits unclipped", plain, ej.partition_adapters, 8))
    rank = ALIKE[2]
    found.append(Arm("LoRA rank 2 on the sketch, 2 bits", with_lora(sketch(2, 1), rank), ej.partition_adapters))
    found.append(Arm("LQ-LoRA rank 2, 2 bits", by_turns(2, rank), ej.partition_adapters))
    found.append(Arm("full, dense", lambda params, stats, key: params, kernels))
    return found


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows int32 [windows, 65] to train on, to choose learning rates by, and to judge on."""

    train: np.ndarray
    choice: np.ndarray
    judged: np.ndarray


def shakespeare(task: Task, data: Path) -> Text:
    text = (data / SHAKESPEARE).read_text(encoding="utf-8")
    cut = windows_from_text(task.model.tokenizer, text, length=LENGTH + 1, bos=task.model.config.bos_token_id)
    return Text(train=cut[:-640], choice=cut[-640:-320], judged=cut[-320:])


class Tuning:
    """The runs of one arm: programs are compiled once and shared by rates and seeds."""

    def __init__(self, arm: Arm, task: Task, text: Text):
        self.arm, self.task, self.text = arm, task, text
        self.apply = ej.lift(Decoder(task.model.config).apply)
        self.start, self.tuned = functools.cache(self._start), functools.cache(self._tuned)

    def _start(self, seed: int) -> Any:
        """The model before tuning; sketches are calibrated on 256 windows of the text."""
        params = self.task.model.params
        drawn = np.random.default_rng(seed).choice(len(self.text.train), 256, replace=False)
        batches = self.text.train[np.sort(drawn), :-1].reshape(8, 32, LENGTH)
        stats = ej.calibrate(Decoder(self.task.model.config).apply, {"params": params}, list(batches))
        return self.arm.make(params, stats, jax.random.key(seed))

    def nll(self, params: Any, windows: jax.Array) -> jax.Array:
        logits = self.apply({"params": params}, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    @functools.partial(jax.jit, static_argnums=0)
    def judge(self, params: Any, windows: jax.Array) -> jax.Array:
        """Mean loss of `windows [batches, 8, 65]`."""
        return jax.lax.map(lambda batch: self.nll(params, batch), windows).mean()

    @functools.partial(jax.jit, static_argnums=0)
    def run(self, trained: Any, frozen: Any, windows: jax.Array, rate: jax.Array) -> Any:
        """Adam over batches `[steps, 8, 65]`, linear decay, clipped to norm 1."""
        units = scale_by_spread() if self.arm.relative else optax.identity()
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), units)

        def step(carry: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            trained, state = carry
            windows, left = batch
            grads = jax.grad(lambda t: self.nll(ej.combine(t, frozen), windows))(trained)
            updates, state = optimizer.update(grads, state, trained)
            return (jax.tree.map(lambda p, u: p - rate * left * u, trained, updates), state), None

        left = 1 - jnp.arange(STEPS) / STEPS
        return jax.lax.scan(step, (trained, optimizer.init(trained)), (windows, left))[0][0]

    def _tuned(self, seed: int, rate: float) -> Any:
        trained, frozen = self.arm.split(self.start(seed))
        order = np.random.default_rng(seed).choice(len(self.text.train), STEPS * BATCH)
        batches = jnp.asarray(self.text.train[order].reshape(STEPS, BATCH, -1))
        return ej.combine(self.run(trained, frozen, batches, jnp.float32(rate)), frozen)

    def perplexity(self, params: Any, windows: np.ndarray) -> float:
        return float(jnp.exp(self.judge(params, jnp.asarray(windows.reshape(-1, 8, windows.shape[-1])))))

    def best_rate(self) -> tuple[float, dict[float, float]]:
        """By the choice windows and the first seed: from the arm's guess until the best has worse neighbours."""
        seen: dict[int, float] = {}
        wanted = [self.arm.guess]
        while wanted:
            for i in wanted:
                value = self.perplexity(self.tuned(SEEDS[0], RATES[i]), self.text.choice)
                seen[i] = value if np.isfinite(value) else np.inf
            best = min(seen, key=lambda i: seen[i])
            wanted = [i for i in (best - 1, best + 1) if 0 <= i < len(RATES) and i not in seen]
        return RATES[best], {RATES[i]: seen[i] for i in sorted(seen)}


def tune_all(data: Path, only: str | None = None) -> dict[str, dict[str, Any]]:
    task = stories(data)
    text = shakespeare(task, data)
    found = {}
    print(f"{len(text.train)} windows of {LENGTH} tokens to train on; {STEPS} steps of {BATCH} windows")
    for arm in arms():
        if only not in (None, arm.name):
            continue
        began = time.perf_counter()
        tuning = Tuning(arm, task, text)
        rate, sweep = tuning.best_rate()
        start = tuning.start(SEEDS[0])
        trained, _ = arm.split(start)
        ppl = [tuning.perplexity(tuning.tuned(seed, rate), text.judged) for seed in SEEDS]
        blocks = {path: x for path, x in start.items() if path.startswith("layer")}
        found[arm.name] = {
            "rate": rate,
            "before": tuning.perplexity(start, text.judged),
            "ppl": ppl,
            "trained": sum(x.size for x in jax.tree.leaves(trained)),
            "bytes": ej.nbytes(blocks) - ej.nbytes(trained) // 2,  # trained in float32, stored in float16
            "sweep": sweep,
        }
        r = found[arm.name]
        print(
            f"{arm.name:<32} trained {r['trained']:>7,}  bytes {r['bytes']:>8,}  rate {rate:.1e}  before "
            f"{r['before']:>8.2f}  tuned {statistics.mean(ppl):.3f} +- {statistics.stdev(ppl):.3f}   sweep "
            + " ".join(f"{k:.1e}:{v:.2f}" for k, v in sweep.items())
            + f"  ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
    return found


HIDDEN, WIDE, LAYERS, USERS = 2048, 5632, 2, 8
CONFIG = DecoderConfig(
    vocab_size=512,
    hidden_size=HIDDEN,
    intermediate_size=WIDE,
    num_hidden_layers=LAYERS,
    num_attention_heads=16,
    num_key_value_heads=16,
    tie_word_embeddings=True,
)


def random_model(leaf: Callable[[Any, int, int], Any]) -> Any:
    """Parameters of a decoder 2048 wide; `leaf(rng, in, out)` makes its matrices."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    def make(path: str, x: Any) -> Any:
        if path.endswith("kernel"):
            return leaf(rng, *x.shape)
        return jnp.asarray(rng.standard_normal(x.shape, np.float32) * 0.02 + path.endswith("scale"))

    return map_with_paths(make, shapes)


def random_sketch(groups: int) -> Callable[[Any, int, int], Any]:
    """A sketch of 4 bits with `groups` tables an output."""

    def leaf(rng: Any, n: int, out: int) -> Codebook:
        codes = jnp.asarray(rng.integers(0, 16, (n, out), np.uint8))
        tables = jnp.asarray(rng.standard_normal((groups, out, 16), np.float32) / np.sqrt(n))
        return jax.jit(lambda c, t: Codebook.from_codes(c, t, dtype=jnp.float32))(codes, tables)

    return leaf


def random_qlora(rank_of: Callable[[int, int], int]) -> Callable[[Any, int, int], Any]:
    """NF4 in blocks of 64 and an adapter whose second factor has been trained."""

    def leaf(rng: Any, n: int, out: int) -> Sum:
        base = ej.quantize.NF4().quantize(jnp.asarray(rng.standard_normal((n, out), np.float32) / np.sqrt(n)))
        rank = rank_of(n, out)
        a, b = (jnp.asarray(rng.standard_normal(s, np.float32) / np.sqrt(n)) for s in ((n, rank), (rank, out)))
        return Sum(parts=(base, Adapter(a=a, b=b, dtype=np.dtype("float32"))))

    return leaf


def by_turn(runs: dict[str, Callable[[], Any]], repeats: int = 25) -> dict[str, list[float]]:
    """Milliseconds of each run, by turns, so that a busy machine is busy for all."""
    for run in runs.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(1e3 * (time.perf_counter() - began))
    return times


def speed() -> tuple[dict[str, Bar], dict[str, float]]:
    """One step of decoding: one row with tables against two towers, and eight rows of one user against eight users.

    Bars are on the median of the ratios of times taken in the same turn.
    """
    step = jax.jit(ej.lift(Decoder(CONFIG).apply))
    mixed = jax.jit(lambda p, users, tokens: ej.lift(Decoder(CONFIG).apply)({"params": for_users(p, users)}, tokens))
    one, eight = jnp.ones((1, 1), jnp.int32), jnp.arange(USERS, dtype=jnp.int32)[:, None]
    bars, extra, runs = {}, {}, {}
    sketches = {groups: random_model(random_sketch(groups)) for groups in (1, 4)}
    for groups, params in sketches.items():
        # As many trained values: a table has 16 an output, an adapter its rank for every input and output.
        towers = random_model(random_qlora(lambda n, out, groups=groups: round(16 * groups * out / (n + out))))
        for name, tree in ((f"G={groups}", params), (f"QLoRA as G={groups}", towers)):
            ready = ej.prepare(tree)
            runs[name] = partial(step, {"params": ready}, one)
            extra[f"megabytes, {name}"] = ej.nbytes(tree) / 1e6
        tables, _ = partition_tables(params)
        users = [jax.tree.map(lambda t, k=k: (1 + k / 10) * t, tables) for k in range(USERS)]
        served = ej.prepare(stack_tables(params, users))
        runs[f"G={groups}, 8 rows of one user"] = partial(step, {"params": ej.prepare(params)}, eight)
        runs[f"G={groups}, 8 users"] = partial(mixed, served, jnp.arange(USERS), eight)
    times = by_turn(runs)
    for name, values in times.items():
        low, middle = min(values), statistics.median(values)
        print(f"{name:<28} {low:8.2f} ms at best, {middle:8.2f} in the middle of {len(values)}", flush=True)
        extra[f"milliseconds, {name}"] = low
    for groups in (1, 4):
        alone, towers = np.array(times[f"G={groups}"]), np.array(times[f"QLoRA as G={groups}"])
        bars[f"decode step, tables G={groups} over two towers"] = Bar(float(np.median(alone / towers)), high=0.75)
        # What eight rows of one user cost at best: together, or a row after the other.
        alike = np.minimum(times[f"G={groups}, 8 rows of one user"], USERS * alone)
        users = np.array(times[f"G={groups}, 8 users"])
        name = f"8 users in a batch over 8 rows of one user, G={groups}"
        bars[name] = Bar(float(np.median(users / alike)), high=1.3)
    return bars, extra


def quality(found: dict[str, dict[str, Any]]) -> tuple[dict[str, Bar], dict[str, Any]]:
    """The bars of tuned perplexities."""

    def mean(name: str) -> float:
        return statistics.mean(found[name]["ppl"])

    bars = {}
    for kind in ("", " unclipped"):
        for bits, rank in ALIKE.items():
            tables, towers = found[f"SpaLLM G=1, {bits} bits"], found[f"QLoRA rank {rank}, {bits} bits{kind}"]
            ratios = [a / b for a, b in zip(tables["ppl"], towers["ppl"], strict=True)]
            bars[f"tuned perplexity over QLoRA's, {bits} bits{kind}"] = Bar(
                statistics.mean(ratios), high=0.97 if bits == 2 else 1.0, paper="SketchTune ahead of LoftQ by 14 points"
            )
    bars["2 bits with G=4 over 4 bits with G=1"] = Bar(
        mean("SpaLLM G=4, 2 bits") / mean("SpaLLM G=1, 4 bits"), high=1.03
    )
    return bars, {name: {k: v for k, v in r.items() if k != "sweep"} for name, r in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--part", choices=("speed", "tuning"), help="one of the two; both by default")
    parser.add_argument("--arm", help="tunes one arm and prints its line")
    args = parser.parse_args()
    if lacking := missing(args.data) or (None if (args.data / SHAKESPEARE).exists() else SHAKESPEARE):
        sys.exit(f"{args.data}/{lacking} is missing")
    if args.arm:
        tune_all(args.data, args.arm)
        return 0
    bars, extra = ({}, {}) if args.part == "tuning" else speed()
    if args.part != "speed":
        tuned, figures = quality(tune_all(args.data))
        bars, extra = bars | tuned, extra | figures
    return conclude("SpaLLM", bars, extra)


if __name__ == "__main__":
    sys.exit(main())
