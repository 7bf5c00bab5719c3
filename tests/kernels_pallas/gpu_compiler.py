"""The Hopper kernels compiled to machine code for an H100 that is not there; what the assembler says as lines of JSON.

MOSAIC_GPU_DUMP_TO=folder MOSAIC_GPU_DUMP_PTXAS=1 JAX_PLATFORMS=cpu python -m tests.kernels_pallas.gpu_compiler

XLA's CUDA plugin compiles for a described GPU; Mosaic GPU compiles its kernels on the way, with NVIDIA's assembler.
"""

import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from effjax.arrays import Codebook, NMSparse, Quantized
from effjax.arrays.packing import packed_size
from effjax.kv.coding import Coder
from effjax.kv.integer import PerChannel, PerToken
from effjax.ops import CodedSlots
from effjax.ops.attention_blocks import Question
from effjax.ops.neurons import Neurons, make_neurons
from kernels_pallas.codebook_matmul.gpu import codebook_matmul
from kernels_pallas.decode_attention.gpu import decode_attention
from kernels_pallas.nm_matmul.gpu import nm_matmul
from kernels_pallas.quant_matmul.gpu import quant_matmul
from kernels_pallas.sparse_mlp.gpu import sparse_mlp

S = jax.ShapeDtypeStruct
# As the driver of an H100 SXM reports itself.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def quantized_struct(n, out, bits=4, group=128, zeros=None, scale_dtype=jnp.float16, dtype=jnp.bfloat16):
    """A leaf of shapes alone: a 70B matrix costs nothing."""
    groups = 1 if group is None else n // group
    points = {
        None: None,
        "packed": S((packed_size(groups, bits), out), jnp.uint8),
        "real": S((groups, out), jnp.float32),
    }
    return Quantized(
        codes=S((packed_size(n, bits), out), jnp.uint8),
        scales=S((groups, out), scale_dtype),
        zeros=points[zeros],
        bits=bits,
        pad=packed_size(n, bits) * 8 // bits - n,
        dtype=jnp.dtype(dtype),
    )


def neurons_struct(d, n, dtype=jnp.bfloat16, *, gated=True, biased=False) -> Neurons:
    up, bias = S((d, n), dtype), S((n,), jnp.float32) if biased else None
    activation = "silu" if gated else "relu"

    def make(up, down, bias):
        return make_neurons(up, down, gate=up if gated else None, up_bias=bias, activation=activation)

    return jax.eval_shape(make, up, S((n, d), dtype), bias)


