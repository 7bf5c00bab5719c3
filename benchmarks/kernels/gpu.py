"""The Hopper kernels on the GPU that there is: bytes, time, bandwidth, and the ratio to a dense bf16 product.

python -m benchmarks.kernels.gpu            all kernels at a decoder's shapes
python -m benchmarks.kernels.gpu --neurons  some neurons of a decoder's MLP, beside all of them
python -m benchmarks.kernels.gpu --sweep    every sensible tile of the 4-bit product, the best first

Times are of the device. Each is of a program of many products one after the other, of different matrices that
together do not fit the second-level cache: a model does not find its weights there either.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, conclude
from effjax.arrays import Codebook, NMSparse, Quantized
from effjax.arrays.packing import packed_size
from effjax.ops.neurons import Neurons, make_neurons
from kernels_pallas.codebook_matmul.gpu import codebook_matmul
from kernels_pallas.gpu_tile import Tile
from kernels_pallas.nm_matmul.gpu import nm_matmul
from kernels_pallas.quant_matmul.gpu import quant_matmul
from kernels_pallas.shapes import DECODE_ROWS, MODELS, PREFILL_ROWS, unique_shapes
from kernels_pallas.sparse_mlp.gpu import sparse_mlp

CACHE_BYTES = 50 * 2**20  # second-level cache of an H100
PRODUCTS = 24  # of a program, so that its launch is little among them
REPEATS = 15
COPY_BYTES = 2**30
MODEL = "Llama-3.1-8B"
BAR_SHAPE = (4096, 14336)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Device seconds of one product: the median over repeats, and the spread of the middle half."""

    seconds: float
    spread: float


