"""ReLU Strikes Back: a model's activations exchanged for ReLUs, and how many zeros that gives.

Source: Mirzadeh et al., ReLU Strikes Back: Exploiting Activation Sparsity in Large Language Models (ICLR 2024).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.base import PyTree
from effjax.errors import ConfigError
from effjax.lift.calibrate import InputStats
from effjax.models.config import DecoderConfig
from effjax.paths import leaves_with_paths, path_str


def relufy(config: DecoderConfig, *, stage: int = 1, shift: float = 0.0) -> DecoderConfig:
    """The same model with ReLUs: the weights stay as they are, and are to be trained a little further.

    Args:
        config: of a decoder with SiLU, or with ReLUs already.
        stage: 1 makes the gate of every feed-forward layer a ReLU; 2 also puts one after the norms before attention and
            feed-forward layer (section 4 of the paper).
        shift: the gate lets through what exceeds it (section 5.3); `shift_for` finds one.

    Raises:
        ConfigError: another stage.

    Example:
        >>> from effjax.models.embedded import load_default
        >>> config = relufy(load_default().config, stage=2, shift=0.5)
        >>> config.hidden_act, config.relu_shift, config.norm_relu
        ('relu', 0.5, True)
    """
    if stage not in (1, 2):
        raise ConfigError(f"stage={stage}: 1 exchanges the activation, 2 also adds ReLUs after the norms")
    return dataclasses.replace(config, hidden_act="relu", relu_shift=shift, norm_relu=stage == 2)


def shift_for(preactivations: Float[Array, "*any"], sparsity: float) -> float:
    """The smallest shift of a ReLU at which a share of these values is cut to 0.

    Args:
        preactivations: what a gate's activation is applied to, of a calibration text (`neurons.gate_inputs`).
        sparsity: the share, between 0 and 1.

    Raises:
        ConfigError: `sparsity` is not between 0 and 1.

    Example:
        >>> shift_for(jnp.arange(10.0), 0.8)
        7.0
    """
    if not 0 < sparsity < 1:
        raise ConfigError(f"sparsity={sparsity}: must be between 0 and 1")
    return float(jnp.quantile(jnp.asarray(preactivations, jnp.float32), sparsity, method="lower"))


def zero_shares(stats: PyTree) -> dict[str, float]:
    """For every weight the share of its inputs that were exactly 0.

    Args:
        stats: of `effjax.calibrate(..., needs={"zeros"})`.

    Example:
        >>> import effjax as ej
        >>> params = {"kernel": jnp.ones((4, 2))}
        >>> x = jnp.array([[0.0, 1.0, 0.0, 2.0]])
        >>> zero_shares(ej.calibrate(lambda p, x: x @ p["kernel"], params, [x], needs={"zeros"}))
        {'kernel': 0.5}
    """
    return {path: float(jnp.mean(leaf.zeros)) for path, leaf in _watched(stats)}


def flops_share(stats: PyTree, params: PyTree) -> float:
    """Share of the dense products' work that remains where zeros of the input are skipped (table 1 of the paper).

    Products with weights that `stats` hold count, two operations a weight and row; attention's own do not.

    Example:
        >>> import effjax as ej
        >>> params = {"kernel": jnp.ones((4, 2))}
        >>> x = jnp.array([[0.0, 1.0, 2.0, 3.0]])
        >>> flops_share(ej.calibrate(lambda p, x: x @ p["kernel"], params, [x], needs={"zeros"}), params)
        0.75
    """
    sizes = {path: jnp.size(leaf) for path, leaf in leaves_with_paths(params)}
    shares = zero_shares(stats)
    return sum(sizes[path] * (1 - zeros) for path, zeros in shares.items()) / sum(sizes[path] for path in shares)


def _watched(stats: PyTree) -> list[tuple[str, Any]]:
    flat = jax.tree_util.tree_leaves_with_path(stats, is_leaf=lambda x: isinstance(x, InputStats))
    return [(path_str(path), leaf) for path, leaf in flat]
