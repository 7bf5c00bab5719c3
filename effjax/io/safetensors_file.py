"""Reads and writes one safetensors file, tensor by tensor; a header must describe exactly what is there.

The format: 8 bytes little-endian header size, a JSON object `{name: {dtype, shape, data_offsets}}`, then the data. The
usual readers let a repeated name pass (the last entry wins) and name no tensor when a file is short; both are caught
here. The usual writer wants all tensors at once; here the header comes first and each tensor is put in its place as
soon as it is there, in any order.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from effjax.errors import CheckpointError

_MAX_HEADER = 100_000_000  # the limit of the reference reader
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
CHUNK = 1 << 24  # bytes that are read at once where a tensor need not be whole in memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies: its file, dtype, shape and first byte."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor, in its dtype on disk."""
        return self._flat(0, math.prod(self.shape)).reshape(self.shape)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Slices `start:stop` of the first axis, and only these."""
        width = math.prod(self.shape[1:])
        return self._flat(start * width, (stop - start) * width).reshape(stop - start, *self.shape[1:])

    def chunks(self, nbytes: int = CHUNK) -> Iterator[np.ndarray]:
        """The elements in order, flat, some `nbytes` at a time."""
        size, step = math.prod(self.shape), max(1, nbytes // self.dtype.itemsize)
        for start in range(0, size, step):
            yield self._flat(start, min(step, size - start))

    def sha256(self) -> str:
        """The hash of the tensor's bytes, read in chunks."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(raw_bytes(chunk))
        return digest.hexdigest()

    def _flat(self, first: int, count: int) -> np.ndarray:
        data = np.fromfile(self.file, self.dtype, count=count, offset=self.start + first * self.dtype.itemsize)
        if data.size != count:
            raise CheckpointError(f"{self.file.name}: became shorter while it was read; copy the file again")
        return data


def raw_bytes(x: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, not copied."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


def layout(
    file: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], *, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Where the tensors of a file to be written lie, and the header that says so.

    As the usual writer does, wide dtypes come first, so that every tensor is aligned, and names are in order.

    Args:
        file: what is going to be written.
        tensors: dtype and shape by name.
        metadata: texts for the header.

    Returns:
        The first bytes of the file, up to the data, and an entry a tensor.

    Raises:
        CheckpointError: a dtype that the format does not have.

    Example:
        >>> head, entries = layout(Path("x"), {"a": (np.dtype("int8"), (3,)), "b": (np.dtype("float32"), (2, 2))})
        >>> len(head) % 8, entries["a"].start - entries["b"].start
        (0, 16)
    """
    for name, (dtype, _) in tensors.items():
        if np.dtype(dtype) not in _NAMES:
            raise CheckpointError(f"{name}: safetensors has no dtype {np.dtype(dtype).name}; known are {list(_DTYPES)}")
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset, spans = 0, {}
    for name in sorted(tensors, key=lambda name: (-np.dtype(tensors[name][0]).itemsize, name)):
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, end]}
        spans[name], offset = offset, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    entries = {
        name: TensorEntry(file=file, dtype=np.dtype(tensors[name][0]), shape=tuple(tensors[name][1]), start=base + at)
        for name, at in spans.items()
    }
    return len(text).to_bytes(8, "little") + text, entries


def reserve(head: bytes, entries: Mapping[str, TensorEntry], file: Path) -> None:
    """Makes a file with its header and room for all its tensors, so that a disk that is too small is known at once."""
    size = max((entry.start + entry.nbytes for entry in entries.values()), default=len(head))
    with file.open("wb") as stream:
        stream.write(head)
        stream.flush()
        if size > len(head):
            os.posix_fallocate(stream.fileno(), 0, size)
        os.fsync(stream.fileno())


def put(stream: Any, entry: TensorEntry, parts: Iterator[np.ndarray]) -> str:
    """Writes the elements of one tensor, given in order, to its place in an open file; returns their SHA-256.

    Raises:
        CheckpointError: the parts are not as many bytes as the entry says.
    """
    digest, at, end = hashlib.sha256(), entry.start, entry.start + entry.nbytes
    for part in parts:
        data = raw_bytes(part)
        if at + len(data) > end:
            raise CheckpointError(f"{entry.file.name}: a tensor of {entry.nbytes} bytes got more than that")
        stream.seek(at)
        stream.write(data)
        digest.update(data)
        at += len(data)
    if at != end:
        raise CheckpointError(f"{entry.file.name}: a tensor of {entry.nbytes} bytes got {end - at} too few")
    return digest.hexdigest()


def write_file(file: Path, tensors: Mapping[str, np.ndarray], *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a whole file, one tensor after the other."""
    head, entries = layout(file, {name: (x.dtype, x.shape) for name, x in tensors.items()}, metadata=metadata)
    with file.open("wb") as stream:
        stream.write(head)
        for name, entry in entries.items():
            put(stream, entry, iter([tensors[name]]))


def read_entries(file: Path) -> dict[str, TensorEntry]:
    """All tensors of `file`, from its header alone.

    Raises:
        CheckpointError: the header is damaged, repeats a name, or does not fit the bytes of the file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file.name}: {size} bytes is too short for safetensors; copy the file again")
            header_size = int.from_bytes(prefix, "little")
            if header_size > min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{file.name}: the header claims {header_size} bytes but the file has {size}; it is truncated or "
                    "no "
                    "safetensors file, copy it again"
                )
            raw = stream.read(header_size)
    except OSError as error:
        raise CheckpointError(f"{file.name}: cannot be read ({error.strerror})") from error

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if repeated:
            raise CheckpointError(f"{file.name}: the header names {', '.join(repeated)} more than once; write it anew")
        return dict(pairs)

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: the header is not JSON ({error}); the file is damaged") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file.name}: the header is a {type(header).__name__}, not an object; the file is damaged"
        )
    entries, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        entries[name], span = _entry(file, name, entry, 8 + header_size)
        spans.append((*span, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise CheckpointError(f"{file.name}: {name} starts at byte {start} of the data where {end} is expected")
        end = stop
    if 8 + header_size + end != size:
        short = 8 + header_size + end - size
        what = f"{short} bytes are missing at the end" if short > 0 else f"{-short} bytes too many at the end"
        raise CheckpointError(f"{file.name}: {what}; the file is truncated or damaged, copy it again")
    return entries


def _entry(file: Path, name: str, entry: Any, base: int) -> tuple[TensorEntry, tuple[int, int]]:
    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise CheckpointError(f"{file.name}: the header entry of {name} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{file.name}: {name} has dtype {dtype!r}; known are {', '.join(_DTYPES)}")
    if not whole(shape) or not whole(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{file.name}: {name} has shape {shape!r} and data_offsets {offsets!r}; both must be sizes"
        )
    start, stop = offsets
    wanted = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if stop - start != wanted:
        raise CheckpointError(
            f"{file.name}: {name} of {dtype} {shape} takes {wanted} bytes, but its data_offsets span {stop - start}"
        )
    found = TensorEntry(file=file, dtype=np.dtype(_DTYPES[dtype]), shape=tuple(shape), start=base + start)
    return found, (start, stop)
