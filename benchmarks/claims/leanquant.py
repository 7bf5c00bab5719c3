"""LeanQuant's claim: a grid that knows the loss loses less than GPTQ's, k-means by Fisher information, or rounding.

python -m benchmarks.claims.leanquant --data DIR [--seeds 3] [--windows 64] [--models stories260K embedded]

`DIR` holds `models/stories260K/hf` and `text/tinystories_sample/tinystories_sample.txt`; the embedded model comes with
the package. All methods see the same calibration windows, block by block; what they make is judged by its excess,
ln ppl − ln ppl(dense), on windows of other text, through the packed leaves. Ratios are of excesses averaged over seeds;
the spread is between the seeds' own ratios. "GPTQ + k-means" is LeanQuant without its weights (p = 0): the ablation.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import effjax as ej
from benchmarks.bars import Bar, conclude
from benchmarks.language_models import Task, embedded, missing, stories
from effjax.errors import EffjaxError
from effjax.evaluate import compare_many, next_token_loss
from effjax.lift import InputStats
from effjax.models.decoder import stages
from effjax.paths import leaves_with_paths, path_str
from effjax.quantize import GPTQ, RTN, LeanQuant, SqueezeLLM
from effjax.recipe import Recipe, apply_recipe
from effjax.rules import is_dense_matrix
from effjax.sequential import compress_sequentially

GROUP, BATCH, WIDTHS = 32, 4, (4, 3, 2)
Arm = Callable[[int, int | None], Any]  # from bits and group size
ARMS: dict[str, Arm] = {
    "RTN": lambda bits, group: RTN(bits=bits, group_size=group),
    "GPTQ": lambda bits, group: GPTQ(bits=bits, group_size=group),
    "GPTQ + k-means": lambda bits, group: LeanQuant(bits=bits, group_size=group, p=0.0),
    "LeanQuant affine": lambda bits, group: LeanQuant(bits=bits, group_size=group, grid="affine"),
    "LeanQuant": lambda bits, group: LeanQuant(bits=bits, group_size=group),
    "LeanQuant p=4": lambda bits, group: LeanQuant(bits=bits, group_size=group, p=4.0),
    "SqueezeLLM": lambda bits, group: None if group else SqueezeLLM(bits=bits),
}


def recipe(task: Task, make: Arm, bits: int, group: int | None) -> Recipe | None:
    """One method for all matrices; those whose inputs groups do not divide are done per channel."""
    method = make(bits, group)
    if method is None:
        return None
    matrices = [(path, leaf) for path, leaf in leaves_with_paths(task.model.params) if is_dense_matrix(path, leaf)]
    uneven = [path for path, leaf in matrices if group is not None and leaf.shape[-2] % group]
    return Recipe(rules=(*((path, make(bits, None)) for path in uneven), (None, method)))


def fisher(task: Task, calibration: np.ndarray) -> Any:
    """Squared gradients of the next-token loss, one window after the other."""

    def apply(params: Any, tokens: jax.Array) -> jax.Array:
        return task.model.apply({"params": params}, tokens)

    batches = [jnp.asarray(batch) for batch in np.split(calibration, len(calibration) // BATCH)]
    loss = next_token_loss(task.model.apply)
    return ej.calibrate(apply, task.model.params, batches, needs={"fisher"}, loss=loss)


def compressed(task: Task, grouping: int | None, bits: int, calibration: np.ndarray, stats: Any) -> dict[str, Any]:
    """The parameters under every arm."""
    found = {}
    for name, make in ARMS.items():
        chosen = recipe(task, make, bits, grouping)
        if chosen is None:
            continue
        if name == "SqueezeLLM":
            found[name] = apply_recipe(task.model.params, chosen, stats=stats)
        else:
            found[name] = compress_sequentially(
                task.model.params, chosen, stages(task.model.config), calibration, micro_batch=BATCH
            )
    return found


def bits_a_weight(params: Any) -> float:
    leaves = [leaf for _, leaf in leaves_with_paths(params) if ej.is_compressed(leaf)]
    return 8 * ej.nbytes(leaves) / sum(leaf.size for leaf in leaves)


def lower_in_layers(task: Task, calibration: np.ndarray, bits: int = 3) -> float:
    """The share of matrices where LeanQuant's error on the inputs of the dense model is below GPTQ's, per channel."""
    params = task.model.params
    batches = [jnp.asarray(batch) for batch in np.split(calibration, len(calibration) // BATCH)]
    stats = ej.calibrate(lambda p, x: task.model.apply({"params": p}, x), params, batches)
    found = jax.tree_util.tree_leaves_with_path(stats, is_leaf=lambda x: isinstance(x, InputStats))
    moments = {path_str(path): leaf.second_moment for path, leaf in found}
    errors = {}
    for name in ("GPTQ", "LeanQuant"):
        leaves = dict(leaves_with_paths(ej.quantize_params(params, ARMS[name](bits, None), stats=stats)))
        dense = dict(leaves_with_paths(params))
        errors[name] = [layer_error(dense[path], leaves[path], moment) for path, moment in moments.items()]
    return float(np.mean(np.less(errors["LeanQuant"], errors["GPTQ"])))


def layer_error(w: jax.Array, q: Any, moment: jax.Array) -> float:
    """`E |x (W - Q)|^2`, in float64."""
    d = np.asarray(w, np.float64) - np.asarray(q.materialize(), np.float64)
    return float(np.sum(d * (np.asarray(moment, np.float64) @ d)))


def packed_form_difference(task: Task, params: Any) -> float:
    """Largest difference of logits between the packed leaves under `lift` and the dense copies judged below."""
    tokens = jnp.asarray(task.evaluation[:2])
    packed = jax.jit(ej.lift(task.model.apply, on_materialize="error", limit=0))({"params": params}, tokens)
    return float(jnp.abs(packed - task.model.apply({"params": ej.materialize(params)}, tokens)).max())


def measure(task: Task, seeds: int, windows: int) -> dict[str, Any]:
    """Excess and bits of every arm, by grouping, width and seed."""
    rows: dict[tuple[int | None, int, str], dict[str, Any]] = {}
    difference = 0.0
    for grouping in (None, GROUP):
        candidates, size = {}, {}
        for seed in range(seeds):
            calibration = task.calibration(seed, windows)
            stats = fisher(task, calibration) if grouping is None else None
            for bits in WIDTHS:
                started = time.perf_counter()
                for name, params in compressed(task, grouping, bits, calibration, stats).items():
                    size[bits, name] = bits_a_weight(params)
                    candidates[bits, name, seed] = ej.materialize(params)
                    if (bits, name, seed) == (3, "LeanQuant", 0):
                        difference = max(difference, packed_form_difference(task, params))
                took = time.perf_counter() - started
                where = "per channel" if grouping is None else f"group {grouping}"
                print(f"{task.name}, {where}, {bits} bits, seed {seed}: {took:.1f} s", file=sys.stderr)
        named = {repr(key): params for key, params in candidates.items()}
        results = compare_many(task.model.apply, task.model.params, named, task.evaluation)
        for bits in WIDTHS:
            for name in ARMS:
                found = [results[repr((bits, name, s))] for s in range(seeds) if (bits, name, s) in candidates]
                if found:
                    rows[grouping, bits, name] = {
                        "excess": [c.delta_nll for c in found],
                        "perplexity": float(np.mean([c.perplexity for c in found])),
                        "bits": size[bits, name],
                    }
    lower = lower_in_layers(task, task.calibration(0, windows))
    return {"name": task.name, "rows": rows, "lower": lower, "difference": difference}


def ratio(rows: Any, grouping: int | None, bits: int, name: str, other: str) -> tuple[float, float, float]:
    """The ratio of mean excesses, and the least and largest of the seeds' own."""
    a, b = (np.array(rows[grouping, bits, n]["excess"]) for n in (name, other))
    return float(a.mean() / b.mean()), float((a / b).min()), float((a / b).max())


