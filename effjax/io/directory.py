"""Directories and files that appear whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from effjax.errors import CheckpointError


@contextlib.contextmanager
def renamed_when_whole(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its name at the end, or disappears on any error.

    Raises:
        CheckpointError: `target` exists and `overwrite` is False, its parent is missing, or the disk is full.
    """
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target.name} exists already; choose another name, or overwrite it explicitly")
    if not target.absolute().parent.is_dir():
        raise CheckpointError(f"{target.name} cannot be made: its parent directory does not exist; make that first")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
    except OSError as error:
        raise CheckpointError(f"{target.name} cannot be written ({error.strerror}); nothing was left behind") from error
    old = temporary.with_name(temporary.name + ".old")
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for file in temporary.iterdir():  # the safetensors writer makes files that only their owner reads
            file.chmod(0o666 & ~_umask())
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":  # the writer wraps a full disk
            raise CheckpointError(
                f"{target.name} cannot be written ({error}); nothing was left behind, free some space or choose "
                "another disk"
            ) from error
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def file_renamed_when_whole(target: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A temporary file beside `target` that takes its name at the end, or disappears on any error.

    Raises:
        CheckpointError: as `renamed_when_whole`.
    """
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target.name} exists already; choose another name, or overwrite it explicitly")
    if not target.absolute().parent.is_dir():
        raise CheckpointError(f"{target.name} cannot be made: its parent directory does not exist; make that first")
    temporary: Path | None = None
    try:
        number, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.absolute().parent)
        temporary = Path(name)
        with os.fdopen(number, "wb") as stream:
            yield stream
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{target.name} cannot be written ({error.strerror}); nothing was left behind, free some space or "
                "choose another disk"
            ) from error
        raise


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def hash_of_entries(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all entries of a manifest, in any order and layout: what it carries itself to tell damage.

    Example:
        >>> hash_of_entries({"a": 1, "b": [2]}) == hash_of_entries({"b": [2], "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
