"""The Hopper kernels as machine code: no spilled register, no serialised tensor core, no copy of the weight."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot

ROOT = Path(__file__).parents[2]
DENSE_BYTES = 2 * 4096 * 14336


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    # The package of plugins itself is missing where there is none.
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        pytest.skip("needs the extra `aot-gpu`, whose compiler works without a GPU")
    dumps = {"MOSAIC_GPU_DUMP_TO": str(tmp_path_factory.mktemp("kernels")), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels_pallas.gpu_compiler"],
        cwd=ROOT,
        env=os.environ | dumps | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def cases(compiled):
    return [line for line in compiled if "case" in line]


def test_nothing_is_spilled_and_tensor_cores_do_not_wait(cases):
    assert len(cases) == 13
    for case in cases:
        assert case["spilled"] == case["serialized"] == 0, case
        assert case["registers"] <= 255


def test_the_weight_is_read_as_it_is_stored(cases):
    """Arguments are the packed bytes and x; what is temporary are partial sums, and tables or zero points unpacked."""
    for case in cases:
        width = 14336 if case["transpose"] else 4096
        assert 0 <= case["arguments"] - case["stored"] - 2 * case["rows"] * width <= 4096, case
        if case["rows"] <= 16:
            assert case["temporary"] < DENSE_BYTES / 20, case
        else:  # the float32 result before it is turned, and x in the kernel's order
            result = 4 * case["rows"] * (4096 if case["transpose"] else 14336)
            assert case["temporary"] <= 1.1 * (result + 2 * case["rows"] * width), case


def test_attention_reads_the_cache_as_it_is_stored(compiled):
    """Nothing is spilled; arguments are the cache and queries, and what is temporary shares of outputs and logits."""
    found = {line["attention"]: line for line in compiled if "attention" in line}
    assert len(found) == 6
    for name, case in found.items():
        assert case["spilled"] == case["serialized"] == 0 and case["registers"] <= 255, case
        assert abs(case["arguments"] - case["stored"]) <= 8192, case
        assert case["temporary"] < case["stored"] / (40 if name == "dense, no sums" else 6), case


def test_neurons_are_read_as_they_are_stored(compiled):
    """Nothing is spilled; arguments are the weights, and what is temporary are the shares' sums."""
    found = [line for line in compiled if "mlp" in line]
    assert len(found) == 4
    for case in found:
        assert case["spilled"] == 0 and case["registers"] <= 255, case
        assert abs(case["arguments"] - case["stored"]) <= 8192, case
        assert case["temporary"] < case["stored"] / 20, case
