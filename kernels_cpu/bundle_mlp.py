"""An MLP on the rows of a neuron cache, one neuron a row, where they lie; the native product of `sparse_mlp`."""

import ctypes

import numpy as np
from jaxtyping import Float32, UInt8

from kernels_cpu import variants
from kernels_cpu.read_rows import Pool
from kernels_cpu.sparse_mlp import TYPES, VARIANTS

_POINTERS = ("rows", "scales", "zeros", "biases", "x", "y")
_NUMBERS = ("count", "slots", "stride", "gate", "up", "down", "width", "type", "helpers", "variant")


class _Call(ctypes.Structure):  # BundleMlp in bundle_mlp.h
    _fields_ = [*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_int64) for name in _NUMBERS)]


def bundle_mlp(
    pool: Pool,
    x: Float32[np.ndarray, " width"],
    rows: UInt8[np.ndarray, "slots stride"],
    count: int,
    *,
    kind: str | int,
    starts: tuple[int | None, int, int],
    biases: Float32[np.ndarray, "2 slots"],
    scales: Float32[np.ndarray, "3 slots"] | None = None,
    zeros: Float32[np.ndarray, " slots"] | None = None,
    helpers: int = 1,
    variant: str = "auto",
) -> Float32[np.ndarray, " width"]:
    """Sum of `relu(up . x + bias) * down` over the first rows; with a gate of `relu(gate . x + bias) * (up . x + bias)`
    times `down`.

    Args:
        pool: whose threads help.
        x: the input.
        rows: bytes of the neurons.
        count: rows in use.
        kind: "float32", "bfloat16", or 8 or 4 for codes.
        starts: byte of a row where gate, up and down begin.
        biases: of gate and up, by row.
        scales, zeros: of codes, by row: `number = scale * (code - zero)`.
        helpers: threads beside the caller's.

    Raises:
        ValueError: a variant that is unknown or does not run here.
    """
    reason = variants.why_not("bundle_mlp", variant, VARIANTS)
    if reason:
        raise ValueError(reason)
    width = len(x)
    x = np.ascontiguousarray(x, np.float32)
    y = np.zeros(width, np.float32)
    arrays = {"rows": rows, "scales": scales, "zeros": zeros, "biases": biases, "x": x, "y": y}
    assert all(a is None or a.flags.c_contiguous for a in arrays.values()) and count <= len(rows) == biases.shape[1]
    gate, up, down = starts
    call = _Call(
        **{name: None if array is None else array.ctypes.data for name, array in arrays.items()},
        count=count,
        slots=len(rows),
        stride=rows.shape[1],
        gate=-1 if gate is None else gate,
        up=up,
        down=down,
        width=width,
        type=TYPES[kind],
        helpers=helpers,
        variant=variants.VARIANTS[variant],
    )
    pool.library.EffjaxBundleMlp(pool.handle, ctypes.byref(call))
    return y
