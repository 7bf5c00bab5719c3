"""The GGUF container: metadata and tensor descriptions read within strict bounds.

Layout (version 3, little-endian): magic `GGUF`, u32 version, u64 tensor count, u64 metadata count, metadata (key, u32
type, value), tensor descriptions (name, u32 dimensions, u64 sizes fastest first, u32 type, u64 offset), padding to
`general.alignment`, data. The usual readers let overlapping tensors, trailing bytes and names such as `../x` pass; here
the tensors must tile the data exactly, and nothing is allocated from a count that the file is too short to hold.
"""

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from effjax.arrays.base import CompressedArray
from effjax.errors import CheckpointError
from effjax.io.formats.gguf_blocks import decode
from effjax.io.formats.gguf_types import BY_NUMBER, TensorType

MAGIC = b"GGUF"
ALIGNMENT = 32
NUMBERS: dict[int, str] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9
_MIN_PAIR, _MIN_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8  # bytes of the shortest metadata pair and description


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """Where one tensor lies, and what it is.

    Attributes:
        name: as in the file.
        file: the file.
        kind: its type.
        shape: slowest axis first, so that a matrix is `[out, in]`; blocks run along the last axis.
        start: its first byte in the file.
    """

    name: str
    file: Path
    kind: TensorType
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.kind.row_bytes(self.shape[-1])

    def raw(self) -> np.ndarray:
        """The bytes of every row, `uint8[*shape[:-1], bytes]`.

        Raises:
            CheckpointError: the file became shorter since its header was read.
        """
        data = np.fromfile(self.file, np.uint8, count=self.nbytes, offset=self.start)
        if data.size != self.nbytes:
            raise CheckpointError(f"{self.file.name}: became shorter while it was read; copy the file again")
        return data.reshape(*self.shape[:-1], -1)

    def read(self, *, rows: np.ndarray | None = None) -> CompressedArray | np.ndarray:
        """The tensor as a leaf: matrices turned to `[*L, in, out]`, codes and scales exactly those of the file.

        Args:
            rows: the order in which the rows of a matrix (our columns) are taken, `int[out]`; None leaves it.

        Returns:
            A compressed array that materialises to float32 (see `effjax.io.formats.gguf_blocks`), or the numbers of a
            plain type in their dtype.

        Raises:
            CheckpointError: a type that is not read, or values or scales that are not finite.
        """
        raw = self.raw()
        if rows is not None:
            raw = raw[..., rows, :] if raw.ndim > 1 else raw.reshape(rows.size, -1)[rows].reshape(-1)
        return decode(self.kind, raw, name=f"{self.file.name}: {self.name}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """What the header of a file says.

    Attributes:
        metadata: numbers, truth values and strings; an array is a numpy array, or a list of strings.
        tensors: by name, in the order of the file.
        alignment: of the data, in bytes.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    alignment: int = ALIGNMENT


class _Header:
    """Reads the header front to back; every size is checked against what is left of the file first."""

    def __init__(self, file: Path, stream: BinaryIO, size: int) -> None:
        self.file, self.stream, self.size, self.position = file, stream, size, 0

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file.name}: {what}")

    def take(self, count: int, what: str) -> bytes:
        self.room(count, what)
        data = self.stream.read(count)
        if len(data) != count:
            raise self.error("became shorter while it was read; copy the file again")
        self.position += count
        return data

    def room(self, count: int, what: str) -> None:
        if count > self.size - self.position:
            raise self.error(
                f"{what} takes {count} bytes where {self.size - self.position} are left; the file is truncated or "
                "damaged, copy it again"
            )

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def string(self, what: str) -> str:
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8; the file is damaged, copy it again") from error

    def value(self, key: str) -> Any:
        what = f"the value of {key!r}"
        kind = self.number("I", what)
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY:
            return self.numbers(kind, 1, what)[0].item()
        kind, count = self.number("I", what), self.number("Q", what)
        if kind == STRING:
            self.room(8 * count, what)
            return [self.string(f"entry {index} of {key!r}") for index in range(count)]
        if kind == ARRAY:
            raise self.error(f"{what} is an array of arrays, which no model has; the file is damaged")
        return self.numbers(kind, count, what)

    def numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        if kind not in NUMBERS:
            raise self.error(f"{what} has type {kind}, known are 0 to 12; the file is damaged, or newer than version 3")
        dtype = np.dtype(NUMBERS[kind])
        data = self.take(count * dtype.itemsize, what)
        if dtype == np.bool_ and data.strip(b"\0\1"):
            raise self.error(f"{what} is a truth value that is neither 0 nor 1; the file is damaged, copy it again")
        return np.frombuffer(data, dtype)


def read_gguf(path: str | Path) -> GGUFFile:
    """Reads the header of a GGUF file of version 2 or 3; tensors are read one at a time, with `GGUFTensor.read`.

    Raises:
        CheckpointError: the header is damaged, names something twice, or does not fit the bytes of the file.

    Example:
        >>> found = read_gguf("model.gguf")  # doctest: +SKIP
        >>> found.metadata["general.architecture"], found.tensors["token_embd.weight"].shape  # doctest: +SKIP
        ('llama', (2048, 256))
    """
    file = Path(path)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            return _read_header(_Header(file, stream, size))
    except OSError as error:
        raise CheckpointError(f"{file.name}: cannot be read ({error.strerror})") from error


