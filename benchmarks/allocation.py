"""Widths chosen to a budget against one width for all, at equal bytes: excess perplexity on stories260K.

python -m benchmarks.allocation --data DIR [--seeds 3]

`DIR` as for benchmarks.claims.stories260k, whose windows judge. Candidates are one method at 2, 3, 4, 5, 6 and 8 bits,
in groups of 32, or a group a column where 32 does not divide. Every budget is the container bytes that a uniform 2, 3
or 4 bits take, or the middle between two of them, where the best uniform choice that fits is the smaller one. Excess is
ln(perplexity) - ln(perplexity of the dense model). Calibration windows come from the part of the text before the
judged windows; a seed chooses them. Weights are materialised for judging, so that one compiled program serves all
variants.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import effjax as ej
from benchmarks.bars import Bar, conclude
from benchmarks.claims.stories260k import CHARACTERS, GROUP, LENGTH, MODEL, TEXT, read_windows
from effjax.errors import EffjaxError
from effjax.evaluate import next_token_loss, windows_from_text
from effjax.lift.calibrate import InputStats
from effjax.models.decoder import Decoder
from effjax.models.hf import LoadedModel, load_model
from effjax.paths import leaves_with_paths
from effjax.quantize import Sensitivity, allocate, family, sensitivity
from effjax.rules import is_dense_matrix

CALIBRATION = 32
WIDTHS = (2, 3, 4, 5, 6, 8)
JUDGED = "fisher layer"
LOSS_WINDOWS = 8


def calibration_windows(model: LoadedModel, text: Path, seed: int) -> np.ndarray:
    """`int32[32, 256]` of the first two thirds of the text, which the judged windows do not reach."""
    found = windows_from_text(
        model.tokenizer,
        text.read_text(encoding="utf-8")[: CHARACTERS * 2 // 3],
        length=LENGTH,
        bos=model.config.bos_token_id,
    )
    return found[np.random.default_rng(seed).permutation(len(found))[:CALIBRATION]]


class Setting:
    """The model, its loss, and what one seed of calibration gives."""

    def __init__(self, model: LoadedModel, text: Path) -> None:
        self.model, self.text = model, text
        self.module = Decoder(model.config)
        self.judged = read_windows(model, text)
        self.loss = next_token_loss(self.module.apply)
        self.step = jax.jit(self.loss)
        self.dense = self.nll(model.params)

    def statistics(self, windows: np.ndarray) -> Any:
        batches = [jnp.asarray(batch) for batch in np.split(windows, 4)]
        return ej.calibrate(
            lambda params, tokens: self.module.apply({"params": params}, tokens),
            self.model.params,
            batches,
            needs={"second_moment", "fisher"},
            loss=self.loss,
        )

    def nll(self, params: Any) -> float:
        """Mean over the judged tokens; batches are of equal size."""
        return float(np.mean([float(self.step(params, batch)) for batch in np.split(self.judged, 5)]))

    def excess(self, rules: Any, stats: Any) -> float:
        return self.nll(ej.materialize(ej.quantize_params(self.model.params, rules, stats=stats))) - self.dense


def table(setting: Setting, name: str, **options: Any) -> Sensitivity:
    """One method at all widths, in groups, or per column for the matrices that groups do not divide."""
    kind = {"RTN": ej.quantize.RTN, "GPTQ": ej.quantize.GPTQ}[name]
    matrices = {
        path: leaf.shape[-2] for path, leaf in leaves_with_paths(setting.model.params) if is_dense_matrix(path, leaf)
    }
    found = []
    for size in (GROUP, None):
        paths = {path for path, n in matrices.items() if (n % GROUP == 0) == (size is not None)}
        if paths:
            methods = family(kind(group_size=size), WIDTHS)
            where = lambda path, _, paths=paths: path in paths  # noqa: E731
            found.append(sensitivity(setting.model.params, methods, where=where, **options))
    return Sensitivity(measure=found[0].measure, leaves=tuple(leaf for t in found for leaf in t.leaves))


def tables(setting: Setting, name: str, stats: Any, windows: np.ndarray) -> Iterator[tuple[str, Sensitivity]]:
    """The same candidates under every measure that the method's needs allow; statistics are cut down to it."""

    def without(*fields: str) -> Any:
        gone = dict.fromkeys(fields)
        return jax.tree.map(
            lambda s: dataclasses.replace(s, **gone), stats, is_leaf=lambda x: isinstance(x, InputStats)
        )

    if name == "RTN":
        yield "weights", table(setting, name)
        yield "fisher", table(setting, name, stats=without("outer_sum"))
    yield "layer", table(setting, name, stats=without("fisher_sum", "examples"))
    yield "fisher layer", table(setting, name, stats=stats)
    batches = [jnp.asarray(windows[:LOSS_WINDOWS])]
    yield "loss", table(setting, name, stats=stats, loss=setting.loss, batches=batches)


