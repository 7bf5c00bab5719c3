"""The TPU's `quant_matmul` in the simulator of a TPU: widths, groups, zero points, odd shapes and both directions."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.arrays import Quantized
from kernels_pallas.quant_matmul.tile import Tile, choose_tile, vmem_bytes
from kernels_pallas.quant_matmul.tpu import quant_matmul, why_not
from kernels_pallas.shapes import MODELS, unique_shapes
from tests.kernels_pallas.oracles import assert_product, quantized


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_while_decoding(bits):
    """Scales on the products: nothing is rounded, whatever the activations are."""
    zeros = ("symmetric", "packed", "real")[bits % 3]
    w = quantized(512, 136, bits=bits, group=32 if bits % 2 else None, zeros=zeros, seed=bits)
    dtype = "float32" if bits in (3, 4, 8) else "bfloat16"
    assert choose_tile(3, jnp.dtype(dtype), w).scale_on == "products"
    assert_product(quant_matmul, w, rows=3, dtype=dtype, tolerance=2e-6)


@settings(max_examples=4)
@given(
    bits=st.integers(1, 8),
    group=st.sampled_from([None, 32, 96]),
    zeros=st.sampled_from(["symmetric", "packed", "real"]),
    rows=st.sampled_from([1, 17, 130]),
    inputs=st.integers(1, 700),
    out=st.integers(1, 300),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    transpose=st.booleans(),
)
def test_odd_shapes(bits, group, zeros, rows, inputs, out, dtype, transpose):
    n = inputs if group is None else max(1, inputs // group) * group
    w = quantized(n, out, bits=bits, group=group, zeros=zeros, seed=inputs)
    assert why_not(rows, jnp.dtype(dtype), w, transpose=transpose) == ""
    assert_product(quant_matmul, w, rows=rows, dtype=dtype, transpose=transpose)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_prefill_with_groups_across_several_tiles(bits, dtype):
    """Steps that hold part of a group, and several tiles along each axis."""
    w = quantized(1024, 256, bits=bits, group=512, zeros="packed", scale_dtype=jnp.bfloat16)
    tile = Tile(rows=16, span=256, spans=1, out=128, scale_on="weights")
    assert_product(quant_matmul, w, rows=40, dtype=dtype, tile=tile)


def test_gradient_of_the_inputs_across_several_tiles():
    w = quantized(1024, 272, bits=4, group=128, zeros="packed", scale_dtype=jnp.bfloat16)
    tile = Tile(rows=16, span=128, spans=2, out=128, scale_on="weights")
    assert_product(quant_matmul, w, rows=24, dtype="float32", transpose=True, tile=tile)


def test_what_is_refused():
    few = quantized(64, 128, bits=4, group=4)
    with pytest.raises(ValueError, match="groups of 4 inputs.*8 inputs at a time.*use implementation='reference'"):
        quant_matmul(jnp.ones((1, 64), jnp.bfloat16), few)
    w = quantized(64, 128, bits=4, group=32)
    assert why_not(1, jnp.int8, w) == "activations in int8: only bfloat16 and float32"
    assert why_not(0, jnp.bfloat16, w) == "no rows"
    assert "map over the leading axes" in why_not(1, jnp.bfloat16, w.replace(codes=w.codes[None]))
    assert "whole registers only every 2176 inputs" in why_not(1, jnp.float32, quantized(1088, 8, bits=4, group=136))
    tile = choose_tile(1, jnp.float32, w)
    with pytest.raises(ValueError, match="contracts over the scales' axis: its tile needs scale_on='weights'"):
        quant_matmul(jnp.ones((1, 128)), w, transpose=True, tile=tile)


@pytest.mark.parametrize("transpose", [False, True])
def test_tiles_of_real_shapes_fit_the_smallest_vector_memory(transpose):
    for model in MODELS:
        for n, out in unique_shapes(model):
            for bits, group in ((4, 128), (3, None), (8, 64), (2, 32)):
                w = _shape_of(n, out, bits, group)
                for rows in (1, 16, 256, 2048):
                    for dtype in (jnp.bfloat16, jnp.float32):
                        tile = choose_tile(rows, dtype, w, transpose=transpose)
                        assert tile.out % 128 == 0 and tile.span % 128 == 0
                        assert group is None or tile.inputs % group == 0 or group % tile.inputs == 0
                        assert vmem_bytes(tile, dtype, w, transpose=transpose) < 32 * 2**20


def _shape_of(n, out, bits, group):
    codes = jax.ShapeDtypeStruct((-(-n * bits // 8), out), jnp.uint8)
    scales = jax.ShapeDtypeStruct((1 if group is None else n // group, out), jnp.bfloat16)
    return Quantized(codes=codes, scales=scales, zeros=None, bits=bits, dtype=jnp.dtype("bfloat16"))
