"""Set bits in each row of bytes, natively on the CPU: the self check of the toolchain."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8, UInt32

from kernels_cpu._native import NATIVE

# Values of the attribute `variant` in popcount.cc, and the processor feature each one needs.
VARIANTS = {"auto": 0, "portable": 1, "popcnt": 2}
MAX_ROW_BYTES = (2**32 - 1) // 8


def popcount(x: UInt8[Array, "*rows n"], *, variant: str = "auto") -> UInt32[Array, "*rows"]:
    """Counts the set bits along the last axis; the density of a packed mask is this over `8 * n`.

    Works under `jax.jit` and `jax.vmap`. On other platforms than the CPU, and without the native library, the plain jax
    form runs; in the latter case a `NativeKernelWarning` is given once a process.

    Args:
        x: uint8 `[*rows, n]`, with any `n` from 0 up to 2**29 - 1.
        variant: `"auto"` takes the fastest that this processor runs; `"portable"` and `"popcnt"` (x86) name one.

    Returns:
        uint32 `[*rows]`.

    Raises:
        TypeError: when `x` is not uint8.
        ValueError: when `x` is a scalar, a row is too long to count, or the variant is unknown or unsupported here.
        RuntimeError: when a variant is named and there is no native library.

    Example:
        >>> int(popcount(jnp.array([255, 1, 0], jnp.uint8)))
        9
    """
    x = jnp.asarray(x)
    _check(x, variant)
    if NATIVE.load() is None:
        if variant != "auto":  # a named implementation runs or fails loudly
            raise RuntimeError(f"popcount: variant {variant!r} needs the native library: {NATIVE.why_not()}")
        NATIVE.warn_once("popcount")
        return _plain(x)
    if variant == "popcnt" and "popcnt" not in NATIVE.features():
        raise ValueError(f"popcount: variant 'popcnt' does not run here; this processor has {NATIVE.features()}")

    def call(x: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct(x.shape[:-1], jnp.uint32)
        kernel = jax.ffi.ffi_call(NATIVE.target("EffjaxPopcount"), result, vmap_method="broadcast_all")
        return kernel(x, variant=np.int64(VARIANTS[variant]))

    return jax.lax.platform_dependent(x, cpu=call, default=_plain)


def _plain(x: jax.Array) -> jax.Array:
    return jnp.sum(jax.lax.population_count(x), axis=-1, dtype=jnp.uint32)


def _check(x: jax.Array, variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"popcount: unknown variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    if x.dtype != jnp.uint8:
        raise TypeError(f"popcount: x must be uint8, not {x.dtype}; view other integers as bytes first")
    if x.ndim == 0:
        raise ValueError("popcount: x must have at least one axis; write x[None] for a single byte")
    if x.shape[-1] > MAX_ROW_BYTES:
        raise ValueError(f"popcount: a row of {x.shape[-1]} bytes overflows uint32; split it below {MAX_ROW_BYTES + 1}")
