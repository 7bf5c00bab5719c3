"""A parameter tree with compressed leaves as named plain arrays plus a manifest of everything that is no array."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from effjax import arrays
from effjax.arrays.base import CompressedArray, PyTree, is_compressed
from effjax.errors import CheckpointError, LeafError
from effjax.paths import path_str

KINDS: tuple[type[CompressedArray], ...] = (
    arrays.Adapter,
    arrays.Codebook,
    arrays.Hashed,
    arrays.LowRank,
    arrays.NMSparse,
    arrays.Permuted,
    arrays.Prepared,
    arrays.Quantized,
    arrays.RowScaled,
    arrays.Shared,
    arrays.Sum,
    arrays.UserTables,
    arrays.View,
)
Manifest = dict[str, Any]


def encode(params: PyTree) -> tuple[dict[str, Any], Manifest]:
    """Names every array of `params`; fields of a compressed leaf are `path.field`.

    Returns:
        The arrays by name, and a JSON-able manifest `{path: {"kind": ..., static fields ..., nested arrays ...}}` of
        the compressed leaves.

    Raises:
        LeafError: a name that could not be read back, because a key of the tree contains "/" or "..", or is that of a
            field of a compressed leaf.
    """
    named: dict[str, Any] = {}
    manifest: Manifest = {}
    paths: list[str] = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_compressed):
        path = path_str(key_path)
        parts = [path_str((key,)) for key in key_path]
        paths.append(path)
        if any(not part or "/" in part or part == ".." for part in parts):
            raise LeafError(
                f"{path!r} cannot be stored under that name: rename the keys that are empty, '..' or hold '/'"
            )
        if is_compressed(leaf):
            manifest[path] = _encode_leaf(path, leaf, named)
        else:
            named[path] = leaf
    for path in paths:
        if owner := _owner(path, manifest):
            raise LeafError(f"{path!r} reads as a field of the compressed leaf {owner!r}: rename one of the two keys")
    return named, manifest


def _owner(name: str, manifest: Manifest) -> str | None:
    """The compressed leaf of which `name` would be a field, if any."""
    parts = name.split(".")
    return next((p for i in range(1, len(parts)) if (p := ".".join(parts[:i])) in manifest), None)


def _encode_leaf(name: str, leaf: CompressedArray, named: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": type(leaf).__name__}
    for field in leaf.static_fields:
        value = getattr(leaf, field)
        entry[field] = value.name if isinstance(value, np.dtype) else value
    for field in leaf.data_fields:
        value = getattr(leaf, field)
        if is_compressed(value):
            entry[field] = _encode_leaf(f"{name}.{field}", value, named)
        elif isinstance(value, tuple):
            entry[field] = [_encode_leaf(f"{name}.{field}.{i}", part, named) for i, part in enumerate(value)]
        elif value is None:
            entry[field] = None  # said openly: a field that is neither here nor among the arrays was lost
        else:
            named[f"{name}.{field}"] = value
            if leaf.__dataclass_fields__[field].default is None:  # type: ignore[attr-defined]
                entry[field] = True  # a field that files of an earlier version do not know: said to be there
    return entry


def decode(named: Mapping[str, Any], manifest: Manifest) -> PyTree:
    """The tree again, as nested dicts.

    Raises:
        CheckpointError: an array that the manifest needs is missing, one that nothing needs is there, or an unknown
            kind or field.
    """
    rest = dict(named)
    leaves = {path: _decode_leaf(path, entry, rest) for path, entry in manifest.items()}
    orphans = sorted(name for name in rest if _owner(name, manifest))
    if orphans:
        raise CheckpointError(f"{orphans[0]}: the manifest knows no such field; the files do not belong together")
    tree: dict[str, Any] = {}
    for path, leaf in sorted({**rest, **leaves}.items()):
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise CheckpointError(f"{path}: {part!r} is both a leaf and a branch of the tree")
        node[last] = leaf
    return tree


def _decode_leaf(name: str, entry: Mapping[str, Any], rest: dict[str, Any]) -> CompressedArray:
    kinds = {kind.__name__: kind for kind in KINDS}
    kind = kinds.get(entry.get("kind", ""))
    if kind is None:
        raise CheckpointError(f"{name}: unknown kind {entry.get('kind')!r}; known are {', '.join(sorted(kinds))}")
    known = {f.name: f for f in kind.__dataclass_fields__.values()}  # type: ignore[attr-defined]
    unknown = sorted(set(entry) - {"kind"} - set(known))
    if unknown:
        raise CheckpointError(f"{name}: {kind.__name__} has no field {unknown[0]!r}; written by a newer version?")
    fields: dict[str, Any] = {}
    for field, declared in known.items():
        if declared.metadata.get("static"):
            if field not in entry:
                raise CheckpointError(f"{name}: the manifest lacks {field!r} of {kind.__name__}")
            fields[field] = _static_value(name, field, entry[field])
        elif isinstance(entry.get(field), dict):
            fields[field] = _decode_leaf(f"{name}.{field}", entry[field], rest)
        elif isinstance(entry.get(field), list):
            parts = entry[field]
            fields[field] = tuple(_decode_leaf(f"{name}.{field}.{i}", part, rest) for i, part in enumerate(parts))
        elif field in entry and entry[field] is None:
            fields[field] = None
        else:
            fields[field] = rest.pop(f"{name}.{field}", None)
            if fields[field] is None and declared.default is None and entry.get(field) is not True:
                continue
            if fields[field] is None:
                raise CheckpointError(f"{name}.{field} is missing: a {kind.__name__} leaf cannot be read without it")
    return kind(**fields)


def _static_value(name: str, field: str, value: Any) -> Any:
    if field == "dtype":
        try:
            return jax.numpy.dtype(value)
        except TypeError:
            raise CheckpointError(f"{name}: {value!r} is no dtype") from None
    return tuple(value) if isinstance(value, list) else value
