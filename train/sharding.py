"""Where arrays lie: the mesh that a flag describes, rules from paths to axes, the rows that a process reads."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from effjax.arrays.sharding import fit_spec
from effjax.errors import ConfigError
from effjax.paths import Where, matches, path_str

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # what rows of a batch are spread over; `tensor` shares them

Rules = Sequence[tuple[Where | re.Pattern[str], PartitionSpec]]

# The decoder's matrices: the first of a pair is cut by outputs, the second by inputs, so that one sum ends both. The
# table of tokens is cut by tokens: cut by features, it would cut all activations so and move them three times as often.
RULES: Rules = (
    (re.compile(r"(^|/)((q|k|v|gate|up)_proj|lm_head)/kernel$"), PartitionSpec("fsdp", "tensor")),
    (re.compile(r"(^|/)((q|k|v|gate|up)_proj)/bias$"), PartitionSpec("tensor")),
    (re.compile(r"(^|/)(o|down)_proj/kernel$"), PartitionSpec("tensor", "fsdp")),
    (re.compile(r"(^|/)embed/embedding$"), PartitionSpec(("fsdp", "tensor"), None)),
)


def make_mesh(spec: str, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh that a flag describes; axes not named have size one.

    Args:
        spec: such as "data=2,fsdp=4".
        devices: None for those that jax has.

    Raises:
        ConfigError: an unknown axis, a size that is not a positive integer, or more devices than there are; with
            several processes also fewer, since every process has to take part.

    Example:
        >>> dict(make_mesh("data=1").shape)
        {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in spec.split(","):
        name, _, size = part.strip().partition("=")
        if name not in sizes or not size.isdigit() or int(size) < 1:
            raise ConfigError(f"mesh {spec!r}: cannot read {part!r}; write axis=size with axes {', '.join(AXES)}")
        sizes[name] = int(size)
    devices = jax.devices() if devices is None else devices
    wanted = math.prod(sizes.values())
    if wanted > len(devices):
        raise ConfigError(f"mesh {spec!r} needs {wanted} devices, {len(devices)} exist: lower an axis")
    if wanted < len(devices) and len({device.process_index for device in devices}) > 1:
        raise ConfigError(f"mesh {spec!r} has {wanted} devices, the processes {len(devices)}: raise an axis")
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=devices[:wanted])


def partition_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Shards the largest dimension that `fsdp` divides; vectors and scalars stay whole.

    Example:
        >>> tuple(partition_spec((256, 640), 2))
        (None, 'fsdp')
    """
    fitting = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or len(shape) < 2 or not fitting:
        return PartitionSpec()
    axis = max(fitting, key=lambda axis: (shape[axis], -axis))
    return PartitionSpec(*(None,) * axis, "fsdp")


