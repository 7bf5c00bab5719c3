"""Compresses a model on disk unit by unit: reads, compresses, writes, notes down, forgets; goes on after a kill."""

import dataclasses
import hashlib
import importlib.metadata
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.base import is_compressed, materialize, nbytes
from effjax.errors import CheckpointError, EffjaxError
from effjax.evaluate.loss import next_token_loss
from effjax.io.checkpoint import texts_of
from effjax.io.safetensors_file import CHUNK
from effjax.lift.calibrate import InputStats, calibrate
from effjax.models.decoder import DecoderApply
from effjax.models.hf import load_model
from effjax.paths import nest
from effjax.recipe import Recipe
from effjax.rules import default_axes
from effjax.sequential import advance, batches, below, compress_flat, compress_stage
from effjax.stream.memory import return_freed_memory
from effjax.stream.output import SHARD_BYTES, Output, encode_leaf, output_axes, output_layout, whole_leaf
from effjax.stream.schedule import Schedule, Unit, make_schedule, micro_batch, slice_struct
from effjax.stream.source import Source
from effjax.stream.work import FileArray, Work, sync_directory, work_directory

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is compressed, and how: everything that the bytes depend on.

    Attributes:
        source: the dense model.
        recipe: what to do to which leaves.
        calibration: int32 tokens `[windows, length]`, where a method needs statistics.
        shard_bytes: a weights file is begun when the next leaf would make this one larger.
    """

    source: Source
    recipe: Recipe
    calibration: np.ndarray | None = None
    shard_bytes: int = SHARD_BYTES

    @property
    def windows(self) -> tuple[int, int] | None:
        """Calibration windows and their length."""
        return None if self.calibration is None else (self.calibration.shape[0], self.calibration.shape[1])

    def schedule(self, memory: int | None) -> Schedule:
        """The units of the job under a budget; see `make_schedule`."""
        config, structs = self.source.config, self.source.structs
        return make_schedule(config, structs, self.recipe, windows=self.windows, memory=memory)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the bytes depend on; the budget is not among it."""
        calibration = None
        if self.calibration is not None:
            text = hashlib.sha256(np.ascontiguousarray(self.calibration, "<i4").tobytes()).hexdigest()
            windows, length = self.calibration.shape
            calibration = {"tokens": text, "windows": windows, "length": length, "at once": micro_batch(length)}
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "ml_dtypes")}
        return {
            "recipe": self.recipe.to_dict(),
            "input": self.source.files(),
            "calibration": calibration,
            "shard size": self.shard_bytes,
            "versions": versions | {"backend": jax.default_backend()},
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor of the result.

    Attributes:
        path: its name.
        kind: type of the compressed leaf, or the dtype of a dense one.
        nbytes: container bytes.
        error: ‖W − Ŵ‖ / ‖W‖, or None where the leaf is unchanged.
    """

    path: str
    kind: str
    nbytes: int
    error: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streamed:
    """What was made.

    Attributes:
        rows: a row a tensor, in the order of the model.
        leaves: shapes of the result, by path.
        resumed: units that an earlier process had finished.
        units: all units.
    """

    rows: tuple[Row, ...]
    leaves: dict[str, Any]
    resumed: int
    units: int


def compress_checkpoint(
    job: Job,
    out: Path,
    *,
    memory: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    finish: Callable[[Streamed, Path], Mapping[str, str]] | None = None,
    progress: Progress | None = None,
) -> Streamed:
    """Compresses a model on disk to an effjax checkpoint on disk, never holding more than `memory`.

    The bytes do not depend on the budget, nor on how often the work was killed and begun again. Until everything is
    there the output has another name; a process that is killed loses the unit in work and no more.

    Args:
        job: what to compress, and how.
        out: directory to make; its parent must exist.
        memory: bytes that the whole process may hold; None for as much as it takes.
        overwrite: replace an existing directory.
        restart: throw away what an earlier process left unfinished.
        finish: `finish(streamed, directory)` is called when all weights are written, before the directory gets its
            name, and gives further texts by file name, such as README.md.
        progress: called with `("compress NAME", units done, units)`.

    Raises:
        ConfigError: the budget cannot hold a unit; nothing was written.
        RuleError, LeafError, CalibrationError: the recipe does not fit; nothing is left behind.
        CheckpointError: a damaged input (nothing is left behind), unfinished work of another kind, a full disk.

    Example:
        >>> import effjax as ej, tempfile
        >>> from effjax.stream import open_source
        >>> job = Job(source=open_source("default"), recipe=Recipe(rules=[(None, ej.quantize.RTN(bits=4))]))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     streamed = compress_checkpoint(job, Path(directory) / "small")
        ...     ej.io.verify_checkpoint(Path(directory) / "small")
        []
    """
    schedule = job.schedule(memory)
    output = output_layout(work_directory(out) / "output", schedule.leaves, shard_bytes=job.shard_bytes)
    with Work(out, job.fingerprint(), restart=restart) as work:
        resumed = len(work.done)
        if not work.finished:
            run = _Run(job, schedule, output, work, memory)
            try:
                run.units(progress)
            except EffjaxError:
                if not isinstance(run.error, EffjaxError):  # the input, the recipe: going on would end here again
                    work.remove()
                raise
            except OSError as error:
                raise _cannot_write(out, work, schedule, error) from error
            except KeyboardInterrupt:
                if not work.done:
                    work.remove()
                raise
        streamed = _streamed(schedule, work, resumed)
        if not work.finished:
            texts = partial(_texts, job, schedule, output, work)
            _write_texts(work.output, texts({}))
            if finish is not None:
                _write_texts(work.output, texts(finish(streamed, work.output)))
            sync_directory(work.output)
            work.append({"finished": True})
        work.publish(overwrite=overwrite)
    return streamed


class _Run:
    """The loop over the units; `error` holds a complaint about earlier work, which must not be thrown away for it."""

    def __init__(self, job: Job, schedule: Schedule, output: Output, work: Work, memory: int | None) -> None:
        self.job, self.schedule, self.output, self.work = job, schedule, output, work
        self.piece = max(CHUNK, (memory - schedule.base) // 4) if memory is not None else 2**30
        self.fisher: dict[str, InputStats] = {}
        self.error: EffjaxError | None = None

    def units(self, progress: Progress | None) -> None:
        """Does what is not done yet."""
        units, work = self.schedule.units, self.work
        if not work.done:
            work.output.mkdir(exist_ok=True)
            self.output.reserve()
        self._check_done()
        todo = [unit for unit in units if unit.name not in work.done]
        if todo:
            self.fisher = self._gather_fisher()
        done = len(units) - len(todo)
        label = f"compress {self.work.out.name}"
        if progress is not None:
            progress(label, done, len(units))
        for unit in todo:
            rows, hashes = self._one(unit)
            work.append({"unit": unit.name, "tensors": hashes, "rows": [dataclasses.asdict(row) for row in rows]})
            self._forget(unit)
            done += 1
            if progress is not None:
                progress(label, done, len(units))

    def _check_done(self) -> None:
        """Looks whether the tensors of finished units are still what the journal says."""
        for name, line in self.work.done.items():
            for tensor, expected in line["tensors"].items():
                entry = self.output.entries.get(tensor)
                if entry is None or not entry.file.exists() or entry.sha256() != expected:
                    self.error = CheckpointError(
                        f"the unfinished work on {self.work.out.name} is damaged ({tensor} of {name}): start over with "
                        "--restart"
                    )
                    raise self.error

    def _one(self, unit: Unit) -> tuple[list[Row], dict[str, str]]:
        if unit.kind == "copy":
            return [self._row(path, None) for path in unit.paths], self._copy(unit.paths)
        if unit.kind == "leaves":
            return self._leaves(unit)
        return self._stage(unit)

    def _copy(self, paths: Iterable[str]) -> dict[str, str]:
        tensors = self.job.source.tensors
        return self.output.write({path: tensors[path].in_order(self.piece) for path in paths})

    def _leaves(self, unit: Unit) -> tuple[list[Row], dict[str, str]]:
        if unit.slices > 1:
            path = unit.paths[0]
            arrays, error = self._sliced(path, unit.slices)
            return [self._row(path, error)], self._write(arrays)
        dense = {path: jnp.asarray(self.job.source.tensors[path].read()) for path in unit.paths}
        methods = {path: self.schedule.methods[path] for path in unit.paths}
        stats = {path: self.fisher[path] for path in unit.paths if path in self.fisher}
        found = compress_flat(dense, methods, stats, self.job.recipe.seed)
        rows = [self._row(path, _error([_sums(path, dense[path], found[path])])) for path in unit.paths]
        return rows, self._write(_arrays(found))

    def _sliced(self, path: str, slices: int) -> tuple[dict[str, np.ndarray], float]:
        """One weight, a run of its outputs after the other: every output is compressed on its own."""
        stored, method = self.job.source.tensors[path], self.schedule.methods[path]
        step = -(-stored.outputs // slices)
        sums: list[tuple[np.ndarray, np.ndarray]] = []

        def parts() -> Iterator[tuple[int, dict[str, np.ndarray]]]:
            for start in range(0, stored.outputs, step):
                dense = jnp.asarray(stored.read_outputs(start, min(start + step, stored.outputs)))
                found = compress_flat({path: dense}, {path: method}, seed=self.job.recipe.seed)
                sums.append(_sums(path, dense, found[path]))
                yield start, _arrays(found)
                del dense, found
                return_freed_memory()

        shapes = encode_leaf(path, self.schedule.leaves[path])
        struct = slice_struct(path, stored.struct, step)
        part = jax.eval_shape(lambda x: compress_flat({path: x}, {path: method}, seed=self.job.recipe.seed), struct)
        axes = output_axes(shapes, encode_leaf(path, part[path]))
        return whole_leaf(parts(), shapes, axes), _error(sums)

    def _stage(self, unit: Unit) -> tuple[list[Row], dict[str, str]]:
        index = next(i for i, stage in enumerate(self.schedule.stages) if stage.name == unit.name)
        if index == 0:
            return self._embedding(unit)
        stage, tensors = self.schedule.stages[index], self.job.source.tensors
        assert self.job.calibration is not None  # a schedule has stages only where there are windows
        (windows, length), hidden = self.job.calibration.shape, self.job.source.config.hidden_size
        shape, rows = (windows, length, hidden), micro_batch(length)
        carry = FileArray(self._carry(index), shape)
        dense = {path: jnp.asarray(tensors[f"{stage.name}/{path}"].read()) for path in below(stage.name, tensors)}
        found, running = compress_stage(
            stage,
            dense,
            carry,
            self.schedule.methods,
            seed=self.job.recipe.seed,
            micro_batch=rows,
            extra=self.fisher,
        )
        made = []
        for path, leaf in found.items():
            changed = f"{stage.name}/{path}" in self.schedule.methods
            error = _error([_sums(path, dense[path], leaf)]) if changed else None
            made.append(self._row(f"{stage.name}/{path}", error))
        hashes = self._write(_arrays({f"{stage.name}/{path}": leaf for path, leaf in found.items()}))
        if index + 1 < len(self.schedule.stages):
            following = FileArray(self.work.root / "next-carry", shape, make=True)
            advance(stage, running, carry, micro_batch=rows, out=following)
            following.keep_as(self._carry(index + 1))
        return made, hashes

    def _embedding(self, unit: Unit) -> tuple[list[Row], dict[str, str]]:
        """The table, and what it makes of the calibration tokens: of an untouched table only their rows are read."""
        (path,), tokens = unit.paths, self.job.calibration
        assert tokens is not None  # a schedule has stages only where there are windows
        stored, found = self.job.source.tensors[path], None
        if path in self.schedule.methods:
            rows, hashes = self._leaves(dataclasses.replace(unit, kind="leaves", slices=1))
            dense = {path: jnp.asarray(stored.read())}
            found = compress_flat(dense, {path: self.schedule.methods[path]}, None, self.job.recipe.seed)
            table = np.asarray(materialize(found[path].astype(jnp.float32)))
        else:
            rows, hashes, table = [self._row(path, None)], self._copy([path]), None
        shape = (*tokens.shape, stored.shape[1])
        following = FileArray(self.work.root / "next-carry", shape, make=True)
        for start, batch in batches(tokens, micro_batch(tokens.shape[1])):
            ids, back = np.unique(np.asarray(batch), return_inverse=True)
            values = stored.read_rows(ids) if table is None else table[ids]
            following[start : start + len(batch)] = values.astype(np.float32)[back.reshape(batch.shape)]
        following.keep_as(self._carry(1))
        return rows, hashes

    def _carry(self, index: int) -> Path:
        return self.work.root / f"carry-{index}"

    def _forget(self, unit: Unit) -> None:
        """Removes the inputs of a finished block, and gives back its memory."""
        if unit.kind == "stage":
            index = next(i for i, stage in enumerate(self.schedule.stages) if stage.name == unit.name)
            for old in range(index + 1):
                self._carry(old).unlink(missing_ok=True)
        return_freed_memory()

    def _write(self, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
        damaged = [name for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating) and not _finite(x)]
        if damaged:
            raise CheckpointError(f"{damaged[0]} has non-finite values ({len(damaged)} such tensors): not written")
        return self.output.write({name: [x] for name, x in arrays.items()})

    def _row(self, path: str, error: float | None) -> Row:
        leaf = self.schedule.leaves[path]
        kind = type(leaf).__name__ if is_compressed(leaf) else jnp.dtype(leaf.dtype).name
        return Row(path=path, kind=kind, nbytes=nbytes(leaf), error=error)

    def _gather_fisher(self) -> dict[str, InputStats]:
        """Squared gradients of the next-token loss, for the methods that need them: of the dense model, in memory."""
        wanted = {p for p, method in self.schedule.methods.items() if "fisher" in getattr(method, "needs", ())}
        if not wanted or self.job.calibration is None:
            return {}
        model = load_model(self.job.source.directory)
        apply = DecoderApply(dataclasses.replace(model.config, dtype="float32"))
        rows = micro_batch(self.job.calibration.shape[1])
        stats = calibrate(
            lambda params, tokens: apply({"params": params}, tokens),
            model.params,
            ((batch,) for _, batch in batches(self.job.calibration, rows)),
            needs={"fisher"},
            where=lambda path, _: path in wanted,
            loss=next_token_loss(apply),
        )
        flat = jax.tree_util.tree_leaves_with_path(stats, is_leaf=lambda x: isinstance(x, InputStats))
        return {"/".join(key.key for key in path): leaf for path, leaf in flat if isinstance(leaf, InputStats)}


def _arrays(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    named = {name: x for path, leaf in leaves.items() for name, x in encode_leaf(path, leaf).items()}
    return {name: np.asarray(x, order="C") for name, x in named.items()}


def _finite(x: np.ndarray) -> bool:
    return bool(np.isfinite(x.astype(np.float32, copy=False)).all())


def _sums(path: str, before: Any, after: Any) -> tuple[np.ndarray, np.ndarray]:
    """Squared error and squared norm of every output: the same numbers however the outputs are cut."""
    in_axes, _ = default_axes(path, before.ndim)
    error, norm = _squares(before, after, in_axes)
    return np.asarray(error), np.asarray(norm)


@partial(jax.jit, static_argnums=2)
def _squares(before: jax.Array, after: Any, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    dense = materialize(after.astype(jnp.float32))
    wide = before.astype(jnp.float32)
    return jnp.sum(jnp.square(wide - dense), axis=axes), jnp.sum(jnp.square(wide), axis=axes)


def _error(sums: list[tuple[np.ndarray, np.ndarray]]) -> float:
    error, norm = (np.concatenate([pair[i].ravel() for pair in sums]).astype(np.float64).sum() for i in (0, 1))
    return float(math.sqrt(error / max(norm, np.finfo(np.float32).tiny)))


def _streamed(schedule: Schedule, work: Work, resumed: int) -> Streamed:
    rows = {row["path"]: Row(**row) for line in work.done.values() for row in line["rows"]}
    ordered = tuple(rows[path] for path in schedule.leaves)
    return Streamed(rows=ordered, leaves=schedule.leaves, resumed=resumed, units=len(schedule.units))


def _texts(job: Job, schedule: Schedule, output: Output, work: Work, more: Mapping[str, str]) -> dict[str, str]:
    tokenizer = job.source.tokenizer
    return texts_of(
        nest(schedule.leaves),
        {name: digest for line in work.done.values() for name, digest in line["tensors"].items()},
        config=job.source.config.to_hf(),
        recipe=job.recipe.to_dict(),
        tokenizer_json=None if tokenizer is None else tokenizer.to_str(),
        files=more,
        weight_map=output.weight_map,
    )


def _write_texts(directory: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")


def _cannot_write(out: Path, work: Work, schedule: Schedule, error: OSError) -> CheckpointError:
    """What a full disk is told as; finished units stay, and where there are none nothing does."""
    reason = error.strerror or str(error)
    if not work.done:
        work.remove()
        left = "nothing was left behind, free some space or choose another disk"
    else:
        left = (
            f"{len(work.done)} of {len(schedule.units)} units are kept: free some space and give the same command again"
        )
    return CheckpointError(f"{out.name} cannot be written ({reason}); {left}")
