"""Results of the Hopper kernels in Mosaic GPU's interpreter, against the product in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.kernels_pallas.gpu_interpreter import GROUPS

# What the interpreter lacks is put into its internals, which are others in later versions.
pytestmark = pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="extends the interpreter of jax 0.10")

ROOT = Path(__file__).parents[2]
SECONDS = 500  # the interpreter may hang where it fails
CASES = {"quant": 9, "transposed": 5, "codebook": 4, "sparse": 2, "tiles": 2, "attention": 7, "mlp": 5}


@pytest.fixture(scope="module")
def cases():
    """All cases in one process, compiled without optimisation: most of the time is compilation."""
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.kernels_pallas.gpu_interpreter", *GROUPS],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("group", GROUPS)
def test_products_are_those_of_float64(cases, group):
    """Sums in float32; what is rounded to 16 bits (scaled weights of a gradient, tables) is off by 2**-17 an entry."""
    found = {case["case"]: case["error"] for case in cases if case["group"] == group}
    assert len(found) == CASES[group]
    exact = group in ("quant", "sparse", "tiles", "mlp")
    # Weights and outputs of attention have 16 bits, and so have queries times the scales of channels.
    bound = 8e-3 if group == "attention" else 5e-7 if exact else 1e-5
    for name, error in found.items():
        assert error < bound, f"{name}: off by {error:.2e} of the largest result"
