"""Coders on disk: one safetensors file with the tables of every layer, and the coding that they belong to."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from effjax.errors import CheckpointError
from effjax.io.directory import file_renamed_when_whole
from effjax.io.safetensors_file import TensorEntry, read_entries
from effjax.kv.coders import KVCoders
from effjax.kv.coding import Coder
from effjax.kv.cq import CQ
from effjax.kv.integer import PerChannel, PerToken
from effjax.kv.kvquant import LevelKeys, LevelValues
from effjax.kv.nomad_slots import NomadLayers

_FORMAT = "effjax kv coders 1"
_PARTS = ("keys", "values")


def save_coders(file: str | Path, coders: KVCoders | NomadLayers, *, overwrite: bool = False) -> None:
    """Writes the coders of a model, whole or not at all.

    Args:
        file: to be written.
        coders: as `effjax.kv.coders.fit_layers` learned them, or codebooks of `effjax.kv.nomad_text.learn_layers`.
        overwrite: replaces a file that exists already.

    Raises:
        CheckpointError: a coding that this format does not have, or a file that exists already or cannot be written.

    Example:
        >>> import tempfile
        >>> import jax
        >>> from effjax.kv.coding import fit
        >>> coder = fit(CQ(channels=4, bits=4, fisher=False), jax.random.normal(jax.random.key(0), (2, 99, 16)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_coders(f"{folder}/kv.safetensors", KVCoders(keys=(coder, None), values=(None, coder)))
        ...     load_coders(f"{folder}/kv.safetensors").keys[0].coding
        CQ(channels=4, bits=4, fisher=False, by_channel=False, iterations=50, table_dtype='float16')
    """
    if isinstance(coders, NomadLayers):
        books = {f"layers.{layer}.books": np.asarray(book) for layer, book in enumerate(coders.books)}
        _write(file, books, {"nomad": coders.layers}, overwrite)
        return
    tensors: dict[str, np.ndarray] = {}
    told: dict[str, Any] = {"rotated": coders.rotated, "exact": coders.exact}
    for part in _PARTS:
        told[part] = []
        for layer, coder in enumerate(getattr(coders, part)):
            told[part].append(None if coder is None else _to_json(coder.coding))
            tables = {} if coder is None or coder.tables is None else coder.tables
            for name, x in (tables if isinstance(tables, dict) else {"": tables}).items():
                tensors[f"layers.{layer}.{part}" + (f".{name}" if name else "")] = np.asarray(x)
    _write(file, tensors, told, overwrite)


def _write(file: str | Path, tensors: dict[str, np.ndarray], told: dict[str, Any], overwrite: bool) -> None:
    with file_renamed_when_whole(Path(file), overwrite=overwrite) as stream:
        stream.write(save(tensors, metadata={"format": _FORMAT, "coders": json.dumps(told)}))


def load_coders(file: str | Path) -> KVCoders | NomadLayers:
    """The coders that `save_coders` wrote.

    Raises:
        CheckpointError: a damaged file, one of something else, or a coding that this version does not know.
    """
    file = Path(file)
    entries = read_entries(file)
    try:
        with safe_open(file, "np") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{file.name}: {error}; copy the file again") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{file.name}: holds no coders of a cache (format {metadata.get('format')!r}); write one with "
            "`effjax calibrate-kv` or effjax.kv.coders_file.save_coders"
        )
    try:
        told = json.loads(metadata["coders"])
        if "nomad" in told:
            return _lookups(file, entries, int(told["nomad"]))
        parts = {part: [_from_json(file, entry) for entry in told[part]] for part in _PARTS}
        rotated, exact = bool(told["rotated"]), int(told["exact"])
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file.name}: the description of its coders is damaged ({error})") from error
    found: dict[str, Any] = {part: {} for part in _PARTS}
    for name, entry in entries.items():
        match = re.fullmatch(r"layers\.(\d+)\.(keys|values)(?:\.(\w+))?", name)
        if match is None:
            raise CheckpointError(f"{file.name}: {name} is no table of a coder; write the file again")
        found[match[2]].setdefault(int(match[1]), {})[match[3]] = jnp.asarray(entry.read())

    def coder(part: str, layer: int, coding: Any) -> Coder | None:
        if coding is None:
            return None
        tables = found[part].get(layer)
        return Coder(coding=coding, tables=tables[None] if tables and None in tables else tables)

    keys, values = (tuple(coder(part, i, coding) for i, coding in enumerate(parts[part])) for part in _PARTS)
    return KVCoders(keys=keys, values=values, rotated=rotated, exact=exact)


def _lookups(file: Path, entries: dict[str, TensorEntry], layers: int) -> NomadLayers:
    names = [f"layers.{layer}.books" for layer in range(layers)]
    if set(names) != set(entries):
        raise CheckpointError(f"{file.name}: holds {sorted(entries)}, not {names}; write the file again")
    return NomadLayers(books=tuple(jnp.asarray(entries[name].read()) for name in names))


def _codings() -> dict[str, Any]:
    return {kind.__name__: kind for kind in (CQ, PerChannel, PerToken, LevelKeys, LevelValues)}


def _to_json(coding: Any) -> dict[str, Any]:
    name = type(coding).__name__
    if name not in _codings():
        raise CheckpointError(f"{coding}: only {', '.join(_codings())} can be written to a file of coders")
    return {"coding": name} | dataclasses.asdict(coding)


def _from_json(file: Path, entry: Any) -> Any:
    if entry is None:
        return None
    fields = dict(entry)
    kind = _codings().get(name := fields.pop("coding"))
    if kind is None:
        raise CheckpointError(f"{file.name}: coding {name!r} is not known here; known are {', '.join(_codings())}")
    return kind(**fields)
