"""TPU kernels without a TPU: bytes, operations, the compiler's estimate and its own schedule, against a roofline.

    python -m benchmarks.kernels.tpu                  (needs the extra `aot`; every target and case)
    python -m benchmarks.kernels.tpu --targets v5e --cases "int4 g128"

Nothing here is a measured time: no chip is there. Four figures of different weight stand side by side.

- bytes: what must cross the memory, from the arrays; the compiler's argument bytes must agree.
- roofline: the larger of bytes / bandwidth and operations / peak, from public figures of the chips, for the kernel and
  for the dense bfloat16 product.
- schedule: the bundles of the kernel in the final schedule that the compiler prints, which the core issues one a cycle,
  times how often its loops run. It tells whether unpacking keeps up with the memory, which a roofline cannot.
- XLA: `optimal_seconds` of its cost analysis for the whole program. To XLA a kernel is a black box with the cost that
  we state, and on some programs the figure comes out negative, then it is left out.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.bars import Bar, conclude


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Public figures of one core of a chip.

    Attributes:
        topology: as the compiler names a small slice.
        flops: peak bfloat16 operations a second.
        bandwidth: bytes a second from memory.
        clock: cycles a second; peak over the operations that the core's matrix units do in a cycle.
        vmem: bytes of vector memory.
    """

    topology: str
    flops: float
    bandwidth: float
    clock: float
    vmem: int


# Per core, as in jax's own table of chips (a v5p and a 7x have two cores a chip). A v5e and a v5p have four matrix
# units of 128x128, a v6e and a 7x two of 256x256.
CHIPS = {
    "v5e": Chip(topology="v5e:2x2", flops=197e12, bandwidth=820e9, clock=197e12 / (2 * 4 * 128**2), vmem=128 << 20),
    "v5p": Chip(
        topology="v5p:2x2x1", flops=229.5e12, bandwidth=1230e9, clock=229.5e12 / (2 * 4 * 128**2), vmem=64 << 20
    ),
    "v6e": Chip(topology="v6e:2x2", flops=920e12, bandwidth=1640e9, clock=920e12 / (2 * 2 * 256**2), vmem=128 << 20),
    "7x": Chip(
        topology="tpu7x:2x2x1", flops=1155e12, bandwidth=3700e9, clock=1155e12 / (2 * 2 * 256**2), vmem=64 << 20
    ),
}

FORMATS = ("int4 g128", "int4 g32", "int8 g128", "int3", "nf4", "lut16", "lut256", "2:4", "dense")
SHAPES = (("Llama-3.1-8B", "o_proj"), ("Llama-3.1-8B", "gate_proj"))
ROWS = (1, 16, 512)


def cases(formats: list[str], all_rows: list[int]) -> list[tuple[str, str, str, int]]:
    """`(format, model, projection, rows)`; the second shape is for the first format only."""
    with_dense = list(dict.fromkeys([*formats, "dense"]))
    both = (FORMATS[0], "dense")
    return [
        (name, *where, rows)
        for name in with_dense
        for where in (SHAPES if name in both else SHAPES[:1])
        for rows in all_rows
    ]


