"""Decoding a model that is twice as large as its memory: real reads of a real disk, beside reading densely.

    python -m benchmarks.flash_io [--folder DIR] [--rounds 3]

The model is made up: 6 layers of OPT's shape, 2048 wide, 8192 neurons each, 1.2 GB in float32, random weights. Its
neurons follow a pattern like that of the trained model of benchmarks/claims/llm_in_a_flash.py: how many are active, how
many a predictor names, and how many of those the last tokens did not use. Columns of the up projections lie near a
space of low dimension, so that there is a predictor; some neurons are larger than others, so that some fire often; and
positions drift slowly, so that tokens in a row are alike. Tokens are words of a text, and the model's likeliest next
words are compared with those of the model in memory.

Each arm is a process of its own whose memory the system limits (RLIMIT_DATA): what it had when it started, the budget,
and `ALLOWANCE` for programs and the stacks of threads. The page cache is passed by (O_DIRECT). "naive" reads all
feed-forward weights for each token, with all else in memory; "hybrid" holds what the budget lets it hold of them, half
of the model in all, and reads the rest. Both read long runs of rows, and compute on them by the same product.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, conclude
from effjax.flash import (
    Every,
    FeedForward,
    FlashDecoder,
    aligned_empty,
    apply_windowed,
    largest_window,
    measure_device,
    open_bundles,
    plan_memory,
    predict_reads,
    resident_params,
    used_shares,
    write_bundles,
)
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder, DecoderApply
from effjax.sparsity.predictor import Predictor
from effjax.stream.memory import peak_resident, resident

CONFIG = DecoderConfig(
    vocab_size=2000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=6,
    num_attention_heads=16,
    model_type="opt",
    max_position_embeddings=256,
    tie_word_embeddings=False,  # else random weights find the word itself the likeliest, whatever the neurons do
)
RANK = 64
CUT, SPREAD, NOISE = 1.97, 0.3, 0.25  # of the ReLU, of the sizes of neurons, of columns outside the predictor's space
NAMED = 1.68  # score above which the predictor names a neuron
LIKENESS, DRIFT = 0.2, 0.9  # share of the position in a hidden state, and how much of it stays from token to token
ROUNDING = 4e-6  # of scores: a neuron that lies as near to the threshold may be named by one program and not by another
ALLOWANCE = 256 << 20
TOKENS = {"flash": 144, "hybrid": 7, "naive": 5}
DENSE = ("hybrid", "naive")


class Layers(Sequence[FeedForward]):
    """The feed-forward layers, each made when it is asked for."""

    def __len__(self) -> int:
        return CONFIG.num_hidden_layers

    def __getitem__(self, i: Any) -> FeedForward:
        rng = np.random.default_rng([1, i])
        d, m = CONFIG.hidden_size, CONFIG.intermediate_size
        predictor = predictors()[i]
        up = predictor.reduce @ predictor.expand
        size = np.linalg.norm(up, axis=0)
        up += NOISE * size * rng.standard_normal((d, m), np.float32) / np.float32(np.sqrt(d))
        down = rng.standard_normal((m, d), np.float32) * np.float32(0.02)
        return FeedForward(up=up, down=down, up_bias=np.full(m, -CUT, np.float32))


def predictors() -> list[Predictor]:
    """Columns of `reduce` are orthonormal, and the scores of neurons have deviations around 1."""
    d, m, found = CONFIG.hidden_size, CONFIG.intermediate_size, []
    for i in range(CONFIG.num_hidden_layers):
        rng = np.random.default_rng([2, i])
        reduce = np.linalg.qr(rng.standard_normal((d, RANK)))[0].astype(np.float32)
        expand = rng.standard_normal((RANK, m)).astype(np.float32)
        expand *= np.exp(SPREAD * rng.standard_normal(m)).astype(np.float32) / np.linalg.norm(expand, axis=0)
        found.append(Predictor(reduce=reduce, expand=expand))  # type: ignore[arg-type]
    return found


def resident_weights() -> Any:
    """All but the feed-forward kernels."""
    shapes = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(3)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        x = rng.standard_normal(leaf.shape, np.float32)
        if name.endswith("positions"):
            for t in range(1, len(x)):
                x[t] = DRIFT * x[t - 1] + np.sqrt(1 - DRIFT**2) * x[t]
            return np.float32(np.sqrt(LIKENESS)) * x
        if name.endswith("embedding"):
            return np.float32(np.sqrt(1 - LIKENESS)) * x
        if leaf.ndim == 1:
            return np.full(leaf.shape, name.endswith("scale"), np.float32)
        return x * np.float32((0.1 if "o_proj" in name else 1) / np.sqrt(leaf.shape[0]))

    return jax.tree_util.tree_map_with_path(draw, resident_params(shapes))


def write_model(folder: Path, kinds: Sequence[str]) -> None:
    leaves = jax.tree.leaves(resident_weights())
    for i, leaf in enumerate(leaves):
        np.save(folder / f"resident_{i}.npy", leaf)
    for kind in kinds:
        write_bundles(folder / f"{kind}.flash", Layers(), kind=kind)  # type: ignore[arg-type]


def load_resident(folder: Path) -> Any:
    """Leaf by leaf, so that none is held twice."""
    shapes = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    shapes = resident_params(shapes)
    count = len(jax.tree.leaves(shapes))
    leaves = [jnp.array(np.load(folder / f"resident_{i}.npy", mmap_mode="r")) for i in range(count)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def reference(folder: Path) -> None:
    """The model in memory: predicted neurons of a calibration text, and the likeliest next words of the judged one."""
    words = np.load(folder / "words.npy")
    params = load_resident(folder)
    for i, ffn in enumerate(Layers()):
        up = {"kernel": jnp.asarray(ffn.up), "bias": jnp.asarray(ffn.up_bias)}
        down = {"kernel": jnp.asarray(ffn.down), "bias": jnp.zeros(CONFIG.hidden_size)}
        params[f"layers_{i}"]["mlp"] = {"up_proj": up, "down_proj": down}
    named = jax.tree.map(jnp.asarray, predictors())

    def run(window: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
        seen: list[Any] = []

        def see(i: int, query: jax.Array, predicted: jax.Array, h: jax.Array) -> None:
            seen.append((predicted[0], h[0] != 0, jnp.abs(named[i](query[0]) - NAMED).min(-1)))

        logits = apply_windowed(CONFIG, named, window, threshold=NAMED, see=see)({"params": params}, tokens[None])
        masks, active, margins = (np.stack([np.asarray(x) for x in parts]) for parts in zip(*seen, strict=True))
        missed = float((active & ~masks).sum() / active.sum())
        new = np.diff(used_shares(masks, 8))
        print(f"active {active.mean():.4f}, predicted {masks.mean():.4f}, missed {missed:.3f}, new {new.round(4)}")
        return np.asarray(logits[0]), masks, missed, margins.min(0)

    masks = run(4, words[0])[1]
    budget = model_bytes(folder) // 2
    plan = plan_memory(
        CONFIG,
        resident_params(params),
        named,
        open_bundles(folder / "float32.flash"),
        budget=budget,
        slots=TOKENS["flash"],
    )
    window = largest_window(masks, sum(plan.capacity))
    logits, judged, missed, margins = run(window, words[1])
    dense = DecoderApply(CONFIG)({"params": params}, words[1:, : max(TOKENS[arm] for arm in DENSE)])
    np.savez(
        folder / "reference.npz",
        masks=np.packbits(masks, axis=-1),
        window=window,
        masked=logits,
        dense=np.asarray(dense[0]),
        pattern=[judged.mean(), missed],
        clear=margins > ROUNDING,
    )


def model_bytes(folder: Path) -> int:
    """Of all weights in float32, predictors not counted."""
    return (folder / "float32.flash").stat().st_size + sum(f.stat().st_size for f in folder.glob("resident_*.npy"))


def arm(name: str, folder: Path, kind: str) -> dict[str, Any]:
    """One arm in this very process; figures are of tokens after the cold start."""
    words, known = np.load(folder / "words.npy")[1], np.load(folder / "reference.npz")
    budget, window = model_bytes(folder) // 2, int(known["window"])
    masks = np.unpackbits(known["masks"], axis=-1).astype(bool)
    file = open_bundles(folder / f"{kind}.flash")
    found: dict[str, Any] = {}
    if name == "flash":
        device = measure_device(file.path, chunks=(4096, 16384, 65536), requests=(16, 64, 256), repeats=15)
        expected = predict_reads(masks, file, device, window=window)
        found = {"device": dataclasses.asdict(device), "expected": dataclasses.asdict(expected)}
    jnp.zeros(1).block_until_ready()
    before, used = resident(), _data()
    resource.setrlimit(resource.RLIMIT_DATA, (used + budget + ALLOWANCE, resource.RLIM_INFINITY))
    try:
        aligned_empty(1, model_bytes(folder))
    except MemoryError:
        found["refused"] = True
    dense = name in DENSE
    scores: list[Any] = [Every(neurons=CONFIG.intermediate_size)] * len(Layers()) if dense else predictors()
    params, scores = load_resident(folder), jax.tree.map(jnp.asarray, scores)
    with FlashDecoder(
        CONFIG,
        params,
        scores,
        file.path,
        budget=budget,
        window=10**6 if dense else window,
        slots=TOKENS["flash"],
        capacity=0 if name == "naive" else None,
        passing=2048 if dense else 256,
        threshold=0.0 if dense else NAMED,
    ) as decoder:
        logits, seconds = [], []
        for token in words[: TOKENS[name]]:
            began = time.perf_counter()
            logits.append(np.asarray(decoder.step(int(token))))
            seconds.append(time.perf_counter() - began)
        cold = 2 if dense else max(window, 8)
        steady = [layer for layers in decoder.trace[cold:] for layer in layers]
        tokens = len(decoder.trace) - cold
        wanted, got = known["dense" if dense else "masked"][: TOKENS[name]], np.stack(logits)
        clear = np.ones(len(got), bool) if dense else known["clear"][: len(got)]
        total = {key: sum(getattr(t, key) for t in steady) / tokens for key in ("attend", "manage", "read", "compute")}
        counts = {
            key: sum(getattr(t, key) for t in steady) / len(steady) for key in ("predicted", "resident", "loaded")
        }
        found |= total | counts
        found |= {
            "seconds": statistics.mean(seconds[cold:]),
            "cold": statistics.mean(seconds[1:cold]),
            "same": float(np.mean(got.argmax(-1) == wanted.argmax(-1))),
            "difference": float(np.abs(got - wanted)[clear].max() / wanted.std()),
            "unclear tokens": int((~clear).sum()),
            "unclear tokens, difference": float(np.abs(got - wanted)[~clear].max(initial=0) / wanted.std()),
            "requests": sum(t.reads.requests for t in steady) / tokens,
            "bytes": sum(t.reads.bytes for t in steady) / tokens,
            "passing": sum(t.passing for t in steady) / tokens,
            "planned": decoder.memory.total,
            "held": peak_resident() - before,
            "data": _data() - used,
            "budget": budget,
            "direct": decoder.reader.direct,
        }
    return found


def _data() -> int:
    """Bytes that RLIMIT_DATA counts."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("VmData:")[1].split()[0])


