"""Outputs of a teacher on disk, so that it runs once: its best labels and the rest's mass, in checked shards."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from safetensors import SafetensorError, safe_open

from effjax.distill.logits import TopK, top_k_targets
from effjax.errors import CheckpointError, ConfigError
from effjax.io.directory import file_renamed_when_whole
from effjax.io.safetensors_file import TensorEntry, layout, put, raw_bytes, read_entries

FORMAT = "effjax teacher store 1"
MANIFEST = "store.json"
_AGAIN = "delete it and write the store again: only what is missing is made"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """What a store holds of every position.

    Attributes:
        k: best labels that are kept.
        temperature: by which logits are divided.
        shard_rows: windows in a file; what a kill may lose.
        dtype: of log-probabilities, "float16" (half a thousandth of their size) or "float32".
    """

    k: int = 64
    temperature: float = 1.0
    shard_rows: int = 256
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.k < 1 or self.shard_rows < 1 or not self.temperature > 0:
            raise ConfigError(f"{self}: k, shard_rows and temperature must be positive")
        if self.dtype not in ("float16", "float32"):
            raise ConfigError(f"dtype={self.dtype!r}: choose 'float16' or 'float32'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherStore:
    """A store that is whole, opened by `open_store`.

    Attributes:
        directory: where it is.
        config: what it holds of a position.
        teacher: whose outputs these are, as told to `write_store`.
        windows: how many there are.
        length: positions in a window.
        labels: of the teacher.
        tokens: SHA-256 of the windows.
        shards: the tensors of every file.
    """

    directory: Path
    config: StoreConfig
    teacher: str
    windows: int
    length: int
    labels: int
    tokens: str
    shards: tuple[dict[str, TensorEntry], ...]

    def rows(self, ids: Int[np.ndarray, "batch"]) -> TopK:
        """Outputs for these windows, numpy `[batch, length, k]`; reads only their bytes."""
        where = [divmod(int(i), self.config.shard_rows) for i in ids]
        read: dict[str, Any] = {
            name: np.concatenate([self.shards[shard][name].read_rows(at, at + 1) for shard, at in where])
            for name in ("labels", "log_probs", "tail")
        }
        read["labels"] = read["labels"].astype(np.int32)
        return TopK(**read, temperature=self.config.temperature)

    def check_windows(self, windows: Int[np.ndarray, "windows length"]) -> None:
        """Refuses windows that the store was not made of.

        Raises:
            CheckpointError: others, or in another order.
        """
        if _hash_of(windows) != self.tokens:
            raise CheckpointError(
                f"{self.directory.name}: was made of {self.windows} other windows of {self.length} tokens than these "
                f"{len(windows)}: write a store for them in another directory"
            )


def write_store(
    directory: str | Path,
    apply: Callable[[Any], jax.Array],
    windows: Int[np.ndarray, "windows length"],
    config: StoreConfig,
    *,
    teacher: str,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> TeacherStore:
    """Runs a teacher over windows and keeps its best labels; goes on where an earlier call was killed.

    Every shard appears whole or not at all, and carries the SHA-256 of its contents. The bytes do not depend on how
    often the work was interrupted.

    Args:
        directory: to make, or to go on with.
        apply: tokens `[batch, length]` -> logits `[batch, length, labels]`; jit it.
        windows: tokens.
        config: what to keep.
        teacher: a name or fingerprint; outputs of another teacher are not mixed in.
        batch: windows that run at once.
        progress: called with `(windows done, windows)`.

    Raises:
        ConfigError: `k` exceeds the labels, or there are no windows.
        CheckpointError: the directory holds a store of something else, or a damaged shard; a full disk.

    Example:
        >>> import tempfile
        >>> windows = np.arange(12, dtype=np.int32).reshape(4, 3) % 5
        >>> logits = lambda tokens: 3.0 * jax.nn.one_hot(tokens, 5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = write_store(folder, logits, windows, StoreConfig(k=1, shard_rows=2), teacher="identity")
        ...     top = store.rows(np.array([3, 0]))
        >>> top.labels[..., 0].tolist(), len(store.shards)
        ([[4, 0, 1], [0, 1, 2]], 2)
    """
    directory = Path(directory)
    if len(windows) == 0:
        raise ConfigError(f"{directory.name}: no windows to run the teacher on")
    windows = np.asarray(windows, np.int32)
    labels = jax.eval_shape(apply, jax.ShapeDtypeStruct((1, windows.shape[1]), jnp.int32)).shape[-1]
    if config.k > labels:
        raise ConfigError(f"k={config.k}: {teacher} has {labels} labels; keep at most these")
    manifest = {
        "format": FORMAT,
        "teacher": teacher,
        "windows": len(windows),
        "length": windows.shape[1],
        "labels": labels,
        "tokens": _hash_of(windows),
        **dataclasses.asdict(config),
    }
    _begin(directory, manifest)
    id_dtype = np.uint16 if labels <= 2**16 else np.uint32

    @jax.jit
    def keep(logits: jax.Array) -> TopK:
        return top_k_targets(logits, k=config.k, temperature=config.temperature)

    for index, start in enumerate(range(0, len(windows), config.shard_rows)):
        rows = windows[start : start + config.shard_rows]
        file = directory / _shard_name(index)
        if file.exists():
            _read_shard(file, manifest, index, hashed=True)
        else:
            parts = []
            for at in range(0, len(rows), batch):
                ids = np.minimum(np.arange(at, at + batch), len(rows) - 1)  # one shape, compiled once
                parts.append(jax.tree.map(np.asarray, keep(apply(rows[ids]))))
            top = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
            arrays = {
                "labels": top.labels[: len(rows)].astype(id_dtype),
                "log_probs": top.log_probs[: len(rows)].astype(config.dtype),
                "tail": top.tail[: len(rows)].astype(config.dtype),
            }
            if not np.isfinite(arrays["log_probs"][..., 0]).all():
                raise CheckpointError(f"{file.name}: {teacher} gave outputs that are not finite: nothing was written")
            metadata = {"format": FORMAT, "of": _told(manifest, index), "sha256": _hash_of(*arrays.values())}
            # The usual writer orders the metadata anew each time.
            head, entries = layout(file, {name: (x.dtype, x.shape) for name, x in arrays.items()}, metadata=metadata)
            with file_renamed_when_whole(file) as stream:
                stream.write(head)
                for name, entry in entries.items():
                    put(stream, entry, iter([arrays[name]]))
        if progress is not None:
            progress(min(start + config.shard_rows, len(windows)), len(windows))
    return open_store(directory, verify=False)


def open_store(directory: str | Path, *, verify: bool = True) -> TeacherStore:
    """Opens a store that is whole.

    Args:
        directory: as given to `write_store`.
        verify: also read all bytes and compare their hashes.

    Raises:
        CheckpointError: a shard is missing, damaged or of another store; it is named, with the remedy.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    config = StoreConfig(**{field.name: manifest[field.name] for field in dataclasses.fields(StoreConfig)})
    count = -(-manifest["windows"] // config.shard_rows)
    missing = [name for name in map(_shard_name, range(count)) if not (directory / name).exists()]
    if missing:
        raise CheckpointError(
            f"{directory.name}: {missing[0]} is missing, {len(missing)} of {count} shards are: write the store again, "
            "it goes on where it was"
        )
    shards = tuple(_read_shard(directory / _shard_name(i), manifest, i, hashed=verify) for i in range(count))
    rest = {name: manifest[name] for name in ("teacher", "windows", "length", "labels", "tokens")}
    return TeacherStore(directory=directory, config=config, shards=shards, **rest)


def _begin(directory: Path, manifest: dict[str, Any]) -> None:
    """Notes down what is going to be stored, or compares it with what was."""
    if (directory / MANIFEST).exists():
        begun = _read_manifest(directory)
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
        stream.write((json.dumps(manifest, indent=1) + "\n").encode())


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory.name}: has no {MANIFEST}, so it is no store; write one first") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{directory.name}/{MANIFEST}: is damaged ({error}): write the store anew") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{directory.name}/{MANIFEST}: is not of this format ({FORMAT}): write the store anew")
    return manifest


