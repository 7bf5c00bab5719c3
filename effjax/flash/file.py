"""A file of bundles: the rows of every layer behind a header that says what they are and what stays in memory."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32

from effjax.errors import CheckpointError, LeafError
from effjax.flash.bundles import FeedForward, Kind, Layout, bundle_ffn, unbundle
from effjax.io.directory import file_renamed_when_whole

MAGIC, VERSION, PAGE = b"EFXFLASH", 1, 4096
_FIXED = 48  # magic, version and length of the header as uint32 little-endian, SHA-256 of the header


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class BundleFile:
    """What is known of a file without reading its rows. Row `layer * neurons + i` belongs to neuron `i` of a layer.

    Attributes:
        path: of the file.
        layout: of a row.
        layers, neurons: how many, neurons of each layer.
        rows_at: byte where the rows begin, a multiple of 4096.
        biases: float32 `[layers, 2, neurons]`, of gate and up.
        down_bias: float32 `[layers, d]`.
        scales: float32 `[layers, 3, neurons]` of gate, up and down, for codes; else None.
        digests: SHA-256 of each layer's rows, see `verify_bundles`.
    """

    path: Path
    layout: Layout
    layers: int
    neurons: int
    rows_at: int
    biases: Float32[np.ndarray, "layers 2 neurons"]
    down_bias: Float32[np.ndarray, "layers d"]
    scales: Float32[np.ndarray, "layers 3 neurons"] | None
    digests: tuple[str, ...]

    @property
    def layer_bytes(self) -> int:
        return self.neurons * self.layout.stride

    @property
    def side_bytes(self) -> int:
        """Biases and scales: what stays in memory."""
        return self.biases.nbytes + self.down_bias.nbytes + (0 if self.scales is None else self.scales.nbytes)


def write_bundles(
    path: str | Path,
    layers: Sequence[FeedForward],
    *,
    kind: Kind = "float32",
    block: int = 512,
    overwrite: bool = False,
) -> BundleFile:
    """Writes the bundles of every layer; the file appears when it is whole, and not at all on any error.

    Args:
        path: of the file to make.
        layers: of equal shapes. A sequence may make each layer when it is asked for: one at a time is held.
        kind, block: of `Layout`.
        overwrite: replaces a file of that name.

    Raises:
        LeafError: no layer, or layers of different shapes.
        CheckpointError: the file exists already, or cannot be written.
    """
    path = Path(path)
    if not len(layers):
        raise LeafError("write_bundles: no layer; give at least one")
    first = layers[0]
    (d, neurons), gated = np.shape(first.up), first.gate is not None
    layout = Layout(width=d, gated=gated, kind=kind, block=block)
    count = len(layers)
    side = {"biases": np.zeros((count, 2, neurons), np.float32), "down_bias": np.zeros((count, d), np.float32)}
    if layout.coded:
        side["scales"] = np.ones((count, 3, neurons), np.float32)
    blank = "0" * 64
    header = {"layout": dataclasses.asdict(layout), "layers": count, "neurons": neurons, "side": blank}
    longest = {**header, "digests": [blank] * count, "side_at": 10**15, "rows_at": 10**15}
    side_at = _whole_pages(_FIXED + len(_json(longest)))
    rows_at = _whole_pages(side_at + sum(a.nbytes for a in side.values()))
    header |= {"side_at": side_at, "rows_at": rows_at}
    digests = []
    with file_renamed_when_whole(path, overwrite=overwrite) as stream:
        stream.seek(rows_at)
        for i, ffn in enumerate(layers):
            if np.shape(ffn.up) != (d, neurons) or (ffn.gate is not None) != gated:
                raise LeafError(
                    f"write_bundles: layer {i} has up {list(np.shape(ffn.up))} and {'a' if gated else 'no'} gate in "
                    f"layer 0, whose up is {[d, neurons]}; write layers of different shapes to files of their own"
                )
            for number, bias in enumerate((ffn.gate_bias, ffn.up_bias)):
                side["biases"][i, number] = 0 if bias is None else np.asarray(bias, np.float32)
            side["down_bias"][i] = 0 if ffn.down_bias is None else np.asarray(ffn.down_bias, np.float32)
            rows, scales = bundle_ffn(ffn, layout)
            if scales is not None:
                side["scales"][i] = scales
            stream.write(rows.data)
            digests.append(hashlib.sha256(rows.data).hexdigest())
        stream.write(bytes(_whole_pages(stream.tell()) - stream.tell()))  # a last block can be read whole
        beside = b"".join(_little(a) for a in side.values())
        text = _json({**header, "side": hashlib.sha256(beside).hexdigest(), "digests": digests})
        stream.seek(0)
        stream.write(MAGIC + np.array([VERSION, len(text)], "<u4").tobytes() + hashlib.sha256(text).digest() + text)
        stream.seek(side_at)
        stream.write(beside)
        stream.flush()
        os.fsync(stream.fileno())
    return open_bundles(path)


def open_bundles(path: str | Path) -> BundleFile:
    """Reads the header, the biases and the scales of a file, and checks them and its length.

    Raises:
        CheckpointError: no such file, not a file of bundles, of a later version, damaged or cut short.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            return _read_header(path, stream)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); make it with write_bundles") from error


