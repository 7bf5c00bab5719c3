"""Damages files of every kind that effjax reads, and counts what was refused by name, read, or brought it down.

    python -m benchmarks.faults [--tries 300] [--seed 0] [--kinds checkpoint store ...]

Of a whole file or directory one file is damaged: cut short, bits turned, bytes overwritten, left out or put in, entries
of its JSON (or of the JSON in its header) taken away or replaced. Then it is read. An outcome is

- refused: an error of effjax whose message names the file, or a directory or tensor of it;
- unnamed: an error of effjax that names none of them;
- as written: it was read, and all values are those that were written;
- otherwise: it was read, with other values. Where contents carry hashes there must be none;
- crash: any other exception.
"""

import argparse
import collections
import dataclasses
import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import effjax as ej
from benchmarks.bars import Bar, conclude
from effjax.distill import StoreConfig, open_store, write_store
from effjax.errors import CheckpointError, EffjaxError
from effjax.flash.bundles import FeedForward
from effjax.flash.file import load_layer, open_bundles, verify_bundles, write_bundles
from effjax.io.checkpoint import load_checkpoint, save_checkpoint
from effjax.io.formats.gguf_model import read_model, write_model
from effjax.kv import CQ, KVCoders, load_coders, save_coders
from effjax.kv.coding import fit
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from effjax.models.hf import LoadedModel, load_model, save_hf
from effjax.sketch import build_sketch, init_representer, load_sketch, save_sketch

PyTree = Any
OUTCOMES = ("refused", "as written", "otherwise", "unnamed", "crash")
MODEL = DecoderConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
    bos_token_id=0,
    eos_token_ids=(1,),
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Something on disk.

    Attributes:
        write: makes it under a path.
        read: gives all values that it holds.
        hashed: contents carry hashes, so that no damage may go unseen.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], PyTree]
    hashed: bool = False


def _params() -> PyTree:
    return Decoder(MODEL).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def _tokenizer() -> str:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.BPE({f"w{i}": i for i in range(MODEL.vocab_size)}, [])).to_str()


def _write_checkpoint(path: Path) -> None:
    small = ej.quantize_params(_params(), ej.quantize.RTN(bits=4, group_size=16), where="**/mlp/**")
    save_checkpoint(path, small, config=MODEL.to_hf(), recipe={"method": "rtn"}, tokenizer_json=_tokenizer())


def _read_checkpoint(path: Path) -> PyTree:
    found = load_checkpoint(path)
    return found.params, found.config, found.recipe, found.tokenizer_json


def _write_coders(path: Path) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 64, 16))
    coder = fit(CQ(channels=4, bits=2, fisher=False, iterations=2), x, key=jax.random.key(1))
    save_coders(path, KVCoders(keys=(coder,), values=(coder,)))


def _write_sketch(path: Path) -> None:
    x = jax.random.normal(jax.random.key(0), (10, 4))
    kernel = init_representer(jax.random.key(1), x, outputs=1, dim=2, points=5)
    save_sketch(path, build_sketch(kernel, rows=5, buckets=4, key=jax.random.key(2)))


def _write_bundles(path: Path) -> None:
    rng = np.random.default_rng(0)
    up, gate, down = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 6), (8, 6), (6, 8)))
    write_bundles(path, [FeedForward(up=up, gate=gate, down=down)] * 2, kind="int8", block=64)


def _read_bundles(path: Path) -> PyTree:
    file = open_bundles(path)
    if damaged := verify_bundles(path):
        raise CheckpointError(f"{path.name}: the rows of layers {damaged} are damaged")
    return [(ffn.up, ffn.gate, ffn.down) for ffn in (load_layer(file, i) for i in range(file.layers))]


def _write_store(path: Path) -> None:
    windows = np.random.default_rng(0).integers(0, 7, (5, 4)).astype(np.int32)
    write_store(path, lambda t: 3.0 * jax.nn.one_hot(t, 7), windows, StoreConfig(k=2, shard_rows=2), teacher="copy")


def _read_store(path: Path) -> PyTree:
    store = open_store(path)
    return dataclasses.asdict(store.config), dataclasses.astuple(store.rows(np.arange(store.windows)))


def _model(found: LoadedModel) -> PyTree:
    return found.params, dataclasses.asdict(found.config), found.tokenizer.to_str() if found.tokenizer else ""


KINDS = {
    "checkpoint": Kind(_write_checkpoint, _read_checkpoint, hashed=True),
    "model directory": Kind(
        lambda path: save_hf(path, MODEL, _params(), tokenizer_json=_tokenizer()), lambda path: _model(load_model(path))
    ),
    "GGUF": Kind(
        lambda path: write_model(path, MODEL, _params()),
        lambda path: _model(read_model(path)),
    ),
    "coders": Kind(_write_coders, lambda path: jax.tree.leaves(load_coders(path))),
    "sketch": Kind(_write_sketch, lambda path: jax.tree.leaves(load_sketch(path)), hashed=True),
    "bundles": Kind(_write_bundles, _read_bundles, hashed=True),
    "teacher store": Kind(_write_store, _read_store, hashed=True),
}


# Damage ---------------------------------------------------------------------------------------------------------------

