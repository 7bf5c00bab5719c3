"""Sequential calibration: block by block, every weight on what the weights compressed before it give."""

import dataclasses
import glob
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.base import materialize
from effjax.arrays.view import folded_shape
from effjax.errors import CalibrationError
from effjax.lift.calibrate import InputStats, calibrate
from effjax.paths import leaves_with_paths, map_with_paths, matches, nest
from effjax.recipe import Recipe, apply_recipe, methods_by_path
from effjax.rules import default_axes

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a model that takes a carry to the next carry, such as one layer of a decoder.

    Attributes:
        name: where its parameters are in the tree of the model, such as "layers_3".
        apply: `apply(params, carry) -> carry` with the parameters below `name`. Where it is a frozen dataclass that
            compares equal for equal stages, all of them share their compiled programs.
        groups: patterns of weights below `name`, in the order in which the data meets them. Weights of one group are
            calibrated together, on inputs that come from the compressed weights of the groups before.

    Example:
        >>> double = Stage(name="up", apply=lambda params, x: x @ params["kernel"], groups=(("kernel",),))
        >>> double.groups
        (('kernel',),)
    """

    name: str
    apply: Callable[[PyTree, PyTree], PyTree]
    groups: tuple[tuple[str, ...], ...] = ()


def compress_sequentially(
    params: PyTree,
    recipe: Recipe,
    stages: Sequence[Stage],
    inputs: PyTree,
    *,
    micro_batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> PyTree:
    """Compresses a model by a recipe, calibrating every block on the outputs of the compressed blocks before it.

    The order of GPTQ (Frantar et al. 2022, "true sequential"): within a block the groups of `Stage.groups` one after
    the other, then the block is run again to make the inputs of the next. Activations are float32, in host memory.

    Args:
        params: tree of dicts with dense leaves, of which `stages` name parts.
        recipe: rules; methods with `needs` get statistics, the others are applied as `apply_recipe` does.
        stages: in the order of the data.
        inputs: what the first stage takes: a pytree of arrays with a leading axis of calibration windows.
        micro_batch: windows that run at once. Sums are in this order, so another number gives other last digits. Four
            windows of 256 tokens keep what a block makes of them in the caches of a CPU; more are slower there.
        progress: called with `(stages done, stages)`.

    Returns:
        `params` with compressed leaves.

    Raises:
        CalibrationError: a weight whose method needs statistics is in no stage, or in none of its groups; no windows.
        RuleError, LeafError: as `apply_recipe`, before anything is computed.

    Example:
        >>> import effjax as ej
        >>> params = {"up": {"kernel": jnp.eye(8, 6)}, "down": {"kernel": jnp.eye(6, 4)}}
        >>> linear = lambda params, x: x @ params["kernel"]
        >>> stages = [Stage(name=name, apply=linear, groups=(("kernel",),)) for name in ("up", "down")]
        >>> recipe = Recipe(rules=[(None, ej.sketch.LowRank(rank=2, weighted=True))])
        >>> compressed = compress_sequentially(params, recipe, stages, np.ones((16, 3, 8), np.float32))
        >>> type(compressed["down"]["kernel"]).__name__
        'LowRank'
    """
    methods = methods_by_path(params, recipe)
    abstract_result(params, recipe, methods)
    check_stages(params, methods, stages)
    flat = dict(leaves_with_paths(params))
    carry = inputs
    for done, stage in enumerate(stages):
        own = below(stage.name, flat)
        compressed, running = compress_stage(stage, own, carry, methods, seed=recipe.seed, micro_batch=micro_batch)
        flat |= {f"{stage.name}/{path}": leaf for path, leaf in compressed.items()}
        if done + 1 < len(stages):
            carry = advance(stage, running, carry, micro_batch=micro_batch)
        if progress is not None:
            progress(done + 1, len(stages))
    staged = {path for stage in stages for path in flat if path.startswith(f"{stage.name}/")}
    rest = {path: method for path, method in methods.items() if path not in staged}
    flat |= compress_flat({path: flat[path] for path in rest}, rest, seed=recipe.seed)
    return map_with_paths(lambda path, _: flat[path], params)


def compress_stage(
    stage: Stage,
    params: Mapping[str, Any],
    carry: PyTree,
    methods: Mapping[str, Any],
    *,
    seed: int = 0,
    micro_batch: int = 4,
    extra: Mapping[str, InputStats] | None = None,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Compresses one stage, group after group.

    Args:
        stage: which, and how it runs.
        params: its dense parameters by their paths below `stage.name`.
        carry: its inputs: arrays (or anything that is sliced as arrays are) with a leading axis of windows.
        methods: the method of every weight to compress, by its full path; others are left alone.
        seed: of the keys for methods that draw.
        micro_batch: windows that run at once.
        extra: statistics by full path that do not come from the inputs of a stage, such as Fisher information.

    Returns:
        The parameters with compressed leaves, and float32 parameters of the same values, as `advance` runs them.
    """
    result = dict(params)
    # All programs see dense float32 weights, compressed or not: one program a group, whatever was done before it.
    running = {path: _dense_float32(leaf) for path, leaf in params.items()}
    for group in groups_of(stage, params, methods):
        own = {path: methods[f"{stage.name}/{path}"] for path in group}
        stats = _calibrated(stage, running, carry, own, micro_batch)
        full = {f"{stage.name}/{path}": found for path, found in stats.items()}
        for path, more in (extra or {}).items():
            if path.removeprefix(f"{stage.name}/") in own:
                full[path] = with_fisher(full.get(path), more)
        chosen = {f"{stage.name}/{path}": method for path, method in own.items()}
        done = compress_flat({path: result[path.removeprefix(f"{stage.name}/")] for path in chosen}, chosen, full, seed)
        for path, leaf in done.items():
            short = path.removeprefix(f"{stage.name}/")
            result[short], running[short] = leaf, _dense_float32(leaf)
    return result, running


