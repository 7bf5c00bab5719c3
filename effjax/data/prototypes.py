"""Distance from the nearest prototype: which examples are typical and which are not, without a label."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from effjax.errors import ConfigError
from effjax.kv.vector_kmeans import vector_kmeans


def prototype_distances(
    features: Float[Array, "n dim"], prototypes: int, *, key: Key[Array, ""], iterations: int = 50
) -> Float[Array, " n"]:
    """How far each example is from the nearest of `prototypes` k-means centres.

    Pruning by it (Sorscher et al., NeurIPS 2022) keeps the far, hard examples where there are many, and the near,
    typical ones where there are few: `kept_by_score(distances, keep, easiest=...)`.

    Args:
        features: of a network that was trained on something alike.
        prototypes: centres, about as many as there are classes.
        key: of the start of k-means.
        iterations: of k-means, at most.

    Raises:
        ConfigError: fewer examples than prototypes, or none.

    Example:
        >>> x = jnp.array([[0.0, 0.0], [0.0, 0.2], [9.0, 9.0], [9.0, 9.6]])
        >>> [f"{d:.1f}" for d in prototype_distances(x, 2, key=jax.random.key(0))]
        ['0.1', '0.1', '0.3', '0.3']
    """
    n = features.shape[0]
    if not 1 <= prototypes <= n:
        raise ConfigError(f"prototypes={prototypes} for {n} examples: must be between 1 and their number")
    features = features.astype(jnp.float32)
    centres = vector_kmeans(features, jnp.ones(n), prototypes, key=key, iterations=iterations)

    def nearest(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.min(jnp.sum(jnp.square(x - centres), -1)))

    return jax.lax.map(nearest, features, batch_size=1024)
