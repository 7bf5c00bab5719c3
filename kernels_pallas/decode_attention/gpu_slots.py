"""Keys and values as the Hopper kernel reads them: dense, or integers that registers unpack on the way.

Bytes of two neighbouring channels are read as one word of 16 bits. Its codes are cut out one after the other: the first
codes of all words are a *plane*, a matrix of their own, and the channels of queries and outputs are put in the order of
planes outside. A code becomes a bf16 number by one OR, as in `quant_matmul`; the step of a key's channel is put on the
query, that of a value's token on the weight, and a key's least number drops out of the softmax.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from effjax.kv.integer import PerChannel, PerToken
from effjax.ops.attention_blocks import Slots
from effjax.ops.coded_slots import CodedSlots
from kernels_pallas.gpu_packed import bf16_bits, column_pairs, word16

WORD = 16  # bits that a register's half holds: a dense number, or codes of neighbouring channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """Keys or values.

    Attributes:
        array: `[batch (or pages), heads, slots, width]`, 16-bit floats or words of codes.
        bits: of a code; 16 where it is dense.
        scales: least number and step of a value's code, float16 `[batch (or pages), heads, slots]`; else none.
        steps: of a key's channels, float32 `[heads, 1, head_dim]`; else None.
        dtype: of the operands of the tensor core.
    """

    array: jax.Array
    bits: int
    scales: tuple[jax.Array, ...]
    steps: jax.Array | None
    dtype: Any

    @property
    def planes(self) -> int:
        return WORD // self.bits

    @property
    def width(self) -> int:
        return self.array.shape[-1]

    @property
    def centre(self) -> int:
        """What a code is short of in its plane."""
        return 2 ** (self.bits - 1)

    @property
    def is_coded(self) -> bool:
        return self.bits < WORD

    @property
    def slot_bytes(self) -> int:
        return 2 * self.width + 2 * len(self.scales)

    def to_planes(self, x: Float[Array, "*any head_dim"]) -> Float[Array, "*any planes width"]:
        return x.reshape(*x.shape[:-1], self.width, self.planes).swapaxes(-1, -2)

    def from_planes(self, y: Float[Array, "*any head_dim"]) -> Float[Array, "*any head_dim"]:
        """The inverse, of planes that lie side by side."""
        return y.reshape(*y.shape[:-1], self.planes, self.width).swapaxes(-1, -2).reshape(y.shape)


def why_not(x: Slots, role: str) -> str:
    """Why keys or values (`role`) held so are not for the kernel; empty where they are."""
    if not isinstance(x, CodedSlots):
        if jnp.dtype(x.dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
            return ""
        return f"{role} in {jnp.dtype(x.dtype).name}: the GPU kernel takes bfloat16 and float16"
    wanted = PerChannel if role == "keys" else PerToken
    if not isinstance(x.coding, wanted):
        return f"{role} coded by {x.coding}: the GPU kernel takes {wanted.__name__}"
    head_dim, bits = x.shape[-1], x.coding.bits
    if bits not in (2, 4, 8) or head_dim * bits // WORD % 16 or head_dim > 128:
        return (
            f"{role} coded by {x.coding}, {head_dim} wide: the kernel takes 2, 4 or 8 bits and up to 128 channels, "
            "16 words of 16 bits or a multiple"
        )
    if role == "values" and x.tokens["step"].shape[-1] != 1:
        return f"values coded by {x.coding}: the kernel takes one scale a token"
    return ""


def held(x: Slots) -> Held:
    """How the kernel meets keys or values that `why_not` has nothing against."""
    if not isinstance(x, CodedSlots):
        return Held(array=x, bits=WORD, scales=(), steps=None, dtype=x.dtype)
    codes = x.tokens["codes"]
    words = column_pairs(codes.reshape(-1, codes.shape[-1])).reshape(*codes.shape[:-1], -1)
    scales = tuple(x.tokens[name][..., 0] for name in ("low", "step")) if isinstance(x.coding, PerToken) else ()
    steps = None if scales else x.tables["step"].astype(jnp.float32)
    return Held(array=words, bits=x.coding.bits, scales=scales, steps=steps, dtype=jnp.dtype(jnp.bfloat16))


def transforms(width: int) -> tuple[Any, Any]:
    """Rows of up to 128 bytes of 16-bit numbers whose 16-byte pieces are permuted, so that columns meet every bank."""
    swizzle = next(size for size in (128, 64, 32) if 2 * width % size == 0)
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def plane(words: jax.Array, index: int, bits: int) -> jax.Array:
    """Codes `index` of all words less their centre, bf16, exact."""
    shift = index * bits
    code = words >> word16(shift) if shift else words
    if bits == 8:
        low = bf16_bits((code & word16(0x7F)) | word16(0x4300))
        return low - bf16_bits((code & word16(0x80)) ^ word16(0x4380))
    exact = bf16_bits((code & word16(2**bits - 1)) | word16(0x4300))  # 128 + code
    return exact - np.asarray(128 + 2 ** (bits - 1), jnp.bfloat16)


def spread(row: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A float16 number for every slot, as float32 over all rows of queries."""
    return lax.broadcast_in_dim(row.astype(jnp.float32), shape, (1,))
