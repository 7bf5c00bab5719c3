"""Stages of an experiment, each on the loop in a folder of its own: a small loss in, parameters out."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.distill import module_rates
from train.loop import fit
from train.processes import to_host
from train.step import make_optimizer


def stage(
    config: Any,
    out: Path,
    loss: Callable[[Any, Any], tuple[jax.Array, Mapping[str, jax.Array]]],
    init: Any,
    batch_at: Callable[[int], Any],
    *,
    steps: int,
    rate: float,
    rates: Mapping[str, float] | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
) -> Any:
    """Trains, or takes what was trained when the run goes on; None where it was interrupted.

    Args:
        config: a `LoopConfig` with `out` and `resume`: what is the same in all stages. `stop_at` is for the stage whose
            folder is `config.out`.
        out: the folder.
        loss: `(params, batch) -> (mean, {name: mean})`, with what is to be recorded beside.
        init: `key -> params`, or parameters to go on from.
        batch_at: `step -> batch` on the host, a function of the step alone; the first axis of its first array counts.
        steps: how many.
        rate: peak learning rate.
        rates: factors of it by module (see `effjax.distill.module_rates`); None for 1.
        evaluate: `params -> figures`.
    """
    stop_at = config.stop_at if out == config.out else 0
    told = config.of_part(steps=steps, learning_rate=rate, warmup=min(config.warmup, steps - 1), stop_at=stop_at)

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> Any:
        del key
        value, parts = loss(params, batch)
        count = jnp.asarray(len(jax.tree.leaves(batch)[0]), jnp.float32)
        return value * count, count, {name: (part * count, count) for name, part in parts.items()}

    optimizer = make_optimizer(told)
    optimizer = optimizer if rates is None else optax.chain(optimizer, module_rates(rates))
    state = fit(loss_fn, init, batch_at, told, out, resume=config.resume, evaluate=evaluate, optimizer=optimizer)
    if int(state.step) < steps:
        print(f"stopped in {out.name} at step {int(state.step)} of {steps}; go on with --resume")
        return None
    return to_host(state.params)


def in_parts(function: Callable[..., jax.Array], *arrays: np.ndarray, batch: int = 100) -> np.ndarray:
    """A function of rows, some at a time; the last part is filled up, so that one program serves all.

    Example:
        >>> in_parts(lambda x: 2 * x, np.arange(5), batch=2).tolist()
        [0, 2, 4, 6, 8]
    """
    found = []
    for at in range(0, len(arrays[0]), batch):
        ids = np.minimum(np.arange(at, at + batch), len(arrays[0]) - 1)
        found.append(np.asarray(function(*(x[ids] for x in arrays))))
    return np.concatenate(found)[: len(arrays[0])]
