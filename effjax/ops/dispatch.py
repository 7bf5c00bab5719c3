"""Which implementation of a compressed product runs, by platform and shape: never one that is slower than dense.

A product with `rows` rows moves bytes and does operations. Each implementation is modelled by how much of the bandwidth
and of the arithmetic it reaches. The constants for the CPU were measured with `benchmarks/kernels/cpu.py`; those for
TPUs and GPUs, of which none was at hand, are estimates.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from effjax.arrays.base import CompressedArray
from effjax.arrays.codebook import Codebook
from effjax.arrays.hashed import Hashed
from effjax.arrays.prepared import Prepared
from effjax.arrays.quantized import Quantized
from effjax.ops.implementations import KERNELS, Kernel, natural_bits

PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "cuda": "gpu"}  # of jax's lowering, to the name of their kernels
BLOCK_WEIGHTS = 2**15  # weights of a dense tile: 128 KiB in float32, well inside the second-level cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What a platform can do, roughly: it decides between implementations, and their ratio is what counts.

    Attributes:
        bandwidth: bytes a second from memory.
        flops: operations a second of a dense product, in the dtype it is usually computed in.
    """

    bandwidth: float
    flops: float


# Two cores of a server; a TPU v5e; an H100.
MACHINES = {
    "cpu": Machine(bandwidth=25e9, flops=200e9),
    "tpu": Machine(bandwidth=819e9, flops=197e12),
    "cuda": Machine(bandwidth=3.35e12, flops=989e12),
}


def kernel(name: str, w: CompressedArray) -> Kernel | None:
    """The hand-written kernel of that name ("cpu", "tpu", "gpu") for the type of `w`, or None."""
    return KERNELS.get(name, {}).get(type(w))


def why_not(name: str, rows: int, x_dtype: Any, w: CompressedArray, *, transpose: bool) -> str:
    """Why an implementation does not take these operands, with the remedy; empty where it does."""
    if name == "reference":
        return ""
    if name == "blocked":
        cannot = f"{w} cannot be cut into tiles of whole groups and bytes; use implementation='reference'"
        return cannot if block_rows(w) is None else ""
    found = kernel(name, w)
    if found is None:
        return f"there is no kernel {name!r} for a {type(w).__name__}; use implementation='reference'"
    return found.why_not(rows, jnp.dtype(x_dtype), w, transpose=transpose)


def choose(
    platform: str,
    rows: int,
    x_dtype: Any,
    w: CompressedArray,
    *,
    transpose: bool = False,
    activation_bits: int | None = None,
) -> str:
    """The implementation for a program on one device of a platform.

    Args:
        platform: "cpu", "tpu" or "cuda".
        rows: of `x`, all batch dimensions together.
        x_dtype: of `x`.
        w: the matrix, or its abstract shape.
        transpose: multiply by `W.T`.
        activation_bits: as in `matmul`.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> w = ej.quantize.RTN(bits=4, group_size=None).quantize(jnp.eye(64))
        >>> choose("tpu", 1, jnp.float64, w)
        'reference'
    """
    found = estimates(platform, rows, x_dtype, w, transpose=transpose, activation_bits=activation_bits)
    return min(found, key=lambda name: found[name])


