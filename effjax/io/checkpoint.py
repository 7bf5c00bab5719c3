"""A compressed model as a directory: weights, configuration, recipe, tokenizer, card, and hashes of all of them."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from effjax.arrays.base import PyTree, is_compressed
from effjax.arrays.shared import with_any_table
from effjax.errors import CheckpointError
from effjax.io.directory import hash_of_entries, renamed_when_whole
from effjax.io.encoding import decode, encode
from effjax.io.safetensors_file import TensorEntry, raw_bytes, read_entries, write_file
from effjax.paths import leaves_with_paths

FORMAT = 1  # of one weights file
SHARDED_FORMAT = 2  # of several: the manifest names them under "weights"
OWN_HASH = "sha256"  # of the other entries
INDEX = "model.safetensors.index.json"
WEIGHTS, CONFIG, RECIPE, TOKENIZER, CARD, MANIFEST = (
    "model.safetensors",
    "config.json",
    "recipe.yaml",
    "tokenizer.json",
    "README.md",
    "effjax.json",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """What `load_checkpoint` read.

    Attributes:
        params: nested dicts with compressed leaves.
        config: the model's config.json.
        recipe: what was done to it.
        tokenizer_json: text of the tokenizer, or None.
        hashes: SHA-256 of every tensor, by its name in the weights file.
    """

    params: PyTree
    config: dict[str, Any]
    recipe: dict[str, Any]
    tokenizer_json: str | None
    hashes: dict[str, str]


def save_checkpoint(
    directory: str | os.PathLike[str],
    params: PyTree,
    *,
    config: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
    tokenizer_json: str | None = None,
    card: str = "",
    files: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a compressed model: under a temporary name first, renamed when whole.

    Args:
        directory: to make; its parent must exist.
        params: tree of dicts with dense and compressed leaves.
        config: contents of config.json.
        recipe: how it was made; copying this one file is enough to make it again.
        tokenizer_json: text of tokenizer.json.
        card: text of README.md.
        files: further texts by file name.
        overwrite: replace an existing directory.

    Raises:
        CheckpointError: non-finite values, a directory that exists, or a disk that is full; nothing is left behind.
        LeafError: names that could not be read back.
    """
    named, manifest = encode(params)
    host = {name: np.asarray(jax.device_get(x), order="C") for name, x in named.items()}
    damaged = [name for name, x in host.items() if not _finite(x)]
    if damaged:
        raise CheckpointError(f"{damaged[0]} has non-finite values ({len(damaged)} such tensors): not written")
    texts = texts_of(
        params,
        {name: _hash(raw_bytes(x)) for name, x in host.items()},
        config=config,
        recipe=recipe,
        tokenizer_json=tokenizer_json,
        card=card,
        files=files,
    )
    with renamed_when_whole(Path(directory), overwrite=overwrite) as temporary:
        write_file(temporary / WEIGHTS, host, metadata={"format": "effjax"})
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")


