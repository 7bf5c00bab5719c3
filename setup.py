"""Build hook: compiles `kernels_cpu` while the package is built; everything else is in pyproject.toml."""

import importlib.util
import pathlib
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
KERNELS = ROOT / "kernels_cpu"


def load_build_module():
    """Loads the compile step by file: importing the package itself would need jax, which a build does not have."""
    spec = importlib.util.spec_from_file_location("effjax_kernels_build", KERNELS / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Compiles the shared library, and lets the install succeed when that is not possible."""

    def run(self):
        builder = load_build_module()
        target = KERNELS if self.inplace else pathlib.Path(self.build_lib, "kernels_cpu")
        result = builder.build(KERNELS, target)
        print(builder.announce(result), file=sys.stderr)

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(
    # Loaded with ctypes, so no Python extension; declaring one makes the wheel specific to the platform.
    ext_modules=[
        Extension(
            "kernels_cpu.libeffjax_cpu",
            sources=sorted(str(path.relative_to(ROOT)) for path in KERNELS.glob("*.cc")),
            depends=sorted(str(path.relative_to(ROOT)) for path in KERNELS.glob("*.h")),
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
