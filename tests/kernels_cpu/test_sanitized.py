"""The kernels under the address and undefined-behaviour sanitizers, on buffers of exactly their size."""

import concurrent.futures
import pathlib
import subprocess

import kernels_cpu
from kernels_cpu import _build

SOURCES = pathlib.Path(kernels_cpu.__file__).parent
DRIVER = pathlib.Path(__file__).with_name("sanitized.cc")
FLAGS = ("-O1", "-g", "-std=c++17", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{SOURCES}")
KERNELS = ("quant", "codebook", "nm", "nomad", "attention", "representer", "label_top_k", "sparse_mlp", "cpu")


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_every_variant_reads_and_writes_what_is_its_own(tmp_path):
    compiler, error = _build.find_compiler({"PATH": "/usr/local/bin:/usr/bin:/bin"})
    assert compiler, error
    include, error = _build.find_headers({})
    assert include, error
    # The handlers need XLA around them; the kernels behind them do not.
    sources = [path for name in KERNELS for path in SOURCES.glob(f"{name}_*.cc") if not path.stem.endswith("_matmul")]
    objects = [tmp_path / f"{source.stem}.o" for source in (*sources, DRIVER)]
    commands = [
        [
            *compiler,
            *FLAGS,
            "-isystem",
            str(include),
            *_build.variant_flags(source),
            "-c",
            str(source),
            "-o",
            str(target),
        ]
        for source, target in zip((*sources, DRIVER), objects, strict=True)
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands))
    run([*compiler, "-fsanitize=address,undefined", *map(str, objects), "-o", str(tmp_path / "driver")])
    said = run([str(tmp_path / "driver")])
    assert " cases, 0 numbers off" in said
    assert int(said.split()[0]) >= 80
