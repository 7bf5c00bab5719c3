"""`x @ W` for a uniformly quantized `W` on the CPU: integer products on the packed codes, no dense weight anywhere."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_cpu import variants
from kernels_cpu._native import NATIVE

if TYPE_CHECKING:
    from effjax.arrays.quantized import Quantized

MAX_BLOCK = 256  # inputs that share the scale of an activation: kMaxBlock in activations.h
FLOATS = ("float32", "float16", "bfloat16")


def why_not(w: "Quantized") -> str:
    """Why the kernel does not take `w`, in one sentence; empty where it does.

    Example:
        >>> import effjax as ej, jax.numpy as jnp, kernels_cpu.quant_matmul as native
        >>> native.why_not(ej.quantize.RTN(bits=4, group_size=None).quantize(jnp.eye(8)))
        ''
    """
    n = w.shape[-2]
    if len(w.shape) != 2:
        return f"the kernel takes one matrix, not {list(w.shape)}: map it over the leading axes"
    if w.group_size % run_of(w.bits) and w.group_size != n:
        return f"groups of {w.group_size} inputs do not fill whole runs of {run_of(w.bits)} codes of {w.bits} bits"
    for name, field in (("scales", w.scales), ("zeros", w.zeros)):
        if field is not None and field.dtype.name not in (*FLOATS, "uint8"):
            return f"{name} are {field.dtype.name}, and the kernel reads {', '.join(FLOATS)}"
    return ""


def quant_matmul(
    x: Float[Array, "*batch in"],
    w: "Quantized",
    *,
    activation_bits: int = 24,
    variant: str = "auto",
    tile: int = 0,
) -> Float[Array, "*batch out"]:
    """Multiplies by a quantized matrix `[in, out]` of 1 to 8 bits.

    Activations become fixed-point numbers of one to three signed bytes with one scale for at most 256 inputs, and their
    products with the codes are summed exactly in integers.

    Args:
        x: floating `[*batch, in]`; computed in float32.
        w: groups of whole runs of codes (see `why_not`), or one group.
        activation_bits: 24 bits of the largest activation of a block, as many as float32 has; or 16, more than bfloat16
            has; or 8, the dynamic int8 quantization of activations, each off by up to 1/254 of the largest. A block
            with a NaN or an infinity makes the whole row NaN.
        variant: "auto" takes the fastest that this processor runs; "portable", "avx2", "avx512" and "i8mm" name one.
            All give the same sums of integers.
        tile: 64 where the fields of `w` lie in tiles of 64 columns (`effjax.prepare`).

    Returns:
        float32 `[*batch, out]`.

    Raises:
        ValueError: `w` cannot be taken, shapes do not fit, or the variant is unknown or does not run here.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> w = ej.quantize.RTN(bits=8, group_size=None).quantize(jnp.eye(8))
        >>> quant_matmul(jnp.ones((1, 8)), w).shape
        (1, 8)
    """
    _check(x, w, activation_bits, variant)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    m, n = rows.shape
    out, digits = w.shape[-1], activation_bits // 8
    # An empty array stands for the zero point of a symmetric grid.
    zeros = jnp.zeros((0, out), jnp.uint8) if w.zeros is None else w.zeros
    results = (
        jax.ShapeDtypeStruct((m, out), jnp.float32),
        jax.ShapeDtypeStruct((scratch_bytes(m, n, w.group_size, run_of(w.bits), digits),), jnp.uint8),
    )
    call = jax.ffi.ffi_call(NATIVE.target("EffjaxQuantMatmul"), results, vmap_method="sequential")
    y, _ = call(
        rows,
        w.codes,
        w.scales,
        zeros,
        bits=np.int64(w.bits),
        digits=np.int64(digits),
        variant=np.int64(variants.VARIANTS[variant]),
        tile=np.int64(tile),
    )
    return y.reshape(*x.shape[:-1], out)


def scratch_bytes(rows: int, n: int, group_size: int, run: int, digits: int) -> int:
    """Bytes that the digits of the activations take, with a scale and a sum for each of their blocks (`Arrange`)."""
    block = min(group_size, MAX_BLOCK)
    whole, rest = divmod(group_size, block)
    padded = n // group_size * (whole * -(-block // run) * run + -(-rest // run) * run)
    blocks = n // group_size * (whole + (rest > 0))
    return rows * digits * odd_lines(padded) + 8 * rows * blocks


def odd_lines(nbytes: int) -> int:
    """Bytes rounded up to an odd number of cache lines (`OddLines`)."""
    return (-(-nbytes // 64) | 1) * 64


def run_of(bits: int) -> int:
    """Inputs whose codes the kernel unpacks together."""
    return 32 // bits if 8 % bits == 0 else 8


def _check(x: jax.Array, w: "Quantized", activation_bits: int, variant: str) -> None:
    if activation_bits not in (8, 16, 24):
        raise ValueError(f"quant_matmul: activation_bits must be 8, 16 or 24, found {activation_bits!r}")
    if x.shape[-1] != w.shape[-2]:
        raise ValueError(f"quant_matmul: x {list(x.shape)} does not fit a matrix of {list(w.shape)}")
    reason = why_not(w)
    if reason:
        raise ValueError(f"quant_matmul: {reason}")
    reason = variants.why_not("quant_matmul", variant)
    if reason:
        raise ValueError(reason)
