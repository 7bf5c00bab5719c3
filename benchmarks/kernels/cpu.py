"""Products with compressed matrices on the CPU beside XLA's dense float32: bytes, time, fraction of the limit.

    python -m benchmarks.kernels.cpu [--shapes 4096x4096 4096x11008] [--rows 1 16 256] [--threads 2]

Every case has several copies of its weights, more bytes than the last-level cache holds, and one program multiplies by
them, prepared (`ej.prepare`), one after the other, as a decoder goes through its layers: weights come from memory, and
threads are awake. A product is a copy's share of the program's time. "In cache" goes through one copy as often instead.
The sides take turns, and the median counts. The limit is the STREAM triad of as many threads, measured in the same run.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import effjax as ej
import kernels_cpu
from benchmarks.bars import Bar, conclude
from benchmarks.kernels.stream import last_level_cache, triad
from effjax.ops import matmul

CACHE = max(64 << 20, 2 * last_level_cache())  # bytes of weights that a case goes through at least
# Bars of one row against XLA float32.
BARS = {"int4 g128": 5.0, "int8": 3.0, "codebook 4": 4.0, "2:4 int4": 5.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One form of a matrix.

    Attributes:
        name: as printed.
        make: from a dense matrix.
        activation_bits: of the activations, see `ej.ops.matmul`; None keeps float32's accuracy.
    """

    name: str
    make: Callable[[jax.Array], Any]
    activation_bits: int | None = None


def _sparse(w: jax.Array) -> Any:
    params = {"kernel": w}
    packed = ej.pack_mask(params, ej.prune_mask(params, ej.prune.Magnitude(sparsity=0.5, pattern="2:4")))
    return ej.quantize.quantize_kept(packed, ej.quantize.RTN(bits=4, group_size=64, symmetric=True))["kernel"]


def _codebook(w: jax.Array) -> Any:
    """A table of 16 values a column, evenly spaced: what is looked up does not change the time."""
    codes, high = jnp.clip(jnp.round(w / jnp.abs(w).max(0) * 7.5 + 7.5), 0, 15), jnp.abs(w).max(0)
    tables = (jnp.arange(16.0) / 7.5 - 1.0) * high[:, None]
    return ej.arrays.Codebook.from_codes(codes.astype(jnp.uint8), tables[None], dtype=jnp.float32)


CASES = (
    Case(name="dense float32", make=lambda w: w),
    Case(name="int4 g128", make=ej.quantize.RTN(bits=4, group_size=128).quantize),
    Case(
        name="int4 g128, int8 activations",
        make=ej.quantize.RTN(bits=4, group_size=128).quantize,
        activation_bits=8,
    ),
    Case(name="int8", make=ej.quantize.RTN(bits=8, group_size=None).quantize),
    Case(name="codebook 4", make=_codebook),
    Case(name="2:4 int4", make=_sparse),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds of one product, and what it is measured by."""

    seconds: float
    nbytes: int
    error: float


def compare(n: int, out: int, rows: int, repeats: int, *, cached: bool) -> dict[str, Timed]:
    """All cases in turn on one shape."""
    x = jax.random.normal(jax.random.key(1), (rows, n))
    dense = jax.random.normal(jax.random.key(0), (n, out)) * n**-0.5
    programs, nbytes, errors, counts = {}, {}, {}, {}
    for case in CASES:
        w = case.make(dense)
        if ej.is_compressed(w):
            w = ej.prepare({"w": w})["w"]
        product = partial(matmul, activation_bits=case.activation_bits) if ej.is_compressed(w) else jnp.matmul
        counts[case.name] = count = max(4, -(-CACHE // ej.nbytes(w)))
        copies = [w, *(w if cached else jax.tree.map(jnp.copy, w) for _ in range(count - 1))]
        programs[case.name] = partial(jax.jit(partial(_chain, product)), x, copies)
        nbytes[case.name] = ej.nbytes(w)
        exact = jnp.matmul(x, ej.materialize(w))
        errors[case.name] = float(jnp.linalg.norm(product(x, w) - exact) / jnp.linalg.norm(exact))
    seconds: dict[str, list[float]] = {case.name: [] for case in CASES}
    for turn in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program().block_until_ready()
            if turn:  # the first one compiles
                seconds[name].append((time.perf_counter() - start) / counts[name])
    return {
        name: Timed(seconds=statistics.median(times), nbytes=nbytes[name], error=errors[name])
        for name, times in seconds.items()
    }


def _chain(product: Callable[..., jax.Array], x: jax.Array, copies: list[Any]) -> jax.Array:
    """One product after the other: each waits for the one before."""
    for w in copies:
        x = x + 1e-9 * product(x, w)[:, :1]
    return x


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008"], metavar="INxOUT")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--repeats", type=int, default=20, help="turns at one row; fewer at more rows")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="for the kernels and the triad"
    )
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    limit = triad(arguments.threads)
    bars: dict[str, Bar] = {}
    extra: dict[str, Any] = {"triad GB/s": limit / 1e9, "threads": arguments.threads}
    features = " ".join(kernels_cpu.cpu_features())
    Console(width=120).print(f"{arguments.threads} threads, triad {limit / 1e9:.1f} GB/s; {features}")
    for shape in arguments.shapes:
        n, out = map(int, shape.split("x"))
        for rows in arguments.rows:
            repeats = max(3, arguments.repeats // rows)
            for cached in (False, True) if rows == 1 else (False,):
                found = compare(n, out, rows, repeats, cached=cached)
                show(f"{shape}, {rows} rows" + (", in cache" if cached else ""), found, limit)
                base = found["dense float32"].seconds
                for name, timed in found.items():
                    ratio = base / timed.seconds
                    extra[f"{shape} {rows} rows{' cached' if cached else ''}, {name}"] = round(ratio, 3)
                    if name == "dense float32" or cached:
                        continue
                    if rows == 1 and name in BARS:
                        bars[f"{shape}, {name}: dense / ours"] = Bar(ratio, low=BARS[name])
                        bars[f"{shape}, {name}: of the triad"] = Bar(timed.nbytes / timed.seconds / limit, low=0.7)
                    elif rows > 1:
                        bars[f"{shape}, {rows} rows, {name}: dense / ours"] = Bar(ratio, low=1.0)
                if rows == 1 and not cached:
                    ratio = found["int4 g128"].seconds / found["2:4 int4"].seconds
                    bars[f"{shape}, 2:4 int4: int4 / ours"] = Bar(ratio, low=1.1)
    return conclude("kernels_cpu", bars, extra)


def show(title: str, found: dict[str, Timed], limit: float) -> None:
    table = Table(title=title)
    for column in ("", "MB", "ms", "GB/s", "of the triad", "dense / this", "error against its dense form"):
        table.add_column(column)
    base = found["dense float32"].seconds
    for name, timed in found.items():
        rate = timed.nbytes / timed.seconds
        table.add_row(
            name,
            f"{timed.nbytes / 1e6:.2f}",
            f"{timed.seconds * 1e3:.3f}",
            f"{rate / 1e9:.1f}",
            f"{rate / limit:.2f}",
            f"{base / timed.seconds:.2f}",
            f"{timed.error:.1e}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
