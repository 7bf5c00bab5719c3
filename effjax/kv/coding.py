"""What a coding of keys and values is: tables learned once, codes of every token, and the bytes of both."""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key, UInt8, UInt16

from effjax.arrays.base import nbytes
from effjax.arrays.packing import pack, unpack
from effjax.errors import ConfigError
from effjax.kv.checks import is_whole

PyTree = Any
Vectors = Float[Array, "*L kv_heads slots head_dim"]
At = tuple[Int[Array, "batch kv_heads length"], ...]  # row, head and slot of every new token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Coded:
    """Coded keys or values.

    Attributes:
        tokens: arrays with a row for every coded token, `[*L, kv_heads, slots, width]`: the token axis is always the
            last but one, so that eviction moves slots of all of them alike (`take`).
        blocks: arrays with a row for every run of successive tokens that share scales, `[*L, kv_heads, runs, width]`.
        recent: the last tokens as they came, `[*L, kv_heads, count, head_dim]`; None where all are coded.
    """

    tokens: dict[str, Any]
    blocks: dict[str, Any] = dataclasses.field(default_factory=dict)
    recent: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays (works on `ShapeDtypeStruct` too)."""
        return nbytes(self)

    def take(self, slots: Int[Array, "*L kv_heads kept"]) -> "Coded":
        """The tokens in these slots, for eviction.

        Raises:
            ConfigError: successive tokens share scales, or some are not coded.
        """
        if self.blocks or self.recent is not None:
            raise ConfigError(
                "these codes cannot change places: successive tokens share scales, or the last ones are not coded; "
                "evict before coding, or code keys by channel with scales learned beforehand (CQ, KVQuant, IntKV)"
            )
        return Coded(tokens={name: jnp.take_along_axis(x, slots[..., None], -2) for name, x in self.tokens.items()})


class VectorCoding(Protocol):
    """A coding of vectors: a frozen dataclass of hyper-parameters with these functions, all pure.

    Vectors are `[*L, kv_heads, slots, head_dim]`, as in `effjax.kv.cache.KVCache`; all tables begin with the axis of
    the key heads, or have none.
    """

    def learn(
        self,
        x: Float[Array, "kv_heads tokens head_dim"],
        grads: Float[Array, "kv_heads tokens head_dim"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> PyTree:
        """Tables from the vectors of a calibration text and the gradients of the loss with respect to them."""
        ...

    def encode(self, x: Vectors, tables: PyTree) -> Coded: ...

    def decode(self, coded: Coded, tables: PyTree) -> Vectors:
        """The vectors that codes stand for, float32."""
        ...


class KVCoding(Protocol):
    """A method: one coding for keys and one for values."""

    @property
    def keys(self) -> VectorCoding: ...

    @property
    def values(self) -> VectorCoding: ...

    @property
    def rotated(self) -> bool:
        """Whether keys are coded after the rotation, as the cache holds them; else before, which is to follow."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Coder:
    """A coding with its tables: what a cache needs to hold codes in place of vectors.

    Example:
        >>> from effjax.kv.cq import CQ
        >>> x = jax.random.normal(jax.random.key(0), (2, 300, 16))
        >>> coder = fit(CQ(channels=4, bits=4, fisher=False), x, key=jax.random.key(1))
        >>> coded = coder.encode(x)
        >>> coded.tokens["codes"].shape, coded.nbytes, coder.decode(coded).shape
        ((2, 300, 2), 1200, (2, 300, 16))
        >>> coder.bits_per_channel((8, 2, 4096, 16), tables=False)
        1.0
    """

    coding: Any = dataclasses.field(metadata={"static": True})
    tables: Any

    def encode(self, x: Vectors) -> Coded:
        return self.coding.encode(x, self.tables)

    def decode(self, coded: Coded) -> Vectors:
        return self.coding.decode(coded, self.tables)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, which all tokens share."""
        return nbytes(self.tables)

    def bits_per_channel(self, shape: tuple[int, ...], *, tables: bool = True, dtype: Any = jnp.float16) -> float:
        """Bits of a coded number, from the bytes of the arrays: codes, scales, exact entries, and tables.

        Args:
            shape: of the vectors in the cache, `(*L, kv_heads, slots, head_dim)`; tables are shared out over them.
            tables: counts them; False leaves what every further token costs.
            dtype: of vectors that are kept as they came.
        """
        coded = jax.eval_shape(self.encode, jax.ShapeDtypeStruct(shape, dtype))
        return 8 * (coded.nbytes + (self.nbytes if tables else 0)) / math.prod(shape)


def fit(
    coding: VectorCoding,
    x: Float[Array, "kv_heads tokens head_dim"],
    grads: Float[Array, "kv_heads tokens head_dim"] | None = None,
    *,
    key: Key[Array, ""] | None = None,
) -> Coder:
    """A coding with tables that it learned from the vectors of a calibration text."""
    return Coder(coding=coding, tables=coding.learn(x, grads, key=key))


def pack_codes(codes: Integer[Array, "*any n"], bits: int) -> UInt8[Array, "*any bytes"] | UInt16[Array, "*any n"]:
    """Codes of a token as a stream of bits in bytes; of more than 8 bits as 16-bit numbers.

    Example:
        >>> pack_codes(jnp.array([1, 2, 3]), bits=4).tolist()
        [33, 3]
    """
    if bits > 8:
        return codes.astype(jnp.uint16)
    return pack(codes[..., None], bits)[..., 0]


def unpack_codes(packed: Integer[Array, "*any bytes"], bits: int, n: int) -> Integer[Array, "*any n"]:
    """The first `n` codes: the inverse of `pack_codes`."""
    return packed if bits > 8 else unpack(packed[..., None], bits, n)[..., 0]


def check_bits(name: str, bits: int, most: int = 8) -> None:
    """Raises ValueError for a width that no code has here."""
    if not is_whole(bits, 1) or bits > most:
        raise ValueError(f"{name}={bits!r}: choose 1 to {most}")


def check_whole(name: str, value: int, least: int) -> None:
    """Raises ValueError for what is no whole number of at least `least`."""
    if not is_whole(value, least):
        raise ValueError(f"{name}={value!r}: choose a whole number of at least {least}")


def check_calibration(coding: Any, x: Any, grads: Any, *, need_grads: bool) -> None:
    """Raises ConfigError for vectors or gradients that tables cannot be learned from."""
    if x.ndim != 3:
        raise ConfigError(f"{coding}: learns from [kv_heads, tokens, head_dim], found shape {tuple(x.shape)}")
    if need_grads and grads is None:
        raise ConfigError(
            f"{coding}: needs the gradients of the loss with respect to the vectors; take them from "
            "effjax.kv.capture.capture_kv, or write fisher=False"
        )
    if grads is not None and tuple(grads.shape) != tuple(x.shape):
        raise ConfigError(f"{coding}: gradients have shape {tuple(grads.shape)}, the vectors {tuple(x.shape)}")
