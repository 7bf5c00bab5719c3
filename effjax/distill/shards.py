"""Arrays by rows in checked files: a manifest and shards that appear whole or not at all, and can be gone on with.

What a store holds is for `effjax.distill.store` and `effjax.distill.pseudo_labels` to say. A manifest has at least
"format" and "shard_rows", how many a file has.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from safetensors import SafetensorError, safe_open

from effjax.errors import CheckpointError
from effjax.io.directory import file_renamed_when_whole, hash_of_entries
from effjax.io.safetensors_file import TensorEntry, layout, put, raw_bytes, read_entries

MANIFEST = "store.json"
OWN_HASH = "sha256"  # of the other entries
_AGAIN = "delete it and write the store again: only what is missing is made"

Manifest = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]  # of a row, for each array
Shards = tuple[dict[str, TensorEntry], ...]


def write_shards(
    directory: Path,
    manifest: Manifest,
    rows: int,
    shapes: Shapes,
    make: Callable[[int, int, str], dict[str, np.ndarray]],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Makes the shards that are missing.

    Args:
        directory: to make, or to go on with.
        manifest: what is stored; another one than was begun with is refused.
        rows: in all.
        shapes: what is expected of the shards that are there, in the order that they are hashed in.
        make: `(first row, row after the last, file name) -> arrays`, in the order of `shapes`.
        progress: called with `(rows done, rows)`.

    Raises:
        CheckpointError: the directory holds a store of something else, or a damaged shard; a full disk.
    """
    _begin(directory, manifest)
    each = manifest["shard_rows"]
    for index, start in enumerate(range(0, rows, each)):
        end, file = min(start + each, rows), directory / _shard_name(index)
        if file.exists():
            _read_shard(file, manifest, index, end - start, shapes, hashed=True)
        else:
            arrays = make(start, end, file.name)
            metadata = {"format": manifest["format"], "of": _told(manifest, index), "sha256": hash_of(*arrays.values())}
            # The usual writer orders the metadata anew each time.
            head, entries = layout(file, {name: (x.dtype, x.shape) for name, x in arrays.items()}, metadata=metadata)
            with file_renamed_when_whole(file) as stream:
                stream.write(head)
                for name, entry in entries.items():
                    put(stream, entry, iter([arrays[name]]))
        if progress is not None:
            progress(end, rows)


def open_shards(directory: Path, manifest: Manifest, rows: int, shapes: Shapes, *, verify: bool) -> Shards:
    """The tensors of every file.

    Raises:
        CheckpointError: a shard is missing, damaged or of another store; it is named, with the remedy.
    """
    each = manifest["shard_rows"]
    count = -(-rows // each)
    missing = [name for name in map(_shard_name, range(count)) if not (directory / name).exists()]
    if missing:
        raise CheckpointError(
            f"{directory.name}: {missing[0]} is missing, {len(missing)} of {count} shards are: write the store again, "
            "it goes on where it was"
        )
    sizes = [min(each, rows - i * each) for i in range(count)]
    return tuple(
        _read_shard(directory / _shard_name(i), manifest, i, size, shapes, hashed=verify)
        for i, size in enumerate(sizes)
    )


def read_rows(
    shards: Shards, shard_rows: int, ids: Int[np.ndarray, "batch"], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Some rows of the arrays named; reads only their bytes."""
    where = [divmod(int(i), shard_rows) for i in ids]
    return {name: np.concatenate([shards[shard][name].read_rows(at, at + 1) for shard, at in where]) for name in names}


def read_manifest(directory: Path, form: str) -> Manifest:
    """What a store says of itself.

    Raises:
        CheckpointError: there is none, or it is damaged, or of another format.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory.name}: has no {MANIFEST}, so it is no store; write one first") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{directory.name}/{MANIFEST}: is damaged ({error}): write the store anew") from error
    if not isinstance(manifest, dict) or manifest.get("format") != form:
        raise CheckpointError(f"{directory.name}/{MANIFEST}: is not of this format ({form}): write the store anew")
    if manifest.pop(OWN_HASH, None) != hash_of_entries(manifest):
        raise CheckpointError(f"{directory.name}/{MANIFEST}: is damaged (its hash differs): write the store anew")
    return manifest


def hash_of(*arrays: np.ndarray) -> str:
    """SHA-256 of the bytes of arrays."""
    digest = hashlib.sha256()
    for x in arrays:
        digest.update(raw_bytes(x))
    return digest.hexdigest()


def _begin(directory: Path, manifest: Manifest) -> None:
    """Notes down what is going to be stored, or compares it with what was."""
    if (directory / MANIFEST).exists():
        begun = read_manifest(directory, manifest["format"])
        other = [name for name in manifest if begun.get(name) != manifest[name]]
        if other:
            name = other[0]
            raise CheckpointError(
                f"{directory.name}: holds a store of {name}={begun.get(name)!r}, not {manifest[name]!r}: name another "
                "directory, or delete this one"
            )
        for unfinished in directory.glob(".shard-*"):  # of a process that was killed
            unfinished.unlink()
        return
    if directory.exists() and any(directory.iterdir()):
        raise CheckpointError(f"{directory.name}: is not empty and holds no store: name another directory")
    directory.mkdir(exist_ok=True)
    with file_renamed_when_whole(directory / MANIFEST) as stream:
        told = {**manifest, OWN_HASH: hash_of_entries(manifest)}
        stream.write((json.dumps(told, indent=1) + "\n").encode())


def _read_shard(
    file: Path, manifest: Manifest, index: int, rows: int, shapes: Shapes, *, hashed: bool
) -> dict[str, TensorEntry]:
    """The tensors of a shard, whose header and shapes are right, and whose bytes are where they are `hashed`."""
    try:
        entries = read_entries(file)
        with safe_open(file, "np") as opened:
            metadata = opened.metadata() or {}
    except (CheckpointError, SafetensorError) as error:
        raise CheckpointError(f"{file.parent.name}/{file.name}: is damaged ({error}); {_AGAIN}") from error
    if metadata.get("of") != _told(manifest, index):
        raise CheckpointError(f"{file.parent.name}/{file.name}: belongs to another store; {_AGAIN}")
    if {name: entry.shape for name, entry in entries.items()} != {name: (rows, *s) for name, s in shapes.items()}:
        raise CheckpointError(f"{file.parent.name}/{file.name}: does not hold the tensors of a shard; {_AGAIN}")
    if hashed and hash_of(*(entries[name].read() for name in shapes)) != metadata.get("sha256"):
        raise CheckpointError(f"{file.parent.name}/{file.name}: is damaged (its hash differs); {_AGAIN}")
    return entries


def _told(manifest: Manifest, index: int) -> str:
    """What a shard says of itself: its place, and the store that it is of."""
    return f"{index} {hash_of_entries(manifest)}"


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"
