"""Where every tensor of a checkpoint to be written lies: known from shapes alone, before the first is compressed."""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effjax.arrays.base import nbytes
from effjax.errors import CheckpointError
from effjax.io.checkpoint import WEIGHTS
from effjax.io.encoding import encode
from effjax.io.safetensors_file import TensorEntry, layout, put, reserve
from effjax.paths import nest

SHARD_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """The weight files of a checkpoint.

    Attributes:
        heads: the first bytes of each file, by its name.
        entries: where each tensor lies, by its name.
    """

    heads: dict[str, bytes]
    entries: dict[str, TensorEntry]

    @property
    def weight_map(self) -> dict[str, str] | None:
        """The file of every tensor, or None where there is one file."""
        if len(self.heads) == 1:
            return None
        return {name: entry.file.name for name, entry in self.entries.items()}

    def reserve(self) -> None:
        """Makes the files, of their final size."""
        for file, head in self.heads.items():
            own = {name: entry for name, entry in self.entries.items() if entry.file.name == file}
            reserve(head, own, next(iter(own.values())).file)

    def write(self, tensors: Mapping[str, Iterable[np.ndarray]]) -> dict[str, str]:
        """Puts tensors into their places, each given in pieces; on disk when this returns.

        Returns:
            The SHA-256 of each.
        """
        hashes = {}
        for file in dict.fromkeys(self.entries[name].file for name in tensors):
            with file.open("r+b") as stream:
                for name, parts in tensors.items():
                    if self.entries[name].file == file:
                        hashes[name] = put(stream, self.entries[name], iter(parts))
                stream.flush()
                os.fsync(stream.fileno())
        return hashes


def output_layout(directory: Path, leaves: Mapping[str, Any], *, shard_bytes: int = SHARD_BYTES) -> Output:
    """Lays the leaves of a model out over weight files.

    Args:
        directory: where the files will be.
        leaves: dense and compressed leaves by path, or their shapes, in the order in which they are to be written.
        shard_bytes: a file is begun when the next leaf would make this one larger.

    Raises:
        LeafError: names that could not be read back.

    Example:
        >>> import jax.numpy as jnp
        >>> leaves = {"a": jnp.zeros(4), "b": jnp.zeros(2), "c": jnp.zeros(2)}
        >>> list(output_layout(Path("out"), leaves, shard_bytes=16).heads)
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    encode(nest(leaves))  # refuses names that clash
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for path, leaf in leaves.items():
        if shards[-1] and size + nbytes(leaf) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1] |= encode_leaf(path, leaf)
        size += nbytes(leaf)
    heads: dict[str, bytes] = {}
    entries: dict[str, TensorEntry] = {}
    for index, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        shapes = {name: (np.dtype(x.dtype), tuple(x.shape)) for name, x in shard.items()}
        heads[file], found = layout(directory / file, shapes, metadata={"format": "effjax"})
        entries |= found
    return Output(heads=heads, entries=entries)


def encode_leaf(path: str, leaf: Any) -> dict[str, Any]:
    """The arrays of one leaf by the names they are stored under."""
    return encode(nest({path: leaf}))[0]


def whole_leaf(slices: Iterator[tuple[int, dict[str, np.ndarray]]], shapes: Mapping[str, Any], axes: Mapping[str, Any]):
    """The arrays of a leaf that was compressed in slices of its outputs.

    Args:
        slices: the first output of each slice, and its arrays by name.
        shapes: the arrays of the whole leaf, or their shapes.
        axes: the axis along which the outputs of each array lie, or None where all slices hold the same array.

    Raises:
        CheckpointError: an array that all slices should share differs between them.
    """
    whole: dict[str, np.ndarray] = {}
    for start, arrays in slices:
        for name, part in arrays.items():
            axis = axes[name]
            if axis is None:
                if whole.setdefault(name, part).tobytes() != part.tobytes():
                    raise CheckpointError(f"{name} differs between slices of one weight: it cannot be cut")
                continue
            if name not in whole:
                whole[name] = np.empty(shapes[name].shape, shapes[name].dtype)
            index = [slice(None)] * part.ndim
            index[axis] = slice(start, start + part.shape[axis])
            whole[name][tuple(index)] = part
    return whole


def output_axes(whole: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, int | None]:
    """The axis along which each array of a slice is shorter than that of the whole leaf, or None."""
    axes: dict[str, int | None] = {}
    for name, struct in whole.items():
        differ = [axis for axis, (a, b) in enumerate(zip(struct.shape, part[name].shape, strict=True)) if a != b]
        axes[name] = differ[0] if differ else None
    return axes


def total_bytes(leaves: Mapping[str, Any]) -> int:
    """Bytes of all arrays of the leaves."""
    return sum(nbytes(leaf) for leaf in leaves.values())


def elements(leaf: Any) -> int:
    """Weights that a leaf stands for."""
    return math.prod(leaf.shape)
