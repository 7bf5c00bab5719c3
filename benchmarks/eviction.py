"""What eviction costs in quality, and what it saves in time and memory, for every method at several budgets.

python -m benchmarks.eviction [--data DIR] [--parts quality speed]

Quality: the first 192 tokens of a window are read at once, the cache is evicted to a share of them, and the next 64 are
read with what is left. Excess is ln(perplexity) of those, less that with the whole cache; agreement is how often their
likeliest successor stays the same. The embedded model and, with `--data`, stories260K (`models/stories260K/hf`,
`text/tinystories_sample`). Small models look back little: they forgive.

Speed: a decoder of random weights reads 16,384 tokens in chunks within 1,024 slots and writes 256 more; a step is timed
against one of the same decoder with a plain cache of as many filled slots on average. Bytes of the cache are counted,
and memory is that of the compiled prompt, in chunks and whole.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import language_models
from benchmarks.bars import Bar, conclude
from benchmarks.claims.scissorhands import Random
from effjax.evaluate.loss import next_token_nll
from effjax.kv import H2O, TOVA, EvictionMethod, PyramidKV, Scissorhands, SinkWindow, SnapKV, kv_evict
from effjax.kv.importance import ATTENTION_RECEIVED
from effjax.models.compiled_generate import CompiledGenerate, compile_generate, whole_cache_bytes
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder, DecoderApply, new_cache
from effjax.models.generate_evicting import new_evicting_cache
from effjax.models.hf import LoadedModel

PROMPT, WINDOWS, BATCH = 192, 64, 16
SHARES = (0.5, 0.25, 0.125)
WINDOW = 16  # queries of SnapKV: with 64, the default, an eighth of the prompt would be the window alone

SLOTS, LONG, NEW, CHUNK, REPEATS = 1024, 16_384, 256, 512, 5
SPEED = DecoderConfig(
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=LONG + NEW,
)


def methods(budget: int) -> dict[str, EvictionMethod]:
    """Every method, and the two that look at nothing."""
    return {
        "Scissorhands": Scissorhands(budget=budget),
        "Scissorhands, 2 / kept": Scissorhands(budget=budget, quantile=None, multiple=2.0),
        "H2O": H2O(budget=budget),
        "SnapKV": SnapKV(budget=budget, window=WINDOW),
        "PyramidKV": PyramidKV(budget=budget, window=WINDOW),
        "TOVA": TOVA(budget=budget),
        "StreamingLLM": SinkWindow(sinks=4, window=budget - 4),
        "recent": SinkWindow(sinks=0, window=budget),
        "random": Random(budget),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """What was read behind the prompts: losses and likeliest successors, `[windows, 64]`."""

    nll: np.ndarray
    likeliest: np.ndarray

    def excess(self, whole: "Read") -> float:
        return float((self.nll - whole.nll).mean())

    def interval(self, whole: "Read") -> float:
        """Twice the standard error of the excess over windows."""
        each = (self.nll - whole.nll).mean(axis=1)
        return float(2 * each.std(ddof=1) / np.sqrt(len(each)))

    def agreement(self, whole: "Read") -> float:
        return float((self.likeliest == whole.likeliest).mean())


def windows(task: language_models.Task) -> np.ndarray:
    """Text that is judged on, int32 `[64, 256]`; both models were made for 256 tokens or more."""
    return task.evaluation[:WINDOWS]


@partial(jax.jit, static_argnames=("config", "method"))
def _read(params: Any, tokens: jax.Array, *, config: DecoderConfig, method: EvictionMethod | None) -> Any:
    rest = tokens.shape[1] - PROMPT
    importance = (method.importance if method else None) or ATTENTION_RECEIVED
    cache = new_cache(config, batch=tokens.shape[0], slots=tokens.shape[1], split=True, importance=importance)
    run = DecoderApply(config)
    last, cache = run({"params": params}, tokens[:, :PROMPT], cache=cache, last_only=True)
    if method is not None:
        slots = tuple(kept + rest for kept in method.layer_budgets(cache.layers))
        cache = kv_evict(cache, method, slots=slots if len(set(slots)) > 1 else slots[0])
    logits, _ = run({"params": params}, tokens[:, PROMPT:-1], cache=cache)
    logits = jnp.concatenate([last, logits], axis=1)
    return next_token_nll(logits, tokens[:, PROMPT:]), jnp.argmax(logits, axis=-1)


def read(model: LoadedModel, tokens: np.ndarray, method: EvictionMethod | None) -> Read:
    """Reads all windows with what `method` leaves of the prompts' cache."""
    config = dataclasses.replace(model.config, dtype="float32", scan_layers=False)
    parts = [
        _read(model.params, jnp.asarray(tokens[i : i + BATCH]), config=config, method=method)
        for i in range(0, len(tokens), BATCH)
    ]
    return Read(
        nll=np.concatenate([np.asarray(nll) for nll, _ in parts]),
        likeliest=np.concatenate([np.asarray(best) for _, best in parts]),
    )


