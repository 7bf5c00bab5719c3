"""A training step that samples: draw, gather, train and tell the sampler, as one program on the device."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from effjax.data.reweight import LossReweighting
from effjax.data.sampler import Sampler
from effjax.data.selective_backprop import SelectiveBackprop

Losses = Callable[[Any, Any], jax.Array]  # (params, examples [batch, ...]) -> float[batch]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampled:
    """All that a run with a sampler needs to go on; a checkpoint of it resumes within an epoch.

    Attributes:
        params: the parameters.
        opt_state: what optax keeps.
        sampler: the state of the sampler.
    """

    params: Any
    opt_state: Any
    sampler: Any

    @classmethod
    def start(cls, params: Any, optimizer: optax.GradientTransformation, sampler: Any) -> "Sampled":
        """Before the first step."""
        return cls(params=params, opt_state=optimizer.init(params), sampler=sampler)


def sampled_step(
    sampler: Sampler,
    losses: Losses,
    optimizer: optax.GradientTransformation,
    batch: int,
    *,
    reweight: LossReweighting | None = None,
) -> Any:
    """Builds `step(run, key, examples) -> (run, metrics)`; losses of the step go to the sampler at no extra cost.

    Args:
        sampler: chooses the examples.
        losses: `(params, examples) -> float[batch]`, one an example.
        optimizer: any optax transformation.
        batch: examples a step.
        reweight: of the losses within the batch, beside the sampler's weights.

    Returns:
        The step. `examples` are all of them, a pytree of `[n, ...]`; metrics are (sum, count) pairs, of the loss and
        of the norm of the gradient.

    Example:
        >>> from effjax.data import Spec, Uniform
        >>> x = jax.random.normal(jax.random.key(0), (100, 3))
        >>> examples = {"x": x, "y": x @ jnp.array([1.0, 2.0, 3.0])}
        >>> sampler, optimizer = Uniform(), optax.sgd(0.1)
        >>> step = sampled_step(sampler, lambda w, e: (e["x"] @ w - e["y"]) ** 2, optimizer, 10)
        >>> run = Sampled.start(jnp.zeros(3), optimizer, sampler.init(100, Spec()))
        >>> keys = jax.random.split(jax.random.key(1), 50)
        >>> run, metrics = jax.lax.scan(lambda run, key: step(run, key, examples), run, keys)
        >>> run.params.round(2).tolist()
        [1.0, 2.0, 3.0]
    """

    def step(run: Sampled, key: Key[Array, ""], examples: Any) -> tuple[Sampled, dict[str, Any]]:
        ids, weights = sampler.draw(run.sampler, key, batch)
        run, each, norm = _trained(run, losses, optimizer, _rows(examples, ids), weights, reweight)
        run = dataclasses.replace(run, sampler=sampler.update(run.sampler, ids, each))
        return run, {"loss": (each.sum(), jnp.float32(batch)), "grad_norm": (norm, jnp.ones(()))}

    return step


def selective_step(
    sampler: SelectiveBackprop,
    losses: Losses,
    optimizer: optax.GradientTransformation,
    batch: int,
    candidates: int,
) -> Any:
    """As `sampled_step`: a forward pass over `candidates` examples, a backward pass over the `batch` it chooses."""

    def step(run: Sampled, key: Key[Array, ""], examples: Any) -> tuple[Sampled, dict[str, Any]]:
        ids, _ = sampler.draw(run.sampler, key, candidates)
        drawn = _rows(examples, ids)
        each = losses(run.params, drawn)
        places, weights = sampler.choose(run.sampler, key, each, batch)
        run, _, norm = _trained(run, losses, optimizer, _rows(drawn, places), weights, None)
        run = dataclasses.replace(run, sampler=sampler.update(run.sampler, ids, each))
        return run, {"loss": (each.sum(), jnp.float32(candidates)), "grad_norm": (norm, jnp.ones(()))}

    return step


def _rows(examples: Any, ids: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[ids], examples)


def _trained(
    run: Sampled, losses: Losses, optimizer: Any, drawn: Any, weights: jax.Array, reweight: LossReweighting | None
) -> tuple[Sampled, jax.Array, jax.Array]:
    """After a step of the optimizer, the losses before it, and the norm of the gradient."""

    def mean_loss(params: Any) -> tuple[jax.Array, jax.Array]:
        each = losses(params, drawn)
        return jnp.mean(each * (weights if reweight is None else weights * reweight(each))), each

    grads, each = jax.grad(mean_loss, has_aux=True)(run.params)
    updates, opt_state = optimizer.update(grads, run.opt_state, run.params)
    params = optax.apply_updates(run.params, updates)
    return Sampled(params=params, opt_state=opt_state, sampler=run.sampler), each, optax.tree.norm(grads)


def all_losses(losses: Losses, params: Any, examples: Any, batch: int) -> Float[Array, " n"]:
    """The losses of all examples, `batch` at once: the full forward pass of `effjax.data.ExactLoss`.

    Example:
        >>> all_losses(lambda w, x: w * x, 2.0, jnp.arange(5.0), 2).tolist()
        [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    n = len(jax.tree.leaves(examples)[0])

    def of(start: jax.Array) -> jax.Array:
        return losses(params, jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, min(batch, n)), examples))

    # The last slice begins early where the batch does not divide: no example is padded.
    starts = jnp.minimum(jnp.arange(0, n, min(batch, n)), n - min(batch, n))
    found = jax.lax.map(of, starts)
    return jnp.concatenate([found[:-1].reshape(-1), found[-1][len(starts) * min(batch, n) - n :]])
