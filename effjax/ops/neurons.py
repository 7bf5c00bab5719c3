"""The weights of an MLP by neuron: a row of each matrix belongs to one, so that a few can be read alone."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from effjax.arrays.base import CompressedArray
from effjax.arrays.packing import unpack
from effjax.arrays.prepared import Prepared
from effjax.arrays.quantized import Quantized
from effjax.errors import LeafError

Activation = Literal["relu", "silu", "gelu"]
RUN = 32  # codes that kernels unpack together; kCodeRun in kernels_cpu/sparse_mlp.h


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CodedRows:
    """`row[j, i] = scale * (code[j, i] - zero)`: the codes of a `Quantized` matrix, a row a neuron.

    Attributes:
        codes: `uint8[neurons, width]` of eight bits, or `uint8[neurons, width / 2]` of four: byte `16 r + i` holds
            codes `32 r + i` (lower half) and `32 r + 16 + i`.
        scales, zeros: `float32[neurons, groups]` where `by_neuron`, for groups of numbers of a row; else
            `float32[groups, width]`, for groups of neurons.
        bits: 4 or 8.
        by_neuron: see scales.
    """

    codes: UInt8[Array, "neurons bytes"]
    scales: Float[Array, "..."]
    zeros: Float[Array, "..."]
    bits: int = dataclasses.field(metadata={"static": True})
    by_neuron: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    def take(self, neurons: Int32[Array, " k"]) -> Float[Array, "k width"]:
        """The rows of some neurons, float32."""
        codes, width = self.codes[neurons], self.shape[1]
        if self.bits == 4:
            halves = codes.reshape(len(neurons), -1, 1, RUN // 2)
            codes = jnp.concatenate([halves & 15, halves >> 4], axis=2).reshape(len(neurons), width)
        if self.by_neuron:
            spread = [jnp.repeat(a[neurons], width // a.shape[1], axis=1) for a in (self.scales, self.zeros)]
        else:
            spread = [a[neurons // (self.shape[0] // a.shape[0])] for a in (self.scales, self.zeros)]
        return spread[0] * (codes.astype(jnp.float32) - spread[1])


Rows = Float[Array, "neurons width"] | CodedRows


def take_rows(rows: Any, neurons: jax.Array) -> jax.Array:
    """`float32[k, width]`."""
    return rows.take(neurons) if isinstance(rows, CodedRows) else rows[neurons].astype(jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Neurons:
    """`y = down.T @ h + down_bias`, where `h = act(up @ x + up_bias - shift)`.

    With a gate `h = act(gate @ x + gate_bias - shift) * (up @ x + up_bias)`.

    Attributes:
        up: `[neurons, in]`: float32, bfloat16 or codes; the transposed kernel.
        down: `[neurons, out]`, of the same kind.
        gate: as `up`, or None.
        up_bias, gate_bias: `float32[neurons]`, or None.
        down_bias: `float32[out]`, or None.
        activation: "relu", "silu", or "gelu" (with tanh, as `jax.nn.gelu`).
        shift: of the activation; a ReLU lets through what exceeds it.
    """

    up: Rows
    down: Rows
    gate: Rows | None = None
    up_bias: Float[Array, " neurons"] | None = None
    gate_bias: Float[Array, " neurons"] | None = None
    down_bias: Float[Array, " out"] | None = None
    activation: Activation = dataclasses.field(default="relu", metadata={"static": True})
    shift: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def count(self) -> int:
        return self.up.shape[0]

    @property
    def bytes_per_neuron(self) -> float:
        """What is read of a chosen neuron."""
        fields = jax.tree.leaves((self.up, self.gate, self.down, self.up_bias, self.gate_bias))
        return sum(a.size * a.dtype.itemsize for a in fields) / self.count

    @property
    def weights_per_neuron(self) -> int:
        return self.down.shape[1] + self.up.shape[1] * (1 if self.gate is None else 2)


def make_neurons(
    up: Any,
    down: Any,
    *,
    gate: Any = None,
    up_bias: Float[Array, " neurons"] | None = None,
    gate_bias: Float[Array, " neurons"] | None = None,
    down_bias: Float[Array, " out"] | None = None,
    activation: Activation = "relu",
    shift: float = 0.0,
) -> Neurons:
    """Lays the kernels of an MLP out by neuron, once; a quantized kernel keeps its very codes.

    Args:
        up, gate: kernels `[in, neurons]`, dense or `Quantized` with 4 or 8 bits.
        down: `[neurons, out]`.
        up_bias, gate_bias, down_bias, activation, shift: of `Neurons`.

    Raises:
        LeafError: a stack of layers (map over it), kernels that do not fit together or are of different kinds, a type
            of leaf that has no rows, widths and groups that are no multiples of 32 where there are codes, or a bias of
            a gate that is not there.

    Example:
        >>> make_neurons(jnp.ones((3, 8)), jnp.ones((8, 2))).up.shape
        (8, 3)
    """
    kernels = {"up": up, "down": down} | ({} if gate is None else {"gate": gate})
    for name, kernel in kernels.items():
        if len(kernel.shape) != 2:
            raise LeafError(f"make_neurons: {name} {list(kernel.shape)} is no matrix: map over stacked layers")
    n = up.shape[1]
    if down.shape[0] != n or (gate is not None and gate.shape != up.shape):
        shapes = ", ".join(f"{name} {list(kernel.shape)}" for name, kernel in kernels.items())
        raise LeafError(f"make_neurons: {shapes} do not fit: up and gate are [in, neurons], down is [neurons, out]")
    if gate is None and gate_bias is not None:
        raise LeafError("make_neurons: gate_bias without a gate: an MLP of up and down alone has an up_bias")
    rows = {name: _rows(name, kernel, transpose=name != "down") for name, kernel in kernels.items()}
    kinds = {(r.bits if isinstance(r, CodedRows) else jnp.dtype(r.dtype).name) for r in rows.values()}
    if len(kinds) > 1:
        raise LeafError(
            f"make_neurons: kernels of different kinds ({', '.join(sorted(map(str, kinds)))}): make them alike"
        )
    up_bias, gate_bias, down_bias = (
        None if b is None else jnp.asarray(b, jnp.float32) for b in (up_bias, gate_bias, down_bias)
    )
    return Neurons(
        **rows, up_bias=up_bias, gate_bias=gate_bias, down_bias=down_bias, activation=activation, shift=shift
    )


def _rows(name: str, kernel: Any, *, transpose: bool) -> Any:
    if isinstance(kernel, Prepared):
        raise LeafError(f"make_neurons: {name} is prepared for matrix products; give the leaf it was made of")
    if not isinstance(kernel, CompressedArray):
        return jnp.asarray(kernel.T if transpose else kernel)
    if not isinstance(kernel, Quantized) or kernel.bits not in (4, 8):
        raise LeafError(
            f"make_neurons: {name} is {kernel}: only dense kernels and Quantized ones of 4 or 8 bits have rows; "
            "materialize() others"
        )
    codes = unpack(kernel.codes, kernel.bits, kernel.shape[0])
    scales = kernel.scales.astype(jnp.float32)
    zeros = jnp.broadcast_to(jnp.asarray(kernel.zero_points(), jnp.float32), scales.shape)
    if transpose:
        codes, scales, zeros = codes.T, scales.T, zeros.T
    width = codes.shape[1]
    if width % RUN or (transpose and kernel.group_size % RUN):
        raise LeafError(
            f"make_neurons: {name} is {kernel}: rows of {width} codes in groups of {kernel.group_size} are no whole "
            f"runs of {RUN}; materialize() it"
        )
    if kernel.bits == 4:
        pairs = codes.reshape(codes.shape[0], -1, 2, RUN // 2)
        codes = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(codes.shape[0], width // 2)
    return CodedRows(codes=codes.astype(jnp.uint8), scales=scales, zeros=zeros, bits=kernel.bits, by_neuron=transpose)
