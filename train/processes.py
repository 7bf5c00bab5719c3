"""Several processes that train together: joining, who writes, arrays of all on one host, stopping at the same step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from effjax.errors import ConfigError

COORDINATOR, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join() -> None:
    """Joins the processes that the environment names; without `JAX_COORDINATOR_ADDRESS` there is one.

    Before anything else of jax: devices are counted once. On CPU the processes talk through gloo.

    Raises:
        ConfigError: how many processes there are, or which one this is, is missing or no number.
    """
    if COORDINATOR not in os.environ:
        return
    numbers = []
    for name in (COUNT, INDEX):
        text = os.environ.get(name, "")
        if not text.isdigit():
            raise ConfigError(f"{COORDINATOR} is set and {name}={text!r}: set {COUNT}=N and {INDEX}=0 ... N-1")
        numbers.append(int(text))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(os.environ[COORDINATOR], *numbers)


def is_main() -> bool:
    """Whether this process prints and writes."""
    return jax.process_index() == 0


def to_host(tree: Any) -> Any:
    """Whole arrays as numpy, in every process; all must call."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))


@contextmanager
def stop_flag() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that the loop saves and leaves between two steps."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may take signals
        yield flag
        return
    before = signal.signal(signal.SIGTERM, lambda *_: flag.set())
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)
