"""Keys or values of a cache as codes, with what decodes them: an operand that is decoded piece by piece."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CodedSlots:
    """Codes of the slots of a cache.

    Attributes:
        coded: an `effjax.kv.Coded` whose `tokens` are `[batch, kv_heads, slots, width]`, and which has nothing else:
            any run of slots can then be decoded by itself.
        coder: the `effjax.kv.Coder` whose codes they are, with tables of this layer.

    Raises:
        ConfigError: successive tokens share scales, or some are not coded (from `checked`).

    Example:
        >>> from effjax.kv.coding import fit
        >>> from effjax.kv.cq import CQ
        >>> x = jax.random.normal(jax.random.key(0), (1, 2, 64, 16))
        >>> coder = fit(CQ(channels=4, bits=4, fisher=False), x[0], key=jax.random.key(1))
        >>> slots = CodedSlots(coded=coder.encode(x), coder=coder)
        >>> slots.shape, slots.decode(jnp.int32(8), 4).shape
        ((1, 2, 64, 16), (1, 2, 4, 16))
    """

    coded: Any
    coder: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """`(batch, kv_heads, slots, head_dim)` of the vectors that are coded."""
        return tuple(jax.eval_shape(lambda slots: slots.with_tokens(slots.tokens), self).shape)

    @property
    def dtype(self) -> Any:
        """Of decoded vectors."""
        return jnp.dtype(jnp.float32)

    @property
    def tokens(self) -> dict[str, Any]:
        """The arrays of the codes, by name."""
        return self.coded.tokens

    @property
    def coding(self) -> Any:
        return self.coder.coding

    @property
    def tables(self) -> Any:
        return self.coder.tables

    def checked(self, name: str) -> "CodedSlots":
        """Itself, if every slot is decoded by itself."""
        if self.coded.blocks or self.coded.recent is not None:
            raise ConfigError(
                f"decode_attention: {name} is coded by {self.coding}, where successive tokens share scales or the last "
                "ones are not coded; decode it beforehand, or take a coding whose tokens stand alone (CQ, IntKV)"
            )
        return self

    def decode(self, start: Any, count: int) -> Float[Array, "batch kv_heads count head_dim"]:
        """The vectors of `count` slots from `start`, float32."""

        def cut(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, count, axis=-2)

        return self.with_tokens({name: cut(x) for name, x in self.tokens.items()})

    def with_tokens(self, tokens: dict[str, Any]) -> Array:
        """What other arrays of codes stand for."""
        return self.coder.decode(dataclasses.replace(self.coded, tokens=tokens))
