"""What compression will cost and gain, from the configuration alone: bytes of every leaf, totals, peak host memory."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from effjax.arrays.base import is_compressed, nbytes
from effjax.errors import CheckpointError, ConfigError
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from effjax.paths import leaves_with_paths, matches
from effjax.recipe import Recipe
from effjax.rules import is_dense_matrix
from effjax.sequential import abstract_result, abstract_stats, compress_flat
from effjax.stream.memory import program_bytes

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One tensor: its name, logical shape, how it will be held, and container bytes before and after."""

    path: str
    shape: tuple[int, ...]
    kind: str
    before: int
    after: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes of a model before and after a recipe.

    Attributes:
        rows: a row a tensor.
        before, after: bytes of all tensors.
        peak: most bytes that the arrays hold while compressing and saving (the interpreter and compiled programs come
            on top, some 0.5 GB).
    """

    rows: tuple[PlanRow, ...]
    before: int
    after: int
    peak: int

    @property
    def ratio(self) -> float:
        return self.before / self.after

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio}


def abstract_params(config: DecoderConfig, *, dtype: str | None = None) -> PyTree:
    """Shapes and dtypes of a decoder's parameters; nothing is allocated.

    Example:
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> abstract_params(config, dtype="bfloat16")["embed"]["embedding"].shape
        (256, 32)
    """
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
    if dtype is None:
        return params
    try:
        wanted = jnp.dtype(dtype)
    except TypeError as error:
        raise ConfigError(f"dtype {dtype!r} is not known; write float32, bfloat16 or float16") from error
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, wanted), params)


def plan(params: PyTree, recipe: Recipe | None) -> Plan:
    """What `apply_recipe(params, recipe)` would give, without weights.

    Args:
        params: parameters or their `ShapeDtypeStruct`s.
        recipe: None for the model as it is.

    Raises:
        RuleError, LeafError: a rule or a shape that does not fit, exactly as when compressing.
    """
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    after = params if recipe is None else abstract_result(params, recipe)
    new = dict(leaves_with_paths(after))
    rows = tuple(
        PlanRow(
            path=path,
            shape=tuple(leaf.shape),
            kind=type(new[path]).__name__ if is_compressed(new[path]) else new[path].dtype.name,
            before=nbytes(leaf),
            after=nbytes(new[path]),
        )
        for path, leaf in leaves_with_paths(params)
    )
    total_before, total_after = nbytes(params), nbytes(after)
    if recipe is None:
        return Plan(rows=rows, before=total_before, after=total_after, peak=total_before)
    changed = sum(row.after for row in rows if is_compressed(new[row.path]))
    working = max((_working_bytes(params, recipe, row.path) for row in _largest(rows, new)), default=0)
    saving = 2 * total_after  # the writer holds the bytes of the file beside the arrays
    return Plan(rows=rows, before=total_before, after=total_after, peak=total_before + max(changed + working, saving))


def _largest(rows: tuple[PlanRow, ...], new: dict[str, Any]) -> list[PlanRow]:
    """The largest leaf of each kind of compressed leaf: the one whose compression needs most memory."""
    best: dict[Any, PlanRow] = {}
    for row in rows:
        leaf = new[row.path]
        if is_compressed(leaf):
            kind = type(leaf), tuple(getattr(leaf, name) for name in leaf.static_fields)
            if kind not in best or math.prod(row.shape) > math.prod(best[kind].shape):
                best[kind] = row
    return list(best.values())


def _working_bytes(params: PyTree, recipe: Recipe, path: str) -> int:
    """Memory beyond input and output that compressing one leaf takes, as the compiler states it."""
    struct = dict(leaves_with_paths(params))[path]
    method = next((rule for rule in recipe.rules if _decides(rule[0], path, struct)), None)
    if method is None:
        return 0
    if method[1] is None:
        return 0
    alone = {path: method[1]}
    stats = abstract_stats({path: struct}, alone)
    _, _, between = program_bytes(lambda w, s: compress_flat(w, alone, s, recipe.seed), {path: struct}, stats)
    return between


def _decides(where: str | None, path: str, leaf: Any) -> bool:
    return matches(is_dense_matrix if where is None else where, path, leaf)


def config_directory(path_or_id: str) -> tuple[Path, str]:
    """A directory that holds the model's config.json (fetched alone, for a hub id), and the model's name.

    Raises:
        CheckpointError: there is no such directory, and the hub did not deliver it.
    """
    path = Path(path_or_id)
    if path.is_dir():
        return path, path.resolve().name
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path_or_id):
        raise CheckpointError(f"{path_or_id}: no such directory; give one with a config.json, or a hub id 'owner/name'")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise CheckpointError(
            f"{path_or_id}: no such directory, and to fetch it from the hub huggingface_hub is needed "
            "(pip install huggingface_hub)"
        ) from error
    try:
        return Path(hf_hub_download(path_or_id, "config.json")).parent, path_or_id
    except Exception as error:  # the hub client raises its own, the network's and the cache's errors
        raise CheckpointError(
            f"{path_or_id}: no such directory, and the hub did not deliver its config.json ({type(error).__name__}); "
            "check the id and the network, or give a directory"
        ) from error
