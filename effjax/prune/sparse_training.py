"""RigL and GraNet: masks that move while a network trains, as an optax transformation around any optimizer."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from effjax.arrays.base import PyTree
from effjax.errors import ConfigError
from effjax.prune.api import masks_by_path
from effjax.prune.schedules import cubic_sparsity


@dataclasses.dataclass(frozen=True, kw_only=True)
class RigL:
    """Drops the smallest weights and grows those of the largest gradients (Evci et al., ICML 2020, algorithm 1).

    The density is that of the first mask and stays.

    Attributes:
        fraction: of the active weights that move at the first change; it falls with a cosine.
        every: steps between changes.
        until: step of the last change; three quarters of the training in the paper.
        scope: "leaf" keeps each layer's density, "global" compares all layers.
    """

    until: int
    fraction: float = 0.3
    every: int = 100
    scope: Literal["leaf", "global"] = "leaf"

    def __post_init__(self) -> None:
        _check(self.every, self.until, self.scope, fraction=self.fraction)

    def counts(self, step: Int32[Array, ""], size: int, active: Int32[Array, ""]) -> tuple[jax.Array, jax.Array]:
        """(weights after the change, how many of them are grown)."""
        del size
        share = self.fraction / 2 * (1 + jnp.cos(jnp.pi * step / self.until))
        return active, jnp.floor(share * active).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraNet:
    """Prunes on a cubic schedule, and each time grows back a part elsewhere (Liu et al., NeurIPS 2021, algorithm 1).

    Start from a dense mask, or from a sparse one of `initial` sparsity.

    Attributes:
        sparsity: at the end.
        initial: at the start.
        until: step of the last change.
        begin: step at which pruning begins.
        every: steps between changes.
        regrow: share of the weights that is grown anew at the first change; it falls with a cosine.
        scope: "global" compares all layers, as in the paper, "leaf" gives each the same sparsity.
    """

    sparsity: float
    until: int
    initial: float = 0.0
    begin: int = 0
    every: int = 100
    regrow: float = 0.5
    scope: Literal["leaf", "global"] = "global"

    def __post_init__(self) -> None:
        _check(self.every, self.until, self.scope, regrow=self.regrow, sparsity=self.sparsity, initial=self.initial)

    def counts(self, step: Int32[Array, ""], size: int, active: Int32[Array, ""]) -> tuple[jax.Array, jax.Array]:
        """(weights after the change, how many of them are grown)."""
        left = 1 - cubic_sparsity(step, self.begin, self.until, self.sparsity, self.initial)
        kept = jnp.minimum(jnp.round(left * size).astype(jnp.int32), active)
        share = self.regrow / 2 * (1 + jnp.cos(jnp.pi * step / self.until))
        return kept, jnp.floor(share * kept).astype(jnp.int32)


def _check(every: int, until: int, scope: str, **shares: float) -> None:
    if min(every, until) < 1:
        raise ConfigError(f"every={every}, until={until}: steps, at least 1")
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise ConfigError(f"{name}={share}: a share in [0, 1)")
    if scope not in ("leaf", "global"):
        raise ConfigError(f"scope={scope!r}: choose 'leaf' or 'global'")


class SparseState(NamedTuple):
    """Of `sparse_training`: steps taken, the mask as it is, and the optimizer's own state."""

    count: Int32[Array, ""]
    mask: PyTree
    inner: Any


