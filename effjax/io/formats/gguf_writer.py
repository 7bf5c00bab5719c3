"""Writes GGUF files of version 3: under a temporary name first, one tensor in memory at a time."""

import dataclasses
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from effjax.errors import CheckpointError
from effjax.io.directory import file_renamed_when_whole
from effjax.io.formats.gguf import ALIGNMENT, ARRAY, MAGIC, NUMBERS, STRING, padded, plain_name
from effjax.io.formats.gguf_types import TensorType


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewTensor:
    """A tensor to write: `data()` gives `shape` in the bytes of `kind`, and is called when its turn comes."""

    kind: TensorType
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.kind.row_bytes(self.shape[-1])


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, NewTensor],
    *,
    overwrite: bool = False,
) -> None:
    """Writes one file.

    Args:
        path: to make; its directory must exist.
        metadata: `bool`, `str`, `int` (u32, or the first of i32, u64 and i64 that holds it), `float` (f32), numpy
            scalars (their own type), numpy arrays of numbers, and lists of strings.
        tensors: by name; the data follows in this order.
        overwrite: replaces a file that exists already.

    Raises:
        CheckpointError: a name that no reader takes, a value that has no type here, data that does not have the size of
            its description, a file that exists already, or a full disk; nothing is left behind.

    Example:
        >>> import tempfile
        >>> from effjax.io.formats.gguf import read_gguf
        >>> from effjax.io.formats.gguf_types import BY_NAME
        >>> weight = NewTensor(kind=BY_NAME["F32"], shape=(2, 3), data=lambda: np.ones((2, 3), np.float32))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     write_gguf(f"{directory}/a.gguf", {"general.architecture": "none"}, {"w": weight})
        ...     read_gguf(f"{directory}/a.gguf").tensors["w"].read().shape
        (3, 2)
    """
    with file_renamed_when_whole(Path(path), overwrite=overwrite) as stream:
        _write(stream, metadata, tensors)


def _write(stream: BinaryIO, metadata: Mapping[str, Any], tensors: Mapping[str, NewTensor]) -> None:
    alignment = int(metadata.get("general.alignment", ALIGNMENT))
    head = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_string(key), _value(key, value)]
    end = 0
    for name, tensor in tensors.items():
        if not plain_name(name):
            raise CheckpointError(f"the tensor name {name!r} is no name of 1 to 64 bytes without a path; rename it")
        sizes = tensor.shape[::-1]
        head += [_string(name), struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, tensor.kind.number, end)]
        end = padded(end + tensor.nbytes, alignment)
    whole = b"".join(head)
    stream.write(whole.ljust(padded(len(whole), alignment), b"\0"))
    for name, tensor in tensors.items():
        data = np.ascontiguousarray(tensor.data())
        if data.nbytes != tensor.nbytes:
            raise CheckpointError(f"{name} has {data.nbytes} bytes, its shape and type take {tensor.nbytes}")
        stream.write(data.reshape(-1).view(np.uint8).data)
        stream.write(b"\0" * (padded(data.nbytes, alignment) - data.nbytes))


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value, bool):
        value = np.bool_(value)
    elif isinstance(value, int):
        value = _whole(key, value)
    elif isinstance(value, float):
        value = np.float32(value)
    numbers = {np.dtype(code): kind for kind, code in NUMBERS.items()}
    if isinstance(value, np.generic | np.ndarray) and value.dtype in numbers:
        kind, data = struct.pack("<I", numbers[value.dtype]), np.ascontiguousarray(value).tobytes()
        if isinstance(value, np.generic):
            return kind + data
        if value.ndim == 1:
            return struct.pack("<I", ARRAY) + kind + struct.pack("<Q", value.size) + data
    raise CheckpointError(f"metadata {key!r} is a {type(value).__name__}, which GGUF has no type for; write a number")


def _whole(key: str, value: int) -> np.generic:
    for dtype in (np.uint32, np.int32, np.uint64, np.int64):  # readers expect counts as u32
        if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            return dtype(value)
    raise CheckpointError(f"metadata {key!r} is {value}, beyond 64 bits; write a smaller number")
