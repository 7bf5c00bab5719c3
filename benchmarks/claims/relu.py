"""Claims of ReLU Strikes Back: a model with ReLUs loses little, and most of its neurons rest.

    python -m benchmarks.claims.relu [--seeds 0 1 2] [--steps 200]

The embedded model's SiLU gates are exchanged for ReLUs and all its weights trained further on its own training
documents, beside the same model trained as far with what it has. A seed draws the batches. Learning rate and shifts
were fixed beforehand: a tenth of the rate it was made with, and shifts that cut 90 and 98 % of the gates' inputs.
Loss is that of the held-out documents, in nats a token.
"""

import argparse
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import effjax as ej
from benchmarks.bars import Bar, conclude
from benchmarks.language_models import Task, embedded
from effjax.evaluate.loss import next_token_nll
from effjax.models.config import DecoderConfig
from effjax.models.decoder import DecoderApply
from effjax.sparsity.neurons import active_neurons, changed_neurons, gate_inputs
from effjax.sparsity.relu import flops_share, relufy, shift_for, zero_shares
from effjax.sparsity.reuse import independent_unused, reuse_mask, shuffled_neurons, unused_fraction

BATCH, RATE, WARMUP = 8, 3e-4, 10
CUT = {"shift, 90 %": 0.90, "shift, 98 %": 0.98}
GAMMAS, TOKENS = (4, 8, 16), (1, 2, 4, 8, 16, 32)
JUDGED = 48  # windows


