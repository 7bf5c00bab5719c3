"""KIVI: keys by channel in runs of tokens, values by token, the most recent tokens as they are."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.kv.coders import KVCoders
from effjax.kv.coding import Coded, Coder, check_bits, check_whole, pack_codes, unpack_codes
from effjax.kv.integer import PerToken, check_head_dim, with_recent
from effjax.kv.minmax import minmax_codes, minmax_scales, minmax_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelRuns:
    """Integers between the least and the greatest number of each channel in every run of `group_size` tokens.

    Tokens are coded when `residual` of them are there, so the last `slots mod residual` stay as they came. Tokens of a
    run share scales: their slots cannot move.

    Attributes:
        bits: 1 to 8.
        head_dim: of the vectors.
        group_size: tokens of a run.
        residual: a multiple of `group_size`; 0 codes every whole run.

    Example:
        >>> import jax
        >>> x = jax.random.normal(jax.random.key(0), (2, 70, 16))
        >>> coded = ChannelRuns(bits=2, head_dim=16, group_size=32).encode(x)
        >>> coded.tokens["codes"].shape, coded.blocks["step"].shape, coded.recent.shape
        ((2, 64, 4), (2, 2, 16), (2, 6, 16))
    """

    bits: int = 2
    head_dim: int
    group_size: int = 32
    residual: int = 0

    def __post_init__(self) -> None:
        check_bits("bits", self.bits)
        check_whole("head_dim", self.head_dim, 1)
        check_whole("group_size", self.group_size, 1)
        check_whole("residual", self.residual, 0)
        if self.residual % self.group_size:
            raise ValueError(f"residual={self.residual} is no multiple of group_size={self.group_size}")

    @property
    def run(self) -> int:
        """Successive tokens that share scales."""
        return self.group_size

    @property
    def window(self) -> int:
        """The most tokens that are not coded, and one more."""
        return self.residual or self.group_size

    def coded(self, count: Any) -> Any:
        """How many of `count` tokens are coded."""
        return count // self.window * self.window

    def learn(self, x: Any, grads: Any = None, *, key: Any = None) -> None:
        """Nothing: scales come with every run."""
        return None

    def encode(self, x: Float[Array, "*L kv_heads slots head_dim"], tables: None = None) -> Coded:
        check_head_dim(self, x.shape, self.head_dim)
        coded = self.coded(x.shape[-2])
        old, recent = x[..., :coded, :], x[..., coded:, :] if coded < x.shape[-2] else None
        runs = old.reshape(*old.shape[:-2], coded // self.group_size, self.group_size, self.head_dim)
        scales = minmax_scales(runs.astype(jnp.float32), self.bits, -2)
        codes = minmax_codes(runs, scales, self.bits).reshape(old.shape)
        low, step = (scale[..., 0, :] for scale in scales)
        return Coded(tokens={"codes": pack_codes(codes, self.bits)}, blocks={"low": low, "step": step}, recent=recent)

    def decode(self, coded: Coded, tables: None = None) -> Float[Array, "*L kv_heads slots head_dim"]:
        scales = {name: jnp.repeat(x, self.group_size, axis=-2) for name, x in coded.blocks.items()}
        return with_recent(self.of_tokens({**coded.tokens, **scales}), coded.recent)

    def of_tokens(self, tokens: dict[str, Any]) -> Float[Array, "*L kv_heads slots head_dim"]:
        """What codes stand for, with the scales `low` and `step` of each token's run beside them."""
        codes = unpack_codes(tokens["codes"], self.bits, self.head_dim)
        return minmax_values(codes, (tokens["low"], tokens["step"]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KIVI:
    """Tuning-free asymmetric quantization (Liu et al., ICML 2024): rotated keys by channel, values by token.

    Attributes:
        bits: 1 to 8; the paper has 2 and 4.
        head_dim: of the vectors.
        group_size: tokens of a run of keys, and channels of a group of values (at most head_dim).
        residual: tokens that stay in full precision: keys are coded when so many have come, and the last so many values
            are not coded. A multiple of `group_size`, or 0.

    A cache holds it (`effjax.models.decoder.new_cache(..., coders=method.coders(layers))`), but cannot evict from it.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> method = KIVI(bits=2, head_dim=64, group_size=32, residual=128)
        >>> method.keys.group_size, method.values.group_size
        (32, 32)
    """

    bits: int = 2
    head_dim: int
    group_size: int = 32
    residual: int = 128

    rotated = True

    def __post_init__(self) -> None:
        _ = self.keys, self.values  # which check the fields

    @property
    def keys(self) -> ChannelRuns:
        return ChannelRuns(bits=self.bits, head_dim=self.head_dim, group_size=self.group_size, residual=self.residual)

    @property
    def values(self) -> PerToken:
        width = min(self.group_size, self.head_dim)
        return PerToken(bits=self.bits, head_dim=self.head_dim, group_size=width, residual=self.residual)

    def coders(self, layers: int) -> KVCoders:
        """The coders of so many layers: there is nothing to learn, so no text is needed.

        Example:
            >>> KIVI(bits=2, head_dim=64, residual=0).coders(2).bits_per_channel((1, 2, 4096, 64))
            3.0
        """
        keys, values = (Coder(coding=coding, tables=None) for coding in (self.keys, self.values))
        return KVCoders(keys=(keys,) * layers, values=(values,) * layers, rotated=True)
