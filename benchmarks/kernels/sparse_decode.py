"""A ReLU decoder, token by token: time beside the work that zeros leave, in plain and in speculative decoding.

    python -m benchmarks.kernels.sparse_decode [--repeats 5]

Weights are random, of a Llama's shape with 12 layers of 1024 x 4096; the shift leaves a share of the neurons, as
relufied models have (Mirzadeh et al., ReLU Strikes Back, table 1: 62 to 95 % zeros). The sides are XLA on dense
float32, and the same weights by neuron, whose rows are not read where they meet zeros: exact, nothing is predicted.
They take turns. A check reads five tokens at once, as a pass of speculative decoding does. Random tokens share no
neurons but by chance, so that trained models do better there.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import effjax as ej
from benchmarks.bars import Bar, conclude
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder, DecoderApply, new_cache
from effjax.sparsity.by_neuron import by_neuron, neuron_apply
from effjax.sparsity.neurons import gate_inputs
from effjax.sparsity.relu import flops_share, relufy, shift_for

CONFIG = DecoderConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=12,
    num_attention_heads=16,
    tie_word_embeddings=False,
)
ZEROS = (0.62, 0.9, 0.95)
CHECKED = 5
FILLED = 64  # tokens in the cache


def sides(config: DecoderConfig, params: Any) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """By name, a pass over tokens `[1, n]` behind a filled cache."""
    filled = new_cache(config, batch=1, slots=FILLED + CHECKED, split=True)
    prompt = jax.random.randint(jax.random.key(1), (1, FILLED), 0, config.vocab_size)
    found = {}
    for name, apply, tree in (
        ("dense", DecoderApply(config), params),
        ("by neuron", neuron_apply(config), by_neuron(config, params)),
    ):
        run = jax.jit(lambda p, t, c, apply=apply: apply({"params": p}, t, cache=c))
        cache = run(tree, prompt, filled)[1]
        found[name] = lambda tokens, run=run, tree=tree, cache=cache: run(tree, tokens, cache)[0]
    return found


def seconds(runs: dict[str, Callable[[jax.Array], jax.Array]], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Of a pass over so many tokens, other ones at every turn; the first turn compiles."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        given = [
            jax.random.randint(jax.random.fold_in(jax.random.key(turn), i), (1, tokens), 0, CONFIG.vocab_size)
            for i in range(8)
        ]
        for name, run in runs.items():
            began = time.perf_counter()
            for each in given:
                run(each).block_until_ready()
            if turn:
                times[name].append((time.perf_counter() - began) / len(given))
    return times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.sparse_decode", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="turns of every side")
    args = parser.parse_args(argv)
    tokens = jax.random.randint(jax.random.key(2), (2, 64), 0, CONFIG.vocab_size)
    params = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), tokens)["params"]
    gates = gate_inputs(CONFIG, params, tokens)
    table = Table(title=f"{CONFIG.num_hidden_layers} layers of {CONFIG.hidden_size} x {CONFIG.intermediate_size}")
    for column in ("zeros", "tokens", "dense ms", "by neuron ms", "dense / by neuron", "each turn", "work left"):
        table.add_column(column)
    bars: dict[str, Bar] = {}
    for zeros in ZEROS:
        config = relufy(CONFIG, shift=shift_for(gates, zeros))
        # Rows of `up` whose gate is closed are left out as well: half of what a model counts of the gated layer.
        apply = DecoderApply(config)
        stats = ej.calibrate(lambda p, t, a=apply: a({"params": p}, t), params, [tokens], needs={"zeros"})
        left = flops_share(stats, params)
        up = CONFIG.num_hidden_layers * CONFIG.hidden_size * CONFIG.intermediate_size
        whole = sum(x.size for x in jax.tree.leaves(params)) - params["embed"]["embedding"].size
        left -= zeros * up / whole
        for count in (1, CHECKED):
            times = seconds(sides(config, params), count, args.repeats)
            turns = [a / b for a, b in zip(times["dense"], times["by neuron"], strict=True)]
            ms = [f"{1e3 * statistics.median(each):.1f}" for each in times.values()]
            ratio = statistics.median(turns)
            table.add_row(
                f"{zeros:.0%}", str(count), *ms, f"{ratio:.2f}", " ".join(f"{t:.2f}" for t in turns), f"{left:.2f}"
            )
            low = {0.62: 1.0, 0.9: 1.5, 0.95: 1.5}[zeros] if count == 1 else 1.0
            bars[f"{zeros:.0%} zeros, {count} token{'s' * (count > 1)}: dense / by neuron"] = Bar(ratio, low=low)
    Console(width=120).print(table)
    return conclude("kernels/sparse_decode", bars)


if __name__ == "__main__":
    raise SystemExit(main())
