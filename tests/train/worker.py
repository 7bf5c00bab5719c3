"""One of two processes that train together: stopped by a signal that only the second gets, then going on.

    python tests/train/worker.py OUT

with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; without them it is alone, and not stopped.
"""

import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from train.config import LoopConfig
from train.input import ArrayExamples, Batches
from train.loop import fit
from train.processes import is_main, join, to_host

X = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
DATA = Batches(examples=ArrayExamples({"x": X, "y": X[:, :1] * 2}), batch=16, seed=1)
CONFIG = LoopConfig(steps=9, learning_rate=0.1, warmup=2, save_every=3, seed=3, mesh="data=2,fsdp=2")


def init(key):
    first, second = jax.random.split(key)
    return {
        "up_proj": {"kernel": jax.random.normal(first, (16, 32)) / 4, "bias": jnp.zeros(32)},
        "down_proj": {"kernel": jax.random.normal(second, (32, 1)) / 6},
    }


def loss_fn(params, batch, key):
    x = batch["x"] + 0.01 * jax.random.normal(key, batch["x"].shape)
    hidden = jnp.tanh(x @ params["up_proj"]["kernel"] + params["up_proj"]["bias"][None])
    return jnp.sum((hidden @ params["down_proj"]["kernel"] - batch["y"]) ** 2), jnp.float32(len(x))


def until_terminated(step):
    """The whole batch of a step; each process takes its rows."""
    if step == 4 and not is_main():
        os.kill(os.getpid(), signal.SIGTERM)
    return DATA.read(step, slice(0, DATA.batch))


def main(out):
    join()
    if jax.process_count() > 1:
        state = fit(loss_fn, init, until_terminated, CONFIG, out)
        print("stopped at", int(state.step))
    state = fit(loss_fn, init, DATA, CONFIG, out, resume=True)
    kernel = to_host(state.params)["up_proj"]["kernel"]
    print("kernel", kernel.shape, float(np.abs(kernel).sum(dtype=np.float64)))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    main(Path(sys.argv[1]))