def child(*args: str) -> dict[str, Any]:
    """Runs an arm in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.flash_io", *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(args[:2])} failed with exit code {done.returncode}: {done.stdout[-2000:]}")
    print(done.stdout, end="", flush=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def judge(
    folder: Path, words: np.ndarray, rounds: int, kinds: Sequence[str] = ("int8", "int4")
) -> tuple[dict[str, Bar], dict[str, Any]]:
    """Makes the model in a folder on the disk that is to be read, and runs the arms in turn.

    Args:
        words: int32 `[2, tokens]`, a text to calibrate on and one to judge on, of fewer than 2000 words.
        rounds: of every arm.
        kinds: of codes that the same model is read in besides.
    """
    np.save(folder / "words.npy", words[:, : TOKENS["flash"]])
    write_model(folder, ("float32", *kinds))
    child("--arm", "reference", "--folder", str(folder))
    arms: dict[str, list[dict[str, Any]]] = {name: [] for name in TOKENS}
    for _ in range(rounds):
        for name in arms:
            arms[name].append(child("--arm", name, "--folder", str(folder)))
    for kind in kinds:
        arms[f"flash, {kind}"] = [child("--arm", "flash", "--folder", str(folder), "--kind", kind)]
    size, known = model_bytes(folder), np.load(folder / "reference.npz")
    show(arms, size, known)

    def mean(name: str, key: str) -> float:
        return statistics.mean(run[key] for run in arms[name])

    errors = [run["expected"]["seconds"] / run["read"] for run in arms["flash"]]
    every = [run for runs in arms.values() for run in runs]
    bars = {
        "model over budget": Bar(size / every[0]["budget"], low=2.0),
        "tokens/s over naive's": Bar(mean("naive", "seconds") / mean("flash", "seconds"), low=4.0),
        "tokens/s over hybrid's": Bar(mean("hybrid", "seconds") / mean("flash", "seconds"), low=1.0),
        "next words that are those of the masks in memory": Bar(min(run["same"] for run in arms["flash"]), low=1.0),
        "next words of the dense arms": Bar(min(r["same"] for name in DENSE for r in arms[name]), low=1.0),
        "largest difference of logits, over their deviation, no score at the threshold": Bar(
            max(run["difference"] for name in TOKENS for run in arms[name]), high=1e-3
        ),
        "predicted over measured time of reads": Bar(statistics.mean(errors), low=0.75, high=1.25),
        "processes to which the system refused the whole model": Bar(
            sum(run.get("refused", False) for run in every) / len(every), low=1.0
        ),
        "most memory taken, over the budget": Bar(
            max(run["held"] / run["budget"] for name in TOKENS for run in arms[name]), high=1.25
        ),
    }
    return bars, {"real reads": arms, "predicted over measured, each round": errors}


def show(arms: dict[str, list[dict[str, Any]]], size: int, known: Any) -> None:
    console, budget = Console(width=150), arms["flash"][0]["budget"]
    share, missed = known["pattern"]
    console.print(
        f"model {size / 1e6:,.0f} MB, budget {budget / 1e6:,.0f} MB, window {int(known['window'])}; {share:.1%} of the "
        f"neurons predicted, {missed:.1%} of the active ones missed"
    )
    table = Table(title="a token after the cold start, mean of the rounds")
    columns = ("arm", "tokens/s", "each round", "ms", "cold", "attend", "manage", "read", "expected", "compute")
    for column in (*columns, "MB read", "requests", "resident", "taken MB", "same words"):
        table.add_column(column)
    for name, runs in arms.items():
        mean = {
            key: statistics.mean(run[key] for run in runs) for key in runs[0] if isinstance(runs[0][key], float | int)
        }
        each = " ".join(f"{1 / run['seconds']:.2f}" for run in runs)
        terms = [f"{1e3 * mean[key]:.0f}" for key in ("seconds", "cold", "attend", "manage", "read")]
        guess = [run["expected"]["seconds"] for run in runs if "expected" in run]
        table.add_row(
            name,
            f"{1 / mean['seconds']:.2f}",
            each,
            *terms,
            f"{1e3 * statistics.mean(guess):.0f}" if guess else "",
            f"{1e3 * mean['compute']:.0f}",
            f"{mean['bytes'] / 1e6:.1f}",
            f"{mean['requests']:.0f}",
            f"{mean['resident'] / CONFIG.intermediate_size:.1%}",
            f"{mean['held'] / 1e6:.0f}",
            f"{mean['same']:.1%}",
        )
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flash_io", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="on the disk to be read; 2.5 GB are free there")
    parser.add_argument("--rounds", type=int, default=3, help="of every arm")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="float32", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.arm == "reference":
        reference(args.folder)
        print("{}")
        return 0
    if args.arm:
        print(json.dumps(arm(args.arm, args.folder, args.kind)))
        return 0
    rng = np.random.default_rng(0)  # words as frequent as those of a text
    words = np.minimum(rng.zipf(1.3, (2, TOKENS["flash"])), CONFIG.vocab_size - 1).astype(np.int32)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        return conclude("flash_io", *judge(Path(folder), words, args.rounds))


if __name__ == "__main__":
    raise SystemExit(main())
