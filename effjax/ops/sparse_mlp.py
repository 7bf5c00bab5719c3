"""An MLP of which only some neurons are computed, and the choice of these neurons from scores."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from effjax.ops.dispatch import MACHINES, no_hopper
from effjax.ops.neurons import CodedRows, Neurons, take_rows
from effjax.ops.platform import platform_operation
from kernels_cpu import choose_neurons as native_choice
from kernels_cpu import sparse_mlp as native
from kernels_pallas.sparse_mlp import gpu, tpu

Implementation = Literal["reference", "dense", "cpu", "tpu", "gpu"]
IMPLEMENTATIONS = ("reference", "dense", "cpu", "tpu", "gpu")
PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "cuda": "gpu"}  # of jax's lowering, to the name of their kernel
ACTIVATIONS = {"relu": jax.nn.relu, "silu": jax.nn.silu, "gelu": jax.nn.gelu}
_STATIC = ("treedef", "block")


def sparse_mlp(
    x: Float[Array, "*batch in"],
    neurons: Neurons,
    chosen: Int32[Array, " k"],
    count: Int32[Array, ""] | int | None = None,
    *,
    block: int = 1,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch out"]:
    """The output of an MLP whose other neurons are zero: `down[S].T @ h[S] + down_bias`, see `Neurons`.

    All rows of `x` share the neurons: choose the union of what each needs (`choose_neurons`). Differentiable in `x` and
    in floating weights.

    Args:
        x: inputs of the MLP.
        neurons: its weights by neuron.
        chosen: distinct neurons, or blocks of them where `block` is not 1; one outside `[0, neurons)` adds nothing.
        count: how many of `chosen` count, from the first; all where None. What comes behind is not read.
        block: consecutive neurons that are chosen together; it divides their number.
        implementation: "reference" gathers the rows and multiplies; "dense" computes every neuron and masks; "cpu",
            "tpu" and "gpu" are kernels. None takes the fastest by `estimates` for the platform, see there.

    Returns:
        float32.

    Raises:
        ValueError: shapes that do not fit together, or an implementation that does not run here or take these operands.

    Example:
        >>> from effjax.ops.neurons import make_neurons
        >>> neurons = make_neurons(jnp.eye(4), jnp.eye(4))
        >>> sparse_mlp(jnp.array([5.0, 6.0, 7.0, 8.0]), neurons, jnp.array([1, 3])).tolist()
        [0.0, 6.0, 0.0, 8.0]
    """
    return sparse_mlp_used(x, neurons, chosen, count, block=block, implementation=implementation)[0]


def sparse_mlp_used(
    x: Float[Array, "*batch in"],
    neurons: Neurons,
    chosen: Int32[Array, " k"],
    count: Int32[Array, ""] | int | None = None,
    *,
    block: int = 1,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*batch out"], Bool[Array, " neurons"]]:
    """`sparse_mlp`, and which of its neurons were not zero for some row of `x`.

    Example:
        >>> from effjax.ops.neurons import make_neurons
        >>> neurons = make_neurons(jnp.eye(4), jnp.eye(4))
        >>> sparse_mlp_used(jnp.array([5.0, -6.0, 7.0, 8.0]), neurons, jnp.array([0, 1, 2]))[1].tolist()
        [True, False, True, False]
    """
    if x.shape[-1] != neurons.up.shape[1] or chosen.ndim != 1 or neurons.count % block:
        raise ValueError(
            f"sparse_mlp: x {list(x.shape)}, {neurons.count} neurons of {neurons.up.shape[1]} inputs, chosen "
            f"{list(chosen.shape)} and block={block} do not fit: x is [*batch, in], chosen [k], and block divides the "
            "neurons"
        )
    count = jnp.int32(len(chosen)) if count is None else jnp.asarray(count, jnp.int32)
    leaves, treedef = jax.tree.flatten(neurons)
    flat = x.reshape(-1, x.shape[-1])
    found: Any = _sparse_mlp(treedef, block, implementation, flat, chosen, count, *leaves)
    y, used = found
    return y.reshape(*x.shape[:-1], y.shape[-1]), used


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sparse_mlp(treedef: Any, block: int, implementation: str | None, *arrays: jax.Array) -> list[jax.Array]:
    if implementation is None:
        return _chosen(*arrays, treedef=treedef, block=block)
    if reason := why_not(implementation, arrays[0], treedef.unflatten(arrays[3:]), block):
        raise ValueError(f"sparse_mlp: implementation={implementation!r} does not take this: {reason}")
    return _RUN[implementation](*arrays, treedef=treedef, block=block)


def _forward(treedef: Any, block: int, implementation: str | None, *arrays: jax.Array) -> tuple[list, tuple]:
    return _sparse_mlp(treedef, block, implementation, *arrays), arrays


def _backward(treedef: Any, block: int, implementation: str | None, arrays: tuple, g: list) -> tuple:
    floating = [jnp.issubdtype(a.dtype, jnp.floating) for a in arrays]

    def reference(*given: jax.Array) -> jax.Array:
        rest = iter(given)
        whole = [next(rest) if f else a for f, a in zip(floating, arrays, strict=True)]
        return _reference(*whole, treedef=treedef, block=block)[0]

    found = iter(jax.vjp(reference, *(a for f, a in zip(floating, arrays, strict=True) if f))[1](g[0]))
    return tuple(next(found) if f else None for f in floating)


_sparse_mlp.defvjp(_forward, _backward)


def each_neuron(chosen: jax.Array, count: jax.Array, neurons: int, block: int) -> tuple[jax.Array, jax.Array]:
    """The neurons of chosen blocks, and whether each counts."""
    counts = (jnp.arange(len(chosen)) < count) & (chosen >= 0) & (chosen < neurons // block)
    each = (chosen[:, None] * block + jnp.arange(block, dtype=chosen.dtype)).ravel()
    return jnp.clip(each, 0, neurons - 1), jnp.repeat(counts, block)


def _activations(x: jax.Array, neurons: Neurons, rows: jax.Array | None = None) -> jax.Array:
    """Of some neurons, float32 `[*batch, k]`; of all where None."""

    def product(matrix: Any, bias: jax.Array | None) -> jax.Array:
        z = _products(_whole(matrix) if rows is None else take_rows(matrix, rows), x)
        return z if bias is None else z + (bias if rows is None else bias[rows])

    act, z = ACTIVATIONS[neurons.activation], product(neurons.up, neurons.up_bias)
    if neurons.gate is None:
        return act(z - neurons.shift)
    return act(product(neurons.gate, neurons.gate_bias) - neurons.shift) * z


def _products(rows: jax.Array, x: jax.Array) -> jax.Array:
    """`x @ rows.T`, rows first: XLA is several times slower on a CPU with one input before a transposed matrix."""
    y = jax.lax.dot_general(rows, x.astype(jnp.float32), (((1,), (x.ndim - 1,)), ((), ())))
    return jnp.moveaxis(y, 0, -1)


def _finish(h: jax.Array, down: jax.Array, neurons: Neurons) -> jax.Array:
    y = h @ down
    return y if neurons.down_bias is None else y + neurons.down_bias


def _reference(x: jax.Array, chosen: jax.Array, count: jax.Array, *leaves: jax.Array, treedef: Any, block: int) -> Any:
    neurons: Neurons = treedef.unflatten(leaves)
    rows, counts = each_neuron(chosen, count, neurons.count, block)
    h = jnp.where(counts, _activations(x, neurons, rows), 0.0)
    used = jnp.zeros(neurons.count, bool).at[rows].max((h != 0).any(0))
    return [_finish(h, take_rows(neurons.down, rows), neurons), used]


def _dense(x: jax.Array, chosen: jax.Array, count: jax.Array, *leaves: jax.Array, treedef: Any, block: int) -> Any:
    neurons: Neurons = treedef.unflatten(leaves)
    rows, counts = each_neuron(chosen, count, neurons.count, block)
    mask = jnp.zeros(neurons.count).at[rows].add(counts.astype(jnp.float32))
    h = _activations(x, neurons) * mask
    return [_finish(h, _whole(neurons.down), neurons), (h != 0).any(0)]


def mlp(
    x: Float[Array, "*batch in"], neurons: Neurons, *, mask: Float[Array, "..."] | None = None
) -> Float[Array, "*batch out"]:
    """The whole MLP, float32; activations are multiplied by a mask `[neurons]` or `[*batch, neurons]` where given.

    Example:
        >>> from effjax.ops.neurons import make_neurons
        >>> mlp(jnp.array([5.0, -6.0]), make_neurons(jnp.eye(2), jnp.eye(2))).tolist()
        [5.0, 0.0]
    """
    h = _activations(x, neurons)
    return _finish(h if mask is None else h * mask, _whole(neurons.down), neurons)


def _whole(rows: Any) -> jax.Array:
    return rows.take(jnp.arange(rows.shape[0])) if isinstance(rows, CodedRows) else rows.astype(jnp.float32)


def _native(x: jax.Array, chosen: jax.Array, count: jax.Array, *leaves: jax.Array, treedef: Any, block: int) -> Any:
    neurons: Neurons = treedef.unflatten(leaves)
    if block > 1:
        chosen = (chosen[:, None] * block + jnp.arange(block, dtype=chosen.dtype)).ravel()
    y, used = native.sparse_mlp(x, neurons, chosen, count * block)
    return [y, used.astype(bool)]


def _pallas(kernel: Any) -> Any:
    def run(x: jax.Array, chosen: jax.Array, count: jax.Array, *leaves: jax.Array, treedef: Any, block: int) -> Any:
        # The kernels do not tell; a program that does not ask leaves the second computation out.
        used = _reference(x, chosen, count, *leaves, treedef=treedef, block=block)[1]
        return [kernel.sparse_mlp(x, treedef.unflatten(leaves), chosen, count, block=block), used]

    return run


_RUN = {"reference": _reference, "dense": _dense, "cpu": _native, "tpu": _pallas(tpu), "gpu": _pallas(gpu)}


def why_not(implementation: str, x: Any, neurons: Neurons, block: int = 1) -> str:
    """Why an implementation does not take these operands, in a sentence; empty where it does."""
    if implementation not in IMPLEMENTATIONS:
        return f"there is none of that name; choose one of {', '.join(IMPLEMENTATIONS)}"
    if implementation == "cpu":
        return native.why_not(neurons)
    if implementation == "gpu":
        return gpu.why_not(x.dtype, neurons)
    return tpu.why_not(x.dtype, neurons, block) if implementation == "tpu" else ""


def estimates(platform: str, x: Any, neurons: Neurons, k: int, *, block: int = 1) -> dict[str, float]:
    """Modelled seconds of every implementation that takes the operands, for `k` chosen neurons or blocks.

    Those for a CPU follow measurements (`benchmarks/kernels/sparse_mlp.py`); those for other platforms are guesses.

    Args:
        platform: "cpu", "tpu" or "cuda".
        x: `[batch, in]`, an array or its abstract shape.

    Example:
        >>> from effjax.ops.neurons import make_neurons
        >>> neurons = jax.eval_shape(lambda w: make_neurons(w, w.T), jax.ShapeDtypeStruct((2048, 8192), jnp.float32))
        >>> found = [estimates("cpu", jax.ShapeDtypeStruct((n, 2048), jnp.float32), neurons, 8192) for n in (1, 256)]
        >>> [min(times, key=times.get) for times in found]
        ['cpu', 'dense']
    """
    machine, rows = MACHINES[platform], x.shape[0]
    share = min(1.0, k * block / neurons.count)
    stream = neurons.count * neurons.bytes_per_neuron / machine.bandwidth
    wide = 4 * neurons.count * neurons.weights_per_neuron / machine.bandwidth
    arithmetic = 2 * rows * neurons.count * neurons.weights_per_neuron / machine.flops
    # Coded rows are spread to float32 by XLA, one code after the other on a CPU.
    coded = isinstance(neurons.up, CodedRows)
    spread = 2 * wide + (neurons.count * neurons.weights_per_neuron / 5e8 if platform == "cpu" else 0) if coded else 0.0
    found = {}
    name = PLATFORMS[platform]
    # Of the kernels; on a GPU every row of x reads the neurons again, from a cache twice as fast as memory.
    own = {"cpu": 1.25 * arithmetic, "tpu": arithmetic, "gpu": rows / 2 * stream}[name]
    if not why_not(name, x, neurons, block) and not (name == "gpu" and no_hopper()):
        found[name] = share * max(stream, own)  # first, so that it is taken where it is as fast
    return found | {
        "dense": spread + max(stream, arithmetic),
        "reference": share * (spread + max(stream + 2 * wide, arithmetic)),
    }


def choose(platform: str, x: Any, neurons: Neurons, k: int, *, block: int = 1) -> str:
    """The fastest implementation by `estimates`."""
    found = estimates(platform, x, neurons, k, block=block)
    return min(found, key=lambda name: found[name])


def _for(platform: str) -> Any:
    def run(x: jax.Array, chosen: jax.Array, count: jax.Array, *leaves: jax.Array, treedef: Any, block: int) -> Any:
        name = choose(platform, x, treedef.unflatten(leaves), len(chosen), block=block)
        return _RUN[name](x, chosen, count, *leaves, treedef=treedef, block=block)

    return run


def _partitioned(
    x: jax.Array, chosen: jax.Array, count: jax.Array, *leaves: jax.Array, treedef: Any, block: int
) -> Any:
    few = 3 * len(chosen) * block < treedef.unflatten(leaves).count
    return (_reference if few else _dense)(x, chosen, count, *leaves, treedef=treedef, block=block)


_chosen = platform_operation(
    "sparse_mlp",
    lambda x, chosen, count, *leaves, treedef, block: [
        ((x.shape[0], treedef.unflatten(leaves).down.shape[1]), jnp.dtype(jnp.float32)),
        ((treedef.unflatten(leaves).count,), jnp.dtype(bool)),
    ],
    default=_partitioned,
    one_device={platform: _for(platform) for platform in PLATFORMS},
    static_argnames=_STATIC,
)


def choose_neurons(
    scores: Float[Array, "*batch neurons"],
    k: int,
    threshold: float | Float[Array, ""] = -jnp.inf,
    *,
    implementation: Literal["reference", "cpu"] | None = None,
) -> tuple[Int32[Array, " room"], Int32[Array, ""]]:
    """The union over all rows of their `k` best neurons that are above a threshold, in ascending order.

    Args:
        scores: logits of a predictor.
        k: at most this many a row; of equal scores the first neurons.
        threshold: scores must be greater.
        implementation: None takes the native one in a program for one CPU.

    Returns:
        `chosen` with room for `min(neurons, rows * k)`, behind the union the number of neurons; and how many there are.

    Raises:
        ValueError: `k` not in `[1, neurons]`, or an implementation that does not run here.

    Example:
        >>> chosen, count = choose_neurons(jnp.array([[0.0, 3.0, 1.0], [2.0, 5.0, 4.0]]), k=1)
        >>> chosen.tolist(), int(count)
        ([1, 3], 1)
    """
    n = scores.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"choose_neurons: k={k} of {n} neurons")
    if implementation not in (None, "reference", "cpu"):
        raise ValueError(f"choose_neurons: implementation={implementation!r}: choose 'reference' or 'cpu'")
    flat = scores.reshape(-1, n).astype(jnp.float32)
    low = jnp.asarray(threshold, jnp.float32)
    run = {None: _choice, "reference": _choose_reference, "cpu": _choose_native}[implementation]
    chosen, count = run(jax.lax.stop_gradient(flat), jax.lax.stop_gradient(low), k=k)
    return chosen, count


def top_mask(
    scores: Float[Array, "*batch neurons"], k: int, threshold: float | Float[Array, ""] = -jnp.inf
) -> Bool[Array, "*batch neurons"]:
    """Row by row, whether a neuron is one of the `k` best above a threshold: what `choose_neurons` takes the union of.

    Example:
        >>> top_mask(jnp.array([[0.0, 3.0, 1.0]]), k=2).tolist()
        [[False, True, True]]
    """
    best = jax.lax.top_k(jnp.where(scores == 0, 0.0, scores), k)[1]  # which has -0 below 0
    mask = jnp.zeros(scores.shape, bool)
    mask = jnp.put_along_axis(mask, best, True, axis=-1, inplace=False)
    return mask & ~(scores <= threshold)


def _choose_reference(scores: jax.Array, threshold: jax.Array, *, k: int) -> list[jax.Array]:
    rows, n = scores.shape
    union = top_mask(scores, k, threshold).any(0)
    chosen = jnp.nonzero(union, size=min(n, rows * k), fill_value=n)[0]
    return [chosen.astype(jnp.int32), union.sum(dtype=jnp.int32)]


def _choose_native(scores: jax.Array, threshold: jax.Array, *, k: int) -> list[jax.Array]:
    if reason := native_choice.why_not():
        raise ValueError(f"choose_neurons: implementation='cpu' does not run: {reason}")
    return list(native_choice.choose_neurons(scores, threshold, k=k))


_choice = platform_operation(
    "choose_neurons",
    lambda scores, threshold, k: [
        ((min(scores.shape[1], scores.shape[0] * k),), jnp.dtype(jnp.int32)),
        ((), jnp.dtype(jnp.int32)),
    ],
    default=_choose_reference,
    one_device={"cpu": lambda *a, k: (_choose_reference if native_choice.why_not() else _choose_native)(*a, k=k)},
    static_argnames=("k",),
)
