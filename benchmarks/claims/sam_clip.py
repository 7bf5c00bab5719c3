"""Claims of SAM-CLIP: a segmenter learns names from a classifier in a quarter of their steps, and keeps its masks.

python -m benchmarks.claims.sam_clip [--seeds 200 201 202] [--curve 1] [--out DIR]

Synthetic scenes of 24x24 pixels (`effjax.data.scenes`), on the training loop (`train.distill_sam_clip`). Learning rates
and steps were chosen on seed 100, which is not judged. Every arm but the segmenter alone has the steps of probing and
merging together. With `--out` an interrupted claim goes on where it was.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, conclude
from effjax.models.promptable import init_promptable
from train.distill_sam_clip import (
    SamClipConfig,
    ask_teachers,
    class_accuracy,
    make_data,
    mask_iou,
    merge,
    probe,
    text_iou,
    train_aux,
    train_base,
    with_head,
)

FIGURES = ("mask_iou", "accuracy", "text_iou")
Found = dict[str, dict[str, float]]  # by arm


def run_seed(seed: int, out: Path, lams: tuple[float, ...]) -> Found:
    """All arms of one seed."""
    config = SamClipConfig(out=out, seed=seed, resume=True, log_every=10**6)
    data = make_data(config)
    masks, names, texts = mask_iou(config, data), class_accuracy(config, data, config.pooling), text_iou(config, data)

    def judge(params: Any) -> dict[str, float]:
        return {"mask_iou": masks(params), "accuracy": names(params), "text_iou": texts(params)}

    base, aux = known(train_base(config, data)), known(train_aux(config, data))
    teacher = {"accuracy": class_accuracy(config, data, "mean")(aux), "text_iou": texts(aux)}
    found: Found = {"segmenter": {"mask_iou": masks(base)}, "classifier": teacher}
    targets, new = ask_teachers(config, data, base, aux), with_head(config, base, jax.random.key(seed))
    probed = known(probe(config, out / "probe", new, targets))
    found["head alone"] = judge(probed)

    def evaluate(params: Any) -> dict[str, float]:
        return {"mask_iou": masks(params), "accuracy": names(params)}

    def arm(name: str, params: Any, changes: dict[str, Any], rates: Any = None) -> None:
        began, changed = time.perf_counter(), dataclasses.replace(config, eval_every=config.steps // 4, **changes)
        folder = out / name.replace(" ", "_")
        found[name] = judge(known(merge(changed, folder, params, targets, rates=rates, evaluate=evaluate)))
        print(f"seed {seed}: {name} {rounded(found[name])}, {time.perf_counter() - began:.0f} s", flush=True)

    every = {"steps": config.probe_steps + config.steps}
    arm("merged", probed, {})
    arm("naive", new, every | {"lam": 0.0, "old_rate": 1.0})
    arm("small rate", new, every | {"lam": 0.0})
    fresh = with_head(config, init_promptable(jax.random.key(seed + 1), config.vit), jax.random.key(seed))
    arm("from scratch", fresh, every | {"learning_rate": config.base_rate}, dict.fromkeys(fresh, 1.0))
    for lam in lams:
        arm(f"lambda {lam:g}", probed, {"lam": lam})
    return found


def steps_share() -> float:
    """Steps of probing and merging, of those of both models."""
    config = SamClipConfig(out=Path())
    return (config.probe_steps + config.steps) / (config.base_steps + config.aux_steps)


def known(params: Any) -> Any:
    """Leaves where a stage was stopped."""
    if params is None:
        raise SystemExit("stopped; the same command with --out goes on")
    return params


def rounded(figures: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in figures.items())


def curves(out: Path, arm: str) -> list[tuple[int, float, float]]:
    """Step, masks and names of the evaluations of a run."""
    lines = (out / arm.replace(" ", "_") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [(int(r["step"]), r["mask_iou"], r["accuracy"]) for r in records if "mask_iou" in r]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[200, 201, 202])
    parser.add_argument("--curve", type=int, default=1, help="seeds that also try other weights of masks")
    parser.add_argument("--out", type=Path, help="folder to go on from")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        runs = [run_seed(s, out / str(s), (1.0, 100.0) if i < args.curve else ()) for i, s in enumerate(args.seeds)]
        shown = ("merged", "naive", "lambda 1", "lambda 100") if args.curve else ("merged", "naive")
        told = {arm: curves(out / str(args.seeds[0]), arm) for arm in shown}
    return report(runs, told)


def report(runs: list[Found], told: dict[str, Any]) -> int:
    """Tables, bars and the closing line."""

    def of(arm: str, figure: str) -> np.ndarray:
        return np.array([run[arm][figure] for run in runs if arm in run])

    table = Table(title="mean over seeds (standard deviation)")
    for column in ("arm", *FIGURES):
        table.add_column(column)
    for arm in runs[0]:
        cells = [of(arm, figure) if figure in runs[0][arm] else None for figure in FIGURES]
        table.add_row(arm, *("" if c is None else f"{c.mean():.3f} ({c.std():.3f})" for c in cells))
    Console(width=120).print(table)
    for arm, points in told.items():
        print(f"{arm}: " + "; ".join(f"step {s}: masks {m:.3f}, names {a:.3f}" for s, m, a in points))

    def ratio(figure: str, arm: str, other: str) -> float:
        return float((of(arm, figure) / of(other, figure)).mean())

    lost = float(100 * (of("segmenter", "mask_iou") - of("naive", "mask_iou")).mean())
    gained = float(100 * (of("merged", "text_iou") - of("classifier", "text_iou")).mean())
    bars = {
        "masks kept by merging": Bar(ratio("mask_iou", "merged", "segmenter"), low=0.97, paper="40.9 / 41.2 mAP"),
        "points of masks lost by the naive way": Bar(lost, low=10),
        "names, of the classifier's": Bar(ratio("accuracy", "merged", "classifier"), low=0.95, paper="72.4 / 73.5 %"),
        "points of masks from texts over the classifier": Bar(gained, low=5),
        "steps, of those of both models": Bar(steps_share(), high=0.25),
    }
    if "lambda 1" in runs[0]:
        first = runs[0]
        masks = [first[arm]["mask_iou"] for arm in ("lambda 1", "merged", "lambda 100")]
        names = [first[arm]["accuracy"] for arm in ("merged", "lambda 100")]
        bars |= {
            "points of masks, lambda 10 over 1": Bar(100 * (masks[1] - masks[0]), low=0),
            "points of masks, lambda 100 over 10": Bar(100 * (masks[2] - masks[1]), low=0),
            "points of names, lambda 10 over 100": Bar(100 * (names[0] - names[1]), low=0),
        }
    extra = {"seeds": len(runs), "arms": {arm: {f: float(of(arm, f).mean()) for f in runs[0][arm]} for arm in runs[0]}}
    return conclude("sam_clip", bars, extra)


if __name__ == "__main__":
    raise SystemExit(main())
