"""Integer codes of 1–8 bits as a dense bit stream in bytes, least significant bit first, along the input axis.

Code `i` occupies bits `[i * bits, (i + 1) * bits)` of its column's stream; `n` codes take `ceil(n * bits / 8)` bytes.
Read as little-endian 32-bit words this is the packing of GPTQ's `qweight`, hence both are the same bytes.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Integer, UInt8


def packed_size(n: int, bits: int) -> int:
    """Bytes that `n` codes of `bits` bits occupy."""
    return -(-n * bits // 8)


def pack(codes: Integer[Array, "*L n out"], bits: int) -> UInt8[Array, "*L bytes out"]:
    """Packs codes in `[0, 2**bits)` along axis -2.

    Example:
        >>> pack(jnp.array([[1], [2], [3]]), bits=4).ravel().tolist()
        [33, 3]
    """
    *lead, n, out = codes.shape
    codes = codes.astype(jnp.uint8)
    if bits == 8:
        return codes
    whole = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, -n % 8), (0, 0)])
    octets = whole.reshape(*lead, whole.shape[-2] // 8, 8, out)  # eight codes fill exactly `bits` bytes
    packed = []
    for byte in range(bits):
        value = jnp.zeros_like(octets[..., 0, :])
        for j in range(8 * byte // bits, min(7, (8 * byte + 7) // bits) + 1):
            shift = j * bits - 8 * byte
            code = octets[..., j, :]
            value |= code << shift if shift >= 0 else code >> -shift
        packed.append(value)
    return jnp.stack(packed, axis=-2).reshape(*lead, octets.shape[-3] * bits, out)[..., : packed_size(n, bits), :]


def unpack(packed: UInt8[Array, "*L bytes out"], bits: int, n: int) -> UInt8[Array, "*L n out"]:
    """The first `n` codes of each column: the inverse of `pack`."""
    *lead, size, out = packed.shape
    if bits == 8:
        return packed if size == n else lax.slice_in_dim(packed, 0, n, axis=-2)
    # lax instead of jnp: this is traced once for every matrix shape of a model, and jnp costs three times the time.
    mask = jnp.uint8(2**bits - 1)
    if 8 % bits == 0:
        shape = (*lead, size, 8 // bits, out)
        axis = len(lead) + 1
        shifts = lax.broadcasted_iota(jnp.uint8, shape, axis) * jnp.uint8(bits)
        spread = lax.broadcast_in_dim(packed, shape, (*range(axis), axis + 1))
        codes = lax.bitwise_and(lax.shift_right_logical(spread, shifts), lax.full(shape, mask))
    else:
        octets = lax.pad(packed, jnp.uint8(0), [(0, 0, 0)] * len(lead) + [(0, -size % bits, 0), (0, 0, 0)])
        octets = octets.reshape(*lead, octets.shape[-2] // bits, bits, out)
        columns = []
        for j in range(8):
            byte, shift = divmod(j * bits, 8)
            code = octets[..., byte, :] >> shift
            if shift + bits > 8:
                code |= octets[..., byte + 1, :] << (8 - shift)
            columns.append(code & mask)
        codes = jnp.stack(columns, axis=-2)
    codes = lax.reshape(codes, (*lead, codes.shape[-3] * codes.shape[-2], out))
    return codes if codes.shape[-2] == n else lax.slice_in_dim(codes, 0, n, axis=-2)
