"""NoMAD on the CPU: logits of coded keys by look-ups in registers, and attention of one query a row to them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt8

from kernels_cpu import variants
from kernels_cpu._native import NATIVE

VARIANTS = ("auto", "portable", "avx2", "avx512")
VALUES = ("float32", "float16", "bfloat16")
_BLOCK, _CHUNK = 32, 128  # keys: kBlockKeys and kChunkKeys in nomad.h


def lookup_logits(
    table: UInt8[Array, "*L kv_heads group subs 16"],
    scale: Float[Array, "*L kv_heads group"],
    bias: Float[Array, "*L kv_heads group"],
    codes: UInt8[Array, "*L kv_heads blocks subs 16"],
    *,
    variant: str = "auto",
) -> Float[Array, "*L kv_heads group slots"]:
    """`sum_s table[s, code_s] / scale + bias` of every coded key; see `effjax.kv.nomad.lookup_logits`.

    Args:
        table, scale, bias: of the queries.
        codes: in blocks of 32 keys.
        variant: "auto" takes the fastest that this processor runs; the sums are the same integers in all.

    Raises:
        ValueError: the variant is unknown or does not run here.

    Example:
        >>> table, codes = jnp.ones((1, 1, 3, 16), jnp.uint8), jnp.zeros((1, 2, 3, 16), jnp.uint8)
        >>> lookup_logits(table, jnp.ones((1, 1)), jnp.zeros((1, 1)), codes)[0, 0, :2].tolist()
        [3.0, 3.0]
    """
    _check_variant("nomad.lookup_logits", variant)
    *lead, group, subs, entries = table.shape
    blocks = codes.shape[-3]
    rows = int(np.prod(lead))
    result = jax.ShapeDtypeStruct((rows, group, blocks * _BLOCK), jnp.float32)
    call = jax.ffi.ffi_call(NATIVE.target("EffjaxNomadLookup"), result, vmap_method="sequential")
    y = call(
        table.reshape(rows, group, subs, entries),
        scale.astype(jnp.float32).reshape(rows, group),
        bias.astype(jnp.float32).reshape(rows, group),
        codes.reshape(rows, *codes.shape[-3:]),
        variant=np.int64(variants.VARIANTS[variant]),
    )
    return y.reshape(*lead, group, blocks * _BLOCK)


def attend(
    q: Float[Array, "batch kv_heads group head_dim"],
    codes: UInt8[Array, "batch kv_heads blocks subs 16"],
    recent: Float[Array, "batch kv_heads 32 head_dim"],
    v: Float[Array, "batch kv_heads slots value_dim"],
    lengths: Int32[Array, "batch kv_heads"],
    books: Float[Array, "kv_heads subs 16 d_sub"],
    seen: Bool[Array, "batch kv_heads slots"] | Bool[Array, "0"],
    *,
    with_received: bool = False,
    variant: str = "auto",
) -> Float[Array, "batch kv_heads numbers"]:
    """Table, logits, softmax and the sum of values of one query a row, 128 keys at a time; nothing else is written.

    Args:
        q: scaled queries, float32.
        codes, recent: of the keys, see `effjax.kv.nomad_attention.NomadKeys`; `recent` in float32.
        v: float32, float16 or bfloat16; slots of at most `32 * blocks`.
        lengths: filled slots.
        books: float32.
        seen: slots that count; an empty array for all.
        with_received: also sums the weights of each slot over the group.
        variant: as in `lookup_logits`.

    Returns:
        float32: `group * value_dim` outputs of each row and head, then, `with_received`, one number a slot.

    Raises:
        ValueError: the variant is unknown or does not run here, or there is no native library.
    """
    _check_variant("nomad.attend", variant)
    batch, kv_heads, group, _ = q.shape
    slots, width = v.shape[-2:]
    out = group * width + (slots if with_received else 0)
    scratch = batch * kv_heads * scratch_floats(group, codes.shape[-2], slots, with_received)
    results = (
        jax.ShapeDtypeStruct((batch, kv_heads, out), jnp.float32),
        jax.ShapeDtypeStruct((scratch,), jnp.float32),
    )
    call = jax.ffi.ffi_call(NATIVE.target("EffjaxNomadAttend"), results, vmap_method="sequential")
    # Arrays go in as they are: a reshape between the write of a step and the kernel would make XLA write twice, into
    # two copies of the whole array.
    y, _ = call(
        q,
        codes,
        recent,
        v,
        lengths,
        books,
        seen,
        received=np.int64(with_received),
        variant=np.int64(variants.VARIANTS[variant]),
    )
    return y


def scratch_floats(group: int, subs: int, slots: int, with_received: bool) -> int:
    """Numbers of a row's tables, scales and logits (`ScratchFloats` in nomad.h)."""
    logits = -(-slots // _CHUNK) * _CHUNK if with_received else _CHUNK
    return group * (4 * subs + 4 + logits)


def _check_variant(kernel: str, variant: str) -> None:
    reason = variants.why_not(kernel, variant, VARIANTS)
    if reason:
        raise ValueError(reason)
