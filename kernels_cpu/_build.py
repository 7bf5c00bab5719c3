"""Compiles the native kernels with the C++ compiler at hand; never fails the install, and records what was missing.

Used by `setup.py`, and by hand in a checkout: `python kernels_cpu/_build.py`. Imports the standard library only, since
it runs in build environments that hold nothing else.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping

LIBRARY_NAME = "libeffjax_cpu.so"
RECORD_NAME = "_build.json"
FFI_HEADER = pathlib.PurePath("xla", "ffi", "api", "ffi.h")
# Portable on purpose: faster instruction sets are chosen at run time, function by function or file by file.
COMPILE_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-maybe-uninitialized",  # gcc 12 says it of its own headers for vector instructions
)
# Files whose whole code is for one instruction set, by the end of their names; elsewhere they compile to nothing.
VARIANT_FLAGS = {
    ("x86_64", "_avx2"): ("-mavx2", "-mfma", "-mf16c"),
    ("x86_64", "_avx512"): (
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
        "-mavx512vbmi",
    ),
    ("aarch64", "_i8mm"): ("-march=armv8.2-a+dotprod+i8mm",),
}
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
LINK_FLAGS = ("-shared", "-pthread")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What became of a build: whether there is a library, a sentence about it, a digest of what it was made of."""

    built: bool
    message: str
    inputs: str = ""

    def write(self, directory: pathlib.Path) -> None:
        """Leaves the record next to the library, where `kernels_cpu.why_not()` finds it."""
        (directory / RECORD_NAME).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def find_compiler(environ: Mapping[str, str]) -> tuple[list[str] | None, str]:
    """The command that compiles C++, or None and the reason.

    `CXX` decides alone when it is set, so that a user can choose a compiler or switch the kernels off.
    """
    path = environ.get("PATH")
    if environ.get("CXX"):
        command = environ["CXX"].split()
        if shutil.which(command[0], path=path):
            return command, ""
        return None, f"no C++ compiler: CXX names {command[0]!r}, which cannot be run"
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name, path=path):
            return [name], ""
    return None, "no C++ compiler found (looked for c++, g++ and clang++; set CXX to name another)"


def find_headers(environ: Mapping[str, str]) -> tuple[pathlib.Path | None, str]:
    """The directory that holds the `jax.ffi` headers, or None and the reason.

    Looked for in `EFFJAX_FFI_INCLUDE`, then in the environment that the package is installed into (the jaxlib that will
    run the kernels; an isolated build hides it from imports but not from `sysconfig`), then in the build environment.
    """
    if environ.get("EFFJAX_FFI_INCLUDE"):
        candidates = [pathlib.Path(environ["EFFJAX_FFI_INCLUDE"])]
    else:
        candidates = [pathlib.Path(sysconfig.get_path(key), "jaxlib", "include") for key in ("platlib", "purelib")]
        spec = importlib.util.find_spec("jaxlib")
        if spec is not None:
            candidates += [pathlib.Path(root, "include") for root in spec.submodule_search_locations or ()]
    for candidate in candidates:
        if (candidate / FFI_HEADER).is_file():
            return candidate, ""
    return None, "no jax.ffi headers found: install jaxlib first, or set EFFJAX_FFI_INCLUDE to the directory with xla/"


