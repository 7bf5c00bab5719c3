"""`x @ W` for a 2:4 sparse `W` with values of 4 bits on the CPU: activations are picked by shuffles, in integers."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_cpu import variants
from kernels_cpu._native import NATIVE
from kernels_cpu.quant_matmul import scratch_bytes

if TYPE_CHECKING:
    from effjax.arrays.nm_sparse import NMSparse

RUN = 16  # inputs that the kernel takes together
AMONG = ("auto", "avx512")


def why_not(w: "NMSparse") -> str:
    """Why the kernel does not take `w`, in one sentence; empty where it does."""
    values: Any = w.values
    if len(w.shape) != 2:
        return f"the kernel takes one matrix, not {list(w.shape)}: map it over the leading axes"
    if (w.n, w.m) != (2, 4) or getattr(values, "bits", 0) != 4 or values.zeros is not None:
        return "the kernel takes 2:4 patterns of values quantized to 4 bits on a symmetric grid"
    if w.shape[-2] % RUN or w.shape[-2] // values.scales.shape[-2] % RUN:
        return f"inputs and groups must be whole runs of {RUN}"
    return variants.why_not("nm_matmul", "avx512", AMONG)


def nm_matmul(
    x: Float[Array, "*batch in"], w: "NMSparse", *, activation_bits: int = 24, tile: int = 0
) -> Float[Array, "*batch out"]:
    """Multiplies by a sparse matrix `[in, out]` of which two in four inputs are kept, at 4 bits.

    Args:
        x: floating `[*batch, in]`; computed in float32.
        w: values on a symmetric grid of 4 bits (see `why_not`).
        activation_bits: 24, 16 or 8, as in `quant_matmul`.
        tile: 64 where codes, indices and scales lie in tiles of 64 columns (`effjax.prepare`).

    Returns:
        float32 `[*batch, out]`.

    Raises:
        ValueError: `w` cannot be taken, the processor has no AVX-512 with VNNI and VBMI, or shapes do not fit.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((64, 8))}
        >>> mask = ej.prune_mask(params, ej.prune.Magnitude(sparsity=0.5, pattern="2:4"))
        >>> why_not(ej.pack_mask(params, mask)["kernel"])
        'the kernel takes 2:4 patterns of values quantized to 4 bits on a symmetric grid'
    """
    reason = why_not(w)
    if activation_bits not in (8, 16, 24):
        reason = f"activation_bits must be 8, 16 or 24, found {activation_bits!r}"
    if x.shape[-1] != w.shape[-2]:
        reason = f"x {list(x.shape)} does not fit a matrix of {list(w.shape)}"
    if reason:
        raise ValueError(f"nm_matmul: {reason.removeprefix('nm_matmul: ')}")
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    m, n = rows.shape
    values: Any = w.values
    out, groups, digits = w.shape[-1], values.scales.shape[-2], activation_bits // 8
    results = (
        jax.ShapeDtypeStruct((m, out), jnp.float32),
        jax.ShapeDtypeStruct((scratch_bytes(m, n, n // groups, RUN, digits),), jnp.uint8),
    )
    call = jax.ffi.ffi_call(NATIVE.target("EffjaxNmMatmul"), results, vmap_method="sequential")
    y, _ = call(
        rows, values.codes, w.indices, values.scales.astype(jnp.float32), digits=np.int64(digits), tile=np.int64(tile)
    )
    return y.reshape(*x.shape[:-1], out)
