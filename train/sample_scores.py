"""Scores by which `train.sample` keeps a part of the examples: of a network trained a little, or of n-grams."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from effjax.data import DSIR, el2n, grand, prototype_distances
from effjax.errors import ConfigError
from train.sample_tasks import Task

Scored = Literal["el2n", "grand", "prototypes", "dsir"]
SCORED = ("el2n", "grand", "prototypes", "dsir")
OF_IMAGES = frozenset({"el2n", "prototypes"})


def scores(name: Scored, config: Any, task: Task, scout: Callable[[], Any]) -> jax.Array:
    """A number for every example; those with the highest are kept.

    Args:
        name: what is asked.
        config: a `train.sample.SampleConfig`.
        task: with the examples.
        scout: trains with uniform sampling for a little and gives the parameters.

    Raises:
        ConfigError: a target for "dsir" that cannot be read.
    """
    if name == "dsir":
        return like_target(task.texts(), config.target, config.kept_share, config.seed)
    params = scout()
    if name == "grand":

        def loss(params: Any, example: Any) -> jax.Array:
            return task.losses(params, jax.tree.map(lambda x: x[None], example))[0]

        return jax.jit(lambda params, examples: grand(loss, params, examples))(params, task.examples)
    logits = jax.jit(task.logits)(params)
    if name == "el2n":
        return el2n(logits, task.examples[1])
    return prototype_distances(logits, task.labels, key=jax.random.key(config.seed))


def like_target(texts: list[str], target: Path, keep: float, seed: int) -> jax.Array:
    """1 for the texts that DSIR draws because they look like the lines of a file, 0 for the others."""
    try:
        wanted = target.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--target {target}: cannot be read as UTF-8 text ({error})") from None
    method = DSIR()
    chosen = method.select(method.log_weights(texts, wanted), max(1, round(keep * len(texts))), seed=seed)
    return jnp.asarray(np.isin(np.arange(len(texts)), chosen), jnp.float32)
