"""Why a matrix of hashed weights has no kernel on a GPU."""

from typing import Any

from effjax.arrays.hashed import Hashed


def why_not(rows: int, x_dtype: Any, w: Hashed, *, transpose: bool = False) -> str:
    """The reason why there is no kernel for this product: never empty.

    Every weight is read from its own place in the table. Mosaic GPU lowers no gather, from registers, shared memory or
    global memory (`tests/kernels_pallas/test_gpu_lowering.py` shows the error), and scalar loads would be one at a
    time for a whole warpgroup. XLA's gather remains.
    """
    del rows, x_dtype, transpose
    weights = f"{w.shape[-2]}x{w.shape[-1]} hashed weights"
    return f"{weights}: Mosaic GPU lowers no gather, which reads the table; use implementation='reference'"