def sparse_training(
    optimizer: optax.GradientTransformation, mask: PyTree, method: RigL | GraNet
) -> optax.GradientTransformation:
    """Trains under a mask that moves.

    Call it with the gradients of all weights, those under the mask too, and start from `ej.apply_mask(params, mask)`.
    Every `method.every` steps up to `method.until` the step changes the mask in place of training: dropped weights
    become zero, grown ones begin at zero with fresh moments. The mask is part of the state: it is saved, restored and
    sharded with it, like the parameters.

    Args:
        optimizer: any, such as `optax.adamw(...)`.
        mask: the first one, of `ej.prune_mask`; leaves without a mask train as they are.
        method: when and what moves.

    Returns:
        A transformation whose state is a `SparseState`; `state.mask` is for `ej.apply_mask` or `ej.pack_mask`.

    Raises:
        ValueError: `update` is called without parameters.

    Example:
        >>> import effjax as ej
        >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
        >>> mask = ej.prune_mask(params, ej.prune.Random(sparsity=0.75), key=jax.random.key(1))
        >>> optimizer = sparse_training(optax.sgd(0.1), mask, RigL(every=2, until=10))
        >>> params = ej.apply_mask(params, mask)
        >>> state = optimizer.init(params)
        >>> for _ in range(4):
        ...     grads = jax.grad(lambda p: jnp.sum((p["kernel"] - jnp.eye(8)) ** 2))(params)
        ...     updates, state = optimizer.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> int((params["kernel"] != 0).sum()) <= int(state.mask["kernel"].sum()) == 16
        True
    """

    def init(params: PyTree) -> SparseState:
        masks_by_path(params, mask)  # raises where it does not fit
        return SparseState(count=jnp.zeros((), jnp.int32), mask=mask, inner=optimizer.init(params))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, SparseState]:
        if params is None:
            raise ValueError("sparse_training: update needs the parameters: optimizer.update(grads, state, params)")
        count = jnp.asarray(optax.safe_increment(state.count))

        def train() -> tuple[PyTree, PyTree, Any]:
            steps, inner = optimizer.update(_under(state.mask, updates), state.inner, params)
            return _under(state.mask, steps), state.mask, inner

        def change() -> tuple[PyTree, PyTree, Any]:
            new = moved(method, count, state.mask, params, updates)
            kept = jax.tree.map(jnp.logical_and, state.mask, new)
            # What stays is left alone; all others become zero, where those that are grown begin.
            steps = _map_like(lambda w, k: jnp.where(k, 0, -w), params, kept, lambda w: jnp.zeros_like(w))
            whole = _map_like(lambda w, k: k, params, kept, lambda w: jnp.ones(w.shape, bool))
            inner = optax.tree.map_params(optimizer, lambda s, k: jnp.where(k, s, 0), state.inner, whole)
            return steps, new, inner

        due = (count % method.every == 0) & (count <= method.until)
        steps, new, inner = jax.lax.cond(due, change, train)
        return steps, SparseState(count=count, mask=new, inner=inner)

    return optax.GradientTransformation(init, update)


def moved(method: RigL | GraNet, step: Int32[Array, ""], mask: PyTree, params: PyTree, grads: PyTree) -> PyTree:
    """The mask after a change at `step`: the largest of the active weights stay, the largest gradients grow."""
    masks, structure = jax.tree.flatten(mask)
    weights = jax.tree.leaves(_map_like(lambda w, m: w, params, mask, lambda w: None))
    slopes = jax.tree.leaves(_map_like(lambda g, m: g, grads, mask, lambda g: None))

    def chosen(mask: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
        total, grown = method.counts(step, mask.size, mask.sum(dtype=jnp.int32))
        stays = _highest(jnp.where(mask, jnp.abs(w.astype(jnp.float32)), -1.0), total - grown)
        return stays | _highest(jnp.where(stays, -1.0, jnp.abs(g.astype(jnp.float32))), grown)

    if method.scope == "leaf":
        found = [chosen(m.ravel(), w.ravel(), g.ravel()) for m, w, g in zip(masks, weights, slopes, strict=True)]
    else:
        whole = chosen(*(jnp.concatenate([x.ravel() for x in leaves]) for leaves in (masks, weights, slopes)))
        ends = [sum(m.size for m in masks[: i + 1]) for i in range(len(masks))]
        found = [whole[end - m.size : end] for m, end in zip(masks, ends, strict=True)]
    return structure.unflatten([f.reshape(m.shape) for f, m in zip(found, masks, strict=True)])


def _highest(scores: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` highest entries of a vector, a traced number; ties to the first."""
    rank = jnp.argsort(jnp.argsort(-scores, stable=True), stable=True)
    return rank < count


def _under(mask: PyTree, tree: PyTree) -> PyTree:
    """Zero where the mask is False; as it is where there is none."""
    return _map_like(lambda x, m: jnp.where(m, x, 0), tree, mask, lambda x: x)


def _map_like(fn: Any, tree: PyTree, mask: PyTree, without: Any) -> PyTree:
    """`fn(leaf, mask)` where a leaf has a mask, `without(leaf)` where it has None."""
    return jax.tree.map(lambda m, x: without(x) if m is None else fn(x, m), mask, tree, is_leaf=lambda m: m is None)
