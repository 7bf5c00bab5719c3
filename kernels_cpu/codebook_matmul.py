"""`x @ W` for a `W` of indices into small tables on the CPU: lookups in registers, no dense weight anywhere."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_cpu import variants
from kernels_cpu._native import NATIVE

if TYPE_CHECKING:
    from effjax.arrays.codebook import Codebook

AMONG = ("auto", "portable", "avx2", "avx512")
MOST_LANES = 16  # kMostLanes in codebook_matmul.h


def why_not(w: "Codebook") -> str:
    """Why the kernel does not take `w`, in one sentence; empty where it does."""
    if len(w.shape) != 2:
        return f"the kernel takes one matrix, not {list(w.shape)}: map it over the leading axes"
    n, fields = w.shape[-2], fields_of(w.bits)
    in_groups, chunk = w.tables.shape[-3], MOST_LANES * fields
    if in_groups > 1 and n // in_groups % chunk:
        return f"tables of {n // in_groups} inputs are no whole chunks of {chunk}"
    groups = 1 if w.scales is None else w.scales.shape[-2]
    if groups > 1 and n // groups % fields:
        return f"groups of {n // groups} inputs do not fill whole words of {fields} codes of {w.bits} bits"
    return ""


def codebook_matmul(
    x: Float[Array, "*batch in"], w: "Codebook", *, variant: str = "auto", tile: int = 0
) -> Float[Array, "*batch out"]:
    """Multiplies by a matrix of table entries `[in, out]`, in float32.

    Args:
        x: floating `[*batch, in]`.
        w: 2 to 256 entries a table; tables of up to 16 (AVX-512: 64) values are looked up in registers.
        variant: "auto" takes the fastest that this processor runs; "portable", "avx2" and "avx512" name one.
        tile: 64 where codes and scales lie in tiles of 64 columns (`effjax.prepare`), 1 column by column.

    Returns:
        float32 `[*batch, out]`.

    Raises:
        ValueError: `w` cannot be taken, shapes do not fit, or the variant is unknown or does not run here.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> w = ej.quantize.NF4(block_size=8).quantize(jnp.eye(8))
        >>> codebook_matmul(jnp.ones((1, 8)), w).shape
        (1, 8)
    """
    reason = why_not(w) or variants.why_not("codebook_matmul", variant, AMONG)
    if x.shape[-1] != w.shape[-2]:
        reason = f"x {list(x.shape)} does not fit a matrix of {list(w.shape)}"
    if reason:
        raise ValueError(reason if reason.startswith("codebook_matmul") else f"codebook_matmul: {reason}")
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    m, n = rows.shape
    out = w.shape[-1]
    scales = w.float_scales()
    chunk = MOST_LANES * fields_of(w.bits)
    results = (
        jax.ShapeDtypeStruct((m, out), jnp.float32),
        jax.ShapeDtypeStruct((-(-n // chunk) * chunk if m == 1 else 0,), jnp.float32),
    )
    call = jax.ffi.ffi_call(NATIVE.target("EffjaxCodebookMatmul"), results, vmap_method="sequential")
    y, _ = call(
        rows,
        w.codes,
        w.tables.astype(jnp.float32),
        jnp.zeros((0, out), jnp.float32) if scales is None else scales,  # an empty array stands for no scales
        bits=np.int64(w.bits),
        variant=np.int64(variants.VARIANTS[variant]),
        tile=np.int64(tile),
    )
    return y.reshape(*x.shape[:-1], out)


def fields_of(bits: int) -> int:
    """Codes that the kernel takes from 32 bits; odd widths are unpacked to bytes first."""
    return 32 // bits if 8 % bits == 0 else 4
