"""How well a recommender ranks: hit rate and NDCG of one wanted item among others."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def hit_rate_and_ndcg(
    scores: Float[Array, "users items"], *, top: int = 10
) -> tuple[Float[Array, "users"], Float[Array, "users"]]:
    """Whether the first item of each row is among the `top` best, and the gain of the place it has.

    The protocol of He et al. (Neural Collaborative Filtering, WWW 2017, section 4.1): with one wanted item NDCG is
    `1 / log2(place + 1)`, the first place being 1, and nothing behind `top`. Items that score the same as the wanted
    one count as better, so that a model that tells nothing apart has no hits.

    Args:
        scores: the wanted item first, then those that it is ranked against.
        top: places that count.

    Returns:
        Two values a user, float32; their means are HR@`top` and NDCG@`top`.

    Example:
        >>> hits, gains = hit_rate_and_ndcg(jnp.array([[3.0, 1.0, 2.0], [2.0, 3.0, 1.0], [0.0, 0.0, 1.0]]), top=2)
        >>> hits.tolist(), [round(float(g), 3) for g in gains]
        ([1.0, 1.0, 0.0], [1.0, 0.631, 0.0])
    """
    before = (scores[:, 1:] >= scores[:, :1]).sum(axis=1)
    hits = (before < top).astype(jnp.float32)
    return hits, hits / jnp.log2(before + 2.0)
