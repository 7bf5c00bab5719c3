"""Reads one safetensors file, tensor by tensor, after checking that its header describes exactly what is there.

The format: 8 bytes little-endian header size, a JSON object `{name: {dtype, shape, data_offsets}}`, then the data. The
usual readers let a repeated name pass (the last entry wins) and name no tensor when a file is short; both are caught
here.
"""

import dataclasses
import json
import math
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies: its file, dtype, shape and first byte."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def read(self) -> np.ndarray:
        """The tensor, in its dtype on disk."""
        count = math.prod(self.shape)
        data = np.fromfile(self.file, self.dtype, count=count, offset=self.start)
        if data.size != count:
            raise CheckpointError(f"{self.file.name}: became shorter while it was read; copy the file again")
        return data.reshape(self.shape)


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