def tasks(data: Path | None) -> Iterator[language_models.Task]:
    yield language_models.embedded()
    if data is not None:
        yield language_models.stories(data)


def quality(task: language_models.Task) -> tuple[dict[str, Any], dict[str, Bar]]:
    tokens = windows(task)
    whole = read(task.model, tokens, None)
    table = Table(
        title=f"{task.name}: perplexity {np.exp(whole.nll.mean()):.3f} behind a whole cache of {PROMPT} tokens"
    )
    table.add_column("method")
    for share in SHARES:
        table.add_column(f"excess, {round(PROMPT * share)} kept")
        table.add_column("agree")
    rows: dict[str, dict[str, Any]] = {}
    for share in SHARES:
        for name, method in methods(round(PROMPT * share)).items():
            found = read(task.model, tokens, method)
            rows.setdefault(name, {})[str(share)] = {
                "excess": found.excess(whole),
                "two errors": found.interval(whole),
                "agreement": found.agreement(whole),
            }
            print(f"{task.name} {share} {name}: {found.excess(whole):+.4f}", file=sys.stderr, flush=True)
    for name, row in rows.items():
        cells = [(f"{x['excess']:+.4f} ± {x['two errors']:.4f}", f"{100 * x['agreement']:.1f} %") for x in row.values()]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    Console(width=150).print(table)

    def over(name: str, baseline: str) -> float:
        return max(rows[name][str(share)]["excess"] - rows[baseline][str(share)]["excess"] for share in SHARES)

    bars = {f"{task.name}: {name} less random, worst budget": Bar(over(name, "random"), high=0) for name in
            ("Scissorhands", "H2O", "SnapKV")}  # fmt: skip
    return rows, bars


def compiled(params: Any, prompt: int, kv: EvictionMethod | None, chunk: int | None) -> tuple[Callable[[], Any], Any]:
    """A run of `generate`, compiled; and its programs."""
    apply = DecoderApply(SPEED)
    tokens = jax.random.randint(jax.random.key(1), (1, prompt), 0, SPEED.vocab_size)
    lengths = jnp.array([prompt])

    def cache() -> Any:
        if kv is None:
            return new_cache(SPEED, batch=1, slots=prompt + NEW, split=True)
        return new_evicting_cache(SPEED, kv, prompts=(1, prompt), max_new_tokens=NEW, prefill_chunk=chunk)

    options: dict[str, Any] = {"max_new_tokens": NEW, "kv": kv, "prefill_chunk": chunk}
    made = compile_generate(apply, params, jax.eval_shape(cache), tokens, lengths, **options)
    return lambda: made.run(params, cache(), tokens, lengths)[2], made