def advance(
    stage: Stage, running: Mapping[str, jax.Array], carry: PyTree, *, micro_batch: int = 4, out: PyTree | None = None
) -> PyTree:
    """Runs a stage on every window; the carry of the next stage, in host memory, or in `out` where one is given.

    Args:
        stage: which.
        running: float32 parameters from `compress_stage`.
        carry: its inputs.
        micro_batch: windows that run at once.
        out: arrays (or anything with slices that can be assigned) of the shapes of the result.
    """
    params = nest(running)
    made = out
    for start, batch in batches(carry, micro_batch):
        part = jax.tree.map(np.asarray, _applied(stage.apply, params, batch))
        if made is None:
            made = jax.tree.map(partial(_room, _windows(carry)), part)
        jax.tree.map(partial(_assign, start), made, part)
    return made


def advance_program(stage: Stage, running: Mapping[str, Any], batch: PyTree) -> PyTree:
    """What `advance` compiles: the stage on one run of windows."""
    return stage.apply(nest(running), batch)


def _room(windows: int, part: np.ndarray) -> np.ndarray:
    return np.empty((windows, *part.shape[1:]), part.dtype)


def _assign(start: int, whole: Any, part: np.ndarray) -> None:
    whole[start : start + len(part)] = part


@partial(jax.jit, static_argnums=0)
def _applied(apply: Callable[[PyTree, PyTree], PyTree], params: PyTree, carry: PyTree) -> PyTree:
    return apply(params, carry)


