"""Claims of Deja Vu: a small predictor names the neurons that a token needs, and only those are computed.

    python -m benchmarks.claims.dejavu --data DIR [--seeds 0 1 2] [--skip-speed]

A ReLU language model a seed is trained on wikitext-2 (`benchmarks/relu_lm.py`), and judged on text that neither it nor
its predictors saw. Masks are applied token by token: they cost what the choice costs in quality and gain nothing. The
gain in time is measured apart, at the sizes of OPT-1.3B (`benchmarks/kernels/sparse_mlp.py`). Hyper-parameters are
those of the published recipe, but for the rank and the number of steps.

Oracle: the largest activations of the token itself. Predictor: reads what enters the block. Look-ahead: reads what
enters the block before, so that it can run beside that one. Controls: other random neurons for every token, and the
neurons that are needed most often. TEAL and WINA choose by the activations, so that all of the up projection is
computed first: they save a part of the down projection alone. Heads are a simulation: keys and values of all are kept.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, conclude
from benchmarks.kernels import sparse_mlp
from benchmarks.relu_lm import FOLDER, LENGTH, Hook, ReluLM, Text, perplexity, read_text, taps, train_lm
from effjax.ops.sparse_mlp import top_mask
from effjax.sparsity.dejavu import (
    collect_sparsity,
    head_masks,
    needed_heads,
    neuron_masks,
    random_scores,
    static_scores,
    train_predictors,
    union_density,
)
from effjax.sparsity.predictor import Predictor, Recorded, Training, calibrate, recall_at
from effjax.sparsity.teal import teal_sparsify, teal_threshold
from effjax.sparsity.wina import row_norms, wina_mask

SEEDS = (0, 1, 2)
DENSITIES = (0.25, 0.15, 0.10, 0.05)
JUDGED = 160  # windows, 30,720 words
RECORDED = 220  # windows, 42,240 tokens
HELD_OUT = 20  # further windows, for recall and calibration
TRAINING = Training(rank=64, batch=512, epochs=16)  # 1,248 steps
BATCHES = (1, 2, 4, 8, 16)


def oracle(k: int) -> Hook:
    return lambda layer, inputs, activation: jnp.where(top_mask(activation, k), activation, 0)


def teal(thresholds: list[jax.Array]) -> Hook:
    return lambda layer, inputs, activation: teal_sparsify(activation, thresholds[layer])


def wina(norms: list[jax.Array], k: int) -> Hook:
    return lambda layer, inputs, activation: jnp.where(wina_mask(activation, norms[layer], k), activation, 0)


def recall(predictors: list[Predictor], data: list[Recorded], k: int) -> list[float]:
    found = (recall_at(p(d.queries), d.labels, k) for p, d in zip(predictors, data, strict=True))
    return [float(hits / needed) for hits, needed in found]


def one_seed(model: ReluLM, text: Text, seed: int) -> dict[str, Any]:
    """Perplexity ratios to dense by arm and density, recalls, union densities, and what calibration chose."""
    began = time.perf_counter()
    params = train_lm(model, text, seed)
    print(f"seed {seed}: trained in {time.perf_counter() - began:.0f} s", flush=True)
    order = np.random.default_rng(seed).permutation(len(text.train))
    chosen, held = text.train[order[:RECORDED]], text.train[order[RECORDED : RECORDED + HELD_OUT]]
    judged = text.judged[:JUDGED]
    keys = jax.random.split(jax.random.key(100 + seed), 4)

    def batches(windows: np.ndarray) -> list[jax.Array]:
        return [jnp.asarray(windows[i : i + 20, :-1]) for i in range(0, len(windows), 20)]

    apply = taps(model)
    record = {ahead: collect_sparsity(params, apply, batches(chosen), lookahead=ahead) for ahead in (False, True)}
    valid = {ahead: collect_sparsity(params, apply, batches(held), lookahead=ahead) for ahead in (False, True)}
    predictors = {ahead: train_predictors(keys[0], record[ahead], TRAINING)[0] for ahead in (False, True)}
    print(f"seed {seed}: predictors after {time.perf_counter() - began:.0f} s", flush=True)

    random = [random_scores(k, model.neurons) for k in jax.random.split(keys[1], model.layers)]
    static = [static_scores(d) for d in record[False]]
    shown = jax.jit(apply)(params, jnp.asarray(held[:, :-1]))
    norms = [row_norms(params[f"block{i}"]["down"]["kernel"]) for i in range(model.layers)]
    activity = [float(d.labels.mean()) for d in valid[False]]
    cosines = [
        float(
            jnp.mean(
                jnp.sum(a.query * b.query, -1) / jnp.linalg.norm(a.query, axis=-1) / jnp.linalg.norm(b.query, axis=-1)
            )
        )
        for a, b in zip(shown, shown[1:], strict=False)
    ]

    dense = perplexity(model, params, judged)
    ratios: dict[str, dict[str, float]] = {}
    recalls: dict[str, dict[str, list[float]]] = {}
    for density in DENSITIES:
        k = round(density * model.neurons)
        name = f"{density:.0%}"
        thresholds = [teal_threshold(t.activation, 1 - density) for t in shown]
        arms: dict[str, Hook] = {
            "oracle": oracle(k),
            "predictor": neuron_masks(predictors[False], k),
            "look-ahead": neuron_masks(predictors[True], k, lookahead=True),
            "random": neuron_masks(random, k),
            "static": neuron_masks(static, k),
            "TEAL, down": teal(thresholds),
            "WINA, down": wina(norms, k),
        }
        ratios[name] = {arm: perplexity(model, params, judged, at_mlp=hook) / dense for arm, hook in arms.items()}
        recalls[name] = {
            "predictor": recall(predictors[False], valid[False], k),
            "look-ahead": recall(predictors[True], valid[True], k),
        }
    k = round(0.15 * model.neurons)
    spread = {}
    for batch in BATCHES:  # tokens that decode together come from different texts
        each = []
        for predictor, data in zip(predictors[False], valid[False], strict=True):
            masks = top_mask(predictor(data.queries), k).reshape(HELD_OUT, LENGTH, -1)[:16]
            each.append(union_density(masks.swapaxes(0, 1).reshape(-1, model.neurons), batch))
        spread[batch] = statistics.mean(each)
    found = [
        calibrate(p(d.queries), d.labels, recall=0.95, multiple=8)
        for p, d in zip(predictors[False], valid[False], strict=True)
    ]
    calibrated = {
        "k": [c.k for c in found],
        "perplexity ratio": perplexity(
            model, params, judged, at_mlp=neuron_masks(predictors[False], [c.k for c in found])
        )
        / dense,
    }
    print(f"seed {seed}: done after {time.perf_counter() - began:.0f} s", flush=True)
    return {
        "dense perplexity": dense,
        "activity": activity,
        "cosine of consecutive inputs": cosines,
        "ratios": ratios,
        "recalls": recalls,
        "union of a batch at 15 %": spread,
        "calibrated to a recall of 0.95": calibrated,
        "heads": heads(model, params, chosen, judged, keys[2]),
    }


def heads(model: ReluLM, params: Any, chosen: np.ndarray, judged: np.ndarray, key: jax.Array) -> dict[str, float]:
    """Perplexity ratios with half the heads: a simulation, since keys and values of every head are kept."""
    share, k = 0.5, model.heads // 2
    shown: list[tuple[jax.Array, jax.Array]] = []

    def record(layer: int, inputs: Any, outputs: jax.Array) -> jax.Array:
        shown.append((inputs[max(0, layer - 1)], needed_heads(outputs, share=share)))
        return outputs

    def run(tokens: jax.Array) -> list[Recorded]:
        shown.clear()
        model.apply({"params": params}, tokens, at_heads=record)
        return [Recorded.make(*pair) for pair in shown]

    recorder = jax.jit(run)
    data = [recorder(jnp.asarray(chosen[i : i + 20, :-1])) for i in range(0, len(chosen), 20)]
    layers = [jax.tree.map(lambda *parts: jnp.concatenate(parts), *layer) for layer in zip(*data, strict=True)]
    training = Training(rank=32, batch=512, epochs=16, learning_rate=1e-3, k=k)
    predictors = train_predictors(key, layers, training)[0]

    def best(layer: int, inputs: Any, outputs: jax.Array) -> jax.Array:
        return jnp.where(needed_heads(outputs, share=share)[..., None], outputs, 0)

    arms: dict[str, Hook] = {
        "oracle": best,
        "look-ahead": head_masks(predictors, k),
        "random": head_masks([random_scores(r, model.heads) for r in jax.random.split(key, model.layers)], k),
    }
    dense = perplexity(model, params, judged)
    return {name: perplexity(model, params, judged, at_heads=hook) / dense for name, hook in arms.items()}


def mean(seeds: list[dict[str, Any]], *path: Any) -> float:
    def at(found: Any) -> float:
        for key in path:
            found = found[key]
        return statistics.mean(found) if isinstance(found, list) else found

    return statistics.mean(at(found) for found in seeds)


def show(seeds: list[dict[str, Any]]) -> None:
    first = seeds[0]
    arms = list(first["ratios"]["15%"])
    table = Table(title="perplexity over dense, mean (least, most) of the seeds")
    table.add_column("density")
    for arm in arms:
        table.add_column(arm)
    for density in first["ratios"]:
        cells = []
        for arm in arms:
            each = [s["ratios"][density][arm] for s in seeds]
            cells.append(
                f"{statistics.mean(each):.3f} ({min(each):.3f}, {max(each):.3f})" if len(each) > 1 else f"{each[0]:.4f}"
            )
        table.add_row(density, *cells)
    console = Console(width=160)
    console.print(table)
    table = Table(title="recall of active neurons on held-out tokens, mean over seeds, by layer")
    for column in ("density", "predictor", "look-ahead"):
        table.add_column(column)
    for density in first["recalls"]:
        cells = []
        for arm in ("predictor", "look-ahead"):
            layers = zip(*(s["recalls"][density][arm] for s in seeds), strict=True)
            cells.append(" ".join(f"{statistics.mean(layer):.3f}" for layer in layers))
        table.add_row(density, *cells)
    console.print(table)
    console.print(f"dense perplexity {mean(seeds, 'dense perplexity'):.2f}")
    for name in ("activity", "cosine of consecutive inputs"):
        console.print(
            f"{name} by layer: "
            + " ".join(f"{statistics.mean(x):.2f}" for x in zip(*(s[name] for s in seeds), strict=True))
        )
    unions = ", ".join(f"{b}: {mean(seeds, 'union of a batch at 15 %', b):.0%}" for b in BATCHES)
    console.print(f"effective density of 15 % by batch (the union): {unions}")
    name = "calibrated to a recall of 0.95"
    console.print(
        f"{name}: k {[s[name]['k'] for s in seeds]}, perplexity ratio {mean(seeds, name, 'perplexity ratio'):.4f}"
    )
    console.print(
        "half of the heads (simulation): " + ", ".join(f"{a} {mean(seeds, 'heads', a):.3f}" for a in first["heads"])
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.dejavu", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"directory that holds {FOLDER}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="a model each, about five minutes")
    parser.add_argument("--skip-speed", action="store_true", help="quality alone")
    args = parser.parse_args(argv)
    if not (args.data / FOLDER).is_dir():
        print(f"dejavu: --data {args.data} holds no {FOLDER}; name the directory that does", file=sys.stderr)
        return 2
    text, model = read_text(args.data), ReluLM()
    seeds = [one_seed(model, text, seed) for seed in args.seeds]
    show(seeds)
    bars = {
        "15 %: perplexity, predictor over dense": Bar(mean(seeds, "ratios", "15%", "predictor"), high=1.03),
        "15 %: perplexity, look-ahead over dense": Bar(mean(seeds, "ratios", "15%", "look-ahead"), high=1.04),
        "15 %: perplexity, random over dense": Bar(mean(seeds, "ratios", "15%", "random"), low=1.2),
        "15 %: perplexity, static over dense": Bar(mean(seeds, "ratios", "15%", "static"), low=1.2),
        "25 %: perplexity, predictor over dense": Bar(mean(seeds, "ratios", "25%", "predictor"), high=1.01),
    }
    extra: dict[str, Any] = {f"seed {seed}": found for seed, found in zip(args.seeds, seeds, strict=True)}
    if not args.skip_speed:
        speed, more = sparse_mlp.judge()
        bars |= speed
        extra |= more
    return conclude("dejavu", bars, extra)


if __name__ == "__main__":
    raise SystemExit(main())
