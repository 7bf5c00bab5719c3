"""Batches for the loop: examples in memory, in files or from tensorflow-datasets, in one order on any number of hosts.

The order is a function of the seed and the position alone. Step `s` takes positions `s * batch` to `(s + 1) * batch`,
and each process reads those rows that its devices hold, so the whole batch is the same however many there are. A
position is one number, which is all that a checkpoint has to keep.

Reading ahead is grain's work; nothing here needs TensorFlow.
"""

import dataclasses
import glob
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import safetensors.numpy
from jax.sharding import NamedSharding

from effjax.errors import ConfigError
from train.sharding import process_rows
from train.step import Batch


class Examples(Protocol):
    """A numbered collection of examples, trees of numpy arrays of one shape each; so are grain's and tfds' sources."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class PositionedIterator(Protocol):
    """Rows of this process, batch after batch; as grain's iterators are.

    The state must be the same in every process, and JSON must be able to hold it.
    """

    def __next__(self) -> Batch: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any, /) -> None: ...


@dataclasses.dataclass(frozen=True)
class ArrayExamples:
    """Examples in memory.

    Attributes:
        arrays: a tree of numpy arrays, whose leading axis counts the examples.

    Raises:
        ConfigError: leading axes that differ.
    """

    arrays: Any

    def __post_init__(self):
        sizes = {len(x) for x in jax.tree.leaves(self.arrays)}
        if len(sizes) != 1:
            raise ConfigError(f"leading axes of {sorted(sizes)}: all arrays must have one row an example")

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.arrays)[0])

    def __getitem__(self, index: Any) -> Any:
        return jax.tree.map(lambda x: x[index], self.arrays)


class ArrayRecordExamples:
    """Examples in array_record files, as `write_array_record` writes them.

    Args:
        paths: the files, in the order in which they are numbered.

    Raises:
        ConfigError: no files, a package that is missing, or a record that is not such an example.
    """

    def __init__(self, paths: Iterable[Path | str]):
        self._paths = [str(path) for path in paths]
        if not self._paths:
            raise ConfigError("no array_record files: name some that exist")
        self._records = _grain().sources.ArrayRecordDataSource(self._paths)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        try:
            return safetensors.numpy.load(self._records[int(index)])
        except safetensors.SafetensorError as error:
            raise ConfigError(
                f"record {index} of {self._paths[0]}: is not an example of write_array_record ({error})"
            ) from None


def write_array_record(path: Path, examples: Iterable[Mapping[str, np.ndarray]]) -> int:
    """Writes examples to one file; it gets its name when it is whole.

    Args:
        path: such as "train-00000.array_record".
        examples: named arrays, each example with the same names, shapes and dtypes.

    Returns:
        How many.
    """
    try:
        from array_record.python.array_record_module import ArrayRecordWriter  # type: ignore[import-not-found]
    except ImportError:
        raise ConfigError("array_record files need the package array_record; pip install 'effjax[train]'") from None
    fresh, count = f"{path}.new", 0
    writer = ArrayRecordWriter(fresh, "group_size:1")  # so that any record is read alone
    for example in examples:
        writer.write(safetensors.numpy.save({name: np.asarray(x, order="C") for name, x in example.items()}))
        count += 1
    writer.close()
    os.replace(fresh, path)
    return count


def open_examples(name: str) -> Examples:
    """Examples by name.

    Args:
        name: an `.npz` of arrays with one leading axis; an `.array_record` file or a pattern for several, taken in the
            order of their names; or "tfds:NAME/SPLIT", prepared with `file_format="array_record"`.

    Raises:
        ConfigError: nothing of that name, or a package that is missing.
    """
    if name.startswith("tfds:"):
        dataset, _, split = name.removeprefix("tfds:").rpartition("/")
        try:
            import tensorflow_datasets as tfds  # type: ignore[import-not-found]
        except ImportError:
            raise ConfigError(f"{name}: pip install tensorflow-datasets importlib_resources; no TensorFlow") from None
        return tfds.data_source(dataset, split=split)
    if name.endswith(".npz"):
        try:
            with np.load(name) as file:
                return ArrayExamples(dict(file))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name}: cannot be read as arrays ({error})") from None
    files = sorted(glob.glob(name))
    if not files:
        raise ConfigError(f"{name}: no such files; name an .npz, array_record files, or tfds:NAME/SPLIT")
    return ArrayRecordExamples(files)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """Batches of examples, shuffled anew in each epoch.

    Where an epoch ends inside a batch, the next one begins there: every example comes once an epoch.

    Attributes:
        examples: where they come from.
        batch: rows of the whole batch, over all processes.
        seed: of the order and of `transform`.
        shuffle: False takes the examples as they are numbered.
        epochs: None goes on for ever.
        transform: `(example, rng) -> example`; the generator is a function of seed and position alone.
        threads: that read ahead; 0 reads when asked.

    Example:
        >>> batches = Batches(examples=ArrayExamples({"x": np.arange(5)}), batch=4, shuffle=False)
        >>> [batches.read(step, slice(0, 4))["x"].tolist() for step in (0, 1)]
        [[0, 1, 2, 3], [4, 0, 1, 2]]
    """

    examples: Examples
    batch: int
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = None
    transform: Callable[[Any, np.random.Generator], Any] | None = None
    threads: int = 2

    def __post_init__(self):
        if self.batch < 1 or len(self.examples) < 1 or self.threads < 0:
            raise ConfigError(
                f"batch={self.batch} of {len(self.examples)} examples, threads={self.threads}: give at least one "
                "example, a batch of one row, and no fewer than 0 threads"
            )

    def __len__(self) -> int:
        """Whole batches in all."""
        total = sys.maxsize if self.epochs is None else self.epochs * len(self.examples)
        return total // self.batch

    def read(self, step: int, rows: slice | np.ndarray) -> Batch:
        """Some rows of one batch.

        Args:
            step: which batch.
            rows: of the batch.
        """
        positions = step * self.batch + np.arange(self.batch)[rows]
        epochs, ids = np.divmod(positions, len(self.examples))
        if self.shuffle:
            for epoch in np.unique(epochs):
                ids[epochs == epoch] = permute(ids[epochs == epoch], len(self.examples), (self.seed, int(epoch)))
        if self.transform is None and isinstance(self.examples, ArrayExamples):
            return self.examples[ids]
        found = [self.examples[int(index)] for index in ids]
        if self.transform is not None:
            rngs = (np.random.default_rng((self.seed, int(position))) for position in positions)
            found = [self.transform(example, rng) for example, rng in zip(found, rngs, strict=True)]
        return jax.tree.map(lambda *rows: np.stack(rows), *found)

    def open(self, across: NamedSharding) -> PositionedIterator:
        """An iterator over the rows of this process.

        Args:
            across: sharding of a batch's leading axis.
        """
        rows, grain = process_rows(across, self.batch), _grain()
        steps = grain.MapDataset.range(len(self)).map(lambda step: self.read(int(step), rows))
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)
        return iter(steps.to_iter_dataset(options))


def permute(index: np.ndarray, count: int, seed: Sequence[int]) -> np.ndarray:
    """A random permutation of `count` numbers at some of them, without a table of all.

    A Feistel network over the next power of four, walked until it is inside (Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002).

    Args:
        index: int64 [n], each at least 0 and below `count`.
        count: how many are permuted.
        seed: numbers that choose the permutation.

    Returns:
        int64 [n].

    Example:
        >>> sorted(permute(np.arange(6), 6, (0,)).tolist())
        [0, 1, 2, 3, 4, 5]
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.default_rng(seed).integers(0, 1 << 64, 6, np.uint64)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << half | right

    x = network(index.astype(np.uint64))
    while (outside := x >= count).any():
        x[outside] = network(x[outside])
    return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of `x`: the last step of MurmurHash3."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> np.uint64(33))) * np.uint64(factor)
    return x ^ (x >> np.uint64(33))


class _StepBatches:
    """A function of the step as an iterator; each process takes its rows of the whole batch."""

    def __init__(self, batch_at: Callable[[int], Batch], across: NamedSharding):
        self._batch_at, self._across, self._step = batch_at, across, 0

    def __next__(self) -> Batch:
        batch = self._batch_at(self._step)
        self._step += 1
        count = len(jax.tree.leaves(batch)[0])
        rows = process_rows(self._across, count)
        return batch if len(rows) == count else jax.tree.map(lambda x: x[rows], batch)

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        self._step = state["next_index"]


Source = Callable[[int], Batch] | Batches | PositionedIterator


def open_source(data: Source, across: NamedSharding) -> PositionedIterator:
    """What `train.loop.fit` takes as data, as an iterator over the rows of this process."""
    if isinstance(data, Batches):
        return data.open(across)
    return _StepBatches(data, across) if callable(data) else data


def _grain() -> Any:
    try:
        import grain  # type: ignore[import-not-found]
    except ImportError:
        raise ConfigError("this input needs the package grain; pip install 'effjax[train]'") from None
    return grain