@jax.jit
def _dense_float32(leaf: Any) -> jax.Array:
    """The weight in float32, not rounded to the dtype it was stored in before it was compressed."""
    return materialize(leaf.astype(jnp.float32)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _calibrated(
    stage: Stage, running: Mapping[str, jax.Array], carry: PyTree, methods: Mapping[str, Any], micro_batch: int
) -> dict[str, InputStats]:
    """Statistics of the weights in `methods` that need any, by path below the stage."""
    watched = {path for path, method in methods.items() if needs_inputs(method)}
    if not watched:
        return {}
    needs = frozenset().union(*(needs_inputs(methods[path]) for path in watched))
    stats = calibrate(
        stage.apply,
        nest(running),
        ((batch,) for _, batch in batches(carry, micro_batch)),
        needs=needs,
        where=lambda path, _: path in watched,
    )
    flat = jax.tree_util.tree_leaves_with_path(stats, is_leaf=lambda x: isinstance(x, InputStats))
    return {"/".join(key.key for key in path): leaf for path, leaf in flat}


def needs_inputs(method: Any) -> frozenset[str]:
    """The statistics of its inputs that a method needs; Fisher information is of the whole model, not of a stage."""
    return frozenset(getattr(method, "needs", ())) - {"fisher"}


def with_fisher(stats: InputStats | None, fisher: InputStats) -> InputStats:
    """The statistics of a stage with the Fisher information gathered before."""
    if stats is None:
        return fisher
    return dataclasses.replace(stats, fisher_sum=fisher.fisher_sum, examples=fisher.examples)


def compress_flat(
    leaves: Mapping[str, Any],
    methods: Mapping[str, Any],
    stats: Mapping[str, InputStats] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """`leaves`, by full path, each compressed by its method: the bytes that `apply_recipe` gives for the whole tree."""
    if not methods:
        return dict(leaves)
    recipe = only(methods, seed)
    found = apply_recipe(nest(leaves), recipe, stats=nest(stats) if stats else None)
    return dict(leaves_with_paths(found))


def only(methods: Mapping[str, Any], seed: int) -> Recipe:
    """A recipe of one rule a leaf."""
    return Recipe(rules=tuple((glob.escape(path), method) for path, method in methods.items()), seed=seed)


def groups_of(stage: Stage, params: Mapping[str, Any], methods: Mapping[str, Any]) -> list[list[str]]:
    """The weights to compress by group, as paths below the stage; those in no group come first.

    Raises:
        CalibrationError: a weight in no group needs statistics.
    """
    rest = [path for path in params if f"{stage.name}/{path}" in methods]
    groups = []
    for patterns in stage.groups:
        found = [path for path in rest if any(matches(pattern, path, params[path]) for pattern in patterns)]
        rest = [path for path in rest if path not in found]
        groups.append(found)
    for path in rest:
        if needs_inputs(methods[f"{stage.name}/{path}"]):
            raise CalibrationError(
                f"{stage.name}/{path} is in none of the groups of its stage, so it is not known which inputs it sees: "
                "name it in Stage(groups=...), or leave it out with a rule"
            )
    return [group for group in (rest, *groups) if group]


def check_stages(params: PyTree, methods: Mapping[str, Any], stages: Sequence[Stage]) -> None:
    """Raises CalibrationError where a weight needs statistics that no stage gives."""
    flat = dict(leaves_with_paths(params))
    for stage in stages:
        groups_of(stage, below(stage.name, flat), methods)
    for path, method in methods.items():
        if needs_inputs(method) and not any(path.startswith(f"{stage.name}/") for stage in stages):
            raise CalibrationError(
                f"{path}: {type(method).__name__} needs {sorted(needs_inputs(method))}, but this weight is in none of "
                f"the blocks ({stages[0].name} to {stages[-1].name}): give it another method with a rule"
            )


def abstract_result(params: PyTree, recipe: Recipe, methods: Mapping[str, Any] | None = None) -> PyTree:
    """Shapes of the compressed tree, statistics assumed; raises what compressing would, but for values.

    Args:
        params: parameters or their `ShapeDtypeStruct`s.
        recipe: the rules.
        methods: `methods_by_path(params, recipe)`, where it is known already.
    """
    structs = map_with_paths(lambda _, x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    chosen = methods_by_path(structs, recipe) if methods is None else methods
    stats = abstract_stats(dict(leaves_with_paths(structs)), chosen)
    tree = nest(stats) if stats else None
    return jax.eval_shape(lambda p, s: apply_recipe(p, recipe, stats=s), structs, tree)


def abstract_stats(leaves: Mapping[str, Any], methods: Mapping[str, Any]) -> dict[str, InputStats]:
    """The shapes of the statistics that `methods` need, by path."""
    found = {}
    for path, method in methods.items():
        needs = getattr(method, "needs", frozenset())
        if not needs:
            continue
        axes = default_axes(path, leaves[path].ndim)
        shape = folded_shape(leaves[path].shape, *axes)
        lead, n = shape[:-2], shape[-2]
        wanted = {
            "outer_sum": ("second_moment", (*lead, n, n)),
            "abs_sum": ("abs_mean", (*lead, n)),
            "square_sum": ("norm", (*lead, n)),
            "fisher_sum": ("fisher", shape),
            "examples": ("fisher", lead),
        }
        fields = {
            field: jax.ShapeDtypeStruct(size, jnp.float32) for field, (need, size) in wanted.items() if need in needs
        }
        count = jax.ShapeDtypeStruct(lead, jnp.float32)
        found[path] = InputStats(count=count, in_axes=axes[0], out_axes=axes[1], **fields)  # type: ignore[arg-type]
    return found


def batches(carry: PyTree, micro_batch: int) -> Iterator[tuple[int, PyTree]]:
    """The carry in runs of windows, each with the number of its first."""
    windows = _windows(carry)
    if not windows:
        raise CalibrationError("the calibration set is empty: at least one window is needed")
    for start in range(0, windows, micro_batch):
        stop = min(start + micro_batch, windows)
        yield start, jax.tree.map(lambda x, start=start, stop=stop: jnp.asarray(x[start:stop]), carry)


def _windows(carry: PyTree) -> int:
    return jax.tree.leaves(carry)[0].shape[0]


def below(name: str, flat: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves under `name`, by the rest of their paths."""
    return {path[len(name) + 1 :]: leaf for path, leaf in flat.items() if path.startswith(f"{name}/")}
