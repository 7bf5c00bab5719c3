"""STABLE-RPS: a table that is folded evenly over the model, and gradients that do not know its scale."""

import dataclasses
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.arrays.shared import Shared, shared_array
from effjax.errors import LeafError
from effjax.paths import leaves_with_paths
from effjax.sketch.sharing import SharedParams, Sharing, per_matrix

S = TypeVar("S", bound=SharedParams)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableRPS(Sharing):
    """Stable randomised parameter sharing (Desai and Shrivastava 2023), for `share_params`.

    The weights of all leaves stand in one row that is cut into runs as long as the table; each run is turned by a
    hashed amount and laid over the table. Every slot is read by `floor(ratio)` or `ceil(ratio)` weights, and at
    `ratio=1` by one: the dense model comes back, to the bit. Train with `scale_gradients` and `scale_updates`, which
    make the steps independent of the scale of the table.

    Example:
        >>> import jax
        >>> from effjax.sketch import expand, share_params
        >>> w = jax.random.normal(jax.random.key(0), (16, 16))
        >>> shared = share_params({"kernel": w}, StableRPS(ratio=1), key=jax.random.key(1))
        >>> bool((expand(shared)["kernel"].materialize() == w).all())
        True
    """


@partial(jax.tree_util.register_dataclass, data_fields=["gradient", "update"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class SlotScales:
    """What gradients and updates of a table are multiplied by, a number a slot. Does not change in training.

    With the factors `a` (sign and scale) of the weights that read a slot and `rms` the root of their mean square, the
    table in units of weights is `u = rms * table`.

    Attributes:
        gradient: `rms / sum(a^2)`. The gradient of the table is the sum of `a * g` over the gradients `g` of the
            weights; times this it is the step of `u` that is nearest to a step of all the weights along their own `g`.
        update: `1 / rms`, from a step of `u` to one of the table.
    """

    gradient: Float[Array, " slots"]
    update: Float[Array, " slots"]


def slot_scales(shared: SharedParams) -> SlotScales:
    """How the slots of a table are read: compute it once, beside the state of the optimiser.

    The scale of the gradient is the remedy of STABLE-RPS against ROAST's instability; that of the update extends it to
    optimisers whose step does not grow with the gradient, such as Adam.

    Raises:
        LeafError: no leaf reads the table.
    """
    slots = shared.table.shape[0]
    arrays = [array for _, leaf in leaves_with_paths(shared.params) if (array := shared_array(leaf)) is not None]
    if not arrays:
        raise LeafError("no leaf reads the table: make the parameters with share_params")
    sums = (jnp.zeros(slots), jnp.zeros(slots))
    for array in arrays:
        sums = _counted(array, *sums)
    count, squares = (jnp.where(sums[0] > 0, x, 1) for x in sums)
    rms = jnp.sqrt(squares / count)
    return SlotScales(gradient=rms / squares, update=1 / rms)


def scale_gradients(gradients: S, scales: SlotScales) -> S:
    """Gradients of a `SharedParams`, that of the table in units of weights; goes before the optimiser.

    With plain gradient descent and `scale_updates` behind it, a step moves the weights by the orthogonal projection of
    the dense step onto the models that the table can hold, whatever the scale of the table.

    Example:
        >>> import effjax as ej, jax, jax.numpy as jnp
        >>> from effjax.sketch import StableRPS, expand, share_params
        >>> shared = share_params({"kernel": jnp.ones((8, 8))}, StableRPS(ratio=4), key=jax.random.key(0))
        >>> trained, frozen = ej.partition(shared)
        >>> loss = lambda trained: jnp.square(ej.materialize(expand(ej.combine(trained, frozen)))["kernel"]).sum()
        >>> scales = slot_scales(shared)
        >>> gradients = scale_gradients(jax.grad(loss)(trained), scales)
        >>> step = scale_updates(jax.tree.map(lambda g: -0.1 * g, gradients), scales)
        >>> jax.tree.map(jnp.add, trained, step).table.shape
        (16,)
    """
    return _scaled(gradients, scales.gradient)


def scale_updates(updates: S, scales: SlotScales) -> S:
    """Updates of a `SharedParams` as the table takes them; goes behind the optimiser (after the learning rate)."""
    return _scaled(updates, scales.update)


def _scaled(tree: Any, scale: jax.Array) -> Any:
    return tree.replace(table=(tree.table.astype(jnp.float32) * scale).astype(tree.table.dtype))


@jax.jit
def _counted(array: Shared, count: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array]:
    def add(array: Shared, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        slot, factor = array.slots_and_factors(jnp.arange(array.in_features), count.size)
        return sums[0].at[slot].add(1.0), sums[1].at[slot].add(factor**2)

    return per_matrix(add, array, out=(count, squares))