def measure(product: Callable[..., jax.Array], x: jax.Array, weights: list[Any]) -> Timing:
    """The time of `product(x, w)`, from programs of `PRODUCTS` of them over `weights` in turn."""

    def program(x: jax.Array, weights: list[Any]) -> list[jax.Array]:
        results = []
        for w in itertools.islice(itertools.cycle(weights), PRODUCTS):
            y = product(x, w)
            x, y = jax.lax.optimization_barrier((x, y))  # the next starts when this is done
            results.append(y[0, 0])
        return results

    run = jax.jit(program).lower(x, weights).compile()
    jax.block_until_ready(run(x, weights))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(x, weights))
        times.append((time.perf_counter() - start) / PRODUCTS)
    low, _, high = statistics.quantiles(times, n=4)
    return Timing(seconds=statistics.median(times), spread=high - low)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy on the device."""
    x = jnp.zeros(COPY_BYTES // 4, jnp.float32)
    negate = jax.jit(jnp.negative)
    jax.block_until_ready(negate(x))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready([negate(x) for _ in range(4)])
        times.append((time.perf_counter() - start) / 4)
    return 2 * COPY_BYTES / statistics.median(times)


def bits(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.bits(key, shape, jnp.uint8)


def quantized(n: int, out: int, key: jax.Array, *, width: int, group: int | None, zeros: bool = False) -> Quantized:
    groups = 1 if group is None else n // group
    return Quantized(
        codes=bits(key, packed_size(n, width), out),
        scales=jax.random.uniform(key, (groups, out), jnp.float16),
        zeros=bits(key, packed_size(groups, width), out) if zeros else None,
        bits=width,
        dtype=jnp.dtype(jnp.bfloat16),
    )


def codebook(n: int, out: int, key: jax.Array, *, columns: bool) -> Codebook:
    return Codebook(
        codes=bits(key, n // 2, out),
        tables=jax.random.normal(key, (1, out if columns else 1, 16)),
        scales=None if columns else jax.random.uniform(key, (n // 64, out), jnp.float16),
        bits=4,
        dtype=jnp.dtype(jnp.bfloat16),
    )


def two_of_four(n: int, out: int, key: jax.Array) -> NMSparse:
    first = jax.random.randint(key, (n // 8, out), 0, 3, jnp.uint8)
    places = first | (first + 1) << 2
    values = jax.random.normal(key, (n // 2, out), jnp.bfloat16)
    return NMSparse(values=values, indices=places | places << 4, n=2, m=4, dtype=jnp.dtype(jnp.bfloat16))


KINDS: dict[str, tuple[Callable[..., jax.Array], Callable[..., Any]]] = {
    "int4 g128": (quant_matmul, functools.partial(quantized, width=4, group=128)),
    "int4 g128 zeros": (quant_matmul, functools.partial(quantized, width=4, group=128, zeros=True)),
    "int4 channel": (quant_matmul, functools.partial(quantized, width=4, group=None)),
    "int8 channel": (quant_matmul, functools.partial(quantized, width=8, group=None)),
    "int8 g128": (quant_matmul, functools.partial(quantized, width=8, group=128)),
    "int3 g128": (quant_matmul, functools.partial(quantized, width=3, group=128)),
    "int2 g64": (quant_matmul, functools.partial(quantized, width=2, group=64)),
    "codebook16 g64": (codebook_matmul, functools.partial(codebook, columns=False)),
    "codebook16 column": (codebook_matmul, functools.partial(codebook, columns=True)),
    "2:4 bf16": (nm_matmul, two_of_four),
}


def several(make: Callable[..., Any], n: int, out: int) -> list[Any]:
    """As many matrices as are four times the cache."""
    first = make(n, out, jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    count = min(max(2, -(-4 * CACHE_BYTES // size)), PRODUCTS)
    return [first, *(make(n, out, jax.random.key(i)) for i in range(1, count))]


def dense(n: int, out: int, key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (n, out), jnp.bfloat16)


def moved(x: jax.Array, w: Any, out: int) -> int:
    """Bytes that the product has to read and write: the weight, the activations and the float32 result."""
    return x.nbytes + sum(leaf.nbytes for leaf in jax.tree.leaves(w)) + 4 * x.shape[0] * out


def compare(copy: float) -> tuple[dict[str, Bar], dict[str, float]]:
    table = Table(title=f"{jax.devices()[0].device_kind}: a copy moves {copy / 1e9:.0f} GB/s")
    for column in ("matrix", "kind", "rows", "MB", "us", "+-", "GB/s", "of copy", "dense us", "ratio"):
        table.add_column(column, justify="right")
    bars, extra = {}, {"copy GB/s": copy / 1e9}
    for n, out in [BAR_SHAPE, *(matrix for matrix in unique_shapes(MODEL) if matrix != BAR_SHAPE)]:
        plain = several(dense, n, out)
        kinds = {kind: several(make, n, out) for kind, (_, make) in KINDS.items()}
        for rows in (*DECODE_ROWS, *PREFILL_ROWS):
            x = jax.random.normal(jax.random.key(1), (rows, n), jnp.bfloat16)
            base = measure(jnp.matmul, x, plain)
            for kind, weights in kinds.items():
                timing = measure(KINDS[kind][0], x, weights)
                size = moved(x, weights[0], out)
                rate, ratio = size / timing.seconds, base.seconds / timing.seconds
                cells = (size / 1e6, timing.seconds * 1e6, timing.spread * 1e6, rate / 1e9, rate / copy)
                numbers = [f"{cell:.3g}" for cell in (*cells, base.seconds * 1e6, ratio)]
                table.add_row(f"{n}x{out}", kind, str(rows), *numbers)
                name = f"{kind} {n}x{out} {rows} rows"
                extra[f"{name}, ratio"] = ratio
                if (n, out) == BAR_SHAPE and kind == "int4 g128" and rows in DECODE_ROWS:
                    bars[f"{name}: ratio to bf16"] = Bar(ratio, low=3.1)
                    bars[f"{name}: of the bandwidth"] = Bar(rate / copy, low=0.8)
    Console(width=120).print(table)
    return bars, extra


def mlp(n: int, out: int, key: jax.Array) -> Neurons:
    up, gate, down = (jax.random.normal(k, (n, out), jnp.bfloat16) for k in jax.random.split(key, 3))
    return make_neurons(up, down.T, gate=gate, activation="silu")


def whole(x: jax.Array, neurons: Neurons) -> jax.Array:
    """The dense MLP in bf16, as a model would have it."""
    return (jax.nn.silu(x @ neurons.gate.T) * (x @ neurons.up.T)) @ neurons.down


def compare_neurons(copy: float) -> tuple[dict[str, Bar], dict[str, float]]:
    """Single rows of neurons against the dense MLP: at a tenth, a quarter and half of them, far apart."""
    width, total = MODELS[MODEL].hidden, MODELS[MODEL].intermediate
    weights = several(mlp, width, total)
    table = Table(title=f"{MODEL}: a copy moves {copy / 1e9:.0f} GB/s")
    for column in ("share", "rows", "us", "+-", "GB/s", "of copy", "dense us", "ratio"):
        table.add_column(column, justify="right")
    bars, extra = {}, {"copy GB/s": copy / 1e9}
    for rows in (1, 2, 4):
        x = jax.random.normal(jax.random.key(1), (rows, width), jnp.bfloat16)
        base = measure(whole, x, weights)
        for share in (0.1, 0.25, 0.5):
            k = round(share * total)
            chosen = [jax.random.permutation(jax.random.key(i), total)[:k] for i in range(len(weights))]

            def some(x: jax.Array, w: Any, k: int = k) -> jax.Array:
                return sparse_mlp(x, w[0], w[1], jnp.int32(k), block=1)

            timing = measure(some, x, list(zip(weights, chosen, strict=True)))
            rate, ratio = k * weights[0].bytes_per_neuron / timing.seconds, base.seconds / timing.seconds
            cells = (timing.seconds * 1e6, timing.spread * 1e6, rate / 1e9, rate / copy, base.seconds * 1e6, ratio)
            table.add_row(f"{share:.0%}", str(rows), *(f"{cell:.3g}" for cell in cells))
            extra[f"{share:.0%}, {rows} rows, ratio"] = ratio
            if rows == 1 and share == 0.25:
                bars["a quarter of the neurons: ratio to dense"] = Bar(ratio, low=2)
    Console(width=120).print(table)
    return bars, extra


def sweep(copy: float) -> tuple[dict[str, Bar], dict[str, float]]:
    """Tiles of the 4-bit product by time: what a tuned table is made from."""
    extra = {"copy GB/s": copy / 1e9}
    n, out = BAR_SHAPE
    weights = several(KINDS["int4 g128"][1], n, out)
    for rows in (*DECODE_ROWS, *PREFILL_ROWS):
        x = jax.random.normal(jax.random.key(1), (rows, n), jnp.bfloat16)
        heights = {min(-(-rows // 8) * 8, most) for most in (8, 16, 32, 64, 96, 128)}
        found = []
        for height, columns, splits, stages in itertools.product(
            sorted(heights), (128, 256), (1, 2, 4, 8), (2, 3, 4, 6, 8)
        ):
            if height * columns > 128 * 128 or (rows > 16 and splits > 2):
                continue
            tile = Tile(rows=height, columns=columns, splits=splits, stages=stages)
            try:
                timing = measure(functools.partial(quant_matmul, tile=tile), x, weights)
            except ValueError as error:  # shared memory, said by the compiler
                print(f"{rows} rows, {tile}: {error}")
                continue
            found.append((timing.seconds, tile))
        for seconds, tile in sorted(found, key=lambda pair: pair[0])[:5]:
            print(f"{rows} rows: {1e6 * seconds:.1f} us, {moved(x, weights[0], out) / seconds / copy:.0%}, {tile}")
        extra[f"{rows} rows, best us"] = 1e6 * min(seconds for seconds, _ in found)
    return {}, extra


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.gpu", description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="time the tiles of the 4-bit product")
    parser.add_argument("--neurons", action="store_true", help="time some neurons of an MLP")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability != "9.0":
        print(f"these kernels are for GPUs of compute capability 9.0; here is {device.device_kind}, {capability}")
        return 2
    copy = copy_bandwidth()
    mode = sweep if arguments.sweep else compare_neurons if arguments.neurons else compare
    bars, extra = mode(copy)
    return conclude("kernels_gpu", bars, extra)


if __name__ == "__main__":
    sys.exit(main())
