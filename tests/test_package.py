"""The package as a whole: what importing it costs, what its files look like, what the installed metadata says."""

import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("effjax", "kernels_cpu", "kernels_pallas", "train", "tests", "benchmarks", "notebooks")
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
MAX_LINES = 700


def name_of(path):
    return str(path.relative_to(ROOT))


def modules_after(statement):
    """The top-level modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("package", ["effjax", "kernels_cpu", "kernels_pallas"])
def test_import_is_light_and_gives_no_warning(package):
    loaded = modules_after(f"import {package}")
    assert package in loaded
    assert not loaded & {"torch", "tensorflow", "transformers", "matplotlib", "chex", "pytest"}


def test_import_starts_no_backend():
    code = "import effjax, kernels_cpu\nimport jax._src.xla_bridge as bridge\n"
    code += "print(bridge.backends_are_initialized())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_says_what_it_is_for_and_stays_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines, f"{name_of(path)} is empty"
    assert lines[0].startswith('"""'), f"{name_of(path)}: the first line is {lines[0]!r}, not a docstring"
    assert lines[0].strip('" '), f"{name_of(path)}: the docstring starts with an empty line"
    assert len(lines) <= MAX_LINES, f"{name_of(path)} has {len(lines)} lines; split it"


def test_no_file_names_a_machine():
    # Built from parts, so that this file passes its own check.
    slash = "/"
    machine = re.compile(
        "|".join(
            [
                rf"(?<![\w./-]){slash}(?:root|work|home|Users|opt){slash}\w",
                r"https?://[\w.-]*(?:pyp" + r"i|npmj" + r"s|debia" + r"n)",
                "--(?:extra-)?index-" + "url",
            ]
        )
    )
    files = [
        *SOURCES,
        *(
            path
            for name in PACKAGES
            for pattern in ("*.cc", "*.h", "*.md", "*.json", "*.ipynb")
            for path in (ROOT / name).rglob(pattern)
        ),
        *(
            ROOT / name
            for name in ("pyproject.toml", "setup.py", "Makefile", "constraints.txt", "README.md", ".ci/run")
        ),
    ]
    found = [
        f"{name_of(path)}:{number}: {line.strip()[:100]}"
        for path in files
        if path.stat().st_size < 2**20
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if machine.search(line)
    ]
    assert not found, "\n".join(found)


def test_installed_version_is_the_one_in_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert importlib.metadata.version("effjax") == project["version"]


def test_every_dependency_has_an_exact_constraint():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    names = {re.split(r"[<>=!\[; ]", each, maxsplit=1)[0].lower().replace("_", "-") for each in wanted}
    names -= {project["name"]}  # an extra within another
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    pins = {line.split("==")[0] for line in lines}
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.]+(; python_version (<|>=) \"3\.\d+\")?", line) for line in lines), lines
    assert names <= pins, f"not pinned in constraints.txt: {sorted(names - pins)}"


def test_tests_run_on_eight_host_devices():
    assert len(jax.devices("cpu")) == 8
