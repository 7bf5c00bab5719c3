"""Some neurons of an MLP on the CPU: their rows are read where they lie, those of zero activations half."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt8

from kernels_cpu import variants
from kernels_cpu._native import NATIVE

VARIANTS = ("auto", "portable", "avx2", "avx512")
TYPES = {"float32": 0, "bfloat16": 1, 8: 2, 4: 3}  # RowType in sparse_mlp.h
ACTIVATIONS = {"relu": 0, "silu": 1, "gelu": 2}


def why_not(neurons: Any, variant: str = "auto") -> str:
    """Why the kernel does not take these weights (`effjax.ops.neurons.Neurons`), in a sentence; empty where it does."""
    kind = _kind(neurons.up)
    if kind not in TYPES:
        return f"the native kernel reads float32, bfloat16 and codes of 4 or 8 bits, found {kind}"
    return variants.why_not("sparse_mlp", variant, VARIANTS)


def sparse_mlp(
    x: Float[Array, "batch in"],
    neurons: Any,
    chosen: Int32[Array, " k"],
    count: Int32[Array, ""],
    variant: str = "auto",
) -> tuple[Float[Array, "batch out"], UInt8[Array, " neurons"]]:
    """See `effjax.ops.sparse_mlp`; computed in float32. Also which neurons are not zero for some row: 1, else 0.

    Raises:
        ValueError: weights that the kernel does not take, or a variant that is unknown or does not run here.

    Example:
        >>> from effjax.ops.neurons import make_neurons
        >>> neurons = make_neurons(jnp.ones((3, 8)), jnp.ones((8, 2)))
        >>> y, used = sparse_mlp(jnp.ones((1, 3)), neurons, jnp.array([1, 4]), jnp.int32(2))
        >>> y.tolist(), used.tolist()
        ([[6.0, 6.0]], [0, 1, 0, 0, 1, 0, 0, 0])
    """
    reason = why_not(neurons, variant)
    if reason:
        raise ValueError(reason)
    empty = jnp.zeros((0, 0), jnp.float32)

    def parts(rows: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        return (rows.codes, rows.scales, rows.zeros) if hasattr(rows, "codes") else (rows, empty, empty)

    biases = [neurons.up_bias, neurons.gate_bias, neurons.down_bias]
    gate = (empty, empty, empty) if neurons.gate is None else parts(neurons.gate)
    results = [
        jax.ShapeDtypeStruct((x.shape[0], neurons.down.shape[1]), jnp.float32),
        jax.ShapeDtypeStruct((neurons.count,), jnp.uint8),
    ]
    call = jax.ffi.ffi_call(NATIVE.target("EffjaxSparseMlp"), results, vmap_method="sequential")
    y, used = call(
        x.astype(jnp.float32),
        chosen.astype(jnp.int32),
        jnp.asarray(count, jnp.int32),
        *parts(neurons.up),
        *gate,
        *parts(neurons.down),
        *(jnp.zeros(0, jnp.float32) if b is None else b for b in biases),
        type=np.int64(TYPES[_kind(neurons.up)]),
        activation=np.int64(ACTIVATIONS[neurons.activation]),
        shift=np.float32(neurons.shift),
        gated=np.int64(neurons.gate is not None),
        by_neuron=np.int64(getattr(neurons.down, "by_neuron", False)),
        variant=np.int64(variants.VARIANTS[variant]),
    )
    return y, used


def _kind(rows: Any) -> Any:
    return rows.bits if hasattr(rows, "codes") else jnp.dtype(rows.dtype).name