def uniform(table: Sensitivity, bits: int) -> list[tuple[str, Any]]:
    return [(leaf.path, next(c.method for c in leaf.choices if c.method.bits == bits)) for leaf in table.leaves]


def budgets(table: Sensitivity) -> dict[str, tuple[int, int]]:
    """Name of a budget: its bytes, and the bits of the best uniform choice that fits."""
    size = {bits: table.nbytes(uniform(table, bits)) for bits in (2, 3, 4)}
    middle = {f"between {a} and {a + 1} bits": ((size[a] + size[a + 1]) // 2, a) for a in (2, 3)}
    return {f"bytes of {bits} bits": (size[bits], bits) for bits in size} | middle


def one_seed(setting: Setting, name: str, seed: int) -> dict[str, dict[str, float]]:
    """Excess by budget and by way of choosing; the bytes and the bits a weight of the budget."""
    windows = calibration_windows(setting.model, setting.text, seed)
    stats = setting.statistics(windows)
    rows: dict[str, dict[str, float]] = {}
    known: dict[Any, float] = {}
    for measure, costs in tables(setting, name, stats, windows):
        for budget, (size, bits) in budgets(costs).items():
            row = rows.setdefault(budget, {"bytes": size, "bits a weight": 8 * size / costs.weights})
            choices = {"uniform": uniform(costs, bits)} if "uniform" not in row else {}
            choices[measure] = allocate(costs, budget_bytes=size)
            for way, rules in choices.items():
                if tuple(rules) not in known:
                    known[tuple(rules)] = setting.excess(rules, stats)
                row[way] = known[tuple(rules)]
    return rows


def show(name: str, seeds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Prints the mean over seeds, and the ratio to uniform; returns the figures."""
    ways = [way for way in seeds[0]["bytes of 2 bits"] if way not in ("bytes", "bits a weight")]
    shown = Table(title=f"{name}: excess ln(perplexity), mean of {len(seeds)} seeds; (ratio to uniform)")
    for column in ("budget", "bytes", "bits a weight", *ways):
        shown.add_column(column)
    figures: dict[str, Any] = {}
    for budget in seeds[0]:
        rows = [seed[budget] for seed in seeds]
        mean = {way: statistics.mean(row[way] for row in rows) for way in ways}
        ratios = {way: [row[way] / row["uniform"] for row in rows] for way in ways}
        cells = [
            f"{mean[way]:.4f}" + ("" if way == "uniform" else f" ({statistics.mean(ratios[way]):.3f})") for way in ways
        ]
        shown.add_row(budget, f"{rows[0]['bytes']:,}", f"{rows[0]['bits a weight']:.3f}", *cells)
        figures[budget] = {"bytes": rows[0]["bytes"], "excess": mean, "ratios": ratios}
    Console(width=160).print(shown)
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.allocation", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"directory that holds {MODEL} and {TEXT}")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds")
    parser.add_argument("--methods", nargs="+", default=["RTN", "GPTQ"], choices=["RTN", "GPTQ"])
    arguments = parser.parse_args(argv)
    for name in (MODEL, TEXT):
        if not (arguments.data / name).exists():
            print(f"allocation: --data {arguments.data} holds no {name}; name the directory that does", file=sys.stderr)
            return 2
    try:
        setting = Setting(load_model(arguments.data / MODEL), arguments.data / TEXT)
        found = {
            name: show(name, [one_seed(setting, name, seed) for seed in range(arguments.seeds)])
            for name in arguments.methods
        }
    except EffjaxError as error:
        print(f"allocation: {error}", file=sys.stderr)
        return 2
    bars = {
        f"{name}, {budget}: allocated by {JUDGED} over uniform, worst seed": Bar(
            max(rows[budget]["ratios"][JUDGED]), high=1.0
        )
        for name, rows in found.items()
        for budget in rows
    }
    return conclude("allocation", bars, {"dense perplexity": float(np.exp(setting.dense)), "rows": found})


if __name__ == "__main__":
    raise SystemExit(main())
