"""Claims of CQ: coupled channels need fewer bits a channel for keys and values than single ones, KIVI and KVQuant.

python -m benchmarks.claims.cq [--data DIR] [--seeds 0 1 2] [--skip-four-bits]

Teacher forced: every key (before rotation) and value of a text is replaced by its decoded one, those that the prompt
reads too, the first token among them, in all arms alike. Judged by the excess, `ln perplexity - ln perplexity of the
model as it is`. The embedded model has 2,048 tokens, eight times as many as a codebook has centres, so all layers are
coded. With `--data`, also stories260K (`models/stories260K/hf`, `text/tinystories_sample`): its 512 tokens are only
twice the centres, so its layer 0, whose keys and values depend on the token alone, stays out of all arms; its heads of
8 channels are too narrow for scales by token, so it judges the coupling alone.

Total bits count codes, scales, places, exact entries, codebooks and tables, over a cache of 64 rows of 256 tokens.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, conclude
from benchmarks.language_models import Task, documentation, embedded, missing, stories
from effjax.evaluate import compare_many
from effjax.kv import CQ, KIVI, IntKV, KVQuant
from effjax.kv.capture import CapturedKV, capture_kv
from effjax.kv.coded_apply import apply_coded
from effjax.kv.coders import KVCoders, fit_layers

# The paper learns from 32,768 tokens, 128 a centre of 8c8b. Windows; tokens that are read; rows of the cache.
CALIBRATION, JUDGED, LENGTH, ROWS = 128, 48, 256, 64
ITERATIONS = 25
COUPLED = {1: ((1, 1), (2, 2), (4, 4), (8, 8)), 2: ((1, 2), (2, 4), (4, 8)), 4: ((1, 4), (2, 8))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with texts.

    Attributes:
        task: the model, and the windows that calibration sets are drawn from.
        judged: int32 [windows, 257] of other text: 256 tokens are read.
        leave: layers that no arm codes.
    """

    task: Task
    judged: np.ndarray
    leave: tuple[int, ...] = ()


def embedded_subject() -> Subject:
    task = embedded()
    judged = documentation(task.model, "heldout", length=LENGTH + 1, max_windows=JUDGED)
    return Subject(task=task, judged=judged)


