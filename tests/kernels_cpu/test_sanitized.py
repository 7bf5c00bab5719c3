"""The kernels under the address and undefined-behaviour sanitizers, on buffers of exactly their size."""

import concurrent.futures
import pathlib
import subprocess

import pytest

import kernels_cpu
from kernels_cpu import _build

SOURCES = pathlib.Path(kernels_cpu.__file__).parent
DRIVERS = pathlib.Path(__file__).with_name("sanitized")
FLAGS = ("-O1", "-g1", "-std=c++17", "-w", "-pthread", "-fno-sanitize-recover=all", f"-I{SOURCES}")
KERNELS = ("quant", "codebook", "nm", "nomad", "attention", "representer", "label_top_k", "sparse_mlp", "cpu")


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def built_and_run(sources, sanitizers, tmp_path, macros=()):
    """What the program of these sources prints."""
    compiler, error = _build.find_compiler({"PATH": "/usr/local/bin:/usr/bin:/bin"})
    assert compiler, error
    include, error = _build.find_headers({})
    assert include, error
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    flags = [*compiler, *FLAGS, *macros, f"-fsanitize={sanitizers}", "-isystem", str(include)]
    commands = [
        [*flags, *_build.variant_flags(source), "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands))
    run([*flags, *map(str, objects), "-o", str(tmp_path / "driver")])
    return run([str(tmp_path / "driver")])


def test_every_variant_reads_and_writes_what_is_its_own(tmp_path):
    # The handlers need XLA around them; the kernels behind them do not.
    sources = [path for name in KERNELS for path in SOURCES.glob(f"{name}_*.cc") if not path.stem.endswith("_matmul")]
    drivers = [path for path in DRIVERS.glob("*.cc") if path.stem != "rows"]
    said = built_and_run((*sources, *drivers), "address,undefined", tmp_path)
    assert " cases, 0 numbers off" in said
    assert int(said.split()[0]) >= 80


@pytest.mark.parametrize(
    ("sanitizers", "more", "cases"),
    [("address,undefined", ("bundle_mlp.cc", "sparse_mlp_portable.cc"), 226), ("thread", (), 202)],
)
def test_rows_are_read_by_many_threads(tmp_path, monkeypatch, sanitizers, more, cases):
    monkeypatch.chdir(tmp_path)  # the program makes a file there
    sources = (*(SOURCES / name for name in ("read_rows.cc", "cpu_features.cc", *more)), DRIVERS / "rows.cc")
    said = built_and_run(sources, sanitizers, tmp_path, () if more else ("-DREADS_ALONE",))
    assert said == f"{cases} cases, 0 failures\n"
