"""A dense model in a Hugging Face directory, read tensor by tensor under the names of its parameters."""

import dataclasses
import importlib.resources
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effjax.errors import CheckpointError, ConfigError
from effjax.io.checkpoint import is_checkpoint
from effjax.io.safetensors_file import CHUNK, TensorEntry, raw_bytes
from effjax.models.config import DecoderConfig
from effjax.models.hf import (
    all_entries,
    check_entries,
    embedding_name,
    expected_tensors,
    find_directory,
    read_config,
    read_tokenizer,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """One parameter on disk.

    Attributes:
        name: what the file calls it.
        entry: where it lies.
        transposed: whether the file holds `[out, in]` where the parameter is `[in, out]`.
    """

    name: str
    entry: TensorEntry
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape[::-1] if self.transposed else self.entry.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype that jax holds it in: float64 becomes float32."""
        return np.dtype(jax.dtypes.canonicalize_dtype(self.entry.dtype))

    @property
    def struct(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    @property
    def outputs(self) -> int:
        """Rows on disk: the outputs of a kernel, the entries of an embedding."""
        return self.entry.shape[0]

    def read(self) -> np.ndarray:
        """The parameter in its own layout; raises CheckpointError when a value is not finite."""
        return self.read_outputs(0, self.outputs)

    def read_outputs(self, start: int, stop: int) -> np.ndarray:
        """The part of the parameter that belongs to some outputs; nothing else is read."""
        rows = self.entry.read_rows(start, stop)
        self._check(rows, start)
        rows = rows.astype(self.dtype, copy=False)
        return rows.T if self.transposed else rows

    def read_rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of an embedding, `[ids, features]`, read one by one."""
        rows = np.empty((len(ids), *self.entry.shape[1:]), self.dtype)
        for at, row in enumerate(ids):
            found = self.entry.read_rows(int(row), int(row) + 1)
            self._check(found, int(row))
            rows[at] = found[0]
        return rows

    def in_order(self, room: int) -> Iterator[np.ndarray]:
        """The elements of the parameter in the order of its own layout, in pieces.

        A transposed tensor is read several times where it is larger than `room` bytes.
        """
        rows, width = self.entry.shape[0], math.prod(self.entry.shape[1:])
        step = max(1, min(CHUNK, room) // max(1, width * self.entry.dtype.itemsize))
        if not self.transposed:
            for start in range(0, rows, step):
                yield self.read_outputs(start, min(start + step, rows))
            return
        slab = max(1, min(width, room // max(1, rows * self.dtype.itemsize)))
        for first in range(0, width, slab):
            last = min(first + slab, width)
            piece = np.empty((last - first, rows), self.dtype)
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                piece[:, start:stop] = self.read_outputs(start, stop)[first:last]
            yield piece

    def _check(self, rows: np.ndarray, start: int) -> None:
        if _all_finite(rows):
            return
        bad = np.argwhere(~np.isfinite(rows))
        at = [int(bad[0][0]) + start, *(int(index) for index in bad[0][1:])]
        raise CheckpointError(
            f"{self.entry.file.name}: {self.name} has {len(bad)} values that are NaN or infinite, the first at {at}; "
            "copy the file again or ask its author"
        )


def _all_finite(rows: np.ndarray) -> bool:
    flat, step = rows.reshape(-1), CHUNK // rows.dtype.itemsize
    return all(np.isfinite(flat[start : start + step]).all() for start in range(0, flat.size, step))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A dense model whose weights stay on disk.

    Attributes:
        directory: where it is.
        name: what a recipe calls it.
        config: its configuration.
        tensors: its parameters by path, in the order of the layers.
    """

    directory: Path
    name: str
    config: DecoderConfig
    tensors: dict[str, Stored]

    @property
    def structs(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: stored.struct for path, stored in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(math.prod(s.shape) * s.dtype.itemsize for s in self.structs.values())

    @property
    def tokenizer(self) -> Any:
        """A `tokenizers.Tokenizer`, or None."""
        return read_tokenizer(self.directory)

    def files(self) -> dict[str, list[int]]:
        """Size and time of the last change (ns) of every file that is read."""
        names = {stored.entry.file.name for stored in self.tensors.values()} | {"config.json"}
        names |= {name for name in ("tokenizer.json", "generation_config.json") if (self.directory / name).exists()}
        found = {name: (self.directory / name).stat() for name in sorted(names)}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def open_source(path_or_id: str | os.PathLike[str]) -> Source:
    """Opens a directory, a hub id, or the embedded model ("default"); no weight is read.

    Raises:
        CheckpointError: nothing there, a damaged file, or tensors that do not fit config.json.
        ConfigError: the model is compressed already, or is none that this package runs.
    """
    if os.fspath(path_or_id) == "default" and not os.path.isdir(path_or_id):
        directory, name = embedded_directory(), "default"
    else:
        directory, name = find_directory(path_or_id, None)
    if is_checkpoint(directory):
        raise ConfigError(f"{name} is compressed already: compress the original")
    config = read_config(directory)
    entries, expected = all_entries(directory), expected_tensors(config)
    check_entries(entries, expected, name)
    if config.tie_word_embeddings and "lm_head.weight" in entries:
        _check_tied(entries, name, embedding_name(config))
    tensors = {
        tensor.path: Stored(name=tensor_name, entry=entries[tensor_name], transposed=tensor.transposed)
        for tensor_name, tensor in expected.items()
    }
    return Source(directory=directory, name=name, config=config, tensors=tensors)


def embedded_directory() -> Path:
    """The directory of the embedded model.

    Raises:
        CheckpointError: it is not installed as files.
    """
    files = importlib.resources.files("effjax") / "assets" / "default_model"
    if not isinstance(files, Path) or not (files / "config.json").is_file():
        raise CheckpointError("the embedded model (effjax/assets/default_model) is not installed; reinstall effjax")
    return files


def _check_tied(entries: dict[str, TensorEntry], name: str, table: str) -> None:
    head, embedding = entries["lm_head.weight"], entries[table]
    pairs = zip(head.chunks(), embedding.chunks(), strict=False)
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if not same or not all(raw_bytes(a) == raw_bytes(b) for a, b in pairs):
        raise CheckpointError(
            f"{name}: tie_word_embeddings is true, but lm_head.weight differs from {table}; write tie_word_embeddings "
            "false to use the head"
        )
