"""What every test runs under: eight host devices for the sharding tests, programs that compile fast, no clock."""

import gc
import os
from pathlib import Path

import hypothesis
import jax
import pytest

HOST_DEVICES = 8
# The older generator of loops, in one piece: programs of a few lines compile in a third of the time.
FAST_COMPILER = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
MAPPINGS = 10_000  # of memory by one process; Linux allows 65,530, and the compiler dies where it gets no more


def pytest_configure(config):
    """Set before the first test module is imported, since the number of devices is fixed when a backend starts."""
    del config
    jax.config.update("jax_num_cpu_devices", HOST_DEVICES)
    # Most of the time goes into compiling small programs, which takes half as long so. Also for the processes of tests.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
    if jax.__version_info__[:2] == (0, 10):  # a flag that a compiler does not know ends the process
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILER}"
    # Traces are millions of objects that live on; looking through them all again and again is a sixth of the time.
    gc.set_threshold(50_000, 20, 100)
    # No deadline: the first example of a jitted function pays for its compilation.
    hypothesis.settings.register_profile("local", deadline=None)
    hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True, scope="module")
def programs_do_not_pile_up():
    """Every compiled program keeps mappings of memory: thousands of tests in a process would run out of them.

    Between modules, since the tests of one may count on programs that another of them compiled.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MAPPINGS:
        jax.clear_caches()
