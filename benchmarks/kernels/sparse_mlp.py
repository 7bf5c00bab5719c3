"""A decode step of the MLPs of a ReLU decoder on the CPU: the neurons that a predictor names beside all of them.

    python -m benchmarks.kernels.sparse_mlp [--repeats 15]

Weights are random. Which neurons are active follows what was measured on a trained model: a share `ACTIVE` of them,
the best scores holding a share `RECALL` of those. Predictors of random weights know nothing, so their logits are
computed and added, as good as nothing, to prepared scores: the time is theirs, the choice is not. Layers run one after
the other, on another token at every turn: more weights than the last-level cache holds, and other rows each time.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import effjax as ej
from benchmarks.bars import Bar, conclude
from effjax.ops.neurons import make_neurons
from effjax.ops.sparse_mlp import choose_neurons, mlp, sparse_mlp
from effjax.sparsity.predictor import init_predictor

ACTIVE = 0.28  # share of neurons that ReLU leaves; measured on the model of benchmarks/claims/dejavu.py
RECALL = 0.82  # of active neurons among a quarter of all, likewise
TOKENS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One MLP in the forms that the arms read.

    Attributes:
        up, down: kernels as a Flax model has them.
        scores: for each token, whose best neurons hold the share of active ones; `[tokens, neurons]`.
    """

    up: jax.Array
    down: jax.Array
    bias: jax.Array
    scores: jax.Array


def layer(key: jax.Array, d: int, neurons: int, tokens: jax.Array) -> Layer:
    """Biases leave the wanted share active; scores are activations, but for those a predictor would miss."""
    keys = jax.random.split(key, 4)
    up = jax.random.normal(keys[0], (d, neurons)) / np.sqrt(d)
    down = jax.random.normal(keys[1], (neurons, d)) / np.sqrt(neurons)
    z = tokens @ up
    bias = -jnp.quantile(z, 1 - ACTIVE, axis=0)
    missed = jax.random.uniform(keys[2], z.shape) > RECALL
    scores = jnp.where((z + bias > 0) & ~missed, 10.0, 0.0) + jax.random.uniform(keys[3], z.shape)
    return Layer(up=up, down=down, bias=bias, scores=jnp.where(missed, -1.0, scores))


