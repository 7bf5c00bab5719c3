"""The build hook and the loader: with a compiler, without one, and with a library that does not fit."""

import concurrent.futures
import json
import pathlib
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest

import kernels_cpu
from kernels_cpu import _build, _native

SOURCES = pathlib.Path(kernels_cpu.__file__).parent
ROOT = SOURCES.parent


def bytes_of(*values):
    return np.array(values, np.uint8)


@pytest.fixture
def few_sources(tmp_path):
    """The source that answers questions, and names for the handlers, which loading only looks up: quick to build."""
    sources = tmp_path / "sources"
    sources.mkdir()
    names = "".join(f"EFFJAX_EXPORT void {name}() {{}}\n" for name in (*_native.HANDLERS, *_native.FUNCTIONS))
    (sources / "handlers.cc").write_text(f'#include "cpu.h"\n{names}', encoding="utf-8")
    for name in ("cpu_features.cc", *(path.name for path in SOURCES.glob("*.h"))):
        shutil.copy(SOURCES / name, sources)
    return sources


def test_built_with_a_compiler_and_usable(few_sources, tmp_path):
    result = _build.build(few_sources, tmp_path)
    assert result.built, result.message
    library = _native.NativeLibrary(tmp_path)
    assert library.why_not() == ""
    assert library.features() == kernels_cpu.cpu_features()


def test_the_same_inputs_are_not_built_again(few_sources, tmp_path):
    first = _build.build(few_sources, tmp_path)
    library = tmp_path / _build.LIBRARY_NAME
    built = library.stat().st_mtime_ns
    again = _build.build(few_sources, tmp_path)
    assert again.built and again.inputs == first.inputs and library.stat().st_mtime_ns == built
    assert "unchanged since they were built" in _build.announce(again)

    header = few_sources / "cpu.h"
    header.write_text(header.read_text(encoding="utf-8") + "// changed\n", encoding="utf-8")
    changed = _build.build(few_sources, tmp_path)
    assert changed.inputs != first.inputs and library.stat().st_mtime_ns > built


@pytest.mark.parametrize("damage", ["library gone", "record gone", "record cut"])
def test_a_damaged_build_is_made_anew(few_sources, tmp_path, damage):
    _build.build(few_sources, tmp_path)
    if damage == "library gone":
        (tmp_path / _build.LIBRARY_NAME).unlink()
    elif damage == "record gone":
        (tmp_path / _build.RECORD_NAME).unlink()
    else:
        (tmp_path / _build.RECORD_NAME).write_text('{"built"', encoding="utf-8")
    assert "built with" in _build.announce(_build.build(few_sources, tmp_path))
    assert _native.NativeLibrary(tmp_path).why_not() == ""


def test_loader_is_safe_from_many_threads(tmp_path):
    shutil.copy(SOURCES / _build.LIBRARY_NAME, tmp_path)
    library = _native.NativeLibrary(tmp_path)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda _: library.load(), range(32)))
    assert loaded[0] is not None, library.why_not()
    assert all(each is loaded[0] for each in loaded)


def test_missing_compiler_is_told_and_the_old_library_removed(tmp_path):
    (tmp_path / _build.LIBRARY_NAME).write_bytes(b"old")
    result = _build.build(SOURCES, tmp_path, {"CXX": "/nonexistent", "PATH": ""})
    assert not result.built
    assert "CXX names '/nonexistent', which cannot be run" in _build.announce(result)
    assert not (tmp_path / _build.LIBRARY_NAME).exists()
    reason = _native.NativeLibrary(tmp_path).why_not()
    assert "CXX names '/nonexistent'" in reason
    assert reason.endswith("install a C++17 compiler and install effjax again")


def test_empty_path_names_the_compilers_looked_for(tmp_path):
    result = _build.build(SOURCES, tmp_path, {"PATH": str(tmp_path)})
    assert "no C++ compiler found (looked for c++, g++ and clang++" in result.message


def test_failing_compiler_is_quoted(tmp_path):
    (tmp_path / "bad.cc").write_text("#error deliberately broken\n", encoding="utf-8")
    result = _build.build(tmp_path, tmp_path / "out")
    assert not result.built
    assert "deliberately broken" in result.message
    assert json.loads((tmp_path / "out" / _build.RECORD_NAME).read_text(encoding="utf-8"))["built"] is False


def test_missing_headers_are_told(tmp_path):
    result = _build.build(SOURCES, tmp_path, {"CXX": sys.executable, "EFFJAX_FFI_INCLUDE": str(tmp_path)})
    assert result.message.startswith("no jax.ffi headers found")


def test_never_built_and_damaged_libraries_are_told(tmp_path):
    assert "was never built" in _native.NativeLibrary(tmp_path).why_not()
    (tmp_path / _build.LIBRARY_NAME).write_bytes(b"not a library")
    assert "cannot be loaded" in _native.NativeLibrary(tmp_path).why_not()


@pytest.mark.parametrize(
    ("built", "running", "fits"),
    [
        ((0, 3), (0, 3), True),
        ((0, 1), (0, 3), True),
        ((0, 4), (0, 3), False),
        ((1, 0), (0, 3), False),
        ((0, 9), None, True),
    ],
)
def test_ffi_versions(built, running, fits):
    message = _native._version_mismatch(built, running)
    assert (message == "") == fits
    if not fits:
        assert f"built for FFI version {built[0]}.{built[1]}" in message


def test_running_ffi_version_is_read_from_the_headers():
    assert _native._running_ffi_version() is not None


def test_warns_once_and_still_computes(tmp_path, monkeypatch):
    module = sys.modules[kernels_cpu.popcount.__module__]  # the package attribute of that name is the function
    monkeypatch.setattr(module, "NATIVE", _native.NativeLibrary(tmp_path))
    with pytest.warns(_native.NativeKernelWarning, match="runs as plain jax, which is slower: .*never built") as record:
        assert int(kernels_cpu.popcount(bytes_of(255, 3))) == 10
        assert int(kernels_cpu.popcount(bytes_of(1))) == 1
    assert len(record) == 1
    assert pathlib.Path(record[0].filename).name == "test_build.py"
    with pytest.raises(RuntimeError, match="variant 'portable' needs the native library"):
        kernels_cpu.popcount(bytes_of(1), variant="portable")


def test_kernel_asked_for_by_name_fails_without_the_library(tmp_path):
    with pytest.raises(RuntimeError, match="the kernel EffjaxPopcount needs the native library: .*never built"):
        _native.NativeLibrary(tmp_path).target("EffjaxPopcount")


def test_questions_start_no_backend_and_import_does_not_warn():
    code = (
        "import jax, kernels_cpu\nassert kernels_cpu.available(), kernels_cpu.why_not()\nkernels_cpu.cpu_features()\n"
    )
    code += "import jax._src.xla_bridge as bridge\nassert not bridge.backends_are_initialized()\n"
    code += "jax.config.update('jax_num_cpu_devices', 3)\nimport numpy as np\n"
    code += "print(int(kernels_cpu.popcount(np.array([7], np.uint8))), len(jax.devices()))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["3", "3"], done.stderr


def test_questions_do_not_warn(tmp_path):
    library = _native.NativeLibrary(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.load() is None
        assert library.features() == ()


def test_report_on_the_command_line():
    done = subprocess.run([sys.executable, "-m", "kernels_cpu"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("native CPU kernels: available; this processor has ")
