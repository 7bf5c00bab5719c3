"""Which method goes to which parameter: rule lists, the default choice of leaves, and the axes of a weight."""

import re
from typing import Any

import jax.numpy as jnp

from effjax.arrays.base import PyTree, is_compressed
from effjax.errors import RuleError
from effjax.paths import Where, leaves_with_paths, matches

# Named leaves that are no matrices of a dense layer even where stacking over layers gives them two dimensions.
VECTOR = re.compile(r"(^|_)(bias|scale|gamma|beta|mean|var|b|g)\d*$")  # names of the leaf itself
LEFT_OUT = re.compile(r"norm|embed|(^|_)ln\d*$|^(wte|wpe|ln_\d+|ln_f)$|(^|_)(head|logits|classifier)$")  # of any part


def is_dense_matrix(path: str, leaf: Any) -> bool:
    """The default choice: floating matrices (possibly stacked) of dense layers; no embeddings, norms, biases, heads.

    Example:
        >>> import jax.numpy as jnp
        >>> w = jnp.ones((4, 4))
        >>> is_dense_matrix("layers/mlp/up_proj/kernel", w), is_dense_matrix("embed/embedding", w)
        (True, False)
    """
    if not hasattr(leaf, "ndim") or leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    parts = path.lower().split("/")
    return not (VECTOR.search(parts[-1]) or any(map(LEFT_OUT.search, parts)))


def assign(params: PyTree, method: Any, where: Where | None = None) -> dict[str, Any]:
    """The method of every leaf that gets one, by path.

    Args:
        params: parameter tree; the default choice leaves out what is compressed already.
        method: one method for the default choice of leaves (or for `where`), or a list of `(where, method | None)`
            rules, of which the first that matches a leaf decides.

    Raises:
        RuleError: a rule that matches no leaf or only leaves that earlier rules took, or an empty list.
    """
    leaves = leaves_with_paths(params)
    if not isinstance(method, list | tuple):
        chosen = is_dense_matrix if where is None else where
        found = {
            path: method
            for path, leaf in leaves
            if matches(chosen, path, leaf) and not (where is None and is_compressed(leaf))
        }
        if not found:
            raise RuleError(
                f"{_name(chosen)} matches none of the {len(leaves)} leaves ({_some(leaves)}): "
                "pass rules, e.g. [('*/kernel', method)]"
            )
        return found
    if where is not None:
        raise RuleError("where= and a list of rules exclude each other: put the pattern into the rules")
    if not method:
        raise RuleError("the list of rules is empty: pass at least one (where, method)")
    found = {}
    used = [False] * len(method)
    matched = [False] * len(method)
    for path, leaf in leaves:
        hits = [i for i, (pattern, _) in enumerate(method) if matches(pattern, path, leaf)]
        for i in hits:
            matched[i] = True
        if hits:
            used[hits[0]] = True
            found[path] = method[hits[0]][1]
    for i, (pattern, _) in enumerate(method):
        if not matched[i]:
            raise RuleError(f"rule {i} ({_name(pattern)}) matches no leaf; the tree has {_some(leaves)}")
        if not used[i]:
            raise RuleError(f"rule {i} ({_name(pattern)}) never applies: earlier rules take all its leaves; move it up")
    return {path: m for path, m in found.items() if m is not None}


def default_axes(path: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Input and output axes (negative) of a weight, from the conventions of Flax.

    `[*L, in, out]`, but the attention kernels of `MultiHeadDotProductAttention` (`query`, `key`, `value` are
    `[*L, in, heads, head_dim]`, `out` is `[*L, heads, head_dim, out]`) and embeddings (`[vocab, features]`, which are
    contracted over the features).

    Example:
        >>> default_axes("attention/query/kernel", 3), default_axes("embed/embedding", 2)
        (((-3,), (-2, -1)), ((-1,), (-2,)))
    """
    parts = path.lower().split("/")
    parent = parts[-2] if len(parts) > 1 else ""
    if parts[-1] == "embedding" or parent in ("wte", "wpe"):
        return (-1,), (-2,)
    if ndim >= 3 and parts[-1] == "kernel":
        if parent in ("query", "key", "value"):
            return (-3,), (-2, -1)
        if parent == "out" and len(parts) > 2:
            return (-3, -2), (-1,)
    return (-2,), (-1,)


def _name(where: Where) -> str:
    return repr(where) if isinstance(where, str) else getattr(where, "__name__", repr(where))


def _some(leaves: list[tuple[str, Any]]) -> str:
    names = [path + (" (compressed)" if is_compressed(leaf) else "") for path, leaf in leaves[:4]]
    return ", ".join(names) + (", ..." if len(leaves) > 4 else "")