ODD = (None, True, -1, 0, 3, 2**63, 1e308, "", "x", "../../etc/passwd", [], [[]], {}, [0, 2**40], "F32", "float64")


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Other bytes, or the same where there was nothing to change."""
    at, length = (int(rng.integers(0, n)) for n in (max(len(content), 1), 1 + min(len(content), 64)))
    ways = [
        content[:at],
        content[:at] + bytes([content[at] ^ (1 << int(rng.integers(8)))]) + content[at + 1 :] if content else b"\0",
        content[:at] + rng.bytes(length) + content[at + length :],
        content[:at] + content[at + length :],
        content[:at] + rng.bytes(length) + content[at:],
        content + rng.bytes(length),
    ]
    told = _with_other_entry(content, rng)
    return told if told is not None and rng.random() < 0.6 else ways[rng.integers(len(ways))]


def _with_other_entry(content: bytes, rng: np.random.Generator) -> bytes | None:
    """With an entry of the JSON changed, which is all of the file or the header of its tensors; None without any."""
    try:
        return json.dumps(_changed(json.loads(content), rng)).encode()
    except (ValueError, UnicodeDecodeError):
        size = int.from_bytes(content[:8], "little")
    try:
        header = json.dumps(_changed(json.loads(content[8 : 8 + size]), rng)).encode()
    except (ValueError, UnicodeDecodeError):
        return None
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _changed(told: Any, rng: np.random.Generator) -> Any:
    """One entry somewhere in it is gone, or another."""
    inside = list(told.items()) if isinstance(told, dict) else list(enumerate(told)) if isinstance(told, list) else []
    if not inside or rng.random() < 0.1:
        return ODD[rng.integers(len(ODD))]
    key, value = inside[rng.integers(len(inside))]
    if rng.random() < 0.2:
        return {k: v for k, v in inside if k != key} if isinstance(told, dict) else told[:key] + told[key + 1 :]
    if isinstance(value, str) and value[:1] in "{[":  # JSON within JSON, as metadata holds it
        value = json.dumps(_changed(json.loads(value), rng))
    else:
        value = _changed(value, rng)
    return {**told, key: value} if isinstance(told, dict) else [*told[:key], value, *told[key + 1 :]]


# Outcomes -------------------------------------------------------------------------------------------------------------


def same(a: PyTree, b: PyTree) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(
        np.asarray(x).dtype == np.asarray(y).dtype and np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@dataclasses.dataclass
class Found:
    """Outcomes of a kind, and an account of each that should not be."""

    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    accounts: list[str] = dataclasses.field(default_factory=list)


def tried(kind: Kind, tries: int, seed: int, folder: Path) -> Found:
    """Damages copies of one kind, in a folder of its own."""
    whole, found = folder / "whole", Found()
    kind.write(whole)
    wanted = kind.read(whole)
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file()) if whole.is_dir() else [Path()]
    for number in range(tries):
        rng = np.random.default_rng((seed, number))
        copy = folder / "copy"
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink(missing_ok=True)
        shutil.copytree(whole, copy) if whole.is_dir() else shutil.copy(whole, copy)
        victim = copy / files[rng.integers(len(files))]
        if whole.is_dir() and rng.random() < 0.05:
            victim.unlink()
        else:
            victim.write_bytes(damaged(victim.read_bytes(), rng))
        outcome, told = _outcome(kind, copy, victim, wanted)
        found.counts[outcome] += 1
        if outcome in ("crash", "unnamed") or (outcome == "otherwise" and kind.hashed):
            found.accounts.append(f"{outcome}, try {number}, {victim.name}: {told}")
    return found


def _outcome(kind: Kind, copy: Path, victim: Path, wanted: PyTree) -> tuple[str, str]:
    try:
        values = kind.read(copy)
    except EffjaxError as error:
        known = [copy.name, victim.name, *(path.name for path in copy.parent.rglob("*") if path.is_file())]
        named = any(name in str(error) for name in known) or "/" in str(error)  # paths of tensors have slashes
        return "refused" if named else "unnamed", str(error)
    except Exception:  # anything at all: that is what is counted
        return "crash", traceback.format_exc(limit=-4)
    return ("as written" if same(values, wanted) else "otherwise"), ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--tries", type=int, default=300, help="of every kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args(argv)
    table = Table(title=f"{args.tries} damaged copies of every kind")
    for column in ("kind", *OUTCOMES):
        table.add_column(column)
    total: collections.Counter = collections.Counter()
    unseen = 0
    for name in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            found = tried(KINDS[name], args.tries, args.seed, Path(folder))
        table.add_row(name, *(str(found.counts[outcome]) for outcome in OUTCOMES))
        total += found.counts
        unseen += found.counts["otherwise"] if KINDS[name].hashed else 0
        for account in found.accounts:
            print(f"{name}: {account}", file=sys.stderr)
    Console(width=100).print(table)
    bars = {
        "crashes": Bar(total["crash"], high=0),
        "errors that name no file": Bar(total["unnamed"], high=0),
        "damage unseen where contents carry hashes": Bar(unseen, high=0),
    }
    return conclude("faults", bars, {"tried": total.total(), "outcomes": dict(total)})


if __name__ == "__main__":
    raise SystemExit(main())
