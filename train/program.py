"""The compiled step of a run: shapes, shardings and the jitted function, before any array exists.

A `Program` can be compiled ahead of time, also for devices that are not there:

    program.lower(batch).compile().memory_analysis()
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.config import LoopConfig
from train.sharding import AXES, BATCH_AXES, Rules, bytes_per_device, optimizer_layout, params_layout, process_rows
from train.step import Batch, LossFn, Metrics, TrainState, init_state, make_optimizer, make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A step for one mesh.

    Attributes:
        mesh: devices.
        shapes: of the state (a `TrainState` where `build` made it), as `ShapeDtypeStruct`s that carry their sharding.
        across: sharding of a batch's leading axis.
        frozen: shapes of what is not trained, as a tuple of one or none.
        report: a line for every array that could not be cut as the rules want.
        start: makes the state before the first step, laid out.
        step: `(state, batch, *frozen) -> (state, metrics)`, jitted; the state is donated. With several processes the
            batch comes in a pair with their votes to stop.
    """

    mesh: Mesh
    shapes: Any
    across: NamedSharding
    frozen: tuple[Any, ...]
    report: list[str]
    start: Callable[[], Any]
    step: Any

    @property
    def layout(self) -> Any:
        """Shardings of the state."""
        return jax.tree.map(lambda x: x.sharding, self.shapes)

    @property
    def state_bytes(self) -> tuple[int, int]:
        """Of the whole state, and of what one device holds of it."""
        whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.shapes))
        return whole, bytes_per_device(self.shapes, self.layout)

    def lower(self, batch: Batch) -> Any:
        """The step for batches of these shapes, ready to be compiled.

        Args:
            batch: arrays or their shapes, all rows.
        """
        rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.across), batch)
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.shapes, rows, *self.frozen)

    def put(self, batch: Batch, stop: bool) -> Any:
        """What a process read, on its devices as part of the whole batch.

        Args:
            batch: rows of this process.
            stop: its vote.
        """
        if jax.process_count() == 1:
            return jax.device_put(batch, self.across)
        shards = self.across.num_devices // self.mesh.shape["tensor"]
        own = len(process_rows(self.across, shards))

        def whole(x: np.ndarray) -> jax.Array:
            count = len(x) * shards // own
            rows = process_rows(self.across, count)

            def shard(index: Any) -> np.ndarray:
                wanted = range(count)[index[0]]
                first = int(np.searchsorted(rows, wanted.start))
                return x[first : first + len(wanted)]

            return jax.make_array_from_callback((count, *x.shape[1:]), self.across, shard)

        everyone = NamedSharding(self.mesh, PartitionSpec(AXES))
        vote = np.full(1, stop, np.float32)
        return jax.make_array_from_callback((self.mesh.size,), everyone, lambda _: vote), jax.tree.map(whole, batch)


def build(
    loss_fn: LossFn,
    init: Any,
    config: LoopConfig,
    mesh: Mesh,
    *,
    frozen: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    rules: Rules | None = None,
) -> Program:
    """Lays a run out on a mesh; nothing is computed yet.

    Args:
        loss_fn: see `train.step.make_step`.
        init: `key -> params`; or the parameters to go on from.
        config: seed, optimizer, accumulation and precision.
        mesh: see `train.sharding.make_mesh`.
        frozen: arrays, or their shapes, that are not trained.
        optimizer: None for `make_optimizer(config)`.
        rules: see `train.sharding.params_layout`.
    """
    optimizer = make_optimizer(config) if optimizer is None else optimizer
    given, rest = () if callable(init) else (init,), () if frozen is None else (frozen,)

    def fresh(*params: Any) -> TrainState:
        return init_state((lambda _: params[0]) if params else init, optimizer, config.seed)

    abstract, whole = jax.eval_shape(fresh, *given), NamedSharding(mesh, PartitionSpec())
    params, report = params_layout(abstract.params, mesh, rules)
    opt_state = optimizer_layout(abstract.opt_state, abstract.params, params, mesh)
    layout = dataclasses.replace(abstract, step=whole, params=params, opt_state=opt_state, key=whole)  # type: ignore
    across = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    frozen_layout = tuple(params_layout(tree, mesh)[0] for tree in rest)
    step = make_step(
        loss_fn,
        optimizer,
        accumulate=config.accumulate,
        compute_dtype=config.compute_dtype,
        layout=params,
        across=across,
    )

    def voted(state: TrainState, batch: tuple[jax.Array, Batch], *frozen: Any) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, batch[1], *frozen)
        return state, metrics | {"stop": (batch[0].sum(), jax.numpy.ones(()))}

    alone = jax.process_count() == 1
    batches = across if alone else (NamedSharding(mesh, PartitionSpec(AXES)), across)
    jitted = jax.jit(
        step if alone else voted,
        in_shardings=(layout, batches, *frozen_layout),
        out_shardings=(layout, whole),
        donate_argnums=0,
    )

    def start() -> TrainState:
        # Arrays of one process are the same in each; as numpy they may go to the devices of all.
        values = given if alone else jax.tree.map(np.asarray, given)
        return jax.jit(fresh, out_shardings=layout)(*values)

    def with_sharding(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return Program(
        mesh=mesh,
        shapes=jax.tree.map(with_sharding, abstract, layout),
        across=across,
        frozen=jax.tree.map(with_sharding, rest, frozen_layout),
        report=report,
        start=start,
        step=jitted,
    )