def stories_subject(data: Path) -> Subject:
    task = stories(data)
    bos = task.model.config.bos_token_id
    rows = np.concatenate([window[1:] for window in task.evaluation])
    rows = rows[: len(rows) // LENGTH * LENGTH].reshape(-1, LENGTH)[:JUDGED]
    judged = np.concatenate([np.full((len(rows), 1), bos, np.int32), rows], axis=1)
    return Subject(task=task, judged=judged, leave=(0,))


def coupled(bits: tuple[int, ...], *, fisher: bool) -> dict[str, Any]:
    kind = "Fisher" if fisher else "uniform"
    return {
        f"CQ-{c}c{b}b {kind}": CQ(channels=c, bits=b, fisher=fisher, iterations=ITERATIONS)
        for width in bits
        for c, b in COUPLED[width]
    }


def by_channel() -> dict[str, Any]:
    """One bit, each channel of a centre weighed for itself; of single channels the same as above."""
    return {
        f"CQ-{c}c{b}b by channel": CQ(channels=c, bits=b, by_channel=True, iterations=ITERATIONS)
        for c, b in COUPLED[1][1:]
    }


def between() -> dict[str, Any]:
    """Codes whose total lies between one and three bits, to set beside baselines of the same total."""
    return {f"CQ-{c}c{b}b Fisher": CQ(channels=c, bits=b, iterations=ITERATIONS) for c, b in ((4, 6), (2, 5))}


def baselines(head_dim: int) -> dict[str, Any]:
    """KIVI without its full-precision window, and all else with nothing exempt, as every arm here."""
    found: dict[str, Any] = {
        f"KIVI {bits} bits, groups of {size}": KIVI(bits=bits, head_dim=head_dim, group_size=size, residual=0)
        for bits, size in ((1, 64), (2, 64), (2, 32), (4, 64))
    }
    for bits in (1, 2, 4):
        found[f"KVQuant {bits} bits"] = KVQuant(bits=bits, head_dim=head_dim)
    found["KVQuant 2 bits, Q-Norm"] = KVQuant(bits=2, head_dim=head_dim, q_norm=True)
    for bits in (1, 2):
        found[f"KVQuant {bits} bits, 1 of {head_dim} exact"] = KVQuant(bits=bits, head_dim=head_dim, outliers=1)
    return found | {f"integers, {bits} bits": IntKV(bits=bits, head_dim=head_dim) for bits in (2, 4, 8)}


def excesses(subject: Subject, methods: dict[str, Any], seed: int) -> tuple[dict[str, dict[str, Any]], CapturedKV]:
    """Each method's excess with its interval, perplexity and bits, from one calibration set."""
    model, config = subject.task.model, subject.task.model.config
    captured = capture_kv(config, model.params, subject.task.calibration(seed, CALIBRATION))
    shape = (ROWS, config.num_key_value_heads, LENGTH, config.head_dim)
    coders: dict[str, KVCoders] = {}
    seconds: dict[str, float] = {}
    for name, method in methods.items():
        began = time.perf_counter()
        coders[name] = fit_layers(method, captured, key=jax.random.key(seed), leave=subject.leave)
        jax.block_until_ready(coders[name])
        seconds[name] = time.perf_counter() - began
        print(f"{subject.task.name}, seed {seed}: {name} learned in {seconds[name]:.0f} s", file=sys.stderr)

    def apply(variables: Any, tokens: jax.Array) -> jax.Array:
        part = variables["params"]
        if "coders" in part:
            return apply_coded(config, part["model"], part["coders"], tokens)
        return model.apply({"params": part["model"]}, tokens)

    candidates = {name: {"model": model.params, "coders": coder} for name, coder in coders.items()}
    results = compare_many(apply, {"model": model.params}, candidates, subject.judged, batch_size=8)
    rows = {
        name: {
            "excess": c.delta_nll,
            "interval": [c.delta_low, c.delta_high],
            "perplexity": c.perplexity,
            "reference": c.perplexity_reference,
            "same top-1": c.same_top1,
            "bits": coders[name].bits_per_channel(shape),
            "bits a token": coders[name].bits_per_channel(shape, tables=False),
            "seconds": seconds[name],
        }
        for name, c in results.items()
    }
    return rows, captured


def bytes_missed(subject: Subject) -> int:
    """Bytes of coded arrays that differ from the arithmetic of the paper, over all couplings; 0 where none do."""
    config = subject.task.model.config
    heads, head_dim = config.num_key_value_heads, config.head_dim
    x = jax.random.normal(jax.random.key(0), (heads, 512, head_dim))
    missed = 0
    for c, b in {pair for pairs in COUPLED.values() for pair in pairs}:
        method = CQ(channels=c, bits=b, fisher=False, iterations=0)
        books = method.learn(x)
        coded = method.encode(x, books)
        missed += abs(books.nbytes - heads * head_dim * 2**b * 2)
        missed += abs(coded.nbytes - heads * 512 * head_dim * b // (8 * c))
        missed += abs(sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(coded)) - coded.nbytes)
    return missed


def entropies(captured: CapturedKV, seed: int = 0) -> dict[str, dict[int, tuple[float, float]]]:
    """Joint entropy of neighbouring channels over the sum of theirs, and the same where each channel is shuffled.

    Four bins a channel, cut at the mean and one deviation below and above; means over layers, heads and runs.
    Eight channels have 65,536 cells, more than there are tokens, and are not estimated.
    """
    rng = np.random.default_rng(seed)

    def entropy(cells: np.ndarray, size: int) -> float:
        share = np.bincount(cells, minlength=size) / len(cells)
        return float(-(share[share > 0] * np.log2(share[share > 0])).sum())

    def ratios(bins: np.ndarray, width: int) -> float:
        """bins int [tokens, channels]."""
        joint = alone = 0.0
        for start in range(0, bins.shape[1], width):
            run = bins[:, start : start + width]
            joint += entropy(run @ 4 ** np.arange(width), 4**width)
            alone += sum(entropy(column, 4) for column in run.T)
        return joint / alone

    found: dict[str, dict[int, tuple[float, float]]] = {}
    for name, x in (("keys", captured.keys), ("values", captured.values)):
        rows: dict[int, list[tuple[float, float]]] = {1: [], 2: [], 4: []}
        for head in np.asarray(x).reshape(-1, *x.shape[2:]):
            spread = (head - head.mean(0)) / head.std(0)
            bins = np.clip(np.floor(spread) + 2, 0, 3).astype(np.int64)
            shuffled = np.stack([rng.permutation(column) for column in bins.T], axis=1)
            for width in rows:
                rows[width].append((ratios(bins, width), ratios(shuffled, width)))
        found[name] = {width: tuple(np.mean(pairs, axis=0).tolist()) for width, pairs in rows.items()}  # type: ignore
    return found


def show(title: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Means over seeds, each seed's excess beside them."""
    table = Table(title=title)
    for column in ("coding", "total bits", "bits a token", "perplexity", "excess", "95 %, first seed", "each seed"):
        table.add_column(column)
    for name, runs in sorted(rows.items(), key=lambda item: item[1][0]["bits"]):
        first, excess = runs[0], statistics.mean(run["excess"] for run in runs)
        table.add_row(
            name,
            f"{first['bits']:.3f}",
            f"{first['bits a token']:.3f}",
            f"{statistics.mean(run['perplexity'] for run in runs):.3f}",
            f"{excess:+.4f}",
            f"{first['interval'][0]:+.4f} to {first['interval'][1]:+.4f}",
            " ".join(f"{run['excess']:+.4f}" for run in runs),
        )
    Console(width=140).print(table)


def ratio(rows: dict[str, list[dict[str, Any]]], above: str, below: str) -> float:
    """Mean excess of one arm over that of another, over the seeds that both have."""
    pairs = list(zip(rows[above], rows[below], strict=False))
    return sum(a["excess"] for a, _ in pairs) / sum(b["excess"] for _, b in pairs)


def coupling_bars(name: str, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Bar]:
    def worst(names: list[str]) -> float:
        return max(ratio(rows, wider, narrower) for narrower, wider in zip(names, names[1:], strict=False))

    one, two = ([f"CQ-{c}c{b}b Fisher" for c, b in COUPLED[width]] for width in (1, 2))
    uniform = "CQ-8c8b uniform"
    return {
        f"{name}, 1 bit: excess 8c8b over 1c1b": Bar(ratio(rows, one[-1], one[0]), high=0.2, paper="sheet 0.10"),
        f"{name}, 2 bits: excess 4c8b over 1c2b": Bar(ratio(rows, two[-1], two[0]), high=0.5, paper="sheet 0.27"),
        f"{name}, 1 bit: largest ratio of one coupling to the next smaller": Bar(worst(one), high=1),
        f"{name}, 2 bits: largest ratio of one coupling to the next smaller": Bar(worst(two), high=1),
        f"{name}, 8c8b: excess Fisher over uniform": Bar(ratio(rows, one[-1], uniform), high=1, paper="sheet 0.89"),
    }


def equal_bits(rows: dict[str, list[dict[str, Any]]], family: str) -> tuple[dict[str, str], float]:
    """For each baseline of a family up to 3 bits, the CQ with the most bits that are not more; the largest ratio."""
    pairs: dict[str, str] = {}
    for name, runs in rows.items():
        if name.startswith(family) and runs[0]["bits"] <= 3.01:
            fitting = [
                c for c in rows if c.endswith("Fisher") and rows[c][0]["bits"] <= runs[0]["bits"] and "1c" not in c
            ]
            pairs[name] = max(fitting, key=lambda c: (rows[c][0]["bits"], int(c[3])))
    return pairs, max(ratio(rows, cq, baseline) for baseline, cq in pairs.items())


def run(subject: Subject, seeds: list[int], arms: Callable[[int], dict[str, Any]]) -> tuple[Any, Any]:
    """Rows of all seeds by name, and the entropies of the first seed's vectors."""
    rows: dict[str, list[dict[str, Any]]] = {}
    table = None
    for i, seed in enumerate(seeds):
        found, captured = excesses(subject, arms(i), seed)
        table = entropies(captured) if table is None else table
        for name, row in found.items():
            rows.setdefault(name, []).append(row)
    return rows, table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.cq", description=__doc__)
    parser.add_argument("--data", type=Path, help="directory that holds stories260K and its text; see above")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of calibration sets and k-means")
    parser.add_argument(
        "--skip-four-bits", action="store_true", help="leaves out codes of 4 bits a channel, the slowest"
    )
    args = parser.parse_args(argv)
    if args.data is not None and (name := missing(args.data)):
        print(f"cq: --data {args.data} holds no {name}; name the directory that does", file=sys.stderr)
        return 2
    judged = coupled((1, 2), fisher=True) | {"CQ-8c8b uniform": CQ(fisher=False, iterations=ITERATIONS)}
    subject = embedded_subject()
    head_dim = subject.task.model.config.head_dim
    first = judged | coupled((1,), fisher=False) | by_channel() | between() | baselines(head_dim)
    if not args.skip_four_bits:
        first |= coupled((4,), fisher=True)
    rows, table = run(subject, args.seeds, lambda i: first if i == 0 else judged)
    reference = next(iter(rows.values()))[0]["reference"]
    show(f"embedded model, {JUDGED} held-out windows of {LENGTH} tokens, perplexity {reference:.3f}", rows)
    entropy = Table(title="joint entropy over the sum of single ones (and where channels are shuffled)")
    for column in ("channels", *table):
        entropy.add_column(column)
    for width in (1, 2, 4):
        entropy.add_row(str(width), *(f"{part[width][0]:.3f} ({part[width][1]:.3f})" for part in table.values()))
    Console(width=120).print(entropy)
    bars = coupling_bars("embedded", rows)
    pairs: dict[str, str] = {}
    for family in ("KIVI", "KVQuant"):
        found, worst = equal_bits(rows, family)
        pairs |= found
        bars[f"embedded: largest excess of CQ over {family} at its total bits or fewer, to 3 bits"] = Bar(worst, high=1)
    versus = Table(title="at equal total bits or fewer, seed of the first row")
    for column in ("baseline", "total bits", "excess", "CQ", "total bits", "excess", "ratio"):
        versus.add_column(column)
    for baseline, cq in pairs.items():
        a, b = rows[baseline][0], rows[cq][0]
        figures = (f"{a['bits']:.3f}", f"{a['excess']:+.4f}", cq, f"{b['bits']:.3f}", f"{b['excess']:+.4f}")
        versus.add_row(baseline, *figures, f"{b['excess'] / a['excess']:.2f}")
    Console(width=140).print(versus)
    falls = max(part[wide][0] / part[narrow][0] for part in table.values() for narrow, wide in ((1, 2), (2, 4)))
    bars["embedded: largest ratio of entropy ratios, twice the channels over once"] = Bar(falls, high=1)
    bars["bytes that differ from the arithmetic"] = Bar(bytes_missed(subject), low=0, high=0)
    extra: dict[str, Any] = {"embedded": rows, "equal bits": pairs, "entropies": table}
    if args.data is not None:
        subject = stories_subject(args.data)
        rows, _ = run(subject, args.seeds, lambda i: judged)
        reference = next(iter(rows.values()))[0]["reference"]
        show(f"stories260K without layer 0, {len(subject.judged)} windows, perplexity {reference:.3f}", rows)
        bars |= coupling_bars("stories260K", rows)
        extra["stories260K"] = rows
    return conclude("cq", bars, extra)


if __name__ == "__main__":
    raise SystemExit(main())
