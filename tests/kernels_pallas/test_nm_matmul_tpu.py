"""The TPU's `nm_matmul` in the simulator of a TPU: patterns whose positions fill a word, three, or part of one."""

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.nm_matmul.tpu import Tile, nm_matmul, why_not
from tests.kernels_pallas.oracles import assert_product, nm_sparse, quantized


@pytest.mark.parametrize(
    ("n", "m", "values", "dtype", "transpose"),
    [
        (2, 4, jnp.bfloat16, "bfloat16", False),
        (2, 4, jnp.float32, "float32", True),
        (4, 8, jnp.bfloat16, "float32", False),
        (3, 4, jnp.float32, "float32", False),
        (8, 16, jnp.bfloat16, "float32", False),
    ],
)
def test_patterns(n, m, values, dtype, transpose):
    assert_product(nm_matmul, nm_sparse(480, 136, n=n, m=m, dtype=values), rows=5, dtype=dtype, transpose=transpose)


@settings(max_examples=2)
@given(groups=st.integers(1, 150), out=st.integers(1, 200), halves=st.booleans(), transpose=st.booleans())
def test_odd_shapes(groups, out, halves, transpose):
    w = nm_sparse(4 * groups, out, n=2, m=4, dtype=jnp.bfloat16 if halves else jnp.float32, seed=groups)
    assert_product(nm_matmul, w, rows=3, dtype="float32", transpose=transpose)


@pytest.mark.parametrize("transpose", [False, True])
def test_several_tiles_whose_ends_are_not_read(transpose):
    """Beyond the last input and output lies memory that the simulator fills with NaN."""
    w = nm_sparse(600, 200, n=2, m=4, dtype=jnp.bfloat16)
    tile = Tile(rows=8, span=256, spans=1, out=128)
    assert_product(nm_matmul, w, rows=12, dtype="float32", transpose=transpose, tile=tile)


def test_what_is_refused():
    w = nm_sparse(128, 8, n=2, m=64)
    with pytest.raises(ValueError, match="a 2:64 pattern: groups of up to 32 inputs.*use implementation='reference'"):
        nm_matmul(jnp.ones((1, 128)), w)
    half = nm_sparse(64, 8, n=2, m=4, dtype=jnp.float16)
    assert why_not(1, jnp.bfloat16, half) == "values in float16: only bfloat16 and float32"
    assert why_not(0, jnp.bfloat16, nm_sparse(64, 8, n=2, m=4)) == "no rows"
    coded = half.replace(values=quantized(32, 8, bits=4))
    assert why_not(1, jnp.bfloat16, coded) == "values that are quantized themselves: only floating ones"
    assert "whole registers only every 5376 inputs" in why_not(1, jnp.float32, nm_sparse(42, 8, n=5, m=21))