def peak(made: CompiledGenerate) -> int:
    """Bytes of the prompt's program besides its parameters: cache, temporaries and what it gives."""
    memory = made.prefill.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def speed() -> tuple[dict[str, Any], dict[str, Bar]]:
    params = jax.jit(Decoder(SPEED).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    filled = SLOTS - SLOTS // 32  # on average: a full row loses a sixteenth at once
    plain, _ = compiled(params, filled - NEW // 2, None, None)
    whole, programs = compiled(params, LONG, None, None)
    arms = {name: method for name, method in methods(SLOTS).items() if name not in ("random", "recent")}
    runs = {name: compiled(params, LONG, method, CHUNK) for name, method in arms.items()}
    print("compiled", file=sys.stderr, flush=True)
    full = whole_cache_bytes(jax.eval_shape(lambda: new_cache(SPEED, batch=1, slots=1, split=True)), LONG + NEW)
    steps: dict[str, list[float]] = {}
    stats: dict[str, Any] = {}
    for _ in range(REPEATS):  # in turn
        for name, run in {"plain": plain, **{name: run for name, (run, _) in runs.items()}}.items():
            stats[name] = run()
            steps.setdefault(name, []).append(stats[name].decode_s / stats[name].steps)
    steps["plain, 16,640 slots"] = [(found := whole()).decode_s / found.steps]
    base = statistics.median(steps["plain"])
    table = Table(title=f"a step of 1 row: {LONG:,} tokens read in chunks of {CHUNK} within {SLOTS} slots")
    for column in (
        "cache",
        "ms a step",
        "over plain",
        "bytes of the cache",
        "of all",
        "peak of the prompt",
        "of whole",
    ):
        table.add_column(column)
    figures: dict[str, Any] = {}
    for name, seconds in steps.items():
        middle = statistics.median(seconds)
        figures[name] = {"ms": 1e3 * middle, "over plain": middle / base}
        cells = [name, f"{1e3 * middle:.3f}", f"{middle / base:.3f}"]
        if name in runs:
            memory = peak(runs[name][1])
            figures[name] |= {"bytes": stats[name].cache_bytes, "peak": memory, "peak ratio": memory / peak(programs)}
            cells += [f"{stats[name].cache_bytes:,}", f"{stats[name].cache_bytes / full:.4f}"]
            cells += [f"{memory:,}", f"{memory / peak(programs):.3f}"]
        table.add_row(*cells)
    Console(width=150).print(table)
    heads = SPEED.num_hidden_layers * SPEED.num_key_value_heads
    wanted = heads * (SLOTS * (2 * 4 * SPEED.head_dim + 8) + 4) + 4
    even = [name for name in runs if name != "PyramidKV"]
    bars = {f"step over a true {SLOTS}-slot cache, {name}": Bar(figures[name]["over plain"], high=1.2) for name in even}
    bars["cache bytes that differ from the budget's arithmetic, worst"] = Bar(
        max(abs(figures[name]["bytes"] - wanted) for name in even), low=0, high=0
    )
    bars["peak of the chunked prompt over the whole one, worst"] = Bar(
        max(figures[name]["peak ratio"] for name in runs), high=0.4
    )
    return figures, bars


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eviction", description=__doc__)
    parser.add_argument("--data", type=Path, help="directory that holds stories260K and its text; see above")
    parser.add_argument("--parts", nargs="+", choices=("quality", "speed"), default=("quality", "speed"))
    args = parser.parse_args(argv)
    if args.data is not None and (name := language_models.missing(args.data)):
        print(f"eviction: --data {args.data} holds no {name}; name the directory that does", file=sys.stderr)
        return 2
    bars: dict[str, Bar] = {}
    extra: dict[str, Any] = {}
    if "quality" in args.parts:
        for task in tasks(args.data):
            extra[task.name], more = quality(task)
            bars |= more
    if "speed" in args.parts:
        extra["speed"], more = speed()
        bars |= more
    return conclude("eviction", bars, extra)


if __name__ == "__main__":
    raise SystemExit(main())
