"""Claims of Wanda and SparseGPT: at half of the weights, and at 2 of 4, each loses less than magnitude alone.

    python -m benchmarks.claims.pruning [--data DIR]

One-shot, all layers calibrated on the dense model. Judged on the embedded model and, with `--data`, on stories260K
(`DIR/models/stories260K/hf`, `DIR/text/tinystories_sample`), on windows that calibration never saw. Excess is
`ln(perplexity) - ln(dense perplexity)`; the bars are on the mean over calibration sets.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import effjax as ej
from benchmarks import language_models
from benchmarks.bars import Bar, conclude
from benchmarks.language_models import Task
from effjax.evaluate import compare_many
from effjax.prune import Magnitude, SparseGPT, Wanda, repair

SEEDS, CALIBRATION, BATCH = (0, 1, 2), 64, 16
CUTS: dict[str, dict[str, Any]] = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}


def pruned(task: Task, seed: int) -> dict[str, Any]:
    """Parameters by name of the arm, from one calibration set."""
    params = task.model.params
    windows = task.calibration(seed, CALIBRATION)
    batches = [windows[i : i + BATCH] for i in range(0, len(windows), BATCH)]
    stats = ej.calibrate(
        lambda p, tokens: task.model.apply({"params": p}, tokens), params, batches, needs={"second_moment", "norm"}
    )
    arms: dict[str, Any] = {}
    for name, cut in CUTS.items():
        masks = {
            "magnitude": ej.prune_mask(params, Magnitude(**cut)),
            "Wanda": ej.prune_mask(params, Wanda(**cut), stats=stats),
            "SparseGPT": ej.prune_mask(params, SparseGPT(**cut), stats=stats),
        }
        for method, mask in masks.items():
            arms[f"{name} {method}"] = (repair if method == "SparseGPT" else _apply)(params, mask, stats=stats)
        for method in ("magnitude", "Wanda"):
            arms[f"{name} {method}, repaired"] = repair(params, masks[method], stats=stats)
    return arms


def _apply(params: Any, mask: Any, *, stats: Any) -> Any:
    del stats
    return ej.apply_mask(params, mask)


def judge(task: Task) -> tuple[dict[str, Any], dict[str, Bar]]:
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        found = compare_many(task.model.apply, task.model.params, pruned(task, seed), task.evaluation, batch_size=8)
        for name, c in found.items():
            rows.setdefault(name, []).append({"excess": c.delta_nll, "perplexity": c.perplexity})
            reference = c.perplexity_reference
        print(f"{task.name}: calibration {seed} of {len(SEEDS)} judged", file=sys.stderr)
    table = Table(title=f"{task.name}: {len(task.evaluation)} windows, dense perplexity {reference:.3f}")
    for column in ("arm", "perplexity", "excess", "each calibration set"):
        table.add_column(column)
    mean = {name: statistics.mean(run["excess"] for run in runs) for name, runs in rows.items()}
    for name, runs in rows.items():
        perplexity = statistics.mean(run["perplexity"] for run in runs)
        each = " ".join(f"{run['excess']:+.4f}" for run in runs)
        table.add_row(name, f"{perplexity:.3f}", f"{mean[name]:+.4f}", each)
    Console(width=120).print(table)
    papers = {"50 %": ("6.51 / 6.42", "6.42 / 14.89"), "2:4": ("10.17 / 11.02", "11.02 / 54.59")}
    bars = {}
    for name in CUTS:
        for (better, worse), paper in zip((("SparseGPT", "Wanda"), ("Wanda", "magnitude")), papers[name], strict=True):
            ratio = mean[f"{name} {better}"] / mean[f"{name} {worse}"]
            bars[f"{task.name}, {name}: excess {better} over {worse}"] = Bar(ratio, high=1, paper=f"ppl {paper}")
    return rows, bars


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.pruning", description=__doc__)
    parser.add_argument("--data", type=Path, help="directory that holds stories260K and its text; see above")
    args = parser.parse_args(argv)
    if args.data is not None and (name := language_models.missing(args.data)):
        print(f"pruning: --data {args.data} holds no {name}; name the directory that does", file=sys.stderr)
        return 2
    bars: dict[str, Bar] = {}
    extra: dict[str, Any] = {}
    tasks = [language_models.embedded()] + ([] if args.data is None else [language_models.stories(args.data)])
    for task in tasks:
        extra[task.name], more = judge(task)
        bars |= more
    return conclude("pruning", bars, extra)


if __name__ == "__main__":
    raise SystemExit(main())