def _read_header(header: _Header) -> GGUFFile:
    if header.take(min(4, header.size), "the magic") != MAGIC:
        raise header.error("does not begin with 'GGUF'; it is no GGUF file, or damaged")
    version = header.number("I", "the version")
    if version not in (2, 3):
        why = "it was written for a big-endian machine" if version in (2 << 24, 3 << 24) else "versions 2 and 3 are"
        raise header.error(f"has GGUF version {version}, which is not read ({why}); convert the model anew")
    tensor_count, pair_count = header.number("Q", "the tensor count"), header.number("Q", "the metadata count")
    header.room(tensor_count * _MIN_TENSOR, f"the description of {tensor_count} tensors")
    header.room(pair_count * _MIN_PAIR, f"metadata of {pair_count} entries")
    metadata: dict[str, Any] = {}
    for index in range(pair_count):
        key = header.string(f"metadata key {index}")
        if not key or not key.isprintable():
            raise header.error(f"metadata key {index} is {key!r}; the file is damaged, copy it again")
        if key in metadata:
            raise header.error(f"the metadata has {key!r} more than once; convert the model anew")
        metadata[key] = header.value(key)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise header.error(f"general.alignment is {alignment!r}, not a power of two; convert the model anew")
    found: dict[str, GGUFTensor] = {}
    for index in range(tensor_count):
        tensor = _tensor(header, index)
        if tensor.name in found:
            raise header.error(f"the tensor {tensor.name} is there more than once; convert the model anew")
        if tensor.start % alignment:
            raise header.error(
                f"{tensor.name} starts at byte {tensor.start} of the data, no multiple of the alignment {alignment}; "
                "the file is damaged, copy it again"
            )
        found[tensor.name] = tensor
    start = padded(header.position, alignment)
    _check_tiling(header, found, start, alignment)
    tensors = {name: dataclasses.replace(tensor, start=start + tensor.start) for name, tensor in found.items()}
    return GGUFFile(metadata=metadata, tensors=tensors, alignment=alignment)


def _tensor(header: _Header, index: int) -> GGUFTensor:
    """One tensor description; `start` is relative to the data until the whole header is read."""
    name = header.string(f"the name of tensor {index}")
    if not plain_name(name):
        raise header.error(
            f"tensor {index} is called {name!r}; a name has 1 to 64 bytes, no path and no control characters; rename it"
        )
    dims = header.number("I", f"the shape of {name}")
    if not 1 <= dims <= 4:
        raise header.error(f"{name} has {dims} dimensions, 1 to 4 are possible; the file is damaged, copy it again")
    sizes = [header.number("Q", f"the shape of {name}") for _ in range(dims)]
    number, start = header.number("I", f"the type of {name}"), header.number("Q", f"the offset of {name}")
    if number not in BY_NUMBER:
        raise header.error(
            f"{name} has tensor type {number}, which is not known; the file is damaged, or of a type newer than "
            f"{max(BY_NUMBER)}: convert the model to another type"
        )
    kind = BY_NUMBER[number]
    if 0 in sizes or sizes[0] % kind.elements:
        raise header.error(
            f"{name} of {kind.name} has shape {sizes[::-1]}; its rows must be whole blocks of {kind.elements} weights "
            "and no axis empty; the file is damaged, copy it again"
        )
    return GGUFTensor(name=name, file=header.file, kind=kind, shape=tuple(sizes[::-1]), start=start)


def plain_name(name: str) -> bool:
    """Whether a tensor may be called so: 1 to 64 bytes, no path upwards or from the root, no control characters."""
    parts = name.replace("\\", "/").split("/")
    return 1 <= len(name.encode()) <= 64 and name.isprintable() and ".." not in parts and parts[0] != ""


def _check_tiling(header: _Header, tensors: Mapping[str, GGUFTensor], start: int, alignment: int) -> None:
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        wanted = padded(end, alignment)
        if tensor.start != wanted:
            raise header.error(
                f"{tensor.name} starts at byte {tensor.start} of the data where {wanted} is expected; tensors overlap "
                "or leave a hole, convert the model anew"
            )
        end = tensor.start + tensor.nbytes
        if start + end > header.size:
            raise header.error(
                f"{tensor.name} of {tensor.kind.name} {list(tensor.shape)} ends at byte {start + end} but the file has "
                f"{header.size}; it is truncated or damaged, copy it again"
            )
    if tensors and header.size not in (start + end, start + padded(end, alignment)):
        raise header.error(
            f"{header.size - start - end} bytes too many behind the last tensor; the file is damaged, copy it again"
        )
    if not tensors and header.size > start:
        raise header.error(f"{header.size - start} bytes of data but no tensor; the file is damaged, copy it again")


def padded(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment
