"""Plain integers: keys with a scale a channel that a calibration text gives, values with a scale a token."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import ConfigError
from effjax.kv.coding import Coded, check_bits, check_calibration, check_whole, pack_codes, unpack_codes
from effjax.kv.minmax import minmax_codes, minmax_scales, minmax_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerChannel:
    """Integers between the least and the greatest number that each channel had in the calibration text.

    Scales do not depend on the tokens in the cache, so a token is coded when it comes and its slot may move. What lies
    beyond the range gets the code at its end.

    Attributes:
        bits: 1 to 8.

    Example:
        >>> import jax
        >>> x = jax.random.normal(jax.random.key(0), (2, 64, 16))
        >>> coding = PerChannel(bits=8)
        >>> tables = coding.learn(x)
        >>> bool(jnp.abs(coding.decode(coding.encode(x, tables), tables) - x).max() < 0.02)
        True
    """

    bits: int = 8

    def __post_init__(self) -> None:
        check_bits("bits", self.bits)

    def learn(self, x: Float[Array, "kv_heads tokens head_dim"], grads: Any = None, *, key: Any = None) -> Any:
        """`low` and `step`, float16 `[kv_heads, 1, head_dim]`."""
        check_calibration(self, x, grads, need_grads=False)
        low, step = minmax_scales(x, self.bits, -2)
        return {"low": low, "step": step}

    def encode(self, x: Float[Array, "*L kv_heads slots head_dim"], tables: Any) -> Coded:
        codes = minmax_codes(x, (tables["low"], tables["step"]), self.bits)
        return Coded(tokens={"codes": pack_codes(codes, self.bits)})

    def decode(self, coded: Coded, tables: Any) -> Float[Array, "*L kv_heads slots head_dim"]:
        codes = unpack_codes(coded.tokens["codes"], self.bits, tables["low"].shape[-1])
        return minmax_values(codes, (tables["low"], tables["step"]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerToken:
    """Integers between the least and the greatest number of each token, or of each group of its channels.

    Attributes:
        bits: 1 to 8.
        head_dim: of the vectors.
        group_size: channels that share a scale; None is all of a head.
        residual: how many of the last tokens stay as they came.

    Example:
        >>> import jax
        >>> x = jax.random.normal(jax.random.key(0), (2, 64, 16))
        >>> coding = PerToken(bits=4, head_dim=16)
        >>> coded = coding.encode(x, None)
        >>> coded.tokens["codes"].shape, coded.tokens["step"].shape, coded.nbytes
        ((2, 64, 8), (2, 64, 1), 1536)
    """

    bits: int = 8
    head_dim: int
    group_size: int | None = None
    residual: int = 0

    def __post_init__(self) -> None:
        check_bits("bits", self.bits)
        check_whole("head_dim", self.head_dim, 1)
        check_whole("residual", self.residual, 0)
        if self.group_size is not None:
            check_whole("group_size", self.group_size, 1)
            if self.head_dim % self.group_size:
                raise ValueError(f"group_size={self.group_size} does not divide head_dim={self.head_dim}")

    def learn(self, x: Any, grads: Any = None, *, key: Any = None) -> None:
        """Nothing: scales come with every token."""
        return None

    @property
    def run(self) -> int:
        """Successive tokens that share scales."""
        return 1

    @property
    def window(self) -> int:
        """The most tokens that are not coded."""
        return self.residual

    def coded(self, count: Any) -> Any:
        """How many of `count` tokens are coded."""
        return count - jnp.minimum(count, self.residual)

    def encode(self, x: Float[Array, "*L kv_heads slots head_dim"], tables: None = None) -> Coded:
        check_head_dim(self, x.shape, self.head_dim)
        coded = max(x.shape[-2] - self.residual, 0)
        old, recent = x[..., :coded, :], x[..., coded:, :] if self.residual else None
        groups = old.reshape(*old.shape[:-1], *self._cut)
        scales = minmax_scales(groups.astype(jnp.float32), self.bits, -1)
        codes = minmax_codes(groups, scales, self.bits).reshape(old.shape)
        low, step = (scale[..., 0] for scale in scales)
        return Coded(tokens={"codes": pack_codes(codes, self.bits), "low": low, "step": step}, recent=recent)

    def decode(self, coded: Coded, tables: None = None) -> Float[Array, "*L kv_heads slots head_dim"]:
        return with_recent(self.of_tokens(coded.tokens), coded.recent)

    def of_tokens(self, tokens: dict[str, Any]) -> Float[Array, "*L kv_heads slots head_dim"]:
        """What codes stand for, with the scales `low` and `step` of each token beside them."""
        codes = unpack_codes(tokens["codes"], self.bits, self.head_dim)
        groups = codes.reshape(*codes.shape[:-1], *self._cut)
        return minmax_values(groups, (tokens["low"][..., None], tokens["step"][..., None])).reshape(codes.shape)

    @property
    def _cut(self) -> tuple[int, int]:
        """Groups of a vector, and their size; said in full, as there may be no token to tell it from."""
        size = self.group_size or self.head_dim
        return self.head_dim // size, size


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntKV:
    """Keys, before rotation, by channel; values by token.

    Attributes:
        bits: 1 to 8.
        head_dim: of the vectors.

    Example:
        >>> IntKV(bits=4, head_dim=64).keys
        PerChannel(bits=4)
    """

    bits: int = 8
    head_dim: int

    rotated = False

    def __post_init__(self) -> None:
        check_bits("bits", self.bits)
        check_whole("head_dim", self.head_dim, 1)

    @property
    def keys(self) -> PerChannel:
        return PerChannel(bits=self.bits)

    @property
    def values(self) -> PerToken:
        return PerToken(bits=self.bits, head_dim=self.head_dim)


def with_recent(values: Array, recent: Array | None) -> Array:
    """Decoded tokens and the ones behind them that were not coded, float32."""
    return values if recent is None else jnp.concatenate([values, recent.astype(jnp.float32)], axis=-2)


def check_head_dim(coding: Any, shape: tuple[int, ...], head_dim: int) -> None:
    """Raises ConfigError for vectors of another width."""
    if shape[-1] != head_dim:
        raise ConfigError(f"{coding}: the vectors have shape {shape}; write head_dim={shape[-1]}")
