"""Orbax checkpoints of trees with compressed leaves: sharded, and restored with their types."""

import json
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Sharding

from effjax.arrays.base import PyTree
from effjax.errors import CheckpointError, LeafError
from effjax.io.encoding import decode, encode


def save_orbax(directory: str | os.PathLike[str], params: PyTree) -> None:
    """Saves a tree of dicts; Orbax writes to a temporary name and renames when whole.

    Args:
        directory: to make; must not exist.
        params: tree with dense and compressed leaves, sharded or not.

    Raises:
        CheckpointError: the directory exists.
        LeafError: names that could not be read back, or an array without elements.
    """
    import orbax.checkpoint as ocp

    target = Path(directory).absolute()
    if target.exists():
        raise CheckpointError(f"{target.name} exists already: choose another name or remove it")
    named, manifest = encode(params)
    for name, x in named.items():
        if 0 in x.shape:
            raise LeafError(f"{name} has no elements {list(x.shape)}: Orbax stores none such; leave it out of the tree")
    with ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(
            target, args=ocp.args.Composite(arrays=ocp.args.StandardSave(named), manifest=ocp.args.JsonSave(manifest))
        )


def load_orbax(directory: str | os.PathLike[str], shardings: PyTree | None = None) -> PyTree:
    """Restores the tree, compressed leaves with their types.

    Args:
        directory: what `save_orbax` wrote.
        shardings: a sharding for every array of the tree (`NamedSharding`s over the specs of
            `effjax.partition_specs`), or None for the first local device.

    Raises:
        CheckpointError: a directory that is no such checkpoint, or whose manifest does not fit its arrays.

    Example:
        >>> import tempfile, effjax as ej, jax.numpy as jnp
        >>> params = ej.quantize_params({"kernel": jnp.ones((32, 8))}, ej.quantize.RTN(bits=4, group_size=32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ej.io.save_orbax(folder + "/ckpt", params)
        ...     ej.io.load_orbax(folder + "/ckpt")["kernel"].bits
        4
    """
    import orbax.checkpoint as ocp

    target = Path(directory).absolute()
    if not target.is_dir():
        raise CheckpointError(f"{target.name}: no such Orbax checkpoint")
    with ocp.Checkpointer(_handler()) as checkpointer:
        try:
            manifest = checkpointer.restore(target, args=ocp.args.Composite(manifest=ocp.args.JsonRestore())).manifest
            saved = checkpointer.metadata(target).item_metadata.arrays.tree
        except (FileNotFoundError, KeyError, AttributeError, ValueError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{target.name} is no checkpoint of effjax, or damaged ({error})") from error
        placed = _shardings(shardings, list(saved))
        abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed[name]) for name, x in saved.items()}
        arrays = checkpointer.restore(target, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))).arrays
    return decode(arrays, manifest)


def _handler() -> Any:
    import orbax.checkpoint as ocp

    return ocp.CompositeCheckpointHandler(arrays=ocp.StandardCheckpointHandler(), manifest=ocp.JsonCheckpointHandler())


def _shardings(shardings: PyTree | None, names: list[str]) -> dict[str, Sharding]:
    if shardings is None:
        device = jax.local_devices()[0]
        return dict.fromkeys(names, jax.sharding.SingleDeviceSharding(device))
    placed, _ = encode(shardings)
    missing = sorted(set(names) - set(placed))
    if missing:
        raise CheckpointError(f"shardings lack {missing[0]}: give one for every array of the tree")
    return placed