def report(measured: list[dict[str, Any]]) -> int:
    """Prints what was measured, then the bars."""
    bars: dict[str, Bar] = {}
    figures: dict[str, Any] = {}
    for found in measured:
        rows = found["rows"]
        table = Table(title=f"{found['name']}: excess over the dense model, mean and range over seeds")
        for column in ("grid", "bits", "method", "bits/weight", "perplexity", "excess", "over GPTQ", "range"):
            table.add_column(column)
        for (grouping, bits, name), row in rows.items():
            mean, low, high = ratio(rows, grouping, bits, name, "GPTQ")
            grid = "per channel" if grouping is None else f"group {grouping}"
            cells = (f"{row['bits']:.2f}", f"{row['perplexity']:.3f}", f"{np.mean(row['excess']):+.4f}")
            table.add_row(grid, str(bits), name, *cells, f"{mean:.3f}", f"{low:.3f}–{high:.3f}")
            figures[f"{found['name']} {grid} {bits} bits {name}"] = {**row, "over GPTQ": mean}
        Console(width=120).print(table)
        for grouping in (None, GROUP):
            where = f"{found['name']}, {'per channel' if grouping is None else f'group {grouping}'}"
            for bits in WIDTHS:
                steps = [ratio(rows, grouping, bits, *pair)[0] for pair in (("GPTQ", "RTN"), ("LeanQuant", "GPTQ"))]
                bars[f"{where}, {bits} bits: larger of GPTQ / RTN, LeanQuant / GPTQ"] = Bar(max(steps), high=1.0)
            for bits in (3, 2):
                value = ratio(rows, grouping, bits, "LeanQuant", "GPTQ")[0]
                bars[f"{where}, {bits} bits: LeanQuant / GPTQ"] = Bar(value, high=0.65, paper="sheet 0.41–0.53")
            value = ratio(rows, grouping, 2, "LeanQuant affine", "GPTQ")[0]
            bars[f"{where}, 2 bits: affine / GPTQ"] = Bar(value, high=0.9, paper="sheet 0.76")
        for bits in (3, 2):
            value = ratio(rows, None, bits, "LeanQuant", "SqueezeLLM")[0]
            bars[f"{found['name']}, per channel, {bits} bits: LeanQuant / SqueezeLLM"] = Bar(value, high=0.85)
        bars[f"{found['name']}: matrices whose error is below GPTQ's, 3 bits"] = Bar(found["lower"], low=1.0)
        bars[f"{found['name']}: packed form against dense copies, logits"] = Bar(found["difference"], high=1e-3)
    return conclude("leanquant", bars, {"rows": figures})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.leanquant", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory with stories260K and its text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=64, help="calibration windows of 256 tokens, a multiple of 4")
    parser.add_argument("--models", nargs="+", default=["stories260K", "embedded"], choices=["stories260K", "embedded"])
    options = parser.parse_args(argv)
    if lacking := missing(options.data):
        print(f"leanquant: --data {options.data} holds no {lacking}; name the directory that does", file=sys.stderr)
        return 2
    tasks = [stories(options.data) if name == "stories260K" else embedded() for name in options.models]
    try:
        return report([measure(task, options.seeds, options.windows) for task in tasks])
    except EffjaxError as error:
        print(f"leanquant: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
