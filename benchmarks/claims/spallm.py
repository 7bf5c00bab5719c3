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
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import effjax as ej
from benchmarks.bars import Bar, conclude
from benchmarks.language_models import Task, missing, stories
from effjax.evaluate import windows_from_text
from effjax.models.decoder import Decoder
from effjax.sketch import LqLora, SpaLLM, partition_tables

SEEDS = (0, 1, 2)
STEPS, BATCH, LENGTH = 250, 8, 64
RATES = tuple(2e-3 * 2.5**i for i in range(-2, 6))  # an arm's sweep starts in the middle and goes on beyond an edge
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
    """

    name: str
    make: Callable[[Any, Any, jax.Array], Any]
    split: Callable[[Any], tuple[Any, Any]]


def sketch(bits: int, groups: int) -> Callable[[Any, Any, jax.Array], Any]:
    return lambda params, stats, key: ej.sketch_params(
        params, SpaLLM(bits=bits, groups=groups, table_dtype="float32"), stats=stats
    )


def rounded(bits: int) -> Callable[[Any, Any, jax.Array], Any]:
    """QLoRA's base: NF4, or at other widths the uniform grid of least squared error, in blocks of 64 (of 43)."""

    def method(size: int) -> Any:
        if bits == 4:
            return ej.quantize.NF4(block_size=size)
        return ej.quantize.RTN(bits=bits, group_size=size, clip="mse")

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
    found = [Arm("SpaLLM G=4, 2 bits", sketch(2, 4), partition_tables)]
    for bits, rank in ALIKE.items():
        found.append(Arm(f"SpaLLM G=1, {bits} bits", sketch(bits, 1), partition_tables))
        found.append(Arm(f"QLoRA rank {rank}, {bits} bits", with_lora(rounded(bits), rank), ej.partition_adapters))
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
        self.start = functools.cache(self._start)

    def _start(self, seed: int) -> Any:
        params = task_params = self.task.model.params
        cal = jnp.asarray(self.task.calibration(seed, 64))
        stats = ej.calibrate(
            Decoder(self.task.model.config).apply,
            {"params": task_params},
            [cal[i : i + 8, :-1] for i in range(0, 64, 8)],
        )
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
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

        def step(carry: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            trained, state = carry
            windows, left = batch
            grads = jax.grad(lambda t: self.nll(ej.combine(t, frozen), windows))(trained)
            updates, state = optimizer.update(grads, state, trained)
            return (jax.tree.map(lambda p, u: p - rate * left * u, trained, updates), state), None

        left = 1 - jnp.arange(STEPS) / STEPS
        return jax.lax.scan(step, (trained, optimizer.init(trained)), (windows, left))[0][0]

    def tuned(self, seed: int, rate: float) -> Any:
        trained, frozen = self.arm.split(self.start(seed))
        order = np.random.default_rng(seed).choice(len(self.text.train), STEPS * BATCH)
        batches = jnp.asarray(self.text.train[order].reshape(STEPS, BATCH, -1))
        return ej.combine(self.run(trained, frozen, batches, jnp.float32(rate)), frozen)

    def perplexity(self, params: Any, windows: np.ndarray) -> float:
        return float(jnp.exp(self.judge(params, jnp.asarray(windows.reshape(-1, 8, windows.shape[-1])))))

    def best_rate(self) -> tuple[float, dict[float, float]]:
        """By the choice windows and the first seed: from the middle of `RATES`, until the best has worse neighbours."""
        seen: dict[int, float] = {}
        wanted = [2, 3, 4]
        while wanted:
            for i in wanted:
                value = self.perplexity(self.tuned(SEEDS[0], RATES[i]), self.text.choice)
                seen[i] = value if np.isfinite(value) else np.inf
            best = min(seen, key=lambda i: seen[i])
            wanted = [i for i in (best - 1, best + 1) if 0 <= i < len(RATES) and i not in seen]
        return RATES[best], {RATES[i]: seen[i] for i in sorted(seen)}


def tune_all(data: Path, only: str = "") -> dict[str, dict[str, Any]]:
    task = stories(data)
    text = shakespeare(task, data)
    found = {}
    print(f"{len(text.train)} windows of {LENGTH} tokens to train on; {STEPS} steps of {BATCH} windows")
    for arm in arms():
        if only not in arm.name:
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    tune_all(args.data, args.only)