def params_layout(params: Any, mesh: Mesh, rules: Rules | None = None) -> tuple[Any, list[str]]:
    """A sharding for every array of `params`, and a line for everything that could not be cut as wanted.

    Args:
        params: arrays or their shapes.
        mesh: with the axes of `AXES`.
        rules: `(where, spec)`, of which the first that matches a path decides. `where` is a shell pattern over the
            whole path, a compiled regular expression that is searched in it, or a predicate of path and array. The
            entries of `spec` are for the last dimensions, so that stacked layers need no rules of their own. None takes
            `RULES`. What no rule names is cut over `fsdp` by `partition_spec`.

    Raises:
        ConfigError: a rule given that decides for nothing, has an unknown axis, or more entries than an array has
            dimensions.

    Example:
        >>> shapes = {"up_proj": {"kernel": jax.ShapeDtypeStruct((256, 641), "float32")}}
        >>> mesh = jax.sharding.AbstractMesh((1, 2, 2), AXES)
        >>> layout, report = params_layout(shapes, mesh)
        >>> tuple(layout["up_proj"]["kernel"].spec)
        ('fsdp', None)
        >>> print(*report)
        up_proj/kernel [256, 641]: 641 does not divide by tensor=2, replicated along it
    """
    chosen = RULES if rules is None else rules
    for where, spec in chosen:
        for axis in (axis for entry in spec for axis in (entry if isinstance(entry, tuple) else (entry,))):
            if axis is not None and axis not in mesh.shape:
                raise ConfigError(f"rule {_name(where)}: {spec} names {axis!r}, the mesh has {', '.join(mesh.shape)}")
    used, report = set(), []

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_str(path)
        for number, (where, spec) in enumerate(chosen):
            found = where.search(name) if isinstance(where, re.Pattern) else matches(where, name, leaf)
            if not found:
                continue
            used.add(number)
            if len(spec) > len(leaf.shape):
                raise ConfigError(f"rule {_name(where)}: {spec} has more entries than {name} {list(leaf.shape)}")
            wanted = PartitionSpec(*(None,) * (len(leaf.shape) - len(spec)), *spec)
            fitted = fit_spec(leaf.shape, wanted, mesh)
            report.extend(_left_whole(name, leaf.shape, wanted, fitted, mesh))
            return NamedSharding(mesh, fitted)
        spec = partition_spec(leaf.shape, mesh.shape["fsdp"])
        if len(leaf.shape) > 1 and mesh.shape["fsdp"] > 1 and not spec:
            report.append(f"{name} {list(leaf.shape)}: nothing divides by fsdp={mesh.shape['fsdp']}, replicated")
        return NamedSharding(mesh, spec)

    layout = jax.tree_util.tree_map_with_path(place, params)
    if rules is not None and len(used) < len(rules):
        where = next(where for number, (where, _) in enumerate(rules) if number not in used)
        names = [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise ConfigError(f"rule {_name(where)} decides for no array; the paths are {', '.join(names[:4])}, ...")
    return layout, report


def optimizer_layout(opt_state: Any, params: Any, layout: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer's state: what it keeps for a parameter lies where that lies.

    Args:
        opt_state: arrays or their shapes, of any optax transformation.
        params: arrays or their shapes.
        layout: of the parameters.
        mesh: of the layout.
    """
    homes: dict[str, tuple[tuple[int, ...], NamedSharding]] = {}
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(layout), strict=True
    ):
        homes[path_str(path)] = leaf.shape, sharding

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path)):  # a moment's path ends in its parameter's
            shape, sharding = homes.get(path_str(path[start:]), (None, None))
            if shape == leaf.shape and sharding is not None:
                return sharding
        return NamedSharding(mesh, partition_spec(leaf.shape, mesh.shape["fsdp"]))

    return jax.tree_util.tree_map_with_path(place, opt_state)


def bytes_per_device(tree: Any, layout: Any) -> int:
    """What the arrays of `tree` take on one device under `layout`.

    Example:
        >>> mesh = jax.sharding.AbstractMesh((1, 4, 1), AXES)
        >>> bytes_per_device(jax.ShapeDtypeStruct((8, 2), "float32"), NamedSharding(mesh, PartitionSpec("fsdp")))
        16
    """
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(layout), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x, s in pairs)


def process_rows(across: NamedSharding, batch: int) -> np.ndarray:
    """The rows of a batch that this process has to read: those of its devices.

    Args:
        across: sharding of a batch's leading axis.
        batch: rows of the whole batch.

    Returns:
        int64, ascending; not always neighbours, as the mesh follows the wires between the devices.

    Raises:
        ConfigError: rows that do not divide over the devices.
    """
    shards = math.prod(across.mesh.shape[axis] for axis in BATCH_AXES)
    if batch % shards:
        raise ConfigError(f"a batch of {batch} rows does not divide over {_sizes(across.mesh.shape)}: make it divide")
    indices = across.addressable_devices_indices_map((batch,)).values()
    return np.unique(np.concatenate([np.arange(batch)[index] for index in indices if index is not None]))


def _left_whole(name: str, shape: Any, wanted: PartitionSpec, fitted: PartitionSpec, mesh: Mesh) -> list[str]:
    """What `fit_spec` took out."""
    return [
        f"{name} {list(shape)}: {size} does not divide by "
        f"{_sizes({axis: mesh.shape[axis] for axis in (want if isinstance(want, tuple) else (want,))})}, "
        "replicated along it"
        for size, want, got in zip(shape, wanted, fitted, strict=True)
        if want is not None and got is None
    ]


def _sizes(shape: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in shape.items())


def _name(where: Any) -> str:
    return repr(where.pattern) if isinstance(where, re.Pattern) else repr(where)
