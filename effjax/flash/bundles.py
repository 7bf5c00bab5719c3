"""Bundles: what a token needs of one neuron, side by side in one row, so that one read fetches all of it.

Source: Alizadeh et al., LLM in a flash: Efficient Large Language Model Inference with Limited Memory (2023), 3.2.
"""

import dataclasses
import math
from typing import Any, Literal

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, UInt8

from effjax.errors import LeafError

Kind = Literal["float32", "float16", "bfloat16", "int8", "int4"]
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
BITS = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
RUN = 32  # codes that kernels unpack together, as in effjax.ops.neurons
PARTS = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FeedForward:
    """The feed-forward layer of a block: `down(relu(up(x)))`, or `down(relu(gate(x)) * up(x))`.

    A ReLU that is shifted by `s` is one whose bias is smaller by `s`.

    Attributes:
        up, gate: kernels `[d, neurons]`; no gate where None.
        down: `[neurons, d]`.
        up_bias, gate_bias: `[neurons]`, or None for zeros.
        down_bias: `[d]`, or None for zeros.
    """

    up: Any
    down: Any
    gate: Any = None
    up_bias: Any = None
    gate_bias: Any = None
    down_bias: Any = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(np.shape(getattr(self, name))) for name in PARTS if getattr(self, name) is not None}
        d, neurons = shapes["up"] if len(shapes["up"]) == 2 else (0, 0)
        wanted = {"gate": (d, neurons), "up": (d, neurons), "down": (neurons, d)}
        if not d or any(shape != wanted[name] for name, shape in shapes.items()):
            found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise LeafError(f"FeedForward: {found} do not fit: up and gate are [d, neurons], down is [neurons, d]")

    @property
    def neurons(self) -> int:
        return np.shape(self.down)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the parts of a neuron lie in its row.

    Attributes:
        width: numbers of a part, `d`.
        gated: rows are gate, up, down; else up, down.
        kind: of the numbers. Codes ("int8", "int4") have one scale for each part of each row, kept apart.
        block: rows are padded to a multiple of this many bytes. What a device reads at once, 512 or 4096, lets a row be
            read straight to its place; 1 wastes nothing, and then more is read around it.

    Raises:
        LeafError: an unknown kind, or a size that is not positive.

    Example:
        >>> layout = Layout(width=2048, gated=False, kind="float16")
        >>> layout.stride, layout.starts
        (8192, (None, 0, 4096))
        >>> Layout(width=100, gated=True, kind="int4", block=4096).stride
        4096
    """

    width: int
    gated: bool
    kind: Kind = "float32"
    block: int = 512

    def __post_init__(self) -> None:
        if self.kind not in BITS:
            raise LeafError(f"kind={self.kind!r}: choose one of {', '.join(BITS)}")
        if self.width < 1 or self.block < 1:
            raise LeafError(f"{self}: width and block must be positive")

    @property
    def coded(self) -> bool:
        return self.kind not in DTYPES

    @property
    def padded_width(self) -> int:
        """Numbers of a part as stored: whole runs of codes."""
        return math.ceil(self.width / RUN) * RUN if self.coded else self.width

    @property
    def part_bytes(self) -> int:
        return self.padded_width * BITS[self.kind] // 8

    @property
    def parts(self) -> tuple[str, ...]:
        return PARTS if self.gated else PARTS[1:]

    @property
    def row_bytes(self) -> int:
        """Without padding."""
        return len(self.parts) * self.part_bytes

    @property
    def stride(self) -> int:
        """Bytes from one row to the next."""
        return math.ceil(self.row_bytes / self.block) * self.block

    @property
    def starts(self) -> tuple[int | None, int, int]:
        """Byte of a row where gate, up and down begin."""
        b = self.part_bytes
        return (0, b, 2 * b) if self.gated else (None, 0, b)

    @property
    def zero(self) -> int:
        """The code of 0."""
        return 1 << (BITS[self.kind] - 1)


def bundle_ffn(
    ffn: FeedForward, layout: Layout
) -> tuple[UInt8[np.ndarray, "neurons stride"], Float32[np.ndarray, "3 neurons"] | None]:
    """The rows of all neurons, and for codes the scales of their gate, up and down parts.

    Codes are symmetric, the largest number of a part at the largest code; a part of zeros has scale 1.

    Raises:
        LeafError: a layout of another width or with another number of parts, or a number that is not finite.

    Example:
        >>> ffn = FeedForward(up=np.ones((3, 8)), down=np.zeros((8, 3)))
        >>> rows, scales = bundle_ffn(ffn, Layout(width=3, gated=False, block=1))
        >>> rows.shape, rows[0].view(np.float32).tolist()
        ((8, 24), [1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    """
    d = np.shape(ffn.up)[0]
    if d != layout.width or (ffn.gate is not None) != layout.gated:
        gate = "a gate" if ffn.gate is not None else "no gate"
        raise LeafError(f"bundle_ffn: {layout} for a layer of width {d} with {gate}; make the layout for this layer")
    rows = np.zeros((ffn.neurons, layout.stride), np.uint8)
    scales = np.ones((3, ffn.neurons), np.float32) if layout.coded else None
    for number, (name, start) in enumerate(zip(PARTS, layout.starts, strict=True)):
        if start is None:
            continue
        part = np.asarray(getattr(ffn, name))
        part = part if name == "down" else part.T
        if not np.isfinite(part.astype(np.float32)).all():
            raise LeafError(f"bundle_ffn: {name} {list(part.shape)} holds numbers that are not finite")
        if scales is None:
            stored = np.ascontiguousarray(part, DTYPES[layout.kind]).view(np.uint8)
        else:
            stored, scales[number] = _encode(part.astype(np.float32), layout)
        rows[:, start : start + layout.part_bytes] = stored
    return rows, scales


def unbundle(
    rows: UInt8[np.ndarray, "n stride"], layout: Layout, scales: Float32[np.ndarray, "3 n"] | None = None
) -> dict[str, Float[np.ndarray, "n width"]]:
    """The parts of some rows by name, a row a neuron, in their own dtype; float32 for codes.

    Args:
        scales: of these rows, for codes.

    Example:
        >>> layout = Layout(width=4, gated=False, kind="int8")
        >>> ffn = FeedForward(up=np.full((4, 1), 0.5), down=np.array([[0.0, 1.0, -2.0, 2.0]]))
        >>> unbundle(*(bundle_ffn(ffn, layout)[0], layout, bundle_ffn(ffn, layout)[1]))["up"].tolist()
        [[0.5, 0.5, 0.5, 0.5]]
    """
    found = {}
    for number, (name, start) in enumerate(zip(PARTS, layout.starts, strict=True)):
        if start is None:
            continue
        stored = rows[:, start : start + layout.part_bytes]
        if scales is None:
            found[name] = np.ascontiguousarray(stored).view(DTYPES[layout.kind])
        else:
            found[name] = _decode(stored, scales[number], layout)
    return found


def _encode(part: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    most = layout.zero - 1
    largest = np.abs(part).max(1)
    scale = np.where(largest > 0, largest / most, 1).astype(np.float32)
    codes = np.full((len(part), layout.padded_width), layout.zero, np.uint8)
    codes[:, : layout.width] = np.clip(np.rint(part / scale[:, None]), -most, most).astype(np.int16) + layout.zero
    if layout.kind == "int4":  # byte 16 r + i holds codes 32 r + i (lower half) and 32 r + 16 + i
        pairs = codes.reshape(len(part), -1, 2, RUN // 2)
        codes = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(part), -1)
    return codes, scale


def _decode(stored: np.ndarray, scale: np.ndarray, layout: Layout) -> np.ndarray:
    codes = stored
    if layout.kind == "int4":
        halves = stored.reshape(len(stored), -1, 1, RUN // 2)
        codes = np.concatenate([halves & 15, halves >> 4], axis=2).reshape(len(stored), -1)
    return scale[:, None] * (codes[:, : layout.width].astype(np.float32) - layout.zero)
