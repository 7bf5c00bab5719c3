"""A recipe of mixed widths for a size that the whole model must not exceed: `effjax compress --target-size`."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.base import PyTree, is_compressed, nbytes
from effjax.errors import ConfigError
from effjax.evaluate.loss import next_token_loss
from effjax.lift.calibrate import calibrate
from effjax.models.decoder import DecoderApply
from effjax.models.hf import LoadedModel
from effjax.paths import leaves_with_paths
from effjax.quantize.allocate import allocate, family
from effjax.quantize.sensitivity import Sensitivity, sensitivity
from effjax.recipe import Recipe
from effjax.rules import is_dense_matrix
from effjax.stream.memory import parse_bytes
from effjax.transform import Method

BATCH = 8  # calibration windows that run at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targeted:
    """What `recipe_for_target` chose.

    Attributes:
        recipe: a rule a leaf.
        costs: what it was chosen from.
        nbytes: bytes of the whole model under the recipe.
        limit: what was asked for, in bytes.
    """

    recipe: Recipe
    costs: Sensitivity
    nbytes: int
    limit: int

    def __str__(self) -> str:
        return self.costs.table(self.recipe.rules)  # type: ignore[arg-type]


def parse_target(text: str, whole: int) -> int:
    """Bytes of "1.5MiB", or of "40%" of `whole`.

    Raises:
        ConfigError: neither, or not between 0 and 100 %.

    Example:
        >>> parse_target("1.5MiB", 9), parse_target("40%", 1000)
        (1572864, 400)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None:
        return parse_bytes(text)
    if not 0 < float(match[1]) <= 100:
        raise ConfigError(f"{text!r} of the original: choose more than 0% and at most 100%")
    return int(whole * float(match[1]) / 100)


def recipe_for_target(model: LoadedModel, method: Any, target: str, windows: np.ndarray, *, seed: int = 0) -> Targeted:
    """Chooses the width of every dense-layer matrix so that the whole model takes at most `target`.

    Candidates are `method` at 2, 3, 4, 5, 6 and 8 bits; matrices that its groups do not divide get one group a column.
    The expected loss is the layer error weighted by output gradients (see `sensitivity`), measured on `windows` with
    the dense model in memory. Embeddings, norms and heads stay as they are, and count.

    Args:
        model: a dense model.
        method: the family, with any width.
        target: "1.5MiB", or "40%" of the model's bytes.
        windows: calibration windows, `int32[windows, length]`.
        seed: of the recipe, for methods that draw.

    Raises:
        ConfigError: a method without widths, a target that cannot be read or reached, or a compressed model.
    """
    compressed = [path for path, leaf in leaves_with_paths(model.params) if is_compressed(leaf)]
    if compressed:
        raise ConfigError(f"{model.source} is compressed already ({compressed[0]}): choose widths for the original")
    whole = nbytes(model.params)
    limit = parse_target(target, whole)
    matrices = {path: leaf for path, leaf in leaves_with_paths(model.params) if is_dense_matrix(path, leaf)}
    left = whole - nbytes(matrices)
    groups = _by_grouping(method, {path: leaf.shape[-2] for path, leaf in matrices.items()})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
    stats = _statistics(model, windows, getattr(method, "needs", frozenset()))
    key = jax.random.key(seed) if getattr(method, "needs_key", False) else None
    sizes = _joined([sensitivity(shapes, c, where=_within(paths), stats=stats, key=key) for c, paths in groups])
    least = left + sizes.least_bytes
    if limit < least:
        raise ConfigError(
            f"--target-size {target} ({limit:,} bytes) is below the least possible, {least:,} bytes: "
            f"{left:,} of tensors that stay as they are (embedding, norms, head), {sizes.least_bytes:,} of matrices"
        )
    costs = _joined([sensitivity(model.params, c, where=_within(paths), stats=stats, key=key) for c, paths in groups])
    rules = allocate(costs, budget_bytes=limit - left)
    recipe = Recipe(rules=tuple(rules), seed=seed, model=model.source)
    return Targeted(recipe=recipe, costs=costs, nbytes=left + costs.nbytes(rules), limit=limit)


def _by_grouping(method: Method, inputs: dict[str, int]) -> list[tuple[list[Any], set[str]]]:
    """Candidates, and the matrices they are for: `method` as it is, and per column where its groups do not divide."""
    size = getattr(method, "group_size", None)
    uneven = {path for path, n in inputs.items() if size is not None and n % size}
    found = [(family(method), set(inputs) - uneven)]
    if uneven:
        found.append((family(dataclasses.replace(method, group_size=None)), uneven))  # type: ignore[type-var]
    return [(candidates, paths) for candidates, paths in found if paths]


def _within(paths: set[str]) -> Any:
    return lambda path, _: path in paths


def _joined(tables: list[Sensitivity]) -> Sensitivity:
    leaves = tuple(leaf for table in tables for leaf in table.leaves)
    return Sensitivity(measure=tables[0].measure, leaves=leaves)


def _statistics(model: LoadedModel, windows: np.ndarray, needs: frozenset[str]) -> PyTree:
    apply = DecoderApply(dataclasses.replace(model.config, dtype="float32"))
    batches = [(jnp.asarray(windows[i : i + BATCH]),) for i in range(0, len(windows), BATCH)]
    return calibrate(
        lambda params, tokens: apply({"params": params}, tokens),
        model.params,
        batches,
        needs={*needs, "second_moment", "fisher"},
        loss=next_token_loss(apply),
    )
