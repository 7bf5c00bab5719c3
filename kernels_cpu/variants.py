"""The variants of the kernels by name, what each needs of the processor, and the check of a wish for one."""

from kernels_cpu._native import NATIVE

# Values of the attribute `variant`, as in variants.h.
VARIANTS = {"auto": 0, "portable": 1, "avx2": 2, "avx512": 3, "i8mm": 4}
FEATURES = {
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx512vbmi", "f16c"),
    "i8mm": ("i8mm",),
}


def runnable(kernel: str, among: tuple[str, ...] = tuple(VARIANTS)) -> tuple[str, ...]:
    """The variants of a kernel that this processor runs; none without the native library.

    Example:
        >>> from kernels_cpu.variants import runnable
        >>> set(runnable("quant_matmul")) <= {"auto", "portable", "avx2", "avx512", "i8mm"}
        True
    """
    return tuple(name for name in among if not why_not(kernel, name, among))


def why_not(kernel: str, variant: str, among: tuple[str, ...] = tuple(VARIANTS)) -> str:
    """Why a variant of a kernel does not run here, in one sentence; empty where it does."""
    if variant not in among:
        return f"{kernel}: unknown variant {variant!r}; choose one of {', '.join(among)}"
    if NATIVE.load() is None:
        return f"{kernel} needs the native library: {NATIVE.why_not()}"
    missing = [name for name in FEATURES.get(variant, ()) if name not in NATIVE.features()]
    if missing:
        return f"{kernel}: variant {variant!r} needs {', '.join(missing)}, which this processor lacks"
    return ""
