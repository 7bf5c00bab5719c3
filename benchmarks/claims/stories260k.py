"""stories260K through our importer: dense perplexity, and what each baseline costs, run from its compressed form.

python -m benchmarks.claims.stories260k --data DIR

`DIR` holds `models/stories260K/hf` (a Hugging Face directory of the trained model) and
`text/tinystories_sample/tinystories_sample.txt`. Judged on the last 200 windows of 256 tokens of the first 900,000
characters. The file is read as it stands, as one stream: the marks between its stories are spelled out in ordinary
tokens, which the model has never seen, so perplexities are higher than on stories alone. Each window is the model's
first token and 255 tokens of the stream.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import effjax as ej
from benchmarks.bars import Bar, conclude
from effjax.errors import EffjaxError
from effjax.evaluate import Comparison, compare_many, windows_from_text
from effjax.models.hf import LoadedModel, load_model
from effjax.paths import leaves_with_paths
from effjax.rules import is_dense_matrix

MODEL, TEXT = "models/stories260K/hf", "text/tinystories_sample/tinystories_sample.txt"
CHARACTERS, WINDOWS, LENGTH, GROUP = 900_000, 200, 256, 32
JUDGED = "4 bits asymmetric"


def read_windows(model: LoadedModel, text: Path) -> np.ndarray:
    """The evaluation windows, int32 [200, 256], first token included."""
    return windows_from_text(
        model.tokenizer,
        text.read_text(encoding="utf-8")[:CHARACTERS],
        length=LENGTH,
        max_windows=WINDOWS,
        bos=model.config.bos_token_id,
        keep="last",
    )


def methods() -> dict[str, tuple[Any, Any]]:
    """For every row of the table: the method in groups, and the one for matrices that groups do not divide."""

    def rtn(**fields: Any) -> tuple[Any, Any]:
        return ej.quantize.RTN(group_size=GROUP, **fields), ej.quantize.RTN(group_size=None, **fields)

    return {
        **{f"{bits} bits asymmetric": rtn(bits=bits) for bits in (8, 6, 5, 4, 3, 2)},
        **{f"{bits} bits asymmetric, clipped": rtn(bits=bits, clip="mse") for bits in (4, 3)},
        "4 bits symmetric": rtn(bits=4, symmetric=True),
        "NF4": (ej.quantize.NF4(block_size=GROUP), ej.quantize.NF4(block_size=None)),
    }


def compressed(params: Any) -> dict[str, Any]:
    """The parameters under every row's method; matrices whose inputs groups do not divide are done per channel."""
    matrices = {path: leaf.shape[-2] for path, leaf in leaves_with_paths(params) if is_dense_matrix(path, leaf)}
    found, key = {}, jax.random.key(0)
    for name, (grouped, per_channel) in methods().items():
        rules = [(path, grouped if inputs % GROUP == 0 else per_channel) for path, inputs in matrices.items()]
        found[name] = ej.quantize_params(params, rules)
    half = {name: ej.prune_mask(params, method, key=key) for name, method in masks().items()}
    found |= {name: (ej.pack_mask if "2:4" in name else ej.apply_mask)(params, mask) for name, mask in half.items()}
    found["low rank, half the bytes"] = ej.sketch_params(params, ej.sketch.LowRank(ratio=2))
    found["hashed, half the bytes"] = ej.sketch_params(params, ej.sketch.Hashed(ratio=2), key=key)
    return found


def masks() -> dict[str, Any]:
    """Three ways to drop every second weight."""
    return {
        "magnitude 50 %": ej.prune.Magnitude(sparsity=0.5),
        "magnitude 2:4": ej.prune.Magnitude(pattern="2:4"),
        "random 50 %": ej.prune.Random(sparsity=0.5),
    }


def weight_bytes(params: Any, paths: set[str]) -> int:
    return sum(ej.nbytes(leaf) for path, leaf in leaves_with_paths(params) if path in paths)


def show(model: LoadedModel, candidates: dict[str, Any], results: dict[str, Comparison]) -> dict[str, Any]:
    """Prints the table; returns its figures."""
    paths = {path for path, leaf in leaves_with_paths(model.params) if is_dense_matrix(path, leaf)}
    dense = weight_bytes(model.params, paths)
    table = Table(title="stories260K: weights of the dense layers (embedding and norms stay float32)")
    for column in ("weights", "bytes", "perplexity", "ΔNLL", "95 % interval", "KL", "same top-1"):
        table.add_column(column)
    reference = next(iter(results.values())).perplexity_reference
    table.add_row("dense float32", f"{dense:,}", f"{reference:.3f}", "", "", "", "")
    figures: dict[str, Any] = {}
    for name, c in results.items():
        size = weight_bytes(candidates[name], paths)
        row = (f"{c.perplexity:.3f}", f"{c.delta_nll:+.4f}", c.interval, f"{c.kl_mean:.4f}", f"{c.same_top1:.1%}")
        table.add_row(name, f"{size:,}", *row)
        figures[name] = {
            "bytes": size,
            "perplexity": c.perplexity,
            "delta_nll": c.delta_nll,
            "interval": [c.delta_low, c.delta_high],
        }
    Console(width=120).print(table)
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.stories260k", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"directory that holds {MODEL} and {TEXT}")
    data = parser.parse_args(argv).data
    for name in (MODEL, TEXT):
        if not (data / name).exists():
            print(f"stories260k: --data {data} holds no {name}; name the directory that does", file=sys.stderr)
            return 2
    try:
        model = load_model(data / MODEL)
        windows = read_windows(model, data / TEXT)
        candidates = compressed(model.params)
        # Lifted with no allowance: any dense copy of a packed weight would raise.
        apply = ej.lift(model.apply, on_materialize="error", limit=0)
        results = compare_many(apply, model.params, candidates, windows)
    except EffjaxError as error:
        print(f"stories260k: {error}", file=sys.stderr)
        return 2
    figures = show(model, candidates, results)
    judged = results[JUDGED]
    bars = {
        "dense perplexity": Bar(judged.perplexity_reference, low=6.079, high=6.099, paper="transformers 6.089"),
        f"perplexity, {JUDGED}, groups of {GROUP}": Bar(judged.perplexity, low=6.8, high=7.0, paper="6.9"),
    }
    return conclude("stories260k", bars, {"windows": judged.windows, "tokens": judged.tokens, "rows": figures})


if __name__ == "__main__":
    raise SystemExit(main())
