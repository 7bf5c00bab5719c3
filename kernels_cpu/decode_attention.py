"""Attention of one query a row to the live slots of a cache on the CPU, dense or of integers."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_cpu import variants
from kernels_cpu._native import NATIVE

if TYPE_CHECKING:
    from effjax.ops.attention_blocks import Question

AMONG = ("auto", "portable", "avx2", "avx512")
MOST_LANES = 16  # kMostAttentionLanes in attention.h


def why_not(a: "Question") -> str:
    """Why the kernel does not take these operands, in one sentence; empty where it does."""
    if NATIVE.load() is None:
        return f"there is no native library: {NATIVE.why_not()}"
    if a.table is not None and hasattr(a.v, "coding"):
        return "the kernel takes pages of dense values"
    head_dim = a.q.shape[-1]
    if head_dim % MOST_LANES:
        return f"head_dim {head_dim}: the kernel takes multiples of {MOST_LANES}"
    for x, role in ((a.k, "keys"), (a.v, "values")):
        coding = getattr(x, "coding", None)
        if coding is None:
            if x.dtype.name not in ("float32", "bfloat16"):
                return f"{role} in {x.dtype.name}: the kernel takes float32 and bfloat16"
        elif type(coding).__name__ != {"keys": "PerChannel", "values": "PerToken"}[role]:
            return f"{role} coded by {coding}: the kernel takes integers, keys a scale a channel and values one a token"
        elif coding.bits not in (4, 8) or head_dim * coding.bits // 8 % MOST_LANES:
            return f"{role} coded by {coding}: the kernel takes 8 bits, or 4 of a head_dim that is a multiple of 32"
        elif role == "values" and x.tokens["step"].shape[-1] != 1:
            return f"values coded by {coding}: the kernel takes one scale a token"
    return ""


def decode_attention(a: "Question", *, variant: str = "auto") -> tuple[jax.Array, jax.Array | None]:
    """`(y, received)` as `effjax.ops.decode_attention` defines them, computed in float32.

    Args:
        a: what is asked.
        variant: "auto" takes the fastest that this processor runs; "portable", "avx2" and "avx512" name one.

    Raises:
        ValueError: the kernel does not take the operands, or the variant is unknown or does not run here.
    """
    if reason := why_not(a) or variants.why_not("decode_attention", variant, AMONG):
        raise ValueError(reason if reason.startswith("decode_attention") else f"decode_attention: {reason}")
    batch, heads, _, _ = a.q.shape
    q = a.q.astype(jnp.float32) * a.scale
    k, k_bits = _held(a.k)
    v, v_bits = _held(a.v)
    if k_bits:
        q = q * a.k.tables["step"].astype(jnp.float32)
    none = jnp.zeros((0,), jnp.float32)  # an empty array stands for no scales, and for no sums
    low, step = (a.v.tokens[n][..., 0].astype(jnp.float32) for n in ("low", "step")) if v_bits else (none, none)
    results = (
        jax.ShapeDtypeStruct(a.q.shape, jnp.float32),
        jax.ShapeDtypeStruct((0,) if a.asked is None else (batch, heads, a.slots), jnp.float32),
    )
    call = jax.ffi.ffi_call(NATIVE.target("EffjaxDecodeAttention"), results, vmap_method="sequential")
    y, received = call(
        _nibbles_apart(q) if k_bits == 4 else q,
        k,
        v,
        low,
        step,
        a.start,
        a.length,
        none if a.asked is None else a.asked,
        jnp.zeros((0, 0), jnp.int32) if a.table is None else a.table,
        k_bits=np.int64(k_bits),
        v_bits=np.int64(v_bits),
        quantile=np.float32(getattr(a.counts, "quantile", None) or 0),
        multiple=np.float32(getattr(a.counts, "multiple", None) or 0),
        peaked=a.counts is not None and a.counts.peaked,
        variant=np.int64(variants.VARIANTS[variant]),
    )
    y = _nibbles_together(y) if v_bits == 4 else y
    return y.astype(a.q.dtype), None if a.asked is None else received


def _held(x: Any) -> tuple[jax.Array, int]:
    """The array that is read, and the bits of its codes; 0 where it holds the vectors themselves."""
    return (x.tokens["codes"], x.coding.bits) if hasattr(x, "coding") else (x, 0)


def _nibbles_apart(x: jax.Array) -> jax.Array:
    """Channels of the lower halves of all bytes first."""
    return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)


def _nibbles_together(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)
