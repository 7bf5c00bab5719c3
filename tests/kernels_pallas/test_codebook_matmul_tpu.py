"""The TPU's `codebook_matmul` in the simulator of a TPU: one table, a table a column, a group, and scales on top."""

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.codebook_matmul.tile import Tile, choose_tile, lookup
from kernels_pallas.codebook_matmul.tpu import codebook_matmul, why_not
from tests.kernels_pallas.oracles import assert_product, codebook

CASES = {
    "one table, scales": (dict(n=512, out=136, entries=16, scales=8), "sublanes", "float32", False),
    "one table, two levels of scales": (
        dict(n=256, out=128, entries=15, scales=16, global_scale=3.0, scale_dtype=jnp.float8_e4m3fn),
        "sublanes",
        "float32",
        True,
    ),
    "one table of 256": (dict(n=300, out=128, entries=256), "lanes", "bfloat16", False),
    "a table a column": (dict(n=1000, out=200, entries=16, tables=(1, 200)), "sublanes", "float32", False),
    "a table a group and column": (dict(n=512, out=256, entries=8, tables=(2, 256)), "sublanes", "bfloat16", True),
    "a table a group of columns": (dict(n=512, out=256, entries=32, tables=(2, 2)), "sublanes", "float32", False),
    "a table of 256 a column": (dict(n=600, out=136, entries=256, tables=(1, 136)), "turned", "float32", False),
    "the same, turned": (dict(n=512, out=128, entries=200, tables=(1, 128)), "turned", "float32", True),
}


@pytest.mark.parametrize("name", CASES)
def test_tables(name):
    case, how, dtype, transpose = CASES[name]
    w = codebook(**case)
    assert lookup(w) == how
    assert_product(codebook_matmul, w, rows=5, dtype=dtype, transpose=transpose)


@settings(max_examples=3)
@given(
    entries=st.integers(2, 40),
    columns=st.booleans(),
    inputs=st.integers(1, 600),
    out=st.integers(1, 200),
    transpose=st.booleans(),
)
def test_odd_shapes(entries, columns, inputs, out, transpose):
    w = codebook(inputs, out, entries=entries, tables=(1, out if columns else 1), seed=inputs)
    assert why_not(2, jnp.float32, w) == ""
    assert_product(codebook_matmul, w, rows=2, dtype="float32", transpose=transpose)


def test_several_tiles_and_parts_of_a_group():
    w = codebook(1024, 256, entries=16, tables=(2, 256), scales=2)
    tile = Tile(rows=8, span=128, spans=2, out=128)
    assert_product(codebook_matmul, w, rows=20, dtype="float32", tile=tile)


def test_what_is_refused():
    w = codebook(64, 8, entries=16, scales=16)
    with pytest.raises(ValueError, match="scales of 4 inputs.*must divide a group; use implementation='reference'"):
        codebook_matmul(jnp.ones((1, 64)), w)
    grouped = codebook(96, 8, entries=16, tables=(2, 1))
    assert "no run of up to 4096 inputs that fills whole registers" in why_not(1, jnp.float32, grouped)
    large = codebook(512, 8, entries=256, tables=(1, 8), scales=2)
    assert why_not(1, jnp.float32, large) == "scales on top of tables of 256 entries a column"
    assert why_not(1, jnp.float16, w) == "activations in float16: only bfloat16 and float32"
    assert choose_tile(1, jnp.float32, codebook(512, 8, entries=16)).rows == 8
