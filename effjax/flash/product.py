"""The product of a feed-forward layer with the rows of a neuron cache, where they lie."""

import numpy as np
from jaxtyping import Float32, UInt8

from effjax.flash.bundles import BITS, DTYPES, Layout, unbundle
from kernels_cpu.bundle_mlp import bundle_mlp
from kernels_cpu.read_rows import Pool

AT_ONCE = 256  # rows that are spread to float32 together where the native product does not run


def ffn_prefix(
    x: Float32[np.ndarray, " d"],
    matrix: UInt8[np.ndarray, "capacity stride"],
    count: int,
    layout: Layout,
    biases: Float32[np.ndarray, "2 capacity"],
    scales: Float32[np.ndarray, "3 capacity"] | None = None,
    *,
    pool: Pool | None = None,
    helpers: int = 1,
) -> Float32[np.ndarray, " d"]:
    """What the first `count` rows add to the residual stream; without the bias of the down projection.

    Args:
        x: what enters the up projection.
        matrix: bytes of bundles.
        biases: of the gate and of the up projection, by row.
        scales: of gate, up and down, by row, for codes.
        pool: the native product runs, and on its threads; None takes numpy. It takes every kind but float16.
        helpers: threads of the pool.

    Example:
        >>> from effjax.flash.bundles import FeedForward, bundle_ffn
        >>> layout = Layout(width=2, gated=False)
        >>> rows, _ = bundle_ffn(FeedForward(up=np.eye(2), down=np.eye(2)), layout)
        >>> ffn_prefix(np.array([3.0, -4.0], np.float32), rows, 2, layout, np.zeros((2, 2), np.float32)).tolist()
        [3.0, 0.0]
    """
    if pool is not None and layout.kind != "float16":
        return _native(x, matrix, count, layout, biases, scales, pool, helpers)
    y = np.zeros(layout.width, np.float32)
    for i in range(0, count, AT_ONCE):
        some = slice(i, min(i + AT_ONCE, count))
        parts = unbundle(matrix[some], layout, None if scales is None else scales[:, some])
        wide = {name: part.astype(np.float32) for name, part in parts.items()}
        h = wide["up"] @ x + biases[1, some]
        if layout.gated:
            h = np.maximum(wide["gate"] @ x + biases[0, some], 0) * h
        else:
            h = np.maximum(h, 0)
        y += h @ wide["down"]
    return y


def _native(x, matrix, count, layout, biases, scales, pool, helpers) -> np.ndarray:  # type: ignore[no-untyped-def]
    wide = np.zeros(layout.padded_width, np.float32)
    wide[: layout.width] = x
    y = bundle_mlp(
        pool,
        wide,
        matrix,
        count,
        kind=layout.kind if layout.kind in DTYPES else BITS[layout.kind],
        starts=layout.starts,
        biases=biases,
        scales=scales,
        zeros=None if scales is None else np.full(len(matrix), layout.zero, np.float32),
        helpers=helpers,
    )
    return y[: layout.width]
