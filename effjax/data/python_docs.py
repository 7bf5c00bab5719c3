"""English text that every Python install carries: pydoc topics and the docstrings of the standard library.

Nothing is imported: the files are parsed with `ast`, so building the corpus runs no module code and works the same on
every platform. Each document belongs to the held-out split when a hash of its text falls in the lowest 5 %, hence a
text that two Python versions share is on the same side in both.
"""

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from effjax.errors import ConfigError

HELDOUT_SHARE = 0.05

_SKIPPED_PARTS = frozenset(
    {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "_bundled", "__pycache__"}
)
_LAYOUT = {ord("\n"): None, ord("\t"): None}
_DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documents(split: Literal["train", "heldout", "all"], *, root: Path | None = None) -> list[str]:
    """Returns the documents of one split, ordered by their dotted names, without duplicates.

    Args:
        split: "train" (95 %), "heldout" (5 %) or "all".
        root: the folder of the standard library; the running interpreter's own by default.

    Returns:
        Non-empty texts, one per pydoc topic and per distinct docstring, as `inspect.cleandoc` leaves them.

    Raises:
        ConfigError: `split` is unknown, or `root` holds no documented Python source (a stripped install).

    Example:
        >>> heldout = documents("heldout")
        >>> set(heldout).isdisjoint(documents("train"))
        True
    """
    if split not in ("train", "heldout", "all"):
        raise ConfigError(f"unknown split {split!r}: use 'train', 'heldout' or 'all'")
    folder = Path(sysconfig.get_paths()["stdlib"]) if root is None else Path(root)
    named = sorted(_named_documents(folder))
    unique = dict.fromkeys(text for _, text in named)
    if not unique:
        raise ConfigError(f"no docstrings under {folder}: it holds no Python source; name another library with root=")
    return [text for text in unique if split == "all" or is_heldout(text) == (split == "heldout")]


def is_heldout(text: str) -> bool:
    """Whether a document belongs to the held-out split; a function of its text alone.

    Example:
        >>> is_heldout("Return a new list.")
        False
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELDOUT_SHARE * 2**64


def windows(
    tokens: Sequence[Sequence[int]] | Sequence[np.ndarray], length: int
) -> tuple[Int[np.ndarray, "rows length+1"], Bool[np.ndarray, "rows length"]]:
    """Cuts tokenised documents, laid end to end, into rows in which every token but the very first is a target once.

    This is the held-out protocol: row r holds tokens r·length … (r+1)·length, so neighbouring rows share one token,
    the last input of one being the first of the next.

    Args:
        tokens: token ids of each document, with whatever begin and end marks the model was trained with.
        length: targets a row, the context length of the model.

    Returns:
        Rows int32 [rows, length + 1] (inputs are `[:, :-1]`, targets `[:, 1:]`), and a mask of the targets that
        exist; the last row is padded with zeros.

    Raises:
        ConfigError: fewer than two tokens, or a length below one.

    Example:
        >>> rows, mask = windows([[1, 2, 3], [4, 5]], 3)
        >>> rows.tolist(), mask.tolist()
        ([[1, 2, 3, 4], [4, 5, 0, 0]], [[True, True, True], [True, False, False]])
    """
    stream = np.concatenate([np.asarray(ids, np.int32) for ids in tokens]) if len(tokens) else np.zeros(0, np.int32)
    if length < 1 or stream.size < 2:
        raise ConfigError(f"cannot cut {stream.size} tokens into windows of {length}: give two tokens and a length > 0")
    targets = stream.size - 1
    count = -(-targets // length)
    padded = np.zeros(count * length + 1, np.int32)
    padded[: stream.size] = stream
    index = np.arange(count)[:, None] * length + np.arange(length + 1)
    return padded[index], index[:, 1:] <= targets


def _named_documents(folder: Path) -> Iterator[tuple[str, str]]:
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        if _SKIPPED_PARTS.intersection(parts):
            continue
        try:
            with warnings.catch_warnings():  # old files hold escapes that newer parsers warn about
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and deliberately broken files are not documentation
            continue
        module = ".".join(parts)
        found = _topics(tree) if module == "pydoc_data.topics" else _docstrings(tree, module)
        for name, text in found:
            text = inspect.cleandoc(text).strip()
            if text and text.translate(_LAYOUT).isprintable():  # no control characters, no lone surrogates
                yield name, text


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The entries of the one dictionary literal in pydoc_data/topics.py."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                yield f"pydoc_data.topics.{name}", text


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """The docstring of a module, class or function and of all that is defined inside it."""
    if isinstance(node, (ast.Module, *_DOCUMENTED)):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DOCUMENTED):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.excepthandler):  # definitions under `if`, `try` or `with`
            yield from _docstrings(child, name)
