"""The work directory of a compression that goes on: what is finished, and whether it may be gone on with.

Beside the output, hidden, while the work lasts:

    .NAME.effjax-work/lock            held by the process that works
    .NAME.effjax-work/journal.jsonl   a line a finished unit, behind one line that says what is being made
    .NAME.effjax-work/output/         the weight files, of their final size from the start
    .NAME.effjax-work/carry-*         inputs of the next block, where blocks are calibrated

A unit is finished when its line is in the journal; before that its tensors are on disk. What a killed process leaves
of an unfinished unit is written over.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effjax.errors import CheckpointError

JOURNAL, LOCK, OUTPUT = "journal.jsonl", "lock", "output"


class Work:
    """An open work directory; a context manager that holds its lock.

    Attributes:
        root: the directory.
        output: where the weight files are.
        done: what the journal says of every finished unit, by its name.
        finished: whether everything is written, and only the renaming may be left.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], *, restart: bool = False) -> None:
        """Opens or makes the work directory of `out`.

        Args:
            out: the directory that is going to be written.
            fingerprint: everything that the bytes depend on, as plain values.
            restart: throws away what is there.

        Raises:
            CheckpointError: another process works on `out`; or what is there was begun from something else.
        """
        self.out = out
        self.root = work_directory(out)
        self.output = self.root / OUTPUT
        self.done: dict[str, Any] = {}
        self.finished = False
        self._fingerprint = json.loads(json.dumps(dict(fingerprint)))
        self.root.mkdir(exist_ok=True)
        self._lock = (self.root / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise CheckpointError(
                f"another process is writing {out.name}: wait for it, or choose another --out"
            ) from None
        try:
            self._read(restart)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> "Work":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _read(self, restart: bool) -> None:
        lines, whole = read_journal(self.root / JOURNAL)
        if restart or not lines:
            self.clear()
            self.append({"fingerprint": self._fingerprint})
            return
        problems = differences(lines[0].get("fingerprint", {}), self._fingerprint)
        if problems:
            raise CheckpointError(
                f"an unfinished compression to {self.out.name} was begun with other {'; '.join(problems)}: finish it "
                "with the command that it was begun with, or start over with --restart"
            )
        os.truncate(self.root / JOURNAL, whole)  # what a killed process wrote of its last line
        self.done = {line["unit"]: line for line in lines[1:] if "unit" in line}
        self.finished = any(line.get("finished") for line in lines)

    def clear(self) -> None:
        """Removes everything but the lock; the journal first, so that it never promises what is gone."""
        (self.root / JOURNAL).unlink(missing_ok=True)
        self._clear_but_journal()
        self.done = {}

    def _clear_but_journal(self) -> None:
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (LOCK, JOURNAL):
                path.unlink()

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line to the journal; on disk when this returns."""
        with (self.root / JOURNAL).open("ab") as stream:
            stream.write(json.dumps(dict(line), ensure_ascii=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        if "unit" in line:
            self.done[line["unit"]] = dict(line)

    def publish(self, *, overwrite: bool) -> None:
        """Gives the output its name and removes the work directory; may be called again after a kill in between.

        Raises:
            CheckpointError: the output exists and `overwrite` is False.
        """
        if self.output.exists():
            old = self.root / "old"
            if self.out.exists():
                if not overwrite:
                    raise CheckpointError(f"{self.out.name} exists already; choose another name, or overwrite it")
                shutil.rmtree(old, ignore_errors=True)
                self.out.rename(old)
            self.output.rename(self.out)
            sync_directory(self.out.absolute().parent)
        self.remove()

    def remove(self) -> None:
        """Removes the work directory; the journal stays until nothing else is left to do."""
        self._clear_but_journal()
        (self.root / JOURNAL).unlink(missing_ok=True)
        (self.root / LOCK).unlink()
        self.root.rmdir()


class FileArray:
    """An array in a file, of which runs of the first axis are read and written; none of it stays in memory."""

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: Any = np.float32, *, make: bool = False) -> None:
        self.file, self.shape, self.dtype = file, shape, np.dtype(dtype)
        self._row = int(np.prod(shape[1:])) * self.dtype.itemsize
        if make:
            with file.open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, max(1, shape[0] * self._row))

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        count = (stop - start) * self._row // self.dtype.itemsize
        data = np.fromfile(self.file, self.dtype, count=count, offset=start * self._row)
        return data.reshape(stop - start, *self.shape[1:])

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        with self.file.open("r+b") as stream:
            stream.seek(rows.indices(self.shape[0])[0] * self._row)
            stream.write(np.ascontiguousarray(values, self.dtype).data)

    def keep_as(self, file: Path) -> None:
        """Gives the file its final name, when all of it is on disk."""
        with self.file.open("rb") as stream:
            os.fsync(stream.fileno())
        self.file.rename(file)
        sync_directory(file.parent)
        self.file = file


def work_directory(out: Path) -> Path:
    """Where the unfinished work for `out` is."""
    return out.absolute().parent / f".{out.name}.effjax-work"


def only_naming_left(out: Path) -> bool:
    """Whether a killed process had everything written, so that `out` may exist already."""
    return any(line.get("finished") for line in read_journal(work_directory(out) / JOURNAL)[0])


def read_journal(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal, and the bytes they take; what follows a broken line does not count."""
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return [], 0
    lines, whole = [], 0
    for raw in text.splitlines(keepends=True):
        try:
            line = json.loads(raw)
        except ValueError:
            break
        if not raw.endswith(b"\n") or not isinstance(line, dict):
            break
        lines.append(line)
        whole += len(raw)
    return lines, whole


def differences(before: Any, now: Any) -> list[str]:
    """What differs between two fingerprints, in words.

    Example:
        >>> differences({"recipe": "a", "jax": "0.10"}, {"recipe": "a", "jax": "0.11"})
        ["jax ('0.10' then, '0.11' now)"]
    """
    found = []
    for key in dict.fromkeys([*before, *now]):
        a, b = before.get(key), now.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key} {text}" for text in differences(a, b)]
        elif all(isinstance(x, str | int | float | None) and len(str(x)) < 40 for x in (a, b)):
            found.append(f"{key} ({a!r} then, {b!r} now)")
        else:
            found.append(key)
    return found


def sync_directory(directory: Path) -> None:
    """Brings the names in a directory to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
