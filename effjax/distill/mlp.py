"""Small multilayer perceptrons in plain JAX: what committees are made of, and students and teachers to try them on."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Mlp = dict[str, dict[str, Any]]  # "layer_0": kernel and bias, and so on


def init_mlp(key: jax.Array, widths: Sequence[int]) -> Mlp:
    """Layers from each width to the next, He-normal kernels and zero biases.

    Example:
        >>> jax.tree.map(jnp.shape, init_mlp(jax.random.key(0), (4, 8, 2)))["layer_1"]
        {'bias': (2,), 'kernel': (8, 2)}
    """
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    keys = jax.random.split(key, len(pairs))
    return {
        f"layer_{i}": {"kernel": jax.random.normal(k, (n, m)) * (2 / n) ** 0.5, "bias": jnp.zeros(m)}
        for i, (k, (n, m)) in enumerate(zip(keys, pairs, strict=True))
    }


def layer_outputs(mlp: Mlp, x: Float[Array, "*batch in"], first: int = 0, last: int | None = None) -> list[jax.Array]:
    """What layers `first` to `last` give, one after the other: ReLUs behind all but the network's last.

    Example:
        >>> mlp = init_mlp(jax.random.key(0), (4, 8, 2))
        >>> [y.shape for y in layer_outputs(mlp, jnp.ones((5, 4)))]
        [(5, 8), (5, 2)]
    """
    outputs = []
    for i in range(first, len(mlp) if last is None else last):
        x = x @ mlp[f"layer_{i}"]["kernel"] + mlp[f"layer_{i}"]["bias"]
        x = x if i == len(mlp) - 1 else jax.nn.relu(x)
        outputs.append(x)
    return outputs


def apply_mlp(mlp: Mlp, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
    """The last layer's output."""
    return layer_outputs(mlp, x)[-1]


def halves(middle: int) -> tuple[Callable[[Any, jax.Array], jax.Array], Callable[[Any, jax.Array], Any]]:
    """A perceptron cut behind its first `middle` layers, as `Teacher` and the student of `diverse_loss` want it.

    Returns:
        `apply_lo(mlp, x)`, the output of layer `middle`; `apply_hi(mlp, hidden)`, the inputs of the last layer and its
        outputs.

    Example:
        >>> lo, hi = halves(1)
        >>> mlp = init_mlp(jax.random.key(0), (4, 8, 6, 2))
        >>> [y.shape for y in hi(mlp, lo(mlp, jnp.ones((5, 4))))]
        [(5, 6), (5, 2)]
    """

    def apply_lo(mlp: Mlp, x: jax.Array) -> jax.Array:
        return layer_outputs(mlp, x, 0, middle)[-1]

    def apply_hi(mlp: Mlp, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        penultimate, logits = layer_outputs(mlp, hidden, middle)[-2:]
        return penultimate, logits

    return apply_lo, apply_hi
