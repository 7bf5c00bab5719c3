"""Outputs of a teacher on disk, so that it runs once: its best labels and the rest's mass, in checked shards."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from effjax.distill.logits import TopK, top_k_targets
from effjax.distill.shards import Shapes, Shards, hash_of, open_shards, read_manifest, read_rows, write_shards
from effjax.errors import CheckpointError, ConfigError

FORMAT = "effjax teacher store 1"


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
    shards: Shards

    def rows(self, ids: Int[np.ndarray, "batch"]) -> TopK:
        """Outputs for these windows, numpy `[batch, length, k]`; reads only their bytes."""
        read: dict[str, Any] = read_rows(self.shards, self.config.shard_rows, ids, ("labels", "log_probs", "tail"))
        read["labels"] = read["labels"].astype(np.int32)
        return TopK(**read, temperature=self.config.temperature)

    def check_windows(self, windows: Int[np.ndarray, "windows length"]) -> None:
        """Refuses windows that the store was not made of.

        Raises:
            CheckpointError: others, or in another order.
        """
        if hash_of(windows) != self.tokens:
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
        "tokens": hash_of(windows),
        **dataclasses.asdict(config),
    }
    id_dtype = np.uint16 if labels <= 2**16 else np.uint32

    @jax.jit
    def keep(logits: jax.Array) -> TopK:
        return top_k_targets(logits, k=config.k, temperature=config.temperature)

    def make(start: int, end: int, file: str) -> dict[str, np.ndarray]:
        parts = []
        for at in range(start, end, batch):
            ids = np.minimum(np.arange(at, at + batch), end - 1)  # one shape, compiled once
            parts.append(jax.tree.map(np.asarray, keep(apply(windows[ids]))))
        top = jax.tree.map(lambda *xs: np.concatenate(xs)[: end - start], *parts)
        arrays = {
            "labels": top.labels.astype(id_dtype),
            "log_probs": top.log_probs.astype(config.dtype),
            "tail": top.tail.astype(config.dtype),
        }
        if not np.isfinite(arrays["log_probs"][..., 0]).all():
            raise CheckpointError(f"{file}: {teacher} gave outputs that are not finite: nothing was written")
        return arrays

    write_shards(directory, manifest, len(windows), _shapes(manifest), make, progress)
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
    manifest = read_manifest(directory, FORMAT)
    config = StoreConfig(**{field.name: manifest[field.name] for field in dataclasses.fields(StoreConfig)})
    shards = open_shards(directory, manifest, manifest["windows"], _shapes(manifest), verify=verify)
    rest = {name: manifest[name] for name in ("teacher", "windows", "length", "labels", "tokens")}
    return TeacherStore(directory=directory, config=config, shards=shards, **rest)


def _shapes(manifest: dict[str, Any]) -> Shapes:
    """Of a window."""
    length, k = manifest["length"], manifest["k"]
    return {"labels": (length, k), "log_probs": (length, k), "tail": (length,)}