def tuned(task: Task, config: DecoderConfig, seed: int, steps: int) -> Any:
    """All weights trained on windows of the pool."""
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, WARMUP, steps, RATE / 10)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.0))
    apply = DecoderApply(config)

    @jax.jit
    def step(params: Any, state: Any, windows: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            return next_token_nll(apply({"params": params}, windows[:, :-1]), windows[:, 1:]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, draws = task.model.params, np.random.default_rng(seed)
    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state, task.pool[draws.integers(0, len(task.pool), BATCH)])
    return params


def loss_of(apply: Any, params: Any, windows: np.ndarray) -> float:
    """Nats a token."""
    step = jax.jit(lambda p, w: next_token_nll(apply({"params": p}, w[:, :-1]), w[:, 1:]).mean())
    return statistics.mean(float(step(params, windows[i : i + 8])) for i in range(0, len(windows), 8))


def sparsity(config: DecoderConfig, params: Any, windows: np.ndarray) -> dict[str, float]:
    """Zeros of what enters each kind of product, and the share of the work that is left."""
    stats = ej.calibrate(lambda p, w: DecoderApply(config)({"params": p}, w), params, [windows], needs={"zeros"})
    shares = zero_shares(stats)

    def of(name: str) -> float:
        return statistics.mean(share for path, share in shares.items() if f"/{name}_proj/" in path)

    return {"qkv": of("q"), "up": of("up"), "down": of("down"), "work": flops_share(stats, params)}


def reused(config: DecoderConfig, params: Any, windows: np.ndarray, gamma: int, *, seed: int | None) -> float:
    """Loss when every second block of tokens has only the neurons of the block before it, or as many at random."""

    def change(layer: int, h: jax.Array) -> jax.Array:
        allowed = reuse_mask(h != 0, gamma)
        if seed is not None:
            allowed = shuffled_neurons(jax.random.fold_in(jax.random.key(seed), layer), allowed)
        return jnp.where(allowed, h, 0)

    return loss_of(changed_neurons(config, change), params, windows)


def judge(task: Task, seed: int, steps: int, shifts: dict[str, float]) -> dict[str, dict[str, float]]:
    """Figures by arm for one order of the batches."""
    own, judged = task.model.config, task.evaluation[:JUDGED]
    arms = {
        "SiLU": own,
        "stage 1": relufy(own),
        "stage 2": relufy(own, stage=2),
        **{name: relufy(own, shift=shift) for name, shift in shifts.items()},
    }
    found: dict[str, dict[str, float]] = {}
    for name, config in arms.items():
        params = tuned(task, config, seed, steps)
        row = {"loss": loss_of(DecoderApply(config), params, judged), **sparsity(config, params, judged[:16])}
        if name != "SiLU":
            row["untrained"] = loss_of(DecoderApply(config), task.model.params, judged)
            active = active_neurons(config, params, jnp.asarray(judged[:16]))
            unused = unused_fraction(active).mean((0, 1))
            rates = active.mean((1, 2))
            null = jnp.stack([independent_unused(layer, max(TOKENS)) for layer in rates]).mean(0)
            row |= {f"unused {t}": float(unused[t - 1]) for t in TOKENS}
            row |= {f"null {t}": float(null[t - 1]) for t in TOKENS}
        if name in CUT:
            for gamma in GAMMAS:
                row[f"reuse {gamma}"] = reused(config, params, judged, gamma, seed=None)
                row[f"random {gamma}"] = reused(config, params, judged, gamma, seed=seed)
        found[name] = row
        print(f"seed {seed}, {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()), file=sys.stderr)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.relu", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the batches")
    parser.add_argument("--steps", type=int, default=200, help="of training, of every arm")
    args = parser.parse_args(argv)
    task = embedded()
    gates = gate_inputs(task.model.config, task.model.params, jnp.asarray(task.calibration(0, 8)))
    shifts = {name: shift_for(gates, share) for name, share in CUT.items()}
    runs = [judge(task, seed, args.steps, shifts) for seed in args.seeds]
    mean = {arm: {key: statistics.mean(run[arm][key] for run in runs) for key in runs[0][arm]} for arm in runs[0]}
    show(mean, shifts, runs)
    silu, sparse = mean["SiLU"], mean["shift, 98 %"]
    bars = {
        "stage 1, loss over SiLU's": Bar(mean["stage 1"]["loss"] / silu["loss"], high=1.01, paper="-1.3 points"),
        "stage 1, zeros before the down projection": Bar(mean["stage 1"]["down"], low=0.55, paper="0.62, 0.94"),
        "exchanged and not trained, loss over stage 1's": Bar(
            mean["stage 1"]["untrained"] / mean["stage 1"]["loss"], low=1.05
        ),
        "shift of 90 %, zeros": Bar(mean["shift, 90 %"]["down"], low=0.9, paper="0.95"),
        "shift of 90 %, loss over SiLU's": Bar(mean["shift, 90 %"]["loss"] / silu["loss"], high=1.02),
        "stage 2, work over dense": Bar(mean["stage 2"]["work"], high=0.5, paper="0.44, 0.33"),
    }
    for arm in ("stage 1", *CUT):
        ratio = mean[arm]["unused 32"] / mean[arm]["null 32"]
        bars[f"{arm}, neurons that 32 tokens leave unused, over independent tokens'"] = Bar(ratio, low=1.0)
    for gamma in GAMMAS:
        closed = [
            (run[arm][f"random {gamma}"] - run[arm][f"reuse {gamma}"])
            / (run[arm][f"random {gamma}"] - run[arm]["loss"])
            for arm in ("shift, 98 %",)
            for run in runs
        ]
        bars[f"shift of 98 %, reuse of {gamma} tokens' neurons, share of random's loss made good"] = Bar(
            statistics.mean(closed), low=0.2, paper="0.29 (a smaller model)"
        )
    return conclude("relu", bars, {"mean": mean, "shifts": shifts, "zeros at 98 %": sparse["down"]})


def show(mean: dict[str, Any], shifts: dict[str, float], runs: list[Any]) -> None:
    console = Console(width=120)
    table = Table(title=f"embedded model, mean of {len(runs)} seeds; shifts {[round(s, 3) for s in shifts.values()]}")
    for column in ("arm", "loss", "each seed", "untrained", "zeros: qkv", "up, gate", "down", "work"):
        table.add_column(column)
    for arm, row in mean.items():
        each = " ".join(f"{run[arm]['loss']:.4f}" for run in runs)
        cells = [f"{row[key]:.3f}" for key in ("qkv", "up", "down", "work")]
        table.add_row(arm, f"{row['loss']:.4f}", each, f"{row['untrained']:.4f}" if "untrained" in row else "", *cells)
    console.print(table)
    table = Table(title="share of neurons that the first t tokens leave unused (independent tokens at the same rates)")
    for column in ("arm", *(f"t = {t}" for t in TOKENS)):
        table.add_column(column)
    for arm, row in mean.items():
        if "unused 1" in row:
            table.add_row(arm, *(f"{row[f'unused {t}']:.3f} ({row[f'null {t}']:.3f})" for t in TOKENS))
    console.print(table)
    table = Table(title="loss when every second block has the neurons of the one before (as many at random)")
    for column in ("arm", "all neurons", *(f"{gamma} tokens" for gamma in GAMMAS)):
        table.add_column(column)
    for arm in CUT:
        row = mean[arm]
        cells = [f"{row[f'reuse {gamma}']:.4f} ({row[f'random {gamma}']:.4f})" for gamma in GAMMAS]
        table.add_row(arm, f"{row['loss']:.4f}", *cells)
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