def verify_bundles(path: str | Path) -> list[int]:
    """The layers whose rows are not those that were written; reads the whole file.

    Raises:
        CheckpointError: as `open_bundles`.
    """
    file = open_bundles(path)
    with file.path.open("rb") as stream:
        stream.seek(file.rows_at)
        found = [hashlib.sha256(stream.read(file.layer_bytes)).hexdigest() for _ in range(file.layers)]
    return [i for i, (a, b) in enumerate(zip(found, file.digests, strict=True)) if a != b]


def load_layer(file: BundleFile, layer: int) -> FeedForward:
    """One layer's matrices, read whole; those of codes are what the codes stand for.

    Raises:
        IndexError: no such layer.
    """
    if not 0 <= layer < file.layers:
        raise IndexError(f"layer {layer} of {file.layers} in {file.path}")
    with file.path.open("rb") as stream:
        stream.seek(file.rows_at + layer * file.layer_bytes)
        rows = np.frombuffer(stream.read(file.layer_bytes), np.uint8).reshape(file.neurons, file.layout.stride)
    parts = unbundle(rows, file.layout, None if file.scales is None else file.scales[layer])
    return FeedForward(
        up=parts["up"].T,
        down=parts["down"],
        gate=parts["gate"].T if file.layout.gated else None,
        gate_bias=file.biases[layer, 0],
        up_bias=file.biases[layer, 1],
        down_bias=file.down_bias[layer],
    )


def _read_header(path: Path, stream: BinaryIO) -> BundleFile:
    remedy = "write it again with write_bundles, or copy it again"
    fixed = stream.read(_FIXED)
    if len(fixed) < _FIXED or not fixed.startswith(MAGIC):
        raise CheckpointError(f"{path} is no file of bundles; {remedy}")
    version, length = (int(n) for n in np.frombuffer(fixed[8:16], "<u4"))
    if version != VERSION:
        raise CheckpointError(f"{path} has version {version} and this effjax reads {VERSION}; update effjax")
    text = stream.read(length)
    if len(text) < length or hashlib.sha256(text).digest() != fixed[16:]:
        raise CheckpointError(f"{path}: its header is damaged; {remedy}")
    header = json.loads(text)
    layout, layers, neurons = Layout(**header["layout"]), header["layers"], header["neurons"]
    size, expected = path.stat().st_size, _whole_pages(header["rows_at"] + layers * neurons * layout.stride)
    if size != expected:
        raise CheckpointError(f"{path} has {size:,} bytes and should have {expected:,}; {remedy}")
    shapes = {"biases": (layers, 2, neurons), "down_bias": (layers, layout.width)}
    if layout.coded:
        shapes["scales"] = (layers, 3, neurons)
    stream.seek(header["side_at"])
    beside = stream.read(4 * sum(math.prod(shape) for shape in shapes.values()))
    if hashlib.sha256(beside).hexdigest() != header["side"]:
        raise CheckpointError(f"{path}: its biases or scales are damaged; {remedy}")
    flat, side = np.frombuffer(beside, "<f4").astype(np.float32), {}
    for name, shape in shapes.items():
        side[name], flat = flat[: math.prod(shape)].reshape(shape), flat[math.prod(shape) :]
    return BundleFile(
        path=path,
        layout=layout,
        layers=layers,
        neurons=neurons,
        rows_at=header["rows_at"],
        biases=side["biases"],
        down_bias=side["down_bias"],
        scales=side.get("scales"),
        digests=tuple(header["digests"]),
    )


def _json(header: dict[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def _little(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def _whole_pages(size: int) -> int:
    return math.ceil(size / PAGE) * PAGE
