"""A low-rank part that training adds to a compressed weight, told apart from factors that a sketch made."""

from effjax.arrays.base import register
from effjax.arrays.low_rank import LowRank


@register
class Adapter(LowRank):
    """`W = a @ b`, as `LowRank`; the type says that it is the trained update (LoRA) and not part of the base.

    Stands last among the parts of a `Sum`: `Sum(parts=(base, Adapter(a=..., b=...)))`.

    Attributes:
        a: `float[*L, in, rank]`.
        b: `float[*L, rank, out]`.
        dtype: dtype of the materialised weight, that of the base.

    Example:
        >>> import jax.numpy as jnp
        >>> from effjax.arrays import LowRank
        >>> part = Adapter(a=jnp.ones((8, 2)), b=jnp.zeros((2, 4)))
        >>> part.shape, part.rank, isinstance(part, LowRank)
        ((8, 4), 2, True)
    """
