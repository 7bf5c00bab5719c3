"""Native CPU kernels in C++, bound with `jax.ffi`; importing this loads and compiles nothing.

Without the compiled library every kernel still gives its result through plain jax, after one `NativeKernelWarning`.
`python -m kernels_cpu` prints what this machine has.
"""

from kernels_cpu._native import NATIVE, NativeKernelWarning
from kernels_cpu.popcount import popcount

__all__ = ["NativeKernelWarning", "available", "cpu_features", "popcount", "why_not"]


def available() -> bool:
    """Whether the native library is built, loads, and fits the installed jaxlib.

    Example:
        >>> import kernels_cpu
        >>> kernels_cpu.available() == (kernels_cpu.why_not() == "")
        True
    """
    return NATIVE.load() is not None


def why_not() -> str:
    """Why the native kernels are not available, and what to do; empty when they are."""
    return NATIVE.why_not()


def cpu_features() -> tuple[str, ...]:
    """The vector features that kernels choose from at run time, such as `("popcnt", "avx2", "fma")`.

    Empty without the native library, whose kernels alone use them.
    """
    return NATIVE.features()
