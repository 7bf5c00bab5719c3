"""A Representer Sketch on disk: one safetensors file that needs no other, checked when it is read."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from effjax.errors import CheckpointError
from effjax.io.directory import file_renamed_when_whole
from effjax.io.safetensors_file import raw_bytes, read_entries
from effjax.sketch.representer import RepresenterSketch

_FORMAT = "effjax representer sketch 1"
_ARRAYS = ("bias", "counts", "projection", "seed", "total")
_STATIC = {"kind": str, "width": float, "hashes": int, "projections": str}


def save_sketch(file: str | Path, sketch: RepresenterSketch, *, overwrite: bool = False) -> None:
    """Writes a sketch, whole or not at all, with the SHA-256 of its contents.

    Args:
        file: to be written.
        sketch: from `effjax.sketch.build_sketch`.
        overwrite: replaces a file that exists already.

    Raises:
        CheckpointError: the file exists already or cannot be written.

    Example:
        >>> import jax, tempfile
        >>> from effjax.sketch.representer import build_sketch, query_sketch
        >>> from effjax.sketch.representer_kernel import init_representer
        >>> x = jax.random.normal(jax.random.key(0), (10, 4))
        >>> kernel = init_representer(jax.random.key(1), x, outputs=1, dim=2, points=5)
        >>> sketch = build_sketch(kernel, rows=20, buckets=4, key=jax.random.key(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_sketch(f"{folder}/net.safetensors", sketch)
        ...     again = load_sketch(f"{folder}/net.safetensors")
        >>> bool((query_sketch(again, x) == query_sketch(sketch, x)).all())
        True
    """
    arrays = {name: np.asarray(getattr(sketch, name)) for name in _ARRAYS}
    told: dict[str, Any] = {name: getattr(sketch, name) for name in _STATIC}
    text = json.dumps(told | {"hash_functions": _fingerprint(sketch)}, sort_keys=True)
    metadata = {"format": _FORMAT, "sketch": text, "sha256": _digest(arrays, text)}
    with file_renamed_when_whole(Path(file), overwrite=overwrite) as stream:
        stream.write(save(arrays, metadata=metadata))


def load_sketch(file: str | Path) -> RepresenterSketch:
    """The sketch that `save_sketch` wrote.

    Raises:
        CheckpointError: a damaged file, one of something else, or hash functions that this version of jax draws
            differently: a sketch read with other hashes would answer nonsense.
    """
    file = Path(file)
    entries = read_entries(file)
    try:
        with safe_open(file, "np") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{file.name}: {error}; copy the file again") from error
    if metadata.get("format") != _FORMAT or set(entries) != set(_ARRAYS):
        raise CheckpointError(
            f"{file.name}: holds no Representer Sketch (format {metadata.get('format')!r}, tensors {sorted(entries)}); "
            "write one with effjax.sketch.save_sketch"
        )
    arrays = {name: entry.read() for name, entry in entries.items()}
    if metadata.get("sha256") != _digest(arrays, metadata.get("sketch", "")):
        raise CheckpointError(f"{file.name}: the contents do not have the hash in the header; copy the file again")
    told = json.loads(metadata["sketch"])
    static = {name: kind(told[name]) for name, kind in _STATIC.items()}
    sketch = RepresenterSketch(**{name: jnp.asarray(x) for name, x in arrays.items()}, **static)
    if _fingerprint(sketch) != told["hash_functions"]:
        raise CheckpointError(
            f"{file.name}: its hash functions are drawn differently here, by another version of jax or with "
            "jax_threefry_partitionable changed; read it where it was written, or build the sketch again"
        )
    return sketch


def _fingerprint(sketch: RepresenterSketch) -> str:
    """Of the whole numbers among the hash functions: the last bits of the others may differ between platforms."""
    rehash = jax.jit(lambda sketch: sketch.hash_functions().rehash)(sketch)
    assert rehash is not None  # a sketch is always rehashed
    return _digest({"multiplier": np.asarray(rehash.multiplier), "addend": np.asarray(rehash.addend)}, "")


def _digest(arrays: dict[str, np.ndarray], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.name} {arrays[name].shape}".encode())
        digest.update(raw_bytes(arrays[name]))
    return digest.hexdigest()
