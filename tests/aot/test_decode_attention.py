"""The TPU's `decode_attention` through the real compiler: bytes held, no dense copy, the stated vector memory."""

import jax
import jax.numpy as jnp
import pytest

from effjax.arrays import nbytes
from effjax.kv.coding import Coder
from effjax.kv.cq import CQ
from effjax.kv.integer import PerChannel, PerToken
from effjax.ops import CodedSlots
from effjax.ops.attention import make_question as question
from kernels_pallas.decode_attention import tpu
from kernels_pallas.shapes import MODELS
from tests.aot.test_kernels import TARGETS, compile_for

pytestmark = pytest.mark.aot

STRUCT = jax.ShapeDtypeStruct
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def coded(coding, shape):
    sample = STRUCT((shape[1], 300, shape[3]), F32)
    if isinstance(coding, CQ):
        tables = STRUCT((shape[1], shape[3] // coding.channels, 2**coding.bits, coding.channels), jnp.float16)
    else:
        tables = jax.eval_shape(coding.learn, sample)
    coder = Coder(coding=coding, tables=tables)
    codes = jax.eval_shape(lambda coder, x: coder.encode(x), coder, STRUCT(shape, F32))
    return CodedSlots(coded=codes, coder=coder)


def asked_of(model, slots, *, batch=4, dtype=BF16, keys=None, values=None, page=None):
    widths = MODELS[model]
    heads, head_dim = widths.kv_heads, widths.head_dim
    shape = (batch, heads, slots, head_dim) if page is None else (2 * slots // page, heads, page, head_dim)
    k, v = (STRUCT(shape, dtype) if c is None else coded(c, shape) for c in (keys, values))
    table = None if page is None else STRUCT((batch, slots // page), jnp.int32)
    place = STRUCT((batch, heads), jnp.int32)
    return (
        STRUCT((batch, heads, widths.heads // heads, head_dim), dtype),
        k,
        v,
        place,
        place,
        STRUCT((batch,), F32),
        table,
    )


CQ_8C8B = CQ(channels=8, bits=8)
CASES = {
    "dense": asked_of("Llama-3.1-8B", 8192),
    "dense, 64 wide": asked_of("TinyLlama-1.1B", 2000),
    "dense in float32": asked_of("Qwen3-0.6B", 1000, dtype=F32),
    "int8": asked_of("Llama-3.1-8B", 8192, keys=PerChannel(bits=8), values=PerToken(bits=8, head_dim=128)),
    "int4": asked_of("Llama-3.1-8B", 8192, keys=PerChannel(bits=4), values=PerToken(bits=4, head_dim=128)),
    "int4, 64 wide": asked_of("TinyLlama-1.1B", 2048, keys=PerChannel(bits=4), values=PerToken(bits=4, head_dim=64)),
    "codebooks": asked_of("Llama-3.1-8B", 4096, keys=CQ_8C8B, values=CQ_8C8B),
    "pages of 16": asked_of("Llama-3.1-8B", 4096, page=16),
    "int8 pages of 128": asked_of(
        "Llama-3.1-8B", 4096, page=128, keys=PerChannel(bits=8), values=PerToken(bits=8, head_dim=128)
    ),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_compiles_with_the_stored_bytes_and_no_copy_of_them(name, target):
    def answer(q, k, v, start, length, asked, table):
        return tpu.decode_attention(question("test", q, k, v, length, start, asked, table, None))

    args = CASES[name]
    compiled = compile_for(target, answer, *args)
    assert "tpu_custom_call" in compiled.as_text()
    memory, given = compiled.memory_analysis(), nbytes(args)
    # Arrays of few rows are padded to whole tiles.
    assert given <= memory.argument_size_in_bytes <= 1.05 * given + 2**14
    # What is left are scales of values as words, sums in blocks, and on a v5p the kernel's own vector memory.
    batch, heads, group, head_dim = args[0].shape
    slots = args[2].shape[2] * (1 if args[6] is None else args[6].shape[1])
    small = 4 * batch * heads * (3 * slots + 4 * 8 * max(head_dim, 128))
    tables = sum(16 * head_dim * 256 * heads for x in args[1:3] if isinstance(x, CodedSlots))
    a = jax.eval_shape(lambda *args: question("test", *args[:3], args[4], args[3], *args[5:], None), *args)
    stated = tpu.vmem_bytes(a, tpu.choose_block(a))
    assert memory.temp_size_in_bytes <= small + tables + (stated if target == "v5p" else 0)
    assert stated <= tpu.VECTOR_MEMORY


def test_the_stated_vector_memory_is_a_limit_that_the_compiler_keeps(monkeypatch):
    monkeypatch.setattr(tpu, "vmem_bytes", lambda *args: 2**17)

    def answer(q, k, v, start, length, asked, table):
        return tpu.decode_attention(question("test", q, k, v, length, start, asked, table, None))

    with pytest.raises(jax.errors.JaxRuntimeError, match="(?i)vmem"):
        compile_for("v5e", answer, *CASES["dense"])