def _run(command: list[str]) -> str:
    """Runs a compiler; returns the end of what it said when it failed, else an empty string."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode == 0:
        return ""
    tail = "\n".join(done.stdout.strip().splitlines()[-20:])
    return f"{pathlib.Path(command[0]).name} failed with exit code {done.returncode}:\n{tail}"


def variant_flags(source: pathlib.Path) -> tuple[str, ...]:
    """The flags that a source needs beside `COMPILE_FLAGS`: those of the instruction set it is named after."""
    machine = platform.machine().lower()
    machine = MACHINES.get(machine, machine)
    return next((f for (m, end), f in VARIANT_FLAGS.items() if m == machine and source.stem.endswith(end)), ())


def _compile(compiler: list[str], sources: list[pathlib.Path], include: pathlib.Path, target: pathlib.Path) -> str:
    """Compiles the sources side by side and links them into `target`; returns the error text, empty on success."""
    with tempfile.TemporaryDirectory() as scratch:
        objects = [pathlib.Path(scratch, source.stem + ".o") for source in sources]
        commands = [
            [
                *compiler,
                *COMPILE_FLAGS,
                *variant_flags(source),
                "-isystem",
                str(include),
                "-c",
                str(source),
                "-o",
                str(output),
            ]
            for source, output in zip(sources, objects, strict=True)
        ]
        with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            errors = [error for error in pool.map(_run, commands) if error]
        if errors:
            return errors[0]
        # Linked under another name and renamed, so that a process that has the old library loaded keeps it whole.
        fresh = target.with_name(target.name + ".new")
        error = _run([*compiler, *LINK_FLAGS, *map(str, objects), "-o", str(fresh)])
        if error:
            fresh.unlink(missing_ok=True)
            return error
        fresh.replace(target)
        return ""


def digest_of_inputs(compiler: list[str], source_directory: pathlib.Path, include: pathlib.Path) -> str:
    """SHA-256 over all that decides what a library holds: the command, its flags, the sources and the headers."""
    digest = hashlib.sha256(repr((compiler, COMPILE_FLAGS, LINK_FLAGS, platform.machine())).encode())
    own, ffi = (sorted(d.glob("*.[ch]*")) for d in (source_directory, (include / FFI_HEADER).parent))
    for path in (*own, *ffi):
        digest.update(repr((path.name, variant_flags(path))).encode() + path.read_bytes())
    return digest.hexdigest()


def _made_of(target_directory: pathlib.Path) -> str:
    """The digest that the library in a directory was built from; empty without a library or a record of it."""
    try:
        record = json.loads((target_directory / RECORD_NAME).read_text(encoding="utf-8"))
        return record["inputs"] if record["built"] and (target_directory / LIBRARY_NAME).is_file() else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def build(
    source_directory: pathlib.Path, target_directory: pathlib.Path, environ: Mapping[str, str] | None = None
) -> BuildResult:
    """Builds every `*.cc` of `source_directory` into one library in `target_directory`.

    A library that was made of the very same inputs is kept as it is. One of an earlier build is removed when this one
    fails: an old one beside new Python code is worse than none.

    Args:
        source_directory: where the C++ sources lie.
        target_directory: where the library and the record go; created when absent.
        environ: the variables to read (`CXX`, `PATH`, `EFFJAX_FFI_INCLUDE`); the process's own by default.

    Returns:
        The result, also written as `_build.json` in `target_directory`.
    """
    environ = os.environ if environ is None else environ
    target_directory.mkdir(parents=True, exist_ok=True)
    target = target_directory / LIBRARY_NAME
    compiler, error = find_compiler(environ)
    include, header_error = find_headers(environ)
    inputs = ""
    if compiler is not None and include is None:
        error = header_error
    if compiler is not None and include is not None:
        inputs = digest_of_inputs(compiler, source_directory, include)
        if _made_of(target_directory) == inputs:
            return BuildResult(built=True, message="unchanged since they were built", inputs=inputs)
        error = _compile(compiler, sorted(source_directory.glob("*.cc")), include, target)
    if error:
        target.unlink(missing_ok=True)
        result = BuildResult(built=False, message=error)
    else:
        message = f"built with {pathlib.Path((compiler or [''])[0]).name}"
        result = BuildResult(built=True, message=message, inputs=inputs)
    result.write(target_directory)
    return result


def announce(result: BuildResult) -> str:
    """The one notice of a build, in words for the person who installs."""
    if result.built:
        return f"effjax: native CPU kernels {result.message}."
    return (
        f"effjax: installed without native CPU kernels, so compressed models run slower on the CPU.\n"
        f"effjax: {result.message}\neffjax: install a C++17 compiler and install effjax again to have them."
    )


if __name__ == "__main__":
    here = pathlib.Path(__file__).resolve().parent
    print(announce(build(here, here)), file=sys.stderr)