def weights(name: str, n: int, out: int) -> Any:
    """A leaf of shapes only."""
    import jax
    import jax.numpy as jnp

    from effjax.arrays import Codebook, NMSparse, Quantized

    bf16 = jnp.dtype(jnp.bfloat16)
    if name == "dense":
        return jax.ShapeDtypeStruct((n, out), bf16)
    if name.startswith("int"):
        bits = int(name[3])
        groups = n // int(name.split(" g")[1]) if " g" in name else 1

        def quantized() -> Quantized:
            codes, scales = jnp.zeros((n, out), jnp.uint8), jnp.zeros((groups, out), bf16)
            return Quantized.from_codes(codes, scales, None, bits=bits, dtype=bf16)

        return jax.eval_shape(quantized)
    if name == "2:4":
        dense = jax.ShapeDtypeStruct((n, out), bf16)
        return jax.eval_shape(lambda w: NMSparse.from_dense(w, w != 0, n=2, m=4), dense)
    entries, columns, groups = {"nf4": (16, 1, n // 64), "lut16": (16, out, 0), "lut256": (256, out, 0)}[name]

    def codebook() -> Codebook:
        tables = jnp.zeros((1, columns, entries), bf16)
        scales = jnp.zeros((groups, out), bf16) if groups else None
        return Codebook.from_codes(jnp.zeros((n, out), jnp.uint8), tables, scales, dtype=bf16)

    return jax.eval_shape(codebook)


def compile_case(target: str, name: str, model: str, projection: str, rows: int) -> dict[str, Any]:
    """Compiles one product, in a process whose compiler writes its schedule to the directory in `LLO_DUMP`."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from effjax.arrays import nbytes
    from kernels_pallas.codebook_matmul import tpu as codebook
    from kernels_pallas.frame import unroll
    from kernels_pallas.nm_matmul import tpu as nm
    from kernels_pallas.quant_matmul import tpu as quant
    from kernels_pallas.shapes import shape

    n, out = shape(model, projection)
    w = weights(name, n, out)
    x = jax.ShapeDtypeStruct((rows, n), jnp.bfloat16)
    tile, stated = None, 0
    if name == "dense":

        def product(x: Any, w: Any) -> Any:
            return jnp.dot(x, w, preferred_element_type=jnp.float32)

    else:
        module, kernel = {
            "int": (quant, quant.quant_matmul),
            "2:4": (nm, nm.nm_matmul),
        }.get(name[:3], (codebook, codebook.codebook_matmul))
        tile = module.choose_tile(rows, x.dtype, w)
        stated = module.vmem_bytes(tile, x.dtype, w)

        def product(x: Any, w: Any) -> Any:
            return kernel(x, w)

    device = topologies.get_topology_desc(CHIPS[target].topology, platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), (x, w))
    compiled = jax.jit(product).lower(*placed).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    seconds = float(cost.get("optimal_seconds", -1.0))
    steps = 0 if tile is None else -(-_rows(rows, tile) // tile.rows) * -(-out // tile.out) * -(-n // tile.inputs)
    return {
        "target": target,
        "format": name,
        "shape": f"{model} {projection}",
        "rows": rows,
        "bytes": nbytes(w) + 2 * rows * n + 4 * rows * out,
        "weight_bytes": nbytes(w),
        "argument_bytes": int(memory.argument_size_in_bytes),
        "temp_bytes": int(memory.temp_size_in_bytes),
        "flops": 2 * rows * n * out,
        "estimate": seconds if seconds > 0 else None,
        "vmem": stated,
        "steps": steps,
        "loops": 0 if tile is None else tile.spans // unroll(tile),
        "tile": None if tile is None else dataclasses.asdict(tile),
    }


def _rows(rows: int, tile: Any) -> int:
    return max(rows, tile.rows)


def worker(target: str, chosen: list[tuple[str, str, str, int]]) -> None:
    """Prints a line of JSON a case; the schedule of each is read before the next one is compiled."""
    dump = Path(os.environ["LLO_DUMP"])
    for case in chosen:
        for file in dump.iterdir():
            file.unlink()
        found = compile_case(target, *case)
        found["cycles"] = cycles(dump, found["steps"], found["loops"])
        print("CASE " + json.dumps(found), flush=True)


def cycles(dump: Path, steps: int, loops: int) -> int | None:
    """Bundles of the kernel's schedule, each as often as its loop runs: a step's, and inside it those of its spans.

    The final schedule marks with each bundle how deep in loops it lies: `>` for the loop over the grid, `>>` for the
    one over spans, which runs `loops` times.
    """
    files = sorted(dump.glob("*_matmul*final_bundles.txt"))
    files = [file for file in files if "schedule-analysis" not in file.name]
    if not files or not steps:
        return None
    depth = [0, 0, 0, 0]
    for line in files[-1].read_text().splitlines():
        marked = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]+)?\s*:\s*(>*)", line)
        if marked:
            depth[min(3, len(marked.group(1)))] += 1
    return steps * (depth[1] + depth[2] * loops) + depth[0]


def gather(targets: list[str], formats: list[str], all_rows: list[int]) -> list[dict[str, Any]]:
    """All cases, each target in a process of its own, since the compiler's flags are read once."""
    rows = []
    for target in targets:
        with tempfile.TemporaryDirectory() as dump:
            flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "TPU_SKIP_MDS_QUERY": "1",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                "LIBTPU_INIT_ARGS": flags,
                "LLO_DUMP": dump,
            }
            command = [sys.executable, "-m", "benchmarks.kernels.tpu", "--worker", target, "--cases", *formats]
            command += ["--rows", *map(str, all_rows)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the cases of {target} failed:\n{done.stderr[-3000:]}")
        rows += [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("CASE ")]
    return rows


def limits(row: dict[str, Any]) -> dict[str, float]:
    """Seconds: the memory's, the matrix units', the schedule's, and the larger of them."""
    chip = CHIPS[row["target"]]
    memory, matrix = row["bytes"] / chip.bandwidth, row["flops"] / chip.flops
    schedule = row["cycles"] / chip.clock if row["cycles"] else 0.0
    return {"memory": memory, "matrix": matrix, "schedule": schedule, "bound": max(memory, matrix)}


def show(rows: list[dict[str, Any]]) -> None:
    """A table a target."""
    console = Console(width=150)
    for target in dict.fromkeys(row["target"] for row in rows):
        table = Table(title=f"{target}: microseconds unless said otherwise")
        for column in (
            "format",
            "matrix",
            "rows",
            "MB moved",
            "Gflop",
            "roofline",
            "dense",
            "ratio",
            "schedule",
            "schedule / roofline",
            "XLA",
            "XLA dense",
            "VMEM MiB",
            "temp MB",
        ):
            table.add_column(column, justify="right" if column not in ("format", "matrix") else "left")
        own = [row for row in rows if row["target"] == target]
        dense = {(row["shape"], row["rows"]): row for row in own if row["format"] == "dense"}
        for row in own:
            if row["format"] == "dense":
                continue
            other = dense[row["shape"], row["rows"]]
            mine, theirs = limits(row), limits(other)
            table.add_row(
                row["format"],
                row["shape"].split()[1],
                str(row["rows"]),
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['flops'] / 1e9:.2f}",
                f"{mine['bound'] * 1e6:.1f}",
                f"{theirs['bound'] * 1e6:.1f}",
                f"{theirs['bound'] / mine['bound']:.2f}",
                f"{mine['schedule'] * 1e6:.1f}" if row["cycles"] else "",
                f"{mine['schedule'] / mine['bound']:.2f}" if row["cycles"] else "",
                f"{row['estimate'] * 1e6:.1f}" if row["estimate"] else "",
                f"{other['estimate'] * 1e6:.1f}" if other["estimate"] else "",
                f"{row['vmem'] / 2**20:.1f}",
                f"{row['temp_bytes'] / 1e6:.1f}",
            )
        console.print(table)


def bars(rows: list[dict[str, Any]]) -> dict[str, Bar]:
    """What must hold on every target without a chip to run on."""
    kernels = [row for row in rows if row["format"] != "dense"]
    worst = max(row["argument_bytes"] / (row["weight_bytes"] + _input(row)) for row in kernels)
    vmem = max(row["vmem"] / CHIPS[row["target"]].vmem for row in kernels)
    dense = {(r["target"], r["shape"], r["rows"]): limits(r)["bound"] for r in rows if r["format"] == "dense"}

    def speed(row: dict[str, Any]) -> float:
        mine = limits(row)
        return dense[row["target"], row["shape"], row["rows"]] / max(mine["bound"], mine["schedule"])

    found = {
        "argument bytes over the packed bytes, worst": Bar(worst, high=1.03),
        "stated VMEM over the chip's, worst": Bar(vmem, high=0.5),
    }
    for target in dict.fromkeys(row["target"] for row in kernels):
        decode = [speed(r) for r in kernels if r["target"] == target and r["format"] == "int4 g128" and r["rows"] <= 16]
        if decode:
            found[f"{target}: int4 g128, 1 to 16 rows: dense roofline over ours or our schedule"] = Bar(
                min(decode), low=1.0
            )
    return found


def _input(row: dict[str, Any]) -> int:
    from kernels_pallas.shapes import shape

    return 2 * row["rows"] * shape(*row["shape"].split())[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--cases", nargs="+", choices=FORMATS, default=list(FORMATS), help="formats")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="rows of activations")
    parser.add_argument("--worker", choices=CHIPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, cases(arguments.cases, arguments.rows))
        return 0
    rows = gather(arguments.targets, arguments.cases, arguments.rows)
    show(rows)
    kernels = [row for row in rows if row["format"] != "dense"]
    return conclude("kernels.tpu", bars(rows), {"cases": len(kernels), "targets": arguments.targets})


if __name__ == "__main__":
    sys.exit(main())
