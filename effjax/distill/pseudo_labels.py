"""Labels that experts give to images, made once: class maps, depth and normals in a byte a number, on a coarse grid."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, UInt8

from effjax.distill.shards import Shapes, Shards, hash_of, open_shards, read_manifest, read_rows, write_shards
from effjax.errors import CheckpointError, ConfigError

FORMAT = "effjax label store 1"
IGNORE = 255  # in a class map: the expert does not say
STEPS = 127  # of a number of 8 bits with a sign

Kind = Literal["classes", "depth", "normals"]
Labels = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expert:
    """A trained model that labels images.

    Attributes:
        kind: of what it gives for images `[batch, height, width, channels]`: "classes" logits
            `[batch, height, width, classes]`, "depth" `[batch, height, width]` on any scale, "normals"
            `[batch, height, width, 3]` of any length.
        apply: the model; jit it.
        least: probability of the best class below which it says nothing.
    """

    kind: Kind
    apply: Callable[[Any], jax.Array]
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("classes", "depth", "normals"):
            raise ConfigError(f"kind={self.kind!r}: choose 'classes', 'depth' or 'normals'")


def coarse_classes(
    logits: Float[Array, "batch height width classes"], factor: int, least: float = 0.0
) -> UInt8[Array, "batch rows columns"]:
    """The best class at the middle of each square of `factor` pixels; `IGNORE` where it is not certain enough.

    Example:
        >>> logits = jnp.array([[[[4.0, 0.0], [0.0, 4.0]], [[0.0, 4.0], [0.0, 0.0]]]])
        >>> coarse_classes(logits, 1, least=0.9)[0].tolist(), coarse_classes(logits, 2).tolist()
        ([[0, 1], [1, 255]], [[[0]]])
    """
    taken = logits[:, factor // 2 :: factor, factor // 2 :: factor].astype(jnp.float32)
    certain = jax.nn.softmax(taken, axis=-1).max(-1) >= least
    return jnp.where(certain, taken.argmax(-1), IGNORE).astype(jnp.uint8)


def coarse_depth(depth: Float[Array, "batch height width"], factor: int) -> Int8[Array, "batch rows columns"]:
    """Means of squares of pixels, each image's least depth 0 and its greatest 127.

    Example:
        >>> coarse_depth(jnp.array([[[5.0, 5.0, 9.0, 9.0], [5.0, 5.0, 9.0, 9.0]]]), 2).tolist()
        [[[0, 127]]]
    """
    mean = _means(depth[..., None].astype(jnp.float32), factor)[..., 0]
    low, high = mean.min((1, 2), keepdims=True), mean.max((1, 2), keepdims=True)
    return jnp.round(STEPS * (mean - low) / jnp.maximum(high - low, 1e-9)).astype(jnp.int8)


def coarse_normals(normals: Float[Array, "batch height width 3"], factor: int) -> Int8[Array, "batch rows columns 3"]:
    """Means of squares of pixels, of length 1 again, in steps of 1/127.

    Example:
        >>> coarse_normals(jnp.array([[[[0.0, 3.0, 4.0]]]]), 1).tolist()
        [[[[0, 76, 102]]]]
    """
    mean = _means(normals.astype(jnp.float32), factor)
    length = jnp.linalg.norm(mean, axis=-1, keepdims=True)
    return jnp.round(STEPS * mean / jnp.maximum(length, 1e-9)).astype(jnp.int8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelStore:
    """A store that is whole, opened by `open_labels`.

    Attributes:
        directory: where it is.
        kinds: of the labels, by name.
        grid: rows and columns of them.
        images: how many are labelled.
        hashed: SHA-256 of the images.
        shard_rows: images in a file.
        shards: the tensors of every file.
    """

    directory: Path
    kinds: dict[str, Kind]
    grid: tuple[int, int]
    images: int
    hashed: str
    shard_rows: int
    shards: Shards

    def rows(self, ids: Int[np.ndarray, "batch"]) -> Labels:
        """Labels of these images: int32 classes, float32 depth from 0 to 1, float32 normals of length 1."""
        read = read_rows(self.shards, self.shard_rows, ids, tuple(self.kinds))
        return {name: _floats(x, self.kinds[name]) for name, x in read.items()}

    def check_images(self, images: np.ndarray) -> None:
        """Refuses images that the labels are not of.

        Raises:
            CheckpointError: others, or in another order.
        """
        if hash_of(images) != self.hashed:
            raise CheckpointError(
                f"{self.directory.name}: has labels of {self.images} other images than these {len(images)}: write a "
                "store for them in another directory"
            )


def write_labels(
    directory: str | Path,
    experts: Mapping[str, Expert],
    images: Float[np.ndarray, "images height width channels"],
    *,
    teacher: str,
    factor: int = 4,
    shard_rows: int = 1024,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> LabelStore:
    """Runs experts over images and keeps what they say; goes on where an earlier call was killed.

    Every shard appears whole or not at all, and carries the SHA-256 of its contents.

    Args:
        directory: to make, or to go on with.
        experts: by the name of their labels.
        images: to be labelled.
        teacher: a name or fingerprint of the experts; labels of others are not mixed in.
        factor: pixels of a side that become one label.
        shard_rows: images in a file; what a kill may lose.
        batch: images that run at once.
        progress: called with `(images done, images)`.

    Raises:
        ConfigError: no experts or images, or a factor that does not divide the sides.
        CheckpointError: the directory holds a store of something else, or a damaged shard; outputs that are not finite,
            or of another shape than their kind has; a full disk.

    Example:
        >>> import tempfile
        >>> images = np.random.default_rng(0).random((5, 8, 8, 3), np.float32)
        >>> experts = {"near": Expert(kind="depth", apply=lambda x: x.mean(-1))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = write_labels(folder, experts, images, teacher="brightness", shard_rows=2)
        ...     near = store.rows(np.array([4, 0]))["near"]
        >>> near.shape, float(near.min()), float(near.max()), len(store.shards)
        ((2, 2, 2), 0.0, 1.0, 3)
    """
    directory = Path(directory)
    if not experts or len(images) == 0 or min(factor, shard_rows, batch) < 1:
        raise ConfigError(f"{directory.name}: give experts, images, and a positive factor, shard_rows and batch")
    height, width = images.shape[1:3]
    if height % factor or width % factor:
        raise ConfigError(f"images of {height} x {width} and factor={factor}: choose a factor that divides the sides")
    manifest = {
        "format": FORMAT,
        "teacher": teacher,
        "kinds": {name: expert.kind for name, expert in experts.items()},
        "least": {name: expert.least for name, expert in experts.items()},
        "grid": [height // factor, width // factor],
        "images": len(images),
        "hashed": hash_of(images),
        "shard_rows": shard_rows,
    }

    def make(start: int, end: int, file: str) -> Labels:
        found: dict[str, list[np.ndarray]] = {name: [] for name in experts}
        for at in range(start, end, batch):
            ids = np.minimum(np.arange(at, at + batch), end - 1)  # one shape, compiled once
            for name, expert in experts.items():
                found[name].append(_asked(expert, images[ids], factor, f"{file}: {name}"))
        return {name: np.concatenate(parts)[: end - start] for name, parts in found.items()}

    write_shards(directory, manifest, len(images), _shapes(manifest), make, progress)
    return open_labels(directory, verify=False)


def open_labels(directory: str | Path, *, verify: bool = True) -> LabelStore:
    """Opens a store that is whole.

    Args:
        directory: as given to `write_labels`.
        verify: also read all bytes and compare their hashes.

    Raises:
        CheckpointError: a shard is missing, damaged or of another store; it is named, with the remedy.
    """
    directory = Path(directory)
    manifest = read_manifest(directory, FORMAT)
    shards = open_shards(directory, manifest, manifest["images"], _shapes(manifest), verify=verify)
    rest = {name: manifest[name] for name in ("kinds", "images", "hashed", "shard_rows")}
    return LabelStore(directory=directory, grid=tuple(manifest["grid"]), shards=shards, **rest)


def _asked(expert: Expert, images: np.ndarray, factor: int, where: str) -> np.ndarray:
    said = expert.apply(images)
    last = {"classes": said.shape[3:], "depth": (), "normals": (3,)}[expert.kind]
    if said.shape != (*images.shape[:3], *last) or (expert.kind == "classes" and not 0 < said.shape[-1:][0] <= IGNORE):
        raise CheckpointError(
            f"{where} gave {list(said.shape)} for images {list(images.shape)}, which are no {expert.kind}: nothing was "
            "written"
        )
    if not bool(jnp.isfinite(said).all()):
        raise CheckpointError(f"{where} gave outputs that are not finite: nothing was written")
    if expert.kind == "classes":
        return np.asarray(coarse_classes(said, factor, expert.least))
    return np.asarray((coarse_depth if expert.kind == "depth" else coarse_normals)(said, factor))


def _floats(stored: np.ndarray, kind: Kind) -> np.ndarray:
    if kind == "classes":
        return stored.astype(np.int32)
    values = stored.astype(np.float32) / STEPS
    if kind == "normals":
        values /= np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-9)
    return values


def _shapes(manifest: dict[str, Any]) -> Shapes:
    """Of an image."""
    grid = tuple(manifest["grid"])
    return {name: (*grid, 3) if kind == "normals" else grid for name, kind in manifest["kinds"].items()}


def _means(x: jax.Array, factor: int) -> jax.Array:
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // factor, factor, width // factor, factor, channels).mean((2, 4))