def estimates(
    platform: str,
    rows: int,
    x_dtype: Any,
    w: CompressedArray,
    *,
    transpose: bool = False,
    activation_bits: int | None = None,
) -> dict[str, float]:
    """Modelled seconds of every implementation that takes the operands; "reference" is always among them."""
    machine = MACHINES[platform]
    weights = math.prod(w.shape)
    dense = weights * w.dtype.itemsize
    arithmetic = 2 * rows * weights / machine.flops
    stream = w.nbytes / machine.bandwidth
    found = {}
    if platform == "cpu":
        # XLA unpacks one code after the other, about 5e8 a second, and writes the dense matrix where it is not tiled.
        found["reference"] = weights / 5e8 + 2 * dense / machine.bandwidth + arithmetic
        # Its tiles hold few inputs, so that a dense one stays in the cache: products of them reach half the arithmetic.
        found["blocked"] = weights / 8e9 + max(stream, 2 * arithmetic)
        share = _cpu_share(w, activation_bits or natural_bits(jnp.dtype(x_dtype)))
    else:
        found["reference"] = stream + 2 * dense / machine.bandwidth + arithmetic
        # Half the arithmetic of a dense product is what the Hopper kernels are assumed to reach with many rows.
        share = 2.0 if platform == "cuda" else 0.9
    name = PLATFORMS[platform]
    if kernel(name, w) is not None and not unfit(platform, w):
        found[name] = max(stream, arithmetic * share)
    return {name: t for name, t in found.items() if not why_not(name, rows, x_dtype, w, transpose=transpose)}


def _cpu_share(w: CompressedArray, activation_bits: int) -> float:
    """The time of a native product with many rows, as a share of dense float32: measured with AVX-512 on Zen 4."""
    w = w.array if isinstance(w, Prepared) else w
    if not isinstance(w, Quantized):
        return 1.05 if isinstance(w, Codebook) else activation_bits / 24
    # A block of inputs costs its products, a byte of the activations each, and bringing its sums to floats.
    return (0.59 + 22 / min(w.group_size, 256)) * activation_bits / 24


def unfit(platform: str, w: CompressedArray) -> str:
    """Why the kernel of a platform is not chosen unasked, in one sentence; empty where it is."""
    if platform == "tpu" and isinstance(w, Hashed):
        return "the kernel hashes every weight again at every product: name implementation='tpu' to have it"
    return no_hopper() if platform == "cuda" else ""


def no_hopper() -> str:
    """Why kernels for Hopper are not chosen unasked, in one sentence; empty where every GPU here is one."""
    try:
        found = [getattr(device, "compute_capability", "") for device in jax.local_devices(backend="gpu")]
    except RuntimeError:
        return "no GPU is attached, and the kernels are for Hopper: name implementation='gpu' to compile them"
    other = sorted({capability for capability in found if capability != "9.0"})
    return f"the kernels are for Hopper, and a GPU here has compute capability {other[0]}" if other else ""


def explain(w: CompressedArray, rows: int, x_dtype: Any = jnp.float32, *, transpose: bool = False) -> str:
    """What runs on each platform and why, as a table in text.

    Example:
        >>> import effjax as ej, jax.numpy as jnp
        >>> w = ej.quantize.RTN(bits=4, group_size=None).quantize(jnp.eye(64))
        >>> print(explain(w, rows=1).splitlines()[0])
        platform  implementation  modelled us  chosen
    """
    lines = ["platform  implementation  modelled us  chosen"]
    for platform, own in PLATFORMS.items():
        times = estimates(platform, rows, x_dtype, w, transpose=transpose)
        best = min(times, key=lambda name: times[name])
        for name in dict.fromkeys((*times, "blocked", own) if platform == "cpu" else (*times, own)):
            if name in times:
                figure, note = f"{times[name] * 1e6:.1f}", "yes" if name == best else ""
            else:
                figure = ""
                note = why_not(name, rows, x_dtype, w, transpose=transpose) or unfit(platform, w)
            lines.append(f"{platform:<9} {name:<15} {figure:>11}  {note}".rstrip())
    return "\n".join(lines)


def block_rows(w: CompressedArray) -> int | None:
    """Inputs a tile: the most that divide the matrix and keep a tile within `BLOCK_WEIGHTS`, or None for no tiling."""
    n, out = w.shape
    multiple = w.row_multiple
    if n % multiple or n == multiple:
        return None
    units = n // multiple
    fitting = [k for k in range(1, units) if units % k == 0 and k * multiple * out <= BLOCK_WEIGHTS]
    return multiple * max(fitting, default=1)
