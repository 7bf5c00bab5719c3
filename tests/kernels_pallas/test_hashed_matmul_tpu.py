"""The TPU's `hashed_matmul` in the simulator of a TPU, against the hash computed in Python's integers."""

import jax.numpy as jnp
import pytest

from kernels_pallas.hashed_matmul.tpu import hashed_matmul, why_not
from tests.kernels_pallas.oracles import assert_product, hashed


@pytest.mark.parametrize(
    ("n", "out", "slots", "block", "dtype", "transpose"),
    [(300, 72, 500, 1, "float32", False), (128, 200, 1000, 7, "float32", True), (256, 40, 300, 32, "bfloat16", False)],
)
def test_tables(n, out, slots, block, dtype, transpose):
    w = hashed(n, out, slots=slots, block=block)
    assert_product(hashed_matmul, w, rows=3, dtype=dtype, transpose=transpose)


def test_what_is_refused():
    w = hashed(128, 128, slots=2049)
    with pytest.raises(ValueError, match="a table of 2049 slots.*up to 2048 slots; use implementation='reference'"):
        hashed_matmul(jnp.ones((1, 128)), w)
    assert why_not(1, jnp.float64, hashed(8, 8, slots=4)) == "activations in float64: only bfloat16 and float32"
