"""One optimizer step: state, micro-batches, mixed precision, and metrics as sums and counts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from effjax.errors import ConfigError
from train.config import LoopConfig

Batch = Any  # a pytree of arrays whose leading axis is the batch
# (params, batch, key), and what is frozen if anything is, to (sum, count), and {name: (sum, count)} if there is more
LossFn = Callable[..., tuple[Any, ...]]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on, beside its position in the data.

    Attributes:
        step: int32 scalar, steps done.
        params: the parameters.
        opt_state: what optax keeps.
        key: uint32 key data (not a typed key, so that a checkpoint is plain arrays); folded with `step` at each step.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def init_state(init: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step: `init(key)`, an empty optimizer, and a key of its own for the steps."""
    init_key, key = jax.random.split(jax.random.key(seed))
    params = init(init_key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key_data(key))


def make_optimizer(config: LoopConfig) -> optax.GradientTransformation:
    """AdamW under global-norm clipping, with warm-up and a cosine to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, config.steps)

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.ndim >= 2 and getattr(path[-1], "key", None) == "kernel", params
        )

    adamw = optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=config.weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw)


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    compute_dtype: Any = "float32",
    layout: Any = None,
    across: NamedSharding | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds `step(state, batch) -> (state, metrics)`, metrics being (sum, count) pairs that add over steps and hosts.

    The gradient is that of the batch's sum, over the batch's count: with `accumulate` parts it is the same, also where
    the parts count differently. A batch that counts nothing moves nothing.

    Args:
        loss_fn: `(params, batch, key) -> (sum, count)`, the summed loss in float32 and how many terms it has, or their
            weight; a third result `{name: (sum, count)}` goes into the metrics. What a step is given beside state and
            batch follows the key. The count must not depend on the parameters.
        optimizer: any optax transformation.
        accumulate: parts of the batch, computed one after another. Each has a key of its own.
        compute_dtype: floating parameters become this for `loss_fn`; their gradients come back in their own dtype.
        layout: shardings that the gradients shall have, as the parameters.
        across: sharding of the batch's leading axis, for its parts.

    Raises:
        ConfigError: when traced, a loss that is not float32, or a batch that does not divide into the parts.
    """

    def sums(params: Any, batch: Batch, key: jax.Array, *frozen: Any) -> tuple[jax.Array, Metrics]:
        total, count, *more = loss_fn(_cast(params, compute_dtype), batch, key, *frozen)
        if total.dtype != jnp.float32:
            raise ConfigError(f"the loss is {total.dtype}: cast what the model gives to float32 before the loss")
        metrics = {"loss": (total, count)} | (more[0] if more else {})
        return total, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)

    gradient = jax.grad(sums, has_aux=True)

    def placed(grads: Any) -> Any:
        return grads if layout is None else jax.lax.with_sharding_constraint(grads, layout)

    def gradients(params: Any, batch: Batch, key: jax.Array, *frozen: Any) -> tuple[Any, Metrics]:
        if accumulate == 1:
            grads, metrics = gradient(params, batch, key, *frozen)
            return placed(grads), metrics
        parts = jax.tree.map(lambda x: _parts(x, accumulate, across), batch)

        def add(carry: Any, part: Any) -> tuple[Any, None]:
            index, rows = part
            grads, metrics = gradient(params, rows, jax.random.fold_in(key, index), *frozen)
            grads, metrics = jax.tree.map(jnp.add, carry, (grads, metrics))
            return (placed(grads), metrics), None

        first = jax.tree.map(lambda x: x[0], parts)
        empty = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first, key, *frozen)
        )
        return jax.lax.scan(add, (placed(empty[0]), empty[1]), (jnp.arange(accumulate), parts))[0]

    def step(state: TrainState, batch: Batch, *frozen: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, metrics = gradients(state.params, batch, key, *frozen)
        count = metrics["loss"][1]
        scale = 1 / jnp.where(count == 0, 1, count)
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"grad_norm": (optax.tree.norm(grads), jnp.ones(()))}
        return TrainState(state.step + 1, params, opt_state, state.key), metrics

    return step


def _cast(params: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, params)


def _parts(x: jax.Array, parts: int, across: NamedSharding | None) -> jax.Array:
    """`[rows, ...]` as `[parts, rows / parts, ...]`; every part has rows of every device, so none of them moves."""
    rows, shards = x.shape[0], 1 if across is None else across.num_devices // across.mesh.shape["tensor"]
    if rows % (parts * shards):
        raise ConfigError(f"a batch of {rows} rows does not divide into accumulate={parts} parts on {shards} devices")
    x = jnp.moveaxis(x.reshape(rows // parts, parts, *x.shape[1:]), 1, 0)
    if across is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(across.mesh, PartitionSpec(None, *across.spec)))
