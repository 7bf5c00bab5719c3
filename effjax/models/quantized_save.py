"""Models written in the quantized formats that servers read: weighed first, tensor by tensor, then written whole."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.base import is_compressed
from effjax.errors import CheckpointError, LeafError
from effjax.io.directory import renamed_when_whole
from effjax.io.formats import awq
from effjax.io.formats.exactness import WRITERS, Encoded, Exactness, Format, Scheme, encode, nearest
from effjax.io.safetensors_file import write_file
from effjax.models.decoder import unstack_layers
from effjax.models.hf import LoadedModel, embedding_name, expected_tensors, refuse_own_widths
from effjax.paths import leaves_with_paths
from effjax.tree import kind_of

STAYS_DENSE = "it is written dense"  # how the reason of such a verdict begins


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a format makes of one parameter.

    Attributes:
        path: the parameter.
        held: what it is now.
        stored: what it becomes.
        exact: whether every value stays what it is.
        reason: why.
        error: largest absolute difference, 0 where exact, None where it was not computed.
        largest: largest magnitude of the weight, likewise.
    """

    path: str
    held: str
    stored: str
    exact: bool
    reason: str
    error: float | None = 0.0
    largest: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A model as a format holds it, before anything is written.

    Attributes:
        verdicts: one a parameter.
        tensors: by name; those of weights that cannot be kept exactly are missing where that was not allowed.
        quantization_config: the entry of config.json.
    """

    verdicts: tuple[Verdict, ...]
    tensors: dict[str, np.ndarray]
    quantization_config: dict[str, Any]

    @property
    def exact(self) -> bool:
        return all(verdict.exact for verdict in self.verdicts)


def plan(
    model: LoadedModel,
    format: Format,
    *,
    approximate: bool = False,
    schemes: Mapping[str, Any] | None = None,
    bits: int | None = None,
    group_size: int | None = None,
) -> Plan:
    """What a model becomes in a format, with a verdict for each parameter.

    Linear layers that are dense stay so, unless all are: then they are rounded, which is never exact. Other parameters
    are written dense, and so are, with `approximate`, layers of a shape that the format has no place for.

    Args:
        model: with any leaves.
        format: one of `effjax.io.formats.exactness.WRITERS`.
        approximate: rounds weights that cannot be kept exactly.
        schemes: how weights were stored where they came from, by path (`QuantizedModel.schemes`).
        bits: of weights that are rounded; their own by default, or 4.
        group_size: of weights that are rounded; see `effjax.io.formats.exactness.nearest`.

    Raises:
        CheckpointError: parameters that do not fit the configuration, or none that the format can store.
    """
    if format not in WRITERS:
        raise CheckpointError(f"{format!r} is no directory of quantized tensors; choose one of {', '.join(WRITERS)}")
    named = _named(model)
    linear = {name: path for name, (path, _, transposed) in named.items() if transposed}
    compressed = {name for name in linear if is_compressed(named[name][1])}
    chosen = compressed or set(linear) - {"lm_head.weight"}
    if format == "awq":  # its readers expect a dense head
        chosen -= {"lm_head.weight"}
    schemes = dict(schemes or {})
    if format == "awq" and (size := _common_group_size([named[name][1] for name in chosen], group_size)):
        group_size = size
        schemes = dict.fromkeys(linear.values(), awq.AWQScheme(group_size=size))
    tensors: dict[str, np.ndarray] = {}
    stored: dict[str, Scheme | None] = {}
    verdicts: list[Verdict] = []
    for name, (path, leaf, transposed) in named.items():
        module, encoded = name.removesuffix(".weight"), None
        reason = "what it stands for is kept" if is_compressed(leaf) else "it is kept"
        if name in chosen:
            try:
                verdict, encoded = _weigh(path, leaf, format, schemes.get(path), approximate, bits, group_size)
            except LeafError as error:  # not even rounded: its shape is none of the format's
                reason = f"{STAYS_DENSE}: {error}"
            else:
                verdicts.append(verdict)
                stored[module] = None if encoded is None else encoded.scheme
                tensors |= {} if encoded is None else {f"{module}.{field}": x for field, x in encoded.tensors.items()}
                continue
        dense = np.asarray(leaf.materialize() if is_compressed(leaf) else leaf)
        tensors[name] = np.ascontiguousarray(dense.T if transposed else dense)
        kept = f"dense {dense.dtype.name}"
        verdicts.append(Verdict(path=path, held=describe(leaf), stored=kept, exact=True, reason=reason))
        if transposed:
            stored[module] = None
    stored.setdefault("lm_head", None)  # a tied head is a linear layer too, with the embedding for a weight
    complete = len(verdicts) == sum(v.exact or approximate for v in verdicts)
    try:
        entries = WRITERS[format].config_for(stored).to_json() if complete else {}
    except LeafError as error:
        raise CheckpointError(f"{model.source} cannot be stored as {format}: {error}") from None
    return Plan(verdicts=tuple(verdicts), tensors=tensors, quantization_config=entries)


def _named(model: LoadedModel) -> dict[str, tuple[str, Any, bool]]:
    """Path, leaf and whether it is a kernel, by the name in the file; refuses a tree that does not fit."""
    params = unstack_layers(model.params) if "layers" in model.params else model.params
    flat, expected = dict(leaves_with_paths(params)), expected_tensors(model.config)
    problems = [f"missing {tensor.path}" for tensor in expected.values() if tensor.path not in flat]
    paths = {tensor.path for tensor in expected.values()}
    problems += [f"unexpected {path}" for path in flat if path not in paths]
    named = {}
    for name, tensor in expected.items():
        leaf = flat.get(tensor.path)
        if leaf is None:
            continue
        wanted = tensor.shape[::-1] if tensor.transposed else tensor.shape
        if tuple(leaf.shape) != wanted:
            problems.append(f"{tensor.path} has shape {list(leaf.shape)}, expected {list(wanted)}")
        elif not all(_is_finite(x) for x in jax.tree.leaves(leaf)):
            problems.append(f"{tensor.path} has values that are not finite")
        named[name] = (tensor.path, leaf, tensor.transposed)
    if problems:
        raise CheckpointError("these parameters do not fit the configuration: " + "; ".join(problems))
    return named


def _is_finite(x: Any) -> bool:
    return not jnp.issubdtype(x.dtype, jnp.floating) or bool(np.isfinite(np.asarray(x).astype(np.float32)).all())


def _common_group_size(leaves: list[Any], wanted: int | None) -> int | None:
    """A group size that suits all weights: AWQ has one for the model. None is one group a column everywhere."""
    sizes = [getattr(leaf, "group_size", None) for leaf in leaves]
    known = [size for size in sizes if size]
    if known and all(size == leaf.shape[-2] for leaf, size in zip(leaves, sizes, strict=True)):
        return None
    if known:
        return math.gcd(*known)
    inputs = [leaf.shape[-2] for leaf in leaves]
    fitting = [size for size in (wanted, 128, 64, 32, 16, 8) if size and all(n % size == 0 for n in inputs)]
    return fitting[0] if fitting else None


def _weigh(
    path: str, leaf: Any, format: Format, like: Any, approximate: bool, bits: int | None, group_size: int | None
) -> tuple[Verdict, Encoded | None]:
    try:
        encoded = encode(leaf, format, like=like)
        kept = Exactness(exact=True, reason="its codes and scales are kept")
    except LeafError as error:
        encoded, kept = None, Exactness(exact=False, reason=str(error))
    verdict = Verdict(path=path, held=describe(leaf), stored=format, exact=kept.exact, reason=kept.reason)
    if encoded is not None:
        return dataclasses.replace(verdict, stored=_stored_as(encoded, format)), encoded
    if not approximate:
        return dataclasses.replace(verdict, error=None), None
    rounded = nearest(leaf, format, group_size=group_size, bits=bits)
    encoded = encode(rounded, format, like=like)
    before, after = (np.asarray(_dense(x)) for x in (leaf, rounded))
    return (
        dataclasses.replace(
            verdict,
            stored=_stored_as(encoded, format),
            error=float(np.abs(after - before).max()),
            largest=float(np.abs(before).max()),
        ),
        encoded,
    )


@jax.jit
def _dense(leaf: Any) -> jax.Array:
    return leaf.astype(jnp.float32).materialize() if is_compressed(leaf) else leaf.astype(jnp.float32)


def _stored_as(encoded: Encoded, name: str) -> str:
    scheme: Any = encoded.scheme
    bits, size = getattr(scheme, "bits", getattr(scheme, "num_bits", 4)), getattr(scheme, "group_size", None)
    size = getattr(scheme, "block_size", size)
    kind = getattr(scheme, "format", getattr(scheme, "kind", f"{name} {bits}-bit"))
    groups = "per channel" if size in (None, -1) else f"groups of {size}"
    if getattr(scheme, "strategy", "group") in ("tensor", "block"):
        groups = f"per {scheme.strategy}"
    return f"{kind}{f' {bits}-bit' if kind == 'pack-quantized' else ''}, {groups}"


def describe(leaf: Any) -> str:
    """What a leaf is, in a few words: kind, bits and group size.

    Example:
        >>> import effjax as ej
        >>> describe(ej.quantize.RTN(bits=4, group_size=8).quantize(jnp.ones((16, 8))))
        'Quantized 4-bit, groups of 8'
    """
    inner = leaf
    while is_compressed(getattr(inner, "array", None)):
        inner = inner.array
    kind = (
        kind_of(leaf) if inner is leaf or kind_of(leaf) == kind_of(inner) else f"{type(leaf).__name__} {kind_of(inner)}"
    )
    bits, scales = getattr(inner, "bits", None), getattr(inner, "scales", None)
    if bits is None or scales is None:
        return kind
    size = inner.shape[-2] // scales.shape[-2]
    return f"{kind} {bits}-bit, {'per channel' if size == inner.shape[-2] else f'groups of {size}'}"


def save_quantized_hf(
    directory: str | os.PathLike[str],
    model: LoadedModel,
    *,
    format: Format,
    approximate: bool = False,
    schemes: Mapping[str, Any] | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    overwrite: bool = False,
) -> tuple[Verdict, ...]:
    """Writes a directory that transformers, vLLM and `load_model` read: config.json, model.safetensors, tokenizer.json.

    Args:
        directory: to make; its parent must exist.
        model, format, approximate, schemes, bits, group_size: see `plan`.
        overwrite: replaces a directory that exists already.

    Returns:
        For each parameter, whether it is exact and why.

    Raises:
        CheckpointError: a weight cannot be kept exactly and `approximate` is not given (nothing is written), or see
            `plan` and `effjax.io.directory.renamed_when_whole`.

    Example:
        >>> verdicts = save_quantized_hf("model-awq", load_model("model-gptq"), format="awq")  # doctest: +SKIP
        >>> {verdict.exact for verdict in verdicts}  # doctest: +SKIP
        {True}
    """
    made = plan(model, format, approximate=approximate, schemes=schemes, bits=bits, group_size=group_size)
    return write_plan(directory, model, made, format=format, overwrite=overwrite)


def write_plan(
    directory: str | os.PathLike[str], model: LoadedModel, made: Plan, *, format: Format, overwrite: bool = False
) -> tuple[Verdict, ...]:
    """Writes what `plan` made; see `save_quantized_hf`."""
    refuse_own_widths(model.config)
    refused = [verdict for verdict in made.verdicts if verdict.error is None]
    if refused:
        first = refused[0]
        raise CheckpointError(
            f"{model.source}: {len(refused)} of {len(made.verdicts)} tensors cannot be kept exactly as {format}: "
            f"{first.path}: {first.reason}; allow an approximation, or choose another format"
        )
    embedding = made.tensors[embedding_name(model.config)].dtype.name
    entries = model.config.to_hf() | {"torch_dtype": embedding, "quantization_config": made.quantization_config}
    texts = {"config.json": json.dumps(entries, indent=2) + "\n"}
    if model.tokenizer is not None:
        texts["tokenizer.json"] = model.tokenizer.to_str()
    with renamed_when_whole(Path(directory), overwrite=overwrite) as temporary:
        write_file(temporary / "model.safetensors", made.tensors, metadata={"format": "pt"})
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
    return made.verdicts