def measure(arms: dict[str, Callable[[int], jax.Array]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every turn, the arms in turn; the first one compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats + 1):
        for name, run in arms.items():
            start = time.perf_counter()
            run(turn % TOKENS).block_until_ready()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(
    d: int, neurons: int, *, layers: int, repeats: int, densities: tuple[float, ...], rank: int, coded: bool = False
) -> tuple[dict[str, float], dict[str, float], dict[str, list[float]]]:
    """Milliseconds a layer and megabytes a layer by arm, and the ratios of dense XLA to each in every turn."""
    keys = jax.random.split(jax.random.key(0), layers + 1)
    tokens = jax.random.normal(keys[-1], (TOKENS, d))
    made = [layer(k, d, neurons, tokens) for k in keys[:-1]]
    rows = [make_neurons(m.up, m.down, up_bias=m.bias) for m in made]
    kinds: dict[str, list[Any]] = {"float32": rows}
    if coded:
        kinds["bfloat16"] = [
            make_neurons(m.up.astype(jnp.bfloat16), m.down.astype(jnp.bfloat16), up_bias=m.bias) for m in made
        ]
        for bits, group in ((8, None), (4, 128)):
            method = ej.quantize.RTN(bits=bits, group_size=group, symmetric=True)
            quantize = jax.jit(method.quantize)
            kinds[f"int{bits}"] = [make_neurons(quantize(m.up), quantize(m.down), up_bias=m.bias) for m in made]
    predictors = [init_predictor(k, d, rank, neurons) for k in keys[:-1]]
    small = (d * rank + rank * neurons) * 4
    every = jnp.arange(neurons, dtype=jnp.int32)

    def chain(step: Callable[[jax.Array, Any, jax.Array], jax.Array], each: list[Any]) -> Callable[[int], jax.Array]:
        @jax.jit
        def run(x: jax.Array, each: list[Any], token: jax.Array) -> jax.Array:
            for one in each:
                x = x + 1e-9 * step(x, one, token)
            return x

        return lambda token: run(tokens[token : token + 1], each, jnp.int32(token))

    def dense(x: jax.Array, m: Any, token: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ m[0] + m[2]) @ m[1]

    def predicted(x: jax.Array, m: Any, token: jax.Array, *, k: int) -> jax.Array:
        weights, predictor, scores = m
        chosen, count = choose_neurons(scores[token] + 1e-9 * predictor(x)[0], k)
        return sparse_mlp(x, weights, chosen, count)

    def given(x: jax.Array, m: Any, token: jax.Array, *, k: int) -> jax.Array:
        weights, chosen = m
        return sparse_mlp(x, weights, chosen[token])

    full = 2 * d * neurons * 4
    arms: dict[str, Callable[[int], jax.Array]] = {
        "dense float32, XLA": chain(dense, [(m.up, m.down, m.bias) for m in made]),
        "dense, a row a neuron, XLA": chain(lambda x, m, token: mlp(x, m), rows),
        "every neuron, zeros skipped": chain(lambda x, m, token: sparse_mlp(x, m, every, implementation="cpu"), rows),
    }
    nbytes = {name: float(full) for name in arms}
    nbytes["every neuron, zeros skipped"] = full * (1 + ACTIVE) / 2
    for density in densities:
        k = round(density * neurons)
        best = [
            jax.vmap(lambda s, k=k: choose_neurons(s, k, implementation="reference")[0])(m.scores[:, None])
            for m in made
        ]
        for kind, weights in kinds.items():
            if kind != "float32" and density != densities[0]:
                continue
            # Chosen neurons that are not active are read by half.
            share = k * (1 + min(1.0, RECALL * ACTIVE / density)) / 2
            read = share * weights[0].bytes_per_neuron
            name = f"{kind}, {1 - density:.0%} sparse"
            arms[f"{name}, indices given"] = chain(functools.partial(given, k=k), list(zip(weights, best, strict=True)))
            nbytes[f"{name}, indices given"] = read
            operands = list(zip(weights, predictors, [m.scores for m in made], strict=True))
            arms[f"{name}, predictor included"] = chain(functools.partial(predicted, k=k), operands)
            nbytes[f"{name}, predictor included"] = read + small
    seconds = measure(arms, repeats)
    base = seconds["dense float32, XLA"]
    ratios = {name: [b / t for b, t in zip(base, times, strict=True)] for name, times in seconds.items()}
    each = {name: 1e3 * statistics.median(times) / layers for name, times in seconds.items()}
    return each, {name: size / 1e6 for name, size in nbytes.items()}, ratios


def show(title: str, found: tuple[dict[str, float], dict[str, float], dict[str, list[float]]]) -> None:
    table = Table(title=title)
    for column in ("a layer's MLP, one token", "ms", "MB read", "GB/s", "dense / this", "least, most"):
        table.add_column(column)
    milliseconds, megabytes, ratios = found
    for name, ms in milliseconds.items():
        low, *_, high = sorted(ratios[name])
        middle = statistics.median(ratios[name])
        rate = megabytes[name] / ms
        table.add_row(
            name, f"{ms:.3f}", f"{megabytes[name]:.1f}", f"{rate:.1f}", f"{middle:.2f}", f"{low:.2f}, {high:.2f}"
        )
    Console(width=120).print(table)


def judge(repeats: int = 15) -> tuple[dict[str, Bar], dict[str, Any]]:
    """At the sizes of OPT-1.3B, and at those of a smaller decoder."""
    large = compare(2048, 8192, layers=6, repeats=repeats, densities=(0.25, 0.1), rank=256, coded=True)
    show("2048 x 8192, predictor of rank 256", large)
    small = compare(1024, 4096, layers=24, repeats=repeats, densities=(0.1,), rank=128)
    show("1024 x 4096, predictor of rank 128", small)
    middle = {name: statistics.median(times) for name, times in large[2].items()}
    tenth = {name: statistics.median(times) for name, times in small[2].items()}
    bars = {
        "2048x8192, 75 % sparse, predictor included: dense / this": Bar(
            middle["float32, 75% sparse, predictor included"], low=2
        ),
        "1024x4096, 90 % sparse, indices given: dense / this": Bar(tenth["float32, 90% sparse, indices given"], low=2),
        "1024x4096, 90 % sparse, predictor included: dense / this": Bar(
            tenth["float32, 90% sparse, predictor included"], low=2
        ),
    }
    return bars, {"2048x8192: dense / this": middle, "1024x4096: dense / this": tenth}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.sparse_mlp", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--repeats", type=int, default=15, help="turns")
    return conclude("sparse_mlp", *judge(parser.parse_args().repeats))


if __name__ == "__main__":
    raise SystemExit(main())
