"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import effjax
import kernels_cpu
import kernels_pallas
import train

PACKAGES = (effjax, kernels_cpu, kernels_pallas, train)
MODULES = sorted(m.name for p in PACKAGES for m in pkgutil.walk_packages(p.__path__, f"{p.__name__}."))


# The compiled kernels look like a module of Python to the finder.
SKIPPED = ("__main__", "libeffjax_cpu")


@pytest.mark.parametrize("name", ["effjax", *(name for name in MODULES if not name.endswith(SKIPPED))])
def test_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} fail; see the output above"


def test_transforms_have_examples():
    """The finder really sees examples: an empty run would pass as well."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in ("arrays.quantized", "quantize.api", "sketch.api", "prune.api", "io.orbax", "lift.lifting", "tree"):
        module = importlib.import_module(f"effjax.{name}")
        assert sum(len(test.examples) for test in finder.find(module)) > 0, f"effjax.{name} has no example"
