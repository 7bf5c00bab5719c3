"""The units that a model is compressed in, and the memory that each of them takes."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.arrays.base import nbytes
from effjax.errors import CalibrationError, ConfigError, LeafError
from effjax.io.safetensors_file import CHUNK
from effjax.lift.calibrate import calibrate
from effjax.models.config import DecoderConfig
from effjax.models.decoder import stages as decoder_stages
from effjax.paths import leaves_with_paths, nest
from effjax.recipe import Recipe, methods_by_path
from effjax.rules import default_axes
from effjax.sequential import (
    Stage,
    abstract_result,
    abstract_stats,
    advance_program,
    below,
    check_stages,
    compress_flat,
    groups_of,
    needs_inputs,
)
from effjax.stream.memory import program_bytes, resident

MICRO_BATCH_TOKENS = 1024  # run at once while calibrating; part of the definition of the bytes, so no setting
COMPILING = 96 * 2**20  # what the compiler and its programs take on top, measured on the methods of this package
_PROBE = 64  # outputs of the slice that is compiled to learn what one output takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """What is compressed, written and noted down as done in one piece.

    Attributes:
        name: of the block, the leaf, or the part whose leaves are copied.
        kind: "copy" (nothing is compressed), "leaves" (compressed on their own) or "stage" (a block, calibrated).
        paths: its leaves.
        slices: in how many slices of its outputs a single leaf is compressed.
        working: bytes that it takes beside the program itself; 0 where no budget asks for it.
    """

    name: str
    kind: str
    paths: tuple[str, ...]
    slices: int = 1
    working: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """All units of a job.

    Attributes:
        units: in order.
        leaves: shapes of the result, by path in the order of the model.
        methods: the method of every leaf that gets one.
        stages: the parts of the model that data passes, where there is anything to calibrate.
        base: bytes that the program itself takes; 0 where no budget asks for it.
        least: the smallest budget that can hold every unit; 0 where no budget asks for it.
    """

    units: tuple[Unit, ...]
    leaves: dict[str, Any]
    methods: dict[str, Any]
    stages: tuple[Stage, ...]
    base: int = 0
    least: int = 0

    @property
    def peak(self) -> int:
        """Most memory that the whole process will take."""
        return self.base + max(unit.working for unit in self.units)


def make_schedule(
    config: DecoderConfig,
    structs: Mapping[str, jax.ShapeDtypeStruct],
    recipe: Recipe,
    *,
    windows: tuple[int, int] | None = None,
    memory: int | None = None,
) -> Schedule:
    """Cuts a job into units that fit into `memory`.

    Args:
        config: of the model.
        structs: its parameters by path, in the order of the layers.
        recipe: what to do.
        windows: calibration windows and their length, where a method needs any.
        memory: bytes that the process may take; None cuts nothing and compiles nothing.

    Raises:
        RuleError, LeafError, CalibrationError: as compressing would.
        ConfigError: the budget cannot hold a unit; the least one that can is named.
    """
    tree = nest(structs)
    methods = methods_by_path(tree, recipe)
    found = dict(leaves_with_paths(abstract_result(tree, recipe, methods)))
    leaves = {path: found[path] for path in structs}
    ordered = {path: methods[path] for path in structs if path in methods}
    calibrated = any(map(needs_inputs, ordered.values()))
    stages = decoder_stages(config) if calibrated else ()
    if calibrated:
        check_stages(tree, ordered, stages)
        if windows is None:
            raise CalibrationError("a method of the recipe needs calibration windows: pass calibration=")
    if memory is not None and any("fisher" in getattr(m, "needs", ()) for m in ordered.values()):
        name = next(type(m).__name__ for m in ordered.values() if "fisher" in getattr(m, "needs", ()))
        raise ConfigError(
            f"{name} needs gradients of the whole model (fisher), which no block can give alone: leave --memory out, "
            "or choose another method"
        )
    units = _units(structs, ordered, stages)
    if memory is None:
        return Schedule(units=units, leaves=leaves, methods=ordered, stages=stages)
    sizer = _Sizer(structs, leaves, ordered, recipe.seed, {stage.name: stage for stage in stages}, windows)
    least = {unit.name: sizer.least(unit) for unit in units}  # compiles what tells the sizes
    base = resident() + COMPILING
    room = memory - base
    hungriest = max(units, key=lambda unit: least[unit.name])
    if (most := least[hungriest.name]) > room:
        raise ConfigError(
            f"a budget of {_mib(memory)} cannot hold {hungriest.name}: it takes {_mib(most)} beside the {_mib(base)} "
            f"of the program itself; allow at least {_mib(most + base, up=True)}"
        )
    fitted = tuple(sizer.fitted(unit, room) for unit in units)
    return Schedule(
        units=fitted, leaves=leaves, methods=ordered, stages=stages, base=base, least=base + least[hungriest.name]
    )


def micro_batch(length: int) -> int:
    """Windows of `length` tokens that run at once."""
    return max(1, MICRO_BATCH_TOKENS // length)


def _mib(nbytes: int, *, up: bool = False) -> str:
    return f"{math.ceil(nbytes / 2**20) if up else round(nbytes / 2**20)} MiB"


def _units(structs: Mapping[str, Any], methods: Mapping[str, Any], stages: Sequence[Stage]) -> tuple[Unit, ...]:
    staged = [Unit(name=stage.name, kind="stage", paths=tuple(_inside(stage.name, structs))) for stage in stages]
    taken = {path for unit in staged for path in unit.paths}
    together: dict[Any, list[str]] = {}
    copies: dict[str, list[str]] = {}
    for path in structs:
        if path in taken:
            continue
        method = methods.get(path)
        if method is None:
            copies.setdefault(path.split("/")[0], []).append(path)
        elif getattr(method, "scope", "leaf") == "global":  # one threshold for all its leaves
            together.setdefault(method, []).append(path)
        else:
            together[path] = [path]
    compressed = [
        Unit(name=paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more", kind="leaves", paths=paths)
        for paths in map(tuple, together.values())
    ]
    copied = [Unit(name=f"{part} (copied)", kind="copy", paths=tuple(paths)) for part, paths in copies.items()]
    for unit in staged:
        _check_scope(unit, methods)
    first = {path: index for index, path in enumerate(structs)}
    return (*staged, *sorted([*compressed, *copied], key=lambda unit: first[unit.paths[0]]))


def _inside(name: str, structs: Mapping[str, Any]) -> list[str]:
    return [f"{name}/{path}" for path in below(name, dict(structs))]


def _check_scope(unit: Unit, methods: Mapping[str, Any]) -> None:
    for path in unit.paths:
        if getattr(methods.get(path), "scope", "leaf") == "global":
            raise LeafError(
                f"{path}: a threshold over all leaves (scope='global') and calibration block by block exclude each "
                "other: use scope='leaf', or prune in a step of its own"
            )


class _Sizer:
    """Bytes that units take, from what the compiler says of their programs; equal programs are asked for once."""

    def __init__(
        self,
        structs: Mapping[str, Any],
        leaves: Mapping[str, Any],
        methods: Mapping[str, Any],
        seed: int,
        stages: Mapping[str, Stage],
        windows: tuple[int, int] | None,
    ) -> None:
        self.structs, self.leaves, self.methods, self.seed = structs, leaves, methods, seed
        self.stages, self.windows = stages, windows
        self.known: dict[Any, Any] = {}

    def least(self, unit: Unit) -> int:
        """What the unit takes when it is cut as finely as it can be."""
        if unit.kind == "copy":
            return self._copy(unit.paths)
        if unit.kind == "stage":
            return self._stage(unit)
        if self._can_cut(unit):
            fixed, each = self._cut(unit.paths[0])
            return fixed + _PROBE * each
        return self._leaves(unit)

    def fitted(self, unit: Unit, room: int) -> Unit:
        """The unit with as few slices as fit into `room`."""
        if unit.kind != "leaves" or not self._can_cut(unit):
            return dataclasses.replace(unit, working=self.least(unit))
        path = unit.paths[0]
        fixed, each = self._cut(path)
        outputs = self.outputs(path)
        most = min(outputs, max(1, (room - fixed) // each))
        slices = -(-outputs // most)
        return dataclasses.replace(unit, slices=slices, working=fixed + each * -(-outputs // slices))

    def outputs(self, path: str) -> int:
        _, out_axes = default_axes(path, len(self.structs[path].shape))
        return self.structs[path].shape[out_axes[0]]

    def _can_cut(self, unit: Unit) -> bool:
        path = unit.paths[0]
        method, struct = self.methods[path], self.structs[path]
        return len(unit.paths) == 1 and len(struct.shape) == 2 and method.by_column

    def _cut(self, path: str) -> tuple[int, int]:
        """Bytes that a leaf takes however it is cut, and bytes that each output in a slice takes."""
        struct, count = self.structs[path], min(_PROBE, self.outputs(path))
        part = slice_struct(path, struct, count)
        key = (self.methods[path], part.shape, part.dtype, path.split("/")[-1])
        if key not in self.known:
            self.known[key] = self._alone({path: part})
        return 2 * nbytes(self.leaves[path]), -(-self.known[key] // count)

    def _copy(self, paths: Sequence[str]) -> int:
        """What is read at once, whether its values are finite, and as much transposed."""
        return 4 * min(CHUNK, max(nbytes(self.structs[path]) for path in paths))

    def _leaves(self, unit: Unit) -> int:
        own = {path: self.structs[path] for path in unit.paths}
        key = tuple((self.methods[path], x.shape, x.dtype) for path, x in own.items())
        if key not in self.known:
            self.known[key] = self._alone(own)
        return self.known[key] + sum(nbytes(self.leaves[path]) for path in unit.paths)

    def _alone(self, own: Mapping[str, Any], stats: Mapping[str, Any] | None = None) -> int:
        """Reading, compressing and comparing some leaves that are in memory together."""
        methods = {path: self.methods[path] for path in own}
        dense = sum(nbytes(x) for x in own.values())
        compress = functools.partial(compress_flat, methods=methods, seed=self.seed)
        arguments, results, between = program_bytes(lambda x, s: compress(x, stats=s), dict(own), dict(stats or {}))
        wide = 3 * max(math.prod(x.shape) * 4 for x in own.values())  # comparing: both in float32, and a difference
        return max(3 * dense, dense + max(arguments + results + between, dense + results + wide))

    def _stage(self, unit: Unit) -> int:
        """A block: its weights, what calibrating, compressing and running it take, and its results."""
        if self.windows is None:
            raise CalibrationError("the size of a calibrated block depends on the length of the windows: say it")
        stage, length = self.stages[unit.name], self.windows[1]
        own = below(stage.name, dict(self.structs))
        key = (stage.apply, tuple((p, x.shape, x.dtype, self.methods.get(f"{stage.name}/{p}")) for p, x in own.items()))
        if key not in self.known:
            self.known[key] = self._block(stage, own, length) if stage.groups else self._embedding(unit)
        return self.known[key]

    def _embedding(self, unit: Unit) -> int:
        own = {path: self.structs[path] for path in unit.paths if path in self.methods}
        if not own:
            return self._copy(unit.paths) + 4 * CHUNK
        wide = sum(4 * math.prod(x.shape) for x in own.values())
        return self._alone(own) + 2 * wide + sum(nbytes(self.leaves[path]) for path in own)

    def _block(self, stage: Stage, own: Mapping[str, Any], length: int) -> int:
        rows = min(micro_batch(length), (self.windows or (1, 1))[0])
        hidden = self.structs["embed/embedding"].shape[1]
        carry = jax.ShapeDtypeStruct((rows, length, hidden), jnp.float32)
        running = {path: jax.ShapeDtypeStruct(x.shape, jnp.float32) for path, x in own.items()}
        narrow = sum(nbytes(x) for x in own.values() if x.dtype != jnp.float32)
        weights = sum(map(nbytes, running.values())) + narrow
        working = [2 * max(map(nbytes, running.values()))]  # while the largest is read
        _, results, between = program_bytes(lambda p, x: advance_program(stage, p, x), running, carry)
        working.append(results + between + 2 * nbytes(carry))
        for group in groups_of(stage, own, self.methods):
            chosen = {f"{stage.name}/{path}": own[path] for path in group}
            stats = abstract_stats(chosen, {path: self.methods[path] for path in chosen})
            if stats:
                working.append(self._calibrating(stage, running, carry, chosen) + 2 * nbytes(carry))
            held = sum(map(nbytes, stats.values()))
            joint = any(getattr(self.methods[path], "joint", False) for path in chosen)
            parts = [chosen] if joint else [{path: x} for path, x in chosen.items()]
            for part in parts:
                mine = {path: stats[path] for path in part if path in stats}
                working.append(held + self._alone(part, mine))
        results = sum(nbytes(self.leaves[f"{stage.name}/{path}"]) for path in own)
        return weights + max(working) + 2 * results

    def _calibrating(self, stage: Stage, running: Any, carry: Any, chosen: Mapping[str, Any]) -> int:
        """The step that gathers sums, and three copies of them: the total, the new ones and their sum."""
        watched = {path[len(stage.name) + 1 :] for path in chosen if needs_inputs(self.methods[path])}
        needs = frozenset().union(*(needs_inputs(self.methods[path]) for path in chosen))

        def step(params: Any, x: Any) -> Any:
            return calibrate(stage.apply, nest(params), [(x,)], needs=needs, where=lambda path, _: path in watched)

        _, results, between = program_bytes(step, dict(running), carry)
        return between + 3 * results


def slice_struct(path: str, struct: Any, count: int) -> jax.ShapeDtypeStruct:
    """The shape of `count` outputs of a weight."""
    _, out_axes = default_axes(path, len(struct.shape))
    shape = list(struct.shape)
    shape[out_axes[0]] = count
    return jax.ShapeDtypeStruct(tuple(shape), struct.dtype)
