"""Recipes: a rule list as a YAML or JSON file, the same methods as in Python, and their application to parameters.

A recipe reads

    version: 1
    seed: 0
    rules:
      - where: "*/mlp/*/kernel"     # a path pattern; left out: the dense-layer matrices
        method: rtn                 # a method, or none to leave the leaf as it is
        args: {bits: 4, group_size: 32}

and is written into every output, so that copying one file reproduces it.
"""

import dataclasses
import difflib
import importlib
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from effjax._compat import is_tracer
from effjax.arrays.nm_sparse import NMSparse
from effjax.arrays.view import fold, unfold
from effjax.errors import ConfigError
from effjax.paths import leaves_with_paths, map_with_paths, path_str
from effjax.prune import Pattern, SparseGPT, apply_mask, pack_mask, prune_mask, repair
from effjax.rules import assign, default_axes, is_dense_matrix
from effjax.sketch.sharing import Sharing
from effjax.transform import Method, compress_leaves, select

PyTree = Any
VERSION = 1
KINDS = ("prune", "sketch", "quantize")  # the transforms, in the order in which a recipe applies them
_MAX_BYTES = 1 << 20  # a recipe is a page of text; anything larger is some other file
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 takes 1e-3 for a string


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to do to which leaves: `rules` are `(where, method)` pairs, the first match wins.

    Attributes:
        rules: `where` is a path pattern or None for the default selection; `method` is a method or None to leave alone.
        seed: of the key for methods that draw.
        model: what it was made for, as information: a hub id, the name of a directory, or "default".

    Raises:
        ConfigError: no rules, a `where` that is not a pattern (a function cannot be written to a file), or a bad seed.

    Example:
        >>> recipe = Recipe(rules=[("*/mlp/*/kernel", parse_method("rtn", bits=4)), (None, parse_method("nf4"))])
        >>> recipe == Recipe.from_text(recipe.to_text())
        True
    """

    rules: tuple[tuple[str | None, Any], ...]
    seed: int = 0
    model: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple((where, method) for where, method in self.rules))
        if not self.rules:
            raise ConfigError("a recipe needs at least one rule, such as {method: rtn, args: {bits: 4}}")
        for where, method in self.rules:
            if where is not None and not isinstance(where, str):
                raise ConfigError(f"where={where!r}: a recipe holds path patterns such as '*/mlp/*/kernel'")
            if method is not None:
                kind_of(method)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed!r}: use a whole number from 0 to 4294967295")
        if self.model is not None and not isinstance(self.model, str):
            raise ConfigError(f"model={self.model!r}: write the name of a model, or leave it out")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every field of every method spelled out, so that a changed default cannot change the result."""
        rules = []
        for where, method in self.rules:
            rule: dict[str, Any] = {} if where is None else {"where": where}
            rule["method"] = "none" if method is None else method_name(type(method))
            if method is not None:
                rule["args"] = {f.name: _plain(getattr(method, f.name)) for f in dataclasses.fields(method)}
            rules.append(rule)
        model = {} if self.model is None else {"model": self.model}
        return {"version": VERSION, **model, "seed": self.seed, "rules": rules}

    def to_text(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """The inverse of `to_dict`."""
        return cls.from_text(yaml.safe_dump(dict(values), sort_keys=False))

    @classmethod
    def from_text(cls, text: str, *, source: str = "recipe") -> "Recipe":
        """Reads YAML or JSON; errors name `source` and the line."""
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            return _Reader(loader, source).recipe(root)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f"{source}, line {mark.line + 1}" if mark else source
            raise ConfigError(f"{place}: not valid YAML or JSON: {error.problem}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{source}: not valid YAML or JSON: {error}") from error
        finally:
            loader.dispose()

    @classmethod
    def from_file(cls, path: str | Path) -> "Recipe":
        """Reads a recipe file; an OSError where it cannot be read, a ConfigError where it is wrong."""
        path = Path(path)
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ConfigError(f"{path}: {size} bytes is too large for a recipe; name a YAML or JSON file")
        try:
            return cls.from_text(path.read_text(encoding="utf-8"), source=str(path))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 text, so not a recipe; name a YAML or JSON file") from error


def methods() -> dict[str, type]:
    """Every method by the name recipes and the command line use: `RTN` is `rtn`, `LowRank` is `low_rank`."""
    found = {}
    for kind in KINDS:
        module = importlib.import_module(f"effjax.{kind}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Method) and value is not Method:
                found[method_name(value)] = value
    return found


def _whole_model() -> set[str]:
    """Names of the methods that a rule cannot send to a leaf."""
    sketch = importlib.import_module("effjax.sketch")
    return {method_name(v) for v in vars(sketch).values() if isinstance(v, type) and issubclass(v, Sharing)}


def method_name(cls: type) -> str:
    """The recipe name of a method class.

    Example:
        >>> [method_name(type(name, (), {})) for name in ("RTN", "NF4", "LowRank", "LeanQuant")]
        ['rtn', 'nf4', 'low_rank', 'lean_quant']
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()


def kind_of(method: Any) -> str:
    """Which transform a method belongs to: "quantize", "sketch" or "prune"."""
    name = method_name(type(method))
    cls = methods().get(name)
    if cls is None or not isinstance(method, cls):
        raise ConfigError(f"{method!r} is not a method; use one of {_listed(methods())}")
    return cls.__module__.split(".")[1]


def parse_method(name: str, **args: Any) -> Any:
    """Makes the method called `name` with the fields `args`; `None` for the name "none".

    Raises:
        ConfigError: unknown name or field (the nearest valid one is named), or a value that the method refuses.

    Example:
        >>> parse_method("rtn", bits=4).bits
        4
    """
    known = methods()
    normal = _normal(name, known)
    if normal == "none":
        if args:
            raise ConfigError(f"method 'none' leaves a leaf as it is and takes no {_listed(args)}")
        return None
    if normal not in known:
        names = [*known, "none"]
        if normal in _whole_model():
            raise ConfigError(
                f"{name!r} shares one table among all leaves and is no method of single ones: call "
                "effjax.sketch.share_params in Python; for a table a leaf use 'hashed'"
            )
        raise ConfigError(f"unknown method {name!r}{_nearest(normal, names)}; methods are {_listed(names)}")
    cls = known[normal]
    fields = [f.name for f in dataclasses.fields(cls) if f.init]
    for field in args:
        if field not in fields:
            hint = _nearest(field, fields)
            raise ConfigError(f"method {normal!r} has no field {field!r}{hint}; it takes {_listed(fields)}")
    values = {field: _value(value) for field, value in args.items()}
    hints = typing.get_type_hints(cls)
    for field, value in values.items():
        if not _fits(hints[field], value):
            raise ConfigError(f"method {normal!r}: {field} must be {_spelled(hints[field])}, found {value!r}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:  # a field that is missing, or a value out of its range
        raise ConfigError(f"method {normal!r}: {error}") from error


def methods_by_path(params: PyTree, recipe: Recipe) -> dict[str, Any]:
    """The method of every leaf that `recipe` changes; `params` may be `ShapeDtypeStruct`s.

    Raises:
        RuleError: a rule that matches no leaf, or only leaves that earlier rules took.
    """
    return assign(params, [(is_dense_matrix if where is None else where, method) for where, method in recipe.rules])


def apply_recipe(
    params: PyTree, recipe: Recipe, *, stats: PyTree | None = None, progress: Callable[[int, int], None] | None = None
) -> PyTree:
    """Compresses `params` as `recipe` says; the same bytes as the transforms called in Python with the same methods.

    Works under `jax.eval_shape`. Every leaf is checked before the first is compressed.

    Args:
        params: parameter tree with dense leaves.
        recipe: rules and seed.
        stats: statistics for methods that need them, see `effjax.calibrate`.
        progress: called with `(leaves done, leaves in all)`.

    Raises:
        RuleError, LeafError, CalibrationError: as the transforms do.
    """
    key = jax.random.key(recipe.seed)
    selected = {}
    for kind in KINDS:
        if any(method is not None and kind_of(method) == kind for _, method in recipe.rules):
            rules = [
                (is_dense_matrix if where is None else where, m if m is not None and kind_of(m) == kind else None)
                for where, m in recipe.rules
            ]
            selected[kind] = rules, select(params, rules, where=None, stats=stats, key=key)
    total, done = sum(len(leaves) for _, leaves in selected.values()), 0
    for kind, (rules, leaves) in selected.items():
        if kind == "prune":
            params = _prune(params, rules, stats, key)
            done += len(leaves)
            if progress is not None:
                progress(done, total)
        else:
            report = None if progress is None else (lambda n, _, before=done: progress(before + n, total))
            params = compress_leaves(leaves, params, report)
            done += len(leaves)
    return params


class _Reader:
    """Walks the YAML nodes, which know their lines."""

    def __init__(self, loader: yaml.SafeLoader, source: str) -> None:
        self.loader, self.source = loader, source

    def recipe(self, root: yaml.Node | None) -> Recipe:
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{self.source}: a recipe is a mapping with the key 'rules', such as\n{_EXAMPLE}")
        entries = self.mapping(root, ("version", "model", "seed", "rules"), "a recipe")
        if "version" in entries and self.value(entries["version"]) != VERSION:
            raise self.error(
                entries["version"],
                f"version {self.value(entries['version'])!r} is not known, this effjax reads {VERSION}",
            )
        if "rules" not in entries:
            raise self.error(root, f"the key 'rules' is missing; a recipe reads\n{_EXAMPLE}")
        if not isinstance(entries["rules"], yaml.SequenceNode) or not entries["rules"].value:
            raise self.error(entries["rules"], f"'rules' must be a list of at least one rule, such as\n{_EXAMPLE}")
        rules = [self.rule(node) for node in entries["rules"].value]
        options = {key: self.value(entries[key]) for key in ("seed", "model") if key in entries}
        try:
            return Recipe(rules=tuple(rules), **options)
        except ConfigError as error:
            raise self.error(entries.get("seed", root), str(error)) from error

    def rule(self, node: yaml.Node) -> tuple[str | None, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, "a rule is a mapping with the keys where, method and args")
        entries = self.mapping(node, ("where", "method", "args"), "a rule")
        where = self.value(entries["where"]) if "where" in entries else None
        if where is not None and (not isinstance(where, str) or not where):
            message = f"where must be a path pattern such as '*/mlp/*/kernel', found {where!r}"
            raise self.error(entries["where"], message)
        name = self.value(entries["method"]) if "method" in entries else None
        if not isinstance(name, str):
            message = f"a rule needs a method, one of {_listed([*methods(), 'none'])}"
            raise self.error(entries.get("method", node), message)
        args = self.value(entries["args"]) if "args" in entries else {}
        if not isinstance(args, dict) or not all(isinstance(field, str) for field in args):
            raise self.error(entries["args"], f"args must map fields to values, such as {{bits: 4}}, found {args!r}")
        try:
            return where, parse_method(name, **args)
        except ConfigError as error:
            known = _normal(name, methods()) in methods()
            raise self.error(entries["args"] if args and known else entries["method"], str(error)) from error

    def mapping(self, node: yaml.MappingNode, known: Sequence[str], what: str) -> dict[str, yaml.Node]:
        entries: dict[str, yaml.Node] = {}
        for key_node, value_node in node.value:
            key = self.value(key_node)
            if key not in known:
                hint = _nearest(str(key), known)
                raise self.error(key_node, f"{what} has no key {key!r}{hint}; it takes {_listed(known)}")
            if key in entries:
                raise self.error(key_node, f"the key {key!r} stands twice")
            entries[key] = value_node
        return entries

    def value(self, node: yaml.Node) -> Any:
        return self.loader.construct_object(node, deep=True)

    def error(self, node: yaml.Node, message: str) -> ConfigError:
        return ConfigError(f"{self.source}, line {node.start_mark.line + 1}: {message}")


_EXAMPLE = "rules:\n  - where: '*/mlp/*/kernel'\n    method: rtn\n    args: {bits: 4, group_size: 32}"


def _normal(name: str, known: Iterable[str]) -> str:
    """A method's name as recipes have it; "SpaLLM" and "spallm" are `spa_llm`, as "spa-llm" is."""
    spelled = name.strip().lower().replace("-", "_")
    plain = spelled.replace("_", "")
    return next((other for other in known if other.replace("_", "") == plain), spelled)


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(item) for item in value)  # methods are hashable
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return value


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _prune(params: PyTree, rules: Sequence[tuple[Any, Any]], stats: PyTree | None, key: jax.Array) -> PyTree:
    """Prunes; n:m patterns become packed leaves, whose dropped bytes are gone, other patterns leave zeros."""
    mask = prune_mask(params, rules, stats=stats, key=key)
    methods = assign(params, rules)
    patterns = {path: Pattern.parse(method.pattern) for path, method in methods.items()}
    structured = {path: (p.n, p.m) for path, p in patterns.items() if p.n is not None and p.m is not None}

    def only(keep: Callable[[str], bool]) -> PyTree:
        return jax.tree.map_with_path(lambda path, m: m if keep(path_str(path)) else None, mask)

    for method in {method for method in methods.values() if isinstance(method, SparseGPT)}:
        swept = only(lambda path, method=method: methods.get(path) == method)
        params = repair(params, swept, stats=stats, damping=method.damping)
    params = apply_mask(params, only(lambda path: path not in structured))
    masks = dict(leaves_with_paths(only(lambda path: path in structured)))
    if not any(is_tracer(m) for m in masks.values()):
        return pack_mask(params, only(lambda path: path in structured))

    def pack(path: str, w: Any) -> Any:  # pack_mask looks at values, which a size estimate does not have
        if path not in masks:
            return w
        in_axes, out_axes = default_axes(path, w.ndim)
        folded = fold(w, in_axes, out_axes), fold(masks[path], in_axes, out_axes)
        n, m = structured[path]
        packed = NMSparse.from_dense(*folded, n=n, m=m)
        return unfold(packed, w.shape, in_axes, out_axes)

    return map_with_paths(pack, params)


def _fits(hint: Any, value: Any) -> bool:
    """Whether `value` is of the annotated type, as far as recipes need: numbers, strings, switches, None, choices."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(option, value) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint in (None, type(None)):
        return value is None
    if hint in (int, float):
        return isinstance(value, int | float if hint is float else int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    return isinstance(value, tuple) if origin is tuple else True


def _spelled(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    return (
        getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint).replace("None", "null")
    )
