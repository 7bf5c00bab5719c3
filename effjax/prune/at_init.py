"""Scores of weights before training: SNIP, GraSP and SynFlow, as trees like the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.arrays.base import PyTree
from effjax.errors import ConfigError, LeafError
from effjax.paths import Where, leaves_with_paths
from effjax.prune.api import apply_mask, prune_mask
from effjax.prune.highest import Highest
from effjax.prune.schedules import geometric_sparsity


def snip(loss: Callable[..., jax.Array], params: PyTree, *batch: Any) -> PyTree:
    """Connection sensitivity `|w * dL/dw|` (Lee et al., SNIP, ICLR 2019, equation 4).

    Args:
        loss: `loss(params, *batch) -> scalar`.
        params: dense parameters, usually as they were drawn.
        batch: about ten examples a class.

    Returns:
        Scores like `params`, for `ej.prune_mask(scores, ej.prune.Highest(...))`.

    Example:
        >>> import effjax as ej
        >>> params = {"kernel": jnp.array([[1.0, 4.0], [2.0, 1.0]])}
        >>> scores = snip(lambda p, x: jnp.sum(x @ p["kernel"]), params, jnp.array([[3.0, 1.0]]))
        >>> ej.prune_mask(scores, ej.prune.Highest(sparsity=0.5, scope="global"))["kernel"].tolist()
        [[True, True], [False, False]]
    """
    return jax.tree.map(lambda w, g: jnp.abs(w * g), params, jax.grad(loss)(params, *batch))


def grasp(loss: Callable[..., jax.Array], params: PyTree, *batch: Any) -> PyTree:
    """Gradient signal preservation `w * (H g)`: high where removal would shrink the gradient (Wang et al., GraSP, ICLR
    2020, equation 8, of which the negative is removed from the top).

    Arguments and result are those of `snip`. The authors divide the logits of the loss by a temperature of 200.

    Example:
        >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
        >>> grasp(lambda p: jnp.sum(p["kernel"] ** 4) / 4, params)["kernel"].ravel().tolist()
        [3.0, 192.0]
    """
    gradient = jax.grad(lambda p: loss(p, *batch))
    g = gradient(params)
    return jax.tree.map(lambda w, hg: w * hg, params, jax.jvp(gradient, (params,), (g,))[1])


def synflow_scores(apply: Callable[..., jax.Array], params: PyTree, x: jax.Array) -> PyTree:
    """Synaptic flow `|w * dR/dw|` where `R` is the sum of what the network of absolute weights makes of ones (Tanaka et
    al., SynFlow, NeurIPS 2020, equation 2).

    Args:
        apply: `apply(params, x)`, linear where all is positive, as with ReLUs and without norms over the batch.
        params: dense parameters.
        x: an input; its shape alone is used.

    Example:
        >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [1.0]])}
        >>> scores = synflow_scores(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, jnp.zeros((1, 1)))
        >>> scores["a"].tolist(), scores["b"].tolist()
        ([[3.0, 2.0]], [[3.0], [2.0]])
    """
    positive = jax.tree.map(jnp.abs, params)
    flow = jax.grad(lambda p: jnp.sum(apply(p, jnp.ones_like(x))))(positive)
    return jax.tree.map(lambda w, g: jnp.abs(w * g), positive, flow)


def synflow(
    apply: Callable[..., jax.Array],
    params: PyTree,
    x: jax.Array,
    *,
    sparsity: float,
    rounds: int = 100,
    where: Where | None = None,
) -> PyTree:
    """The mask after many small cuts by synaptic flow, which never empties a layer before all others are as thin.

    After round `k` of `n` the share `(1 - sparsity) ** (k / n)` of the selected weights is left (algorithm 1 of the
    paper). No data is used.

    Args:
        apply, params, x: see `synflow_scores`.
        sparsity: of all selected weights together.
        rounds: of scoring and cutting.
        where: weights to prune, as in `effjax.prune_mask`.

    Raises:
        ConfigError: `rounds` is below 1, or `sparsity` no share.
        LeafError: scores are not finite: the flow of a deep network left float32's range.

    Example:
        >>> import effjax as ej
        >>> keys = jax.random.split(jax.random.key(0))
        >>> params = {str(i): {"kernel": jax.random.normal(key, (16, 16))} for i, key in enumerate(keys)}
        >>> apply = lambda p, x: jax.nn.relu(x @ p["0"]["kernel"]) @ p["1"]["kernel"]
        >>> mask = synflow(apply, params, jnp.ones((1, 16)), sparsity=0.9, rounds=10)
        >>> sum(m.sum().item() for m in jax.tree.leaves(mask))
        51
    """
    if rounds < 1 or not 0 <= sparsity < 1:
        raise ConfigError(f"rounds={rounds}, sparsity={sparsity}: at least one round, and a share in [0, 1)")
    scores_of = jax.jit(lambda p: synflow_scores(apply, p, x))
    mask, kept = None, params
    for done in range(1, rounds + 1):
        scores = scores_of(kept)
        for path, leaf in leaves_with_paths(scores):
            if not bool(jnp.isfinite(leaf).all()):
                raise LeafError(f"{path}: scores are not finite; scale the weights down, which changes no choice")
        share = geometric_sparsity(done, rounds, sparsity)
        mask = prune_mask(scores, Highest(sparsity=share, scope="global"), where=where)
        kept = apply_mask(params, mask)
    return mask
