"""Names of leaves in a parameter tree, and the patterns that select them."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax

from effjax.arrays.base import is_compressed

PyTree = Any
Where = str | Callable[[str, Any], bool]


def path_str(key_path: tuple[Any, ...]) -> str:
    """Spells a jax key path as `"layers/mlp/up_proj/kernel"`.

    NNX states end every path in the variable's `value` attribute; it is dropped, so that Linen and NNX spell alike.
    """
    attribute_value = (
        bool(key_path) and isinstance(key_path[-1], jax.tree_util.GetAttrKey) and key_path[-1].name == "value"
    )
    return jax.tree_util.keystr(key_path[:-1] if attribute_value else key_path, simple=True, separator="/")


def leaves_with_paths(tree: PyTree) -> list[tuple[str, Any]]:
    """All leaves of `tree` with their names, in tree order; a compressed array counts as one leaf."""
    return [(path_str(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_compressed)]


def map_with_paths(fn: Callable[..., Any], tree: PyTree) -> PyTree:
    """Rebuilds `tree` with `fn(path, leaf)` in place of each leaf; a compressed array counts as one leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(path_str(path), leaf), tree, is_leaf=is_compressed)


def nest(flat: Mapping[str, Any]) -> PyTree:
    """Nested dicts from leaves by path: for a tree of dicts, the inverse of `dict(leaves_with_paths(tree))`.

    Example:
        >>> nest({"mlp/up/kernel": 1, "mlp/bias": 2})
        {'mlp': {'up': {'kernel': 1}, 'bias': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def matches(where: Where, path: str, leaf: Any) -> bool:
    """Whether `where` selects the leaf `leaf` called `path`.

    A string is a shell pattern over the whole path (`*` crosses `/`): `"*/mlp/*/kernel"`. A leading `*/` also matches
    at the root, so `"*/kernel"` takes `kernel` itself. Anything else is called as `where(path, leaf)`.

    Example:
        >>> matches("*/mlp/*/kernel", "layers_0/mlp/up_proj/kernel", None)
        True
        >>> matches("*/kernel", "kernel", None)
        True
    """
    if callable(where):
        return bool(where(path, leaf))
    return fnmatch.fnmatchcase(path, where) or (where.startswith("*/") and fnmatch.fnmatchcase(path, where[2:]))
