"""Neural collaborative filtering in plain JAX: GMF, MLP and NeuMF, which score how much a user likes an item.

He et al., Neural Collaborative Filtering (WWW 2017). GMF multiplies two vectors feature by feature (section 3.2), MLP
sends two joined vectors through layers (section 3.3), NeuMF does both and reads the results together (section 3.4).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.distill.mlp import init_mlp

Params = dict[str, Any]


def init_ncf(
    key: jax.Array, users: int, items: int, *, gmf: int = 8, mlp: Sequence[int] = (32, 16, 8), scale: float = 0.1
) -> Params:
    """Vectors of every user and item, the layers between, and a head over all that they give.

    Args:
        key: of the weights: vectors normal with deviation `scale`, layers He-normal, biases zero.
        users, items: how many.
        gmf: length of the vectors that are multiplied; 0 for MLP alone.
        mlp: width of the two joined vectors (even), then of each layer; empty for GMF alone.
        scale: see `key`.

    Raises:
        ValueError: neither of the two, or joined vectors that do not halve.

    Example:
        >>> params = init_ncf(jax.random.key(0), 5, 7, gmf=4, mlp=(8, 6, 3))
        >>> jax.tree.map(jnp.shape, params)["gmf"], jax.tree.map(jnp.shape, params)["head"]
        ({'item': (7, 4), 'user': (5, 4)}, {'bias': (1,), 'kernel': (7, 1)})
    """
    if gmf < 1 and not mlp or len(mlp) == 1 or (mlp and mlp[0] % 2):
        raise ValueError(f"init_ncf: gmf={gmf}, mlp={tuple(mlp)}: give one of them, and mlp an even width and layers")
    keys = jax.random.split(key, 4)

    def vectors(key: jax.Array, dim: int) -> Params:
        of_users, of_items = jax.random.split(key)
        return {
            "user": scale * jax.random.normal(of_users, (users, dim)),
            "item": scale * jax.random.normal(of_items, (items, dim)),
        }

    params: Params = {"gmf": vectors(keys[0], gmf)} if gmf > 0 else {}
    if mlp:
        params |= {"mlp": vectors(keys[1], mlp[0] // 2), "layers": init_mlp(keys[2], mlp)}
    return params | {"head": init_mlp(keys[3], (max(gmf, 0) + (mlp[-1] if mlp else 0), 1))["layer_0"]}


def ncf_lower(params: Params, pairs: Int[Array, "batch 2"]) -> Float[Array, "batch middle"]:
    """The products of GMF and what the first layer of MLP gives, joined.

    Args:
        params: from `init_ncf`.
        pairs: a user and an item a row.
    """
    user, item = pairs[:, 0], pairs[:, 1]
    parts = [params["gmf"]["user"][user] * params["gmf"]["item"][item]] if "gmf" in params else []
    if "mlp" in params:
        joined = jnp.concatenate([params["mlp"]["user"][user], params["mlp"]["item"][item]], axis=-1)
        parts.append(_layer(params["layers"]["layer_0"], joined))
    return jnp.concatenate(parts, axis=-1)


def ncf_upper(params: Params, middle: Float[Array, "batch middle"]) -> tuple[jax.Array, jax.Array]:
    """The rest: features `[batch, d]` that the head reads, and the scores `[batch]`."""
    features = middle
    if "mlp" in params:
        products = params["gmf"]["user"].shape[-1] if "gmf" in params else 0
        x = middle[:, products:]
        for i in range(1, len(params["layers"])):
            x = _layer(params["layers"][f"layer_{i}"], x)
        features = jnp.concatenate([middle[:, :products], x], axis=-1)
    return features, (features @ params["head"]["kernel"] + params["head"]["bias"])[:, 0]


def apply_ncf(params: Params, pairs: Int[Array, "batch 2"]) -> Float[Array, "batch"]:
    """Scores: the logit of "likes it".

    Example:
        >>> params = init_ncf(jax.random.key(0), 5, 7)
        >>> apply_ncf(params, jnp.array([[0, 3], [4, 6]])).shape
        (2,)
    """
    return ncf_upper(params, ncf_lower(params, pairs))[1]


def _layer(layer: Params, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ layer["kernel"] + layer["bias"])