def texts_of(
    params: PyTree,
    hashes: Mapping[str, str],
    *,
    config: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
    tokenizer_json: str | None = None,
    card: str = "",
    files: Mapping[str, str] | None = None,
    weight_map: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The text files of a checkpoint by name, the manifest last; arguments as `save_checkpoint`.

    Args:
        params: the tree, or its shapes.
        hashes: SHA-256 of every tensor, by its name in the weights file.
        weight_map: the file of every tensor, where there are several.
    """
    _, manifest = encode(params)
    texts = {CONFIG: json.dumps(dict(config), indent=2) + "\n", **(files or {})}
    texts[RECIPE] = yaml.safe_dump(dict(recipe or {}), sort_keys=False)
    if card:
        texts[CARD] = card
    if tokenizer_json is not None:
        texts[TOKENIZER] = tokenizer_json
    contents: dict[str, Any] = {"format": FORMAT}
    if weight_map is not None:
        total = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(params))
        index = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
        texts[INDEX] = json.dumps(index, indent=2) + "\n"
        contents = {"format": SHARDED_FORMAT, "weights": list(dict.fromkeys(weight_map.values()))}
    contents |= {
        "leaves": manifest,
        "shapes": {path: [list(x.shape), x.dtype.name] for path, x in leaves_with_paths(params) if is_compressed(x)},
        "tensors": dict(hashes),
        "files": {name: _hash(text.encode()) for name, text in texts.items()},
    }
    contents[OWN_HASH] = hash_of_entries(contents)
    texts[MANIFEST] = json.dumps(contents, indent=1) + "\n"
    return texts


def load_checkpoint(directory: str | os.PathLike[str]) -> LoadedCheckpoint:
    """Reads a compressed model and checks every hash.

    Raises:
        CheckpointError: a missing, damaged or foreign file, with its name and what is wrong.
    """
    root = Path(directory)
    manifest = _read_manifest(root)
    texts = {name: _read_text(root, name) for name in manifest["files"]}
    changed = [name for name, text in texts.items() if name != CARD and _hash(text.encode()) != manifest["files"][name]]
    if changed:
        raise CheckpointError(f"{changed[0]} was changed after it was written (its hash differs): restore it")
    named = {}
    for name, entry in _entries(root, manifest).items():
        x = entry.read()
        if _hash(raw_bytes(x)) != manifest["tensors"][name]:
            raise CheckpointError(f"{entry.file.name}: {name} is damaged (its hash differs): copy or compress it again")
        named[name] = jnp.asarray(x)
    params = decode(named, manifest["leaves"])
    problems = _shape_problems(params, manifest)
    if problems:
        raise CheckpointError(problems[0])
    return LoadedCheckpoint(
        params=params,
        config=_parse_json(CONFIG, texts[CONFIG]),
        recipe=yaml.safe_load(texts.get(RECIPE, "")) or {},
        tokenizer_json=texts.get(TOKENIZER),
        hashes=manifest["tensors"],
    )


def is_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory was written by `save_checkpoint`."""
    return (Path(directory) / MANIFEST).is_file()


def verify_checkpoint(directory: str | os.PathLike[str]) -> list[str]:
    """Looks for damage: hashes of files and tensors, shapes, non-finite values. An empty list is a whole checkpoint.

    The weights are read in pieces, so a checkpoint may be larger than memory.
    """
    root = Path(directory)
    try:
        manifest = _read_manifest(root)
        entries = _entries(root, manifest)
    except CheckpointError as error:
        return [str(error)]
    findings = []
    for name, expected in manifest["files"].items():
        try:
            if _hash(_read_text(root, name).encode()) != expected:
                findings.append(f"{name} was changed after it was written (its hash differs)")
        except CheckpointError as error:
            findings.append(str(error))
    for name, entry in entries.items():
        digest, finite = hashlib.sha256(), True
        try:
            for chunk in entry.chunks():
                digest.update(raw_bytes(chunk))
                finite = finite and _finite(chunk)
        except CheckpointError as error:
            findings.append(str(error))
            continue
        if digest.hexdigest() != manifest["tensors"][name]:
            findings.append(f"{entry.file.name}: {name} is damaged (its hash differs)")
        if not finite:
            findings.append(f"{entry.file.name}: {name} has non-finite values")
    try:
        structs = {name: jax.ShapeDtypeStruct(entry.shape, entry.dtype) for name, entry in entries.items()}
        findings += _shape_problems(decode(structs, manifest["leaves"]), manifest)
    except CheckpointError as error:
        findings.append(str(error))
    return findings


def _shape_problems(params: PyTree, manifest: Mapping[str, Any]) -> list[str]:
    """Compressed leaves whose fields do not make up the shape that was saved."""
    problems = []
    for path, leaf in leaves_with_paths(params):
        if not is_compressed(leaf):
            continue
        expected = manifest["shapes"].get(path)
        try:
            dense = jax.eval_shape(lambda x: with_any_table(x).materialize(), leaf)
            found = [list(dense.shape), dense.dtype.name]
        except (AttributeError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
            problems.append(f"{path}: its fields do not fit together ({str(error).splitlines()[0]})")
            continue
        if found != expected:
            problems.append(f"{path} is {found[1]}{found[0]}, the manifest says {expected}")
    return problems


def _read_manifest(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such directory")
    manifest = _parse_json(MANIFEST, _read_text(root, MANIFEST))
    wanted = {"format": int, "leaves": dict, "shapes": dict, "tensors": dict, "files": dict}
    wrong = [key for key, kind in wanted.items() if not isinstance(manifest.get(key), kind)]
    if wrong:
        raise CheckpointError(f"{MANIFEST} lacks a valid {wrong[0]!r} entry: it is damaged or not of effjax")
    if manifest["format"] not in (FORMAT, SHARDED_FORMAT):
        raise CheckpointError(
            f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT} and {SHARDED_FORMAT}: "
            "update effjax"
        )
    own = manifest.pop(OWN_HASH, None)
    hashed = hash_of_entries(manifest)
    weights = manifest.setdefault("weights", [WEIGHTS])
    if not isinstance(weights, list) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{MANIFEST} lacks a valid 'weights' entry: it is damaged or not of effjax")
    unsafe = [name for name in (*manifest["files"], *weights) if Path(name).name != name]
    if unsafe:
        raise CheckpointError(f"{MANIFEST} names a file outside of the directory: {unsafe[0]!r}")
    if own not in (None, hashed):  # None: written before manifests had one
        raise CheckpointError(f"{MANIFEST} was changed after it was written (its hash differs): restore it")
    return manifest


def _entries(root: Path, manifest: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """Where every tensor lies; the files must hold those of the manifest and no others."""
    entries: dict[str, TensorEntry] = {}
    for file in manifest["weights"]:
        found = read_entries(root / file)
        unknown = sorted(set(found) - set(manifest["tensors"]) | set(found) & set(entries))
        if unknown:
            raise CheckpointError(f"{file} has an unknown {unknown[0]}: it does not belong to {MANIFEST}")
        entries |= found
    missing = sorted(set(manifest["tensors"]) - set(entries))
    if missing:
        which = manifest["weights"][0] if len(manifest["weights"]) == 1 else "no weights file"
        verb = "lacks" if len(manifest["weights"]) == 1 else "has"
        raise CheckpointError(f"{which} {verb} {missing[0]}: it does not belong to {MANIFEST}")
    return entries


def _read_text(root: Path, name: str) -> str:
    try:
        return (root / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{name} is missing in {root.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{name} cannot be read ({error})") from error


def _parse_json(name: str, text: str) -> dict[str, Any]:
    try:
        contents = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{name} is no JSON ({error}): it is damaged") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{name} must hold an object, not a {type(contents).__name__}")
    return contents


def _hash(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _finite(x: np.ndarray) -> bool:
    return not jnp.issubdtype(x.dtype, jnp.floating) or bool(np.isfinite(x.astype(np.float32)).all())
