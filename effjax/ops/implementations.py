"""The hand-written kernels of compressed products: what each takes, and how it is called."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Protocol

import jax

import kernels_cpu
from effjax.arrays.codebook import Codebook
from effjax.arrays.hashed import Hashed
from effjax.arrays.nm_sparse import NMSparse
from effjax.arrays.prepared import Prepared
from effjax.arrays.quantized import Quantized
from kernels_cpu import codebook_matmul, nm_matmul, quant_matmul


class Kernel(Protocol):
    """A hand-written product for one type of leaf on one platform."""

    def why_not(self, rows: int, x_dtype: Any, w: Any, *, transpose: bool) -> str:
        """Why it does not take these operands, in one sentence; empty where it does. Works on abstract arrays."""
        ...

    def __call__(self, x: jax.Array, w: Any, *, transpose: bool, activation_bits: int | None) -> jax.Array:
        """`x @ w` or `x @ w.T`, accumulated in float32, from `x` of `[*batch, in]`."""
        ...


def natural_bits(x_dtype: Any) -> int:
    """Bits of an activation that keep what its dtype holds: 24 of float32, 16 of the 16-bit floats."""
    return 8 * min(x_dtype.itemsize, 3)


@dataclasses.dataclass(frozen=True)
class CpuKernel:
    """A kernel of `kernels_cpu`: integer products of fixed-point activations, or float32 ones."""

    reason: Callable[[Any], str]
    product: Callable[..., jax.Array]
    integer: bool = True

    def why_not(self, rows: int, x_dtype: Any, w: Any, *, transpose: bool) -> str:
        del rows
        if not kernels_cpu.available():
            return f"there is no native library: {kernels_cpu.why_not()}"
        if transpose:
            return "the native kernel multiplies by W, not by its transpose"
        if x_dtype.name not in ("float32", "bfloat16", "float16"):
            return f"the native kernel computes in float32, and x is {x_dtype.name}"
        return self.reason(w)

    def __call__(
        self, x: jax.Array, w: Any, *, transpose: bool, activation_bits: int | None, tile: int = 0
    ) -> jax.Array:
        del transpose
        if not self.integer:
            return self.product(x, w, tile=tile)
        bits = activation_bits or natural_bits(x.dtype)
        return self.product(x, w, activation_bits=bits, tile=tile)


@dataclasses.dataclass(frozen=True)
class PreparedKernel:
    """The CPU kernel of what a prepared leaf holds, in tiles."""

    kernels: dict[type, CpuKernel]

    def why_not(self, rows: int, x_dtype: Any, w: Any, *, transpose: bool) -> str:
        return self.kernels[type(w.array)].why_not(rows, x_dtype, w.array, transpose=transpose)

    def __call__(self, x: jax.Array, w: Any, *, transpose: bool, activation_bits: int | None) -> jax.Array:
        kernel = self.kernels[type(w.array)]
        return kernel(x, w.array, transpose=transpose, activation_bits=activation_bits, tile=w.tile)


@dataclasses.dataclass(frozen=True)
class PallasKernel:
    """A kernel of `kernels_pallas`; its module is loaded when a program for its platform is made, not before."""

    module: str
    name: str

    def why_not(self, rows: int, x_dtype: Any, w: Any, *, transpose: bool) -> str:
        return importlib.import_module(self.module).why_not(rows, x_dtype, w, transpose=transpose)

    def __call__(self, x: jax.Array, w: Any, *, transpose: bool, activation_bits: int | None) -> jax.Array:
        del activation_bits  # products are of bfloat16 or float32
        product = getattr(importlib.import_module(self.module), self.name)
        y = product(x.reshape(-1, x.shape[-1]), w, transpose=transpose)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def _pallas(platform: str) -> dict[type, Kernel]:
    names = {
        Quantized: "quant_matmul",
        Codebook: "codebook_matmul",
        NMSparse: "nm_matmul",
        Hashed: "hashed_matmul",
    }
    return {kind: PallasKernel(f"kernels_pallas.{name}.{platform}", name) for kind, name in names.items()}


CPU = {
    Quantized: CpuKernel(quant_matmul.why_not, quant_matmul.quant_matmul),
    Codebook: CpuKernel(codebook_matmul.why_not, codebook_matmul.codebook_matmul, integer=False),
    NMSparse: CpuKernel(nm_matmul.why_not, nm_matmul.nm_matmul),
}
KERNELS: dict[str, dict[type, Kernel]] = {
    "cpu": {**CPU, Prepared: PreparedKernel(CPU)},
    "tpu": _pallas("tpu"),
    "gpu": _pallas("gpu"),
}
