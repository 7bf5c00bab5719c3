"""Checks an installed wheel from outside the checkout: contents, imports, kernels with and without a compiler."""

import argparse
import importlib.metadata
import importlib.util
import warnings

import numpy as np

import effjax
import kernels_cpu
import kernels_pallas

SHIPPED = {"effjax", "kernels_cpu", "kernels_pallas"}


def check_contents() -> None:
    files = [str(file) for file in importlib.metadata.files("effjax") or ()]
    tops = {name.split("/")[0] for name in files if ".dist-info/" not in name and not name.startswith("..")}
    assert tops == SHIPPED, f"the wheel ships {sorted(tops)}, not {sorted(SHIPPED)}"
    for wanted in ("kernels_cpu/popcount.cc", "kernels_cpu/cpu.h", "effjax/assets/default_model/model.safetensors"):
        assert wanted in files, f"the wheel lacks {wanted}"
    assert any(name.endswith("licenses/LICENSE") for name in files), "the wheel lacks its LICENSE"
    for package in (effjax, kernels_cpu, kernels_pallas):
        assert "site-packages" in str(package.__file__), f"{package.__name__} comes from {package.__file__}"
    for absent in ("train", "benchmarks", "tests"):
        assert importlib.util.find_spec(absent) is None, f"{absent} is importable, and should not be shipped"


def check_kernels(expect_native: bool) -> None:
    assert kernels_cpu.available() == expect_native, f"native kernels: {kernels_cpu.why_not() or 'available'}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counts = [int(kernels_cpu.popcount(np.array([255, 7], np.uint8))) for _ in range(2)]
    assert counts == [11, 11], counts
    given = [warning for warning in caught if issubclass(warning.category, kernels_cpu.NativeKernelWarning)]
    assert len(given) == (0 if expect_native else 1), [str(warning.message) for warning in caught]
    if not expect_native:
        assert "no C++ compiler" in kernels_cpu.why_not(), kernels_cpu.why_not()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--native", choices=("yes", "no"), required=True, help="whether native kernels must be there")
    native = parser.parse_args().native == "yes"
    check_contents()
    check_kernels(native)
    print(f"wheel of effjax {importlib.metadata.version('effjax')}: as it should be, native kernels: {native}")


if __name__ == "__main__":
    main()
