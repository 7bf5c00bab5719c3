"""The main job: one model compressed in several ways, each judged against the original, side by side."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.base import is_compressed, materialize, nbytes
from effjax.errors import CheckpointError, ConfigError
from effjax.evaluate import Comparison, Perplexity, VerdictRule, compare_many, perplexity
from effjax.lift import lift
from effjax.models.decoder import DecoderApply
from effjax.models.generate import generate_text
from effjax.models.hf import LoadedModel
from effjax.paths import leaves_with_paths
from effjax.prune import Magnitude
from effjax.quantize import RTN
from effjax.recipe import Recipe, apply_recipe
from effjax.rules import is_dense_matrix
from effjax.sketch import LowRank
from effjax.stream.engine import Streamed

PyTree = Any
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much there is


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafRow:
    """One tensor of a variant.

    Attributes:
        path: its name.
        role: "embedding", "attention", "mlp", "head" or "other".
        layer: number of its layer where the path says it, else None.
        shape: logical shape.
        kind: type of the compressed leaf, or the dtype of a dense one.
        nbytes: container bytes.
        errors: ‖W − Ŵ‖ / ‖W‖, one a slice of the leading stacked dimension; empty where the leaf is unchanged.
    """

    path: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    errors: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """The original (`recipe` None) or one compressed form of it.

    Attributes:
        name: short name, such as "4-bit".
        summary: what was done, in words.
        recipe: what was done, exactly.
        params: the parameters.
        nbytes: bytes of all of them.
        ratio: bytes of the original over `nbytes`.
        leaves: a row a tensor.
        comparison: the judgement, None for the original or when nothing was evaluated.
        perplexity: on the evaluation windows, None when nothing was evaluated.
        sample: a continuation of the survey's prompt, or None.
    """

    name: str
    summary: str
    recipe: Recipe | None
    params: PyTree
    nbytes: int
    ratio: float
    leaves: tuple[LeafRow, ...]
    comparison: Comparison | None = None
    perplexity: float | None = None
    sample: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the text samples are drawn; temperature 0 takes the likeliest token."""

    prompt: str
    max_new_tokens: int = 64
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0

    def __str__(self) -> str:
        if self.temperature == 0:
            return f"Up to {self.max_new_tokens} tokens, always the likeliest."
        return (
            f"Up to {self.max_new_tokens} tokens at temperature {self.temperature:g}, top-p {self.top_p:g}, "
            f"seed {self.seed}: the same draws for each."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """The original and its compressed forms; `variants[0]` is the original."""

    model: LoadedModel
    variants: tuple[Variant, ...]
    text: str | None
    rule: VerdictRule
    sampling: Sampling | None

    def to_dict(self, *, command: str | None = None, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The contents of report.json: plain values, no arrays, no local paths."""
        original = self.variants[0]
        judged = [v.comparison for v in self.variants if v.comparison]
        evaluation = None
        if judged:
            evaluation = {
                "text": self.text,
                "windows": judged[0].windows,
                "tokens": judged[0].tokens,
                "confidence": judged[0].confidence,
                "rule": dataclasses.asdict(self.rule),
                "rule_text": str(self.rule),
            }
        return {
            "format": 1,
            "model": {
                "name": self.model.source,
                "parameters": sum(int(np.prod(row.shape)) for row in original.leaves),
                "nbytes": original.nbytes,
                "dtype": original.summary,
                "config": self.model.config.to_hf(),
            },
            "evaluation": evaluation,
            "prompt": None if self.sampling is None else self.sampling.prompt,
            "sampling": None if self.sampling is None else str(self.sampling),
            "variants": [_variant_dict(variant) for variant in self.variants],
            "command": command,
            "environment": dict(environment or {}),
        }


def default_recipes(params: PyTree) -> dict[str, Recipe]:
    """What the main job tries: 8, 4, 3 and 2 bits, 2:4 pruning, low rank at half the bytes.

    Quantization is round-to-nearest, asymmetric, in groups of 32 inputs with clipping of least squared error; a matrix
    whose inputs are no multiple of 32 gets one group a column, one whose inputs are no multiple of 4 stays dense under
    2:4.
    """
    recipes = {}
    inputs = {path: leaf.shape[-2] for path, leaf in leaves_with_paths(params) if is_dense_matrix(path, leaf)}
    uneven = [path for path, n in inputs.items() if n % 32]
    rest = [(None, 1)] if len(uneven) < len(inputs) else []
    for bits in (8, 4, 3, 2):
        grouped = RTN(bits=bits, group_size=32, symmetric=False, clip="mse")
        per_channel = dataclasses.replace(grouped, group_size=None)
        rules = [(path, per_channel) for path in uneven] + [(where, grouped) for where, _ in rest]
        recipes[f"{bits}-bit"] = Recipe(rules=tuple(rules))
    skipped = [(path, None) for path, n in inputs.items() if n % 4]
    if len(skipped) < len(inputs):
        recipes["2:4"] = Recipe(rules=(*skipped, (None, Magnitude(pattern="2:4"))))
    recipes["low rank"] = Recipe(rules=((None, LowRank(ratio=2)),))
    return recipes


def survey(
    model: LoadedModel,
    recipes: Mapping[str, Recipe],
    windows: np.ndarray | None,
    *,
    text: str | None = None,
    rule: VerdictRule | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    seed: int = 0,
    stats: PyTree | None = None,
    progress: Progress | None = None,
) -> Survey:
    """Compresses `model` by every recipe, then judges all results against the original in one pass over the windows.

    Nothing is written. The models compute in float32 whatever they are stored in, so that the differences are those of
    the weights. Small models are judged through their materialised weights, all by one compiled program; of larger ones
    each form runs compressed, through `lift`, and is compiled on its own.

    Args:
        model: the original, dense.
        recipes: by the names that the report shows.
        windows: int32 [windows, length] from `windows_from_text`; None compresses without judging.
        text: what the windows were cut from, in words.
        rule: see `compare_many`.
        sampling: writes a sample with each model; None writes none.
        batch_size, seed: see `compare_many`; the seed is that of the bootstrap.
        stats: statistics for methods that need them.
        progress: called with `(stage, done, total)`.

    Raises:
        ConfigError: the model is compressed already.
        RuleError, LeafError, CalibrationError: from the transforms and the evaluation, before anything else is done.
    """
    params = {"dense": model.params}
    _refuse_compressed(model)
    for name, recipe in recipes.items():
        if name in params:
            raise ConfigError(f"two variants are called {name!r}: give them different names")
        report = None if progress is None else partial(progress, f"compress {name}")
        params[name] = apply_recipe(model.params, recipe, stats=stats, progress=report)
    return judge(
        model,
        params,
        recipes,
        windows,
        text=text,
        rule=rule,
        sampling=sampling,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )


def judge(
    model: LoadedModel,
    params: Mapping[str, PyTree],
    recipes: Mapping[str, Recipe],
    windows: np.ndarray | None,
    *,
    text: str | None = None,
    rule: VerdictRule | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Survey:
    """As `survey`, for models compressed before: `params["dense"]` is the original, the others are forms of it."""
    rule = VerdictRule() if rule is None else rule
    for tree in params.values():
        check_same_tensors(model.params, tree)
    apply = float32_apply(model)
    runnable = {name: runnable_params(tree) for name, tree in params.items()}
    candidates = {name: tree for name, tree in runnable.items() if name != "dense"}
    comparisons: dict[str, Comparison] = {}
    dense: Perplexity | None = None
    if windows is not None:
        report = None if progress is None else partial(progress, "evaluate")
        options: dict[str, Any] = {"batch_size": batch_size, "progress": report}
        if candidates:
            comparisons = compare_many(apply, runnable["dense"], candidates, windows, rule=rule, seed=seed, **options)
        else:
            dense = perplexity(apply, runnable["dense"], windows, **options)
    original_bytes = nbytes(model.params)
    reference = next(iter(comparisons.values()), None)
    variants = []
    for index, (name, tree) in enumerate(params.items()):
        if progress is not None:
            progress("measure and sample", index, len(params))
        comparison = comparisons.get(name)
        recipe = recipes.get(name)
        variants.append(
            Variant(
                name=name,
                summary=_dtypes(tree) if recipe is None else describe(recipe),
                recipe=recipe,
                params=tree,
                nbytes=nbytes(tree),
                ratio=original_bytes / nbytes(tree),
                leaves=leaf_rows(model.params, tree),
                comparison=comparison,
                perplexity=_perplexity(comparison, reference, dense),
                sample=None if sampling is None else write_sample(model, runnable[name], sampling),
            )
        )
    if progress is not None:
        progress("measure and sample", len(params), len(params))
    return Survey(model=model, variants=tuple(variants), text=text, rule=rule, sampling=sampling)


def unjudged(model: LoadedModel, structs: Mapping[str, Any], streamed: Streamed, recipe: Recipe, name: str) -> Survey:
    """What is known of a model that was compressed on disk: sizes and the error of every tensor.

    Args:
        model: the original, whose `params` are not looked at.
        structs: shapes of its parameters by path.
        streamed: what was made of them.
        recipe: how.
        name: of the result.
    """
    rows = {row.path: row for row in streamed.rows}
    before = tuple(_leaf_row(path, x.shape, x.dtype.name, nbytes(x), ()) for path, x in structs.items())
    after = tuple(
        _leaf_row(path, x.shape, rows[path].kind, rows[path].nbytes, () if (e := rows[path].error) is None else (e,))
        for path, x in structs.items()
    )
    totals = [sum(row.nbytes for row in leaves) for leaves in (before, after)]
    dtypes = ", ".join(dict.fromkeys(x.dtype.name for x in structs.values()))
    dense = Variant(name="dense", summary=dtypes, recipe=None, params=None, nbytes=totals[0], ratio=1.0, leaves=before)
    small = Variant(
        name=name,
        summary=describe(recipe),
        recipe=recipe,
        params=None,
        nbytes=totals[1],
        ratio=totals[0] / totals[1],
        leaves=after,
    )
    return Survey(model=model, variants=(dense, small), text=None, rule=VerdictRule(), sampling=None)


@dataclasses.dataclass(frozen=True)
class Float32Apply:
    """The lifted apply function of a decoder; equal for equal configurations, so that jit caches by it."""

    decoder: DecoderApply

    def __call__(self, variables: PyTree, tokens: jax.Array, **kwargs: Any) -> Any:
        return lift(self.decoder)(variables, tokens, **kwargs)


def float32_apply(model: LoadedModel) -> Float32Apply:
    """`apply({"params": params}, tokens, ...)` for dense and compressed parameters of `model`."""
    return Float32Apply(DecoderApply(dataclasses.replace(model.config, dtype="float32")))


def runnable_params(params: PyTree, *, limit: int = 2**27) -> PyTree:
    """Float32 weights where their dense copy stays within `limit` bytes, else the parameters as they are."""
    leaves = jax.tree.leaves(params, is_leaf=is_compressed)
    if 4 * sum(leaf.size for leaf in leaves) > limit:
        return params
    return jax.tree.map(_dense_float32, params, is_leaf=is_compressed)


def write_sample(model: LoadedModel, params: PyTree, sampling: Sampling) -> str:
    """The continuation of the prompt by `params`."""
    options = {f.name: getattr(sampling, f.name) for f in dataclasses.fields(sampling) if f.name != "prompt"}
    apply = float32_apply(model)
    model = dataclasses.replace(model, config=apply.decoder.config)
    return generate_text(model, [sampling.prompt], apply=apply, params=params, **options)[0]


def leaf_rows(original: PyTree, params: PyTree) -> tuple[LeafRow, ...]:
    """A row for every tensor of `params`, compared with the tensor of the same name in `original`.

    Raises:
        CheckpointError: the trees have different tensors, so one is no compressed form of the other.
    """
    check_same_tensors(original, params)
    before, after = dict(leaves_with_paths(original)), dict(leaves_with_paths(params))
    rows = []
    for path, leaf in after.items():
        changed = is_compressed(leaf) or (leaf is not before[path] and not _same(before[path], leaf))
        errors = (
            np.atleast_1d(np.asarray(_relative_errors(before[path], _dense_float32(leaf)))).tolist() if changed else []
        )
        kind = type(leaf).__name__ if is_compressed(leaf) else leaf.dtype.name
        rows.append(_leaf_row(path, leaf.shape, kind, nbytes(leaf), tuple(errors)))
    return tuple(rows)


def _leaf_row(path: str, shape: tuple[int, ...], kind: str, size: int, errors: tuple[float, ...]) -> LeafRow:
    layer = re.search(r"(?:^|/)layers?_(\d+)(?:/|$)", path)
    return LeafRow(
        path=path,
        role=_role(path),
        layer=int(layer[1]) if layer else None,
        shape=tuple(shape),
        kind=kind,
        nbytes=size,
        errors=errors,
    )


def check_same_tensors(original: PyTree, params: PyTree) -> None:
    """Raises CheckpointError when one tree is no compressed form of the other: other names or logical shapes."""
    before = {path: tuple(leaf.shape) for path, leaf in leaves_with_paths(original)}
    after = {path: tuple(leaf.shape) for path, leaf in leaves_with_paths(params)}
    wrong = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    if wrong:
        first = f"{wrong[0]} is {list(after.get(wrong[0], ()))}, in the original {list(before.get(wrong[0], ()))}"
        raise CheckpointError(
            f"these models do not have the same tensors ({len(wrong)} differ: {first}): name the model it was made from"
        )


def describe(recipe: Recipe) -> str:
    """The methods of a recipe in a few words: their first field and those that differ from the default.

    Example:
        >>> describe(Recipe(rules=[(None, RTN(bits=4, group_size=32))]))
        'RTN bits 4, group size 32'
    """
    texts: dict[str, None] = {}
    for _, method in reversed(recipe.rules):
        if method is not None:
            shown = [
                (f.name.replace("_", " "), value)
                for i, f in enumerate(dataclasses.fields(method))
                if (value := getattr(method, f.name)) != f.default or (i == 0 and value is not None)
            ]
            fields = ", ".join(f"{name} {'none' if value is None else value}" for name, value in shown)
            texts[f"{type(method).__name__} {fields}".strip()] = None
    return "; ".join(texts)


@jax.jit
def _dense_float32(leaf: Any) -> jax.Array:
    """The weight in float32, not rounded to the dtype it was stored in before it was compressed."""
    return materialize(leaf.astype(jnp.float32))


@jax.jit
def _relative_errors(before: jax.Array, dense: jax.Array) -> jax.Array:
    """One error a slice of the first dimension of stacked weights, else one in all."""
    axes = tuple(range(1 if before.ndim > 2 else 0, before.ndim))
    before = before.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(before), axis=axes))
    return jnp.sqrt(jnp.sum(jnp.square(before - dense), axis=axes)) / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)


def _same(before: jax.Array, after: jax.Array) -> bool:
    return before.dtype == after.dtype and bool(jnp.array_equal(before, after))


def _role(path: str) -> str:
    for role, pattern in (
        ("other", r"norm|bias|(^|/)scale$"),
        ("embedding", r"embed|(^|/)(wte|wpe)(/|$)"),
        ("head", r"(^|/)(lm_head|head|logits)(/|$)"),
        ("attention", r"attention|attn"),
        ("mlp", r"mlp|ffn|feed_forward|experts"),
    ):
        if re.search(pattern, path):
            return role
    return "other"


def _dtypes(tree: PyTree) -> str:
    return ", ".join(dict.fromkeys(leaf.dtype.name for leaf in jax.tree.leaves(tree)))


def _perplexity(comparison: Comparison | None, reference: Comparison | None, dense: Perplexity | None) -> float | None:
    if comparison is not None:
        return comparison.perplexity
    if reference is not None:
        return reference.perplexity_reference
    return None if dense is None else dense.perplexity


def _variant_dict(variant: Variant) -> dict[str, Any]:
    plain = {f.name: getattr(variant, f.name) for f in dataclasses.fields(variant) if f.name != "params"}
    finite = variant.perplexity is not None and np.isfinite(variant.perplexity)
    leaves = [dataclasses.asdict(row) for row in variant.leaves]
    for leaf in leaves:
        leaf["shape"] = list(leaf["shape"])
        leaf["errors"] = [error if np.isfinite(error) else None for error in leaf["errors"]]
    return plain | {
        "recipe": None if variant.recipe is None else variant.recipe.to_dict(),
        "comparison": None if variant.comparison is None else variant.comparison.to_dict(),
        "perplexity": variant.perplexity if finite else None,
        "leaves": leaves,
    }


def _refuse_compressed(model: LoadedModel) -> None:
    found = [path for path, leaf in leaves_with_paths(model.params) if is_compressed(leaf)]
    if found:
        raise ConfigError(
            f"{model.source} is compressed already ({found[0]} and {len(found) - 1} more): compress the original"
        )
