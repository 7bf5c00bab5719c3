"""Our eviction methods beside kvpress's: same model, same windows, same budgets, losses token by token.

python -m benchmarks.peers.kv [--data DIR] [--environment DIR]

The protocol is that of benchmarks.eviction: 192 tokens of a window are read at once, the cache is brought down to a
share, the next 64 are read with what is left. kvpress runs in an environment of its own, made with pip from the default
index where `--environment` has none; it gets the model as a Hugging Face directory and the windows as an array.

`ObservedAttention` is kvpress's relative of H2O: the mean attention over queries, and no newest tokens that stay. It is
listed, but not a twin. Its `PyramidKV` gives all layers one budget where the last would keep less than the window, ours
where the last would keep less than two tokens besides the window: both do at a quarter and an eighth. The others choose
the same tokens by the same rule; where two differ, it is by ties and roundings of the scores. "Noise" is twice the
standard error of the paired difference over windows.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import language_models
from benchmarks.bars import Bar, conclude
from benchmarks.eviction import PROMPT, SHARES, WINDOW, Read, methods, read, tasks, windows
from benchmarks.peers.worker import Worker, environment
from effjax.models.hf import save_hf

HERE = Path(__file__).parent
REQUIREMENTS, WORKER = HERE / "kvpress-requirements.txt", HERE / "_kvpress_worker.py"
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "SnapKV": ("SnapKVPress", {"window_size": WINDOW, "kernel_size": 5}),
    "PyramidKV": ("PyramidKVPress", {"window_size": WINDOW, "kernel_size": 5, "beta": 20}),
    "TOVA": ("TOVAPress", {}),
    "StreamingLLM": ("StreamingLLMPress", {"n_sink": 4}),
}
RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {"H2O": ("ObservedAttentionPress", {})}


def compare(task: language_models.Task, worker: Worker, folder: Path) -> tuple[dict[str, Any], dict[str, Bar]]:
    tokens = windows(task)
    np.save(folder / "tokens.npy", tokens)
    model = folder / task.name
    save_hf(model, task.model.config, task.model.params, None)

    def theirs(press: tuple[str, dict[str, Any]] | None) -> Read:
        save = folder / "read.npz"
        files = {"model": str(model), "tokens": str(folder / "tokens.npy"), "save": str(save)}
        worker.ask({**files, "prompt": PROMPT, "press": press})
        with np.load(save) as found:
            return Read(nll=found["nll"], likeliest=found["likeliest"])

    whole, their_whole = read(task.model, tokens, None), theirs(None)
    table = Table(title=f"{task.name}: excess behind {PROMPT} tokens; whole caches differ by "
                  f"{np.abs(whole.nll - their_whole.nll).max():.1e} nats at most")  # fmt: skip
    for column in ("method", "kept", "ours", "kvpress", "difference", "noise", "same likeliest"):
        table.add_column(column)
    rows: dict[str, Any] = {"whole caches, largest difference": float(np.abs(whole.nll - their_whole.nll).max())}
    worst = 0.0
    for name, (press, arguments) in (TWINS | RELATIVES).items():
        for share in SHARES:
            budget = round(PROMPT * share)
            ours = read(task.model, tokens, methods(budget)[name])
            other = theirs((press, arguments | {"compression_ratio": 1 - share}))
            difference, noise = ours.excess(other), ours.interval(other)
            same = ours.agreement(other)
            rows[f"{name}, {budget}"] = {"ours": ours.excess(whole), "kvpress": other.excess(their_whole)}
            rows[f"{name}, {budget}"] |= {"difference": difference, "noise": noise, "agreement": same}
            if name in TWINS:
                worst = max(worst, difference - noise)
            table.add_row(
                name,
                str(budget),
                f"{ours.excess(whole):+.4f}",
                f"{other.excess(their_whole):+.4f}",
                f"{difference:+.4f}",
                f"{noise:.4f}",
                f"{100 * same:.1f} %",
            )
            print(f"{task.name} {name} {budget}: {difference:+.4f}", file=sys.stderr, flush=True)
    Console(width=140).print(table)
    return rows, {f"{task.name}: excess over kvpress's beyond noise, worst": Bar(worst, high=1e-3)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.kv", description=__doc__)
    parser.add_argument("--data", type=Path, help="directory that holds stories260K and its text")
    parser.add_argument("--environment", type=Path, help="directory of kvpress's environment, made where it has none")
    args = parser.parse_args(argv)
    if args.data is not None and (name := language_models.missing(args.data)):
        print(f"kv: --data {args.data} holds no {name}; name the directory that does", file=sys.stderr)
        return 2
    bars: dict[str, Bar] = {}
    extra: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = environment(args.environment or folder / "environment", REQUIREMENTS, "kvpress")
        with Worker("kvpress", [python, WORKER], folder / "log.txt") as worker:
            extra["versions"] = worker.hello["versions"]
            for task in tasks(args.data):
                extra[task.name], more = compare(task, worker, folder)
                bars |= more
    return conclude("kv_peers", bars, extra)


if __name__ == "__main__":
    raise SystemExit(main())
