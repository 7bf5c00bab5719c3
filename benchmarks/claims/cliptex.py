"""Claims of CLIPTeX: labels of small experts make CLIP's patches better at dense tasks, and keep what it names.

python -m benchmarks.claims.cliptex [--seeds 300 301 302] [--single 1] [--out DIR]

Synthetic scenes of 24x24 pixels with captions (`effjax.data.scenes`), on the training loop (`train.distill_cliptex`).
The baseline is CLIP-FT: the same further steps from the same CLIP on the same batches, without the labels. Learning
rates and steps were chosen on seed 100, which is not judged. With `--out` an interrupted claim goes on where it was.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, conclude
from effjax.distill import write_labels
from train.distill_cliptex import OUTPUTS, ClipTexConfig, Judge, go_on, make_data, mean_iou, train_clip, train_expert

FIGURES = ("class_iou", "depth_error", "edge_precision", "accuracy", "retrieval", "seconds")
Found = dict[str, dict[str, float]]  # by arm


def run_seed(seed: int, out: Path, single: bool) -> tuple[Found, dict[str, float]]:
    """All arms of one seed, and how right the experts are."""
    config = ClipTexConfig(out=out, seed=seed, resume=True, log_every=10**6)
    data = make_data(config)
    experts = {kind: known(train_expert(config, data, kind)) for kind in OUTPUTS}
    seen = data.judged
    right = {
        "classes": mean_iou(
            np.asarray(experts["classes"].apply(seen.images)).argmax(-1), seen.classes, OUTPUTS["classes"]
        ),
        "normals, cosine": float(
            (unit(np.asarray(experts["normals"].apply(seen.images))) * seen.normals).sum(-1).mean()
        ),
    }
    labels = write_labels(out / "labels", experts, data.scenes.images, teacher=f"seed {seed}", factor=config.patch)
    clip, judge = known(train_clip(config, data)), Judge(config, data)
    found: Found = {"CLIP": judge(clip)}
    kinds = tuple(OUTPUTS)
    arms: dict[str, Any] = {"CLIP-FT": (), "CLIPTeX": kinds}
    arms |= {f"only {kind}": (kind,) for kind in kinds} if single else {}
    for name, used in arms.items():
        folder = out / name.replace(" ", "_")
        params = known(go_on(dataclasses.replace(config, experts=used), folder, data, clip, labels))
        found[name] = judge(params) | {"seconds": step_seconds(folder)}
        print(f"seed {seed}: {name} {' '.join(f'{k} {v:.3f}' for k, v in found[name].items())}", flush=True)
    return found, right


def known(params: Any) -> Any:
    """Leaves where a stage was stopped."""
    if params is None:
        raise SystemExit("stopped; the same command with --out goes on")
    return params


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


def step_seconds(folder: Path) -> float:
    """Median of a step, its batch and labels read meanwhile."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(np.median([json.loads(line)["seconds"] for line in lines]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[300, 301, 302])
    parser.add_argument("--single", type=int, default=1, help="seeds that also try every expert alone")
    parser.add_argument("--out", type=Path, help="folder to go on from")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        runs = [run_seed(seed, out / str(seed), i < args.single) for i, seed in enumerate(args.seeds)]
    return report([found for found, _ in runs], [right for _, right in runs])


def report(runs: list[Found], rights: list[dict[str, float]]) -> int:
    """Table, bars and the closing line."""

    def of(arm: str, figure: str) -> np.ndarray:
        return np.array([run[arm][figure] for run in runs if arm in run])

    table = Table(title="mean over seeds (standard deviation)")
    for column in ("arm", *FIGURES):
        table.add_column(column)
    for arm in runs[0]:
        cells = [of(arm, figure) if figure in runs[0][arm] else None for figure in FIGURES]
        table.add_row(arm, *("" if c is None else f"{c.mean():.3f} ({c.std():.3f})" for c in cells))
    Console(width=140).print(table)
    experts = {name: float(np.mean([right[name] for right in rights])) for name in rights[0]}
    print("experts: " + ", ".join(f"{name} {value:.3f}" for name, value in experts.items()))

    def gain(figure: str) -> float:
        return float(100 * (of("CLIPTeX", figure) - of("CLIP-FT", figure)).mean())

    def ratio(figure: str) -> float:
        return float((of("CLIPTeX", figure) / of("CLIP-FT", figure)).mean())

    bars = {
        "points of class IoU of a linear probe": Bar(gain("class_iou"), low=5, paper="up to 16.3 %, all tasks"),
        "depth error, of CLIP-FT's": Bar(ratio("depth_error"), high=0.9),
        "points of precision of edges, which no expert showed": Bar(gain("edge_precision"), low=0),
        "points of zero-shot names": Bar(gain("accuracy"), low=-1, paper="kept"),
        "seconds a step, of CLIP-FT's": Bar(ratio("seconds"), high=1.5),
    }
    means = {arm: {figure: float(of(arm, figure).mean()) for figure in runs[0][arm]} for arm in runs[0]}
    return conclude("cliptex", bars, {"seeds": len(runs), "arms": means, "experts": experts})


if __name__ == "__main__":
    raise SystemExit(main())