def cases() -> Iterator[tuple[str, object, object, int, bool]]:
    """(name, kernel, weight, rows, transpose) at a projection of an 8B decoder."""
    n, out = 4096, 14336
    for rows in (1, 16, 2048):
        yield "int4 g128", quant_matmul, quantized_struct(n, out), rows, False
    yield "int4 g128 zeros", quant_matmul, quantized_struct(n, out, zeros="packed"), 1, False
    yield "int4 g128", quant_matmul, quantized_struct(n, out), 2048, True
    for rows in (1, 2048):
        yield "int8 channel", quant_matmul, quantized_struct(n, out, 8, None), rows, False
    yield "int8 g128 zeros", quant_matmul, quantized_struct(n, out, 8, zeros="packed"), 2048, False
    yield "int3 g128", quant_matmul, quantized_struct(n, out, 3), 1, False
    codes, scales, bf16 = S((n // 2, out), jnp.uint8), S((n // 64, out), jnp.float16), jnp.dtype(jnp.bfloat16)
    one, many = S((1, 1, 16), jnp.float32), S((1, out, 16), jnp.float32)
    for rows in (1, 2048):
        yield (
            "codebook",
            codebook_matmul,
            Codebook(codes=codes, tables=one, scales=scales, bits=4, dtype=bf16),
            rows,
            False,
        )
    yield (
        "codebook of a column",
        codebook_matmul,
        Codebook(codes=codes, tables=many, scales=None, bits=4, dtype=bf16),
        1,
        False,
    )
    values, indices = S((n // 2, out), jnp.bfloat16), S((n // 8, out), jnp.uint8)
    yield "2:4", nm_matmul, NMSparse(values=values, indices=indices, n=2, m=4, dtype=bf16), 1, False


def attention_cases() -> Iterator[tuple[str, Question]]:
    """(name, question) of four sequences of an 8B decoder, of a narrow head, pages, and int8 codes."""

    def int8() -> Iterator[Coder]:
        yield Coder(coding=PerChannel(bits=8), tables={"low": S((8, 1, 128), half), "step": S((8, 1, 128), half)})
        yield Coder(coding=PerToken(bits=8, head_dim=128), tables=None)

    half = jnp.float16
    for name, group, head_dim, page, asked in (
        ("dense", 4, 128, None, True),
        ("dense, no sums", 4, 128, None, False),
        ("64 wide", 8, 64, None, True),
        ("pages of 16", 4, 128, 16, True),
        ("pages of 128", 4, 128, 128, True),
        ("int8", 4, 128, None, True),
    ):
        shape = (4, 8, 4096, head_dim) if page is None else (2048, 8, page, head_dim)
        place = S((4, 8), jnp.int32)
        k = v = S(shape, jnp.bfloat16)
        if name == "int8":
            encode = functools.partial(jax.eval_shape, lambda coder, x: coder.encode(x))
            k, v = (CodedSlots(coded=encode(coder, k), coder=coder) for coder in int8())
        yield (
            name,
            Question(
                q=S((4, 8, group, head_dim), jnp.bfloat16),
                k=k,
                v=v,
                start=place,
                length=place,
                asked=S((4,), jnp.float32) if asked else None,
                table=None if page is None else S((4, 4096 // page), jnp.int32),
                scale=head_dim**-0.5,
            ),
        )


def mlp_cases() -> Iterator[tuple[str, Neurons, int, int]]:
    """(name, neurons, rows, how many are chosen): a quarter, or a tenth, of decoders' neurons."""
    yield "OPT-1.3B", neurons_struct(2048, 8192, gated=False, biased=True), 1, 819
    yield "OPT-1.3B in float32", neurons_struct(2048, 8192, jnp.float32, gated=False, biased=True), 4, 2048
    yield "Llama-3.1-8B", neurons_struct(4096, 14336), 1, 3584
    yield "Llama-3.1-70B", neurons_struct(8192, 28672), 1, 7168


def assembled(f, operands: tuple, device: jax.Device, folder: Path) -> dict[str, int]:
    for old in folder.iterdir():
        old.unlink()
    sharding = jax.sharding.SingleDeviceSharding(device)
    traced = jax.jit(f, in_shardings=sharding, out_shardings=sharding).trace(*operands)
    memory = traced.lower(lowering_platforms=("cuda",)).compile().memory_analysis()
    (report,) = (path.read_text() for path in folder.glob("*.ptxas"))

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        assert found is not None, report
        return int(found[1])

    return {
        "registers": number(r"Used (\d+) registers"),
        "spilled": number(r"(\d+) bytes spill stores"),
        "serialized": report.count("wgmma.mma_async instructions are serialized"),
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    jax.devices()  # registers the plugin's platform
    h100 = topologies.get_topology_desc("", platform="cuda", target_config=H100, topology="1x1x1").devices[0]
    dumps = Path(os.environ["MOSAIC_GPU_DUMP_TO"])

    def stored(leaves) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))

    for name, kernel, w, rows, transpose in cases():
        x = S((rows, w.shape[1 if transpose else 0]), jnp.bfloat16)
        product = functools.partial(kernel, transpose=transpose)
        found = assembled(product, (x, w), h100, dumps)
        line = {"case": name, "rows": rows, "transpose": transpose, "stored": stored(w), **found}
        print(json.dumps(line), flush=True)
    for name, question in attention_cases():
        found = assembled(decode_attention, (question,), h100, dumps)
        print(json.dumps({"attention": name, "stored": stored(question), **found}), flush=True)
    for name, neurons, rows, chosen in mlp_cases():
        x = S((rows, neurons.up.shape[1]), neurons.up.dtype)
        operands = (x, neurons, S((chosen,), jnp.int32), S((), jnp.int32))
        found = assembled(functools.partial(sparse_mlp, block=1), operands, h100, dumps)
        print(json.dumps({"mlp": name, "stored": stored(operands), **found}), flush=True)