def _read_shard(file: Path, manifest: dict[str, Any], index: int, *, hashed: bool) -> dict[str, TensorEntry]:
    """The tensors of a shard, whose header and shapes are right, and whose bytes are where they are `hashed`."""
    try:
        entries = read_entries(file)
        with safe_open(file, "np") as opened:
            metadata = opened.metadata() or {}
    except (CheckpointError, SafetensorError) as error:
        raise CheckpointError(f"{file.parent.name}/{file.name}: is damaged ({error}); {_AGAIN}") from error
    if metadata.get("of") != _told(manifest, index):
        raise CheckpointError(f"{file.parent.name}/{file.name}: belongs to another store; {_AGAIN}")
    rows = min(manifest["shard_rows"], manifest["windows"] - index * manifest["shard_rows"])
    outer = (rows, manifest["length"])
    shapes = {"labels": (*outer, manifest["k"]), "log_probs": (*outer, manifest["k"]), "tail": outer}
    if {name: entry.shape for name, entry in entries.items()} != shapes:
        raise CheckpointError(f"{file.parent.name}/{file.name}: does not hold the tensors of a shard; {_AGAIN}")
    if hashed and _hash_of(*(entries[name].read() for name in shapes)) != metadata.get("sha256"):
        raise CheckpointError(f"{file.parent.name}/{file.name}: is damaged (its hash differs); {_AGAIN}")
    return entries


def _told(manifest: dict[str, Any], index: int) -> str:
    """What a shard says of itself: its place, and the store that it is of."""
    return f"{index} {hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()}"


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def _hash_of(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for x in arrays:
        digest.update(raw_bytes(x))
    return digest.hexdigest()
