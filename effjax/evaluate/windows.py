"""Evaluation windows: a text cut into equal rows of tokens."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from effjax.errors import CalibrationError, ConfigError


def windows_from_text(
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    length: int = 256,
    max_windows: int | None = None,
    bos: int | None = None,
    separator: Sequence[int] = (),
    keep: Literal["first", "last", "spread"] = "spread",
) -> np.ndarray:
    """Tokenises `text` as one stream and cuts it into windows of `length` tokens that do not overlap.

    Args:
        tokenizer: a `tokenizers.Tokenizer` (anything with `encode(text, add_special_tokens=False).ids`).
        text: one text, or documents that are tokenised one by one and joined.
        length: tokens in a window, `bos` included; the incomplete window at the end is dropped.
        max_windows: how many windows to keep, all by default.
        bos: token put in front of every window, so that its first text token is predicted too.
        separator: tokens put between two documents.
        keep: which windows stay when there are more than `max_windows`; "spread" takes them at equal distances.

    Returns:
        int32 [windows, length].

    Raises:
        CalibrationError: the text holds no complete window.
        ConfigError: `length`, `max_windows` or `keep` is out of range.

    Example:
        >>> class Bytes:
        ...     def encode(self, text, add_special_tokens=False):
        ...         return type("Encoding", (), {"ids": list(text.encode())})
        >>> windows_from_text(Bytes(), "abcdefg", length=4, bos=0).tolist()
        [[0, 97, 98, 99], [0, 100, 101, 102]]
    """
    if length < 2:
        raise ConfigError(f"length={length}: a window needs at least 2 tokens")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows={max_windows}: keep at least 1 window, or None for all")
    if keep not in ("first", "last", "spread"):
        raise ConfigError(f"keep={keep!r}: use 'first', 'last' or 'spread'")
    stream: list[int] = []
    for document in [text] if isinstance(text, str) else text:
        if stream:
            stream.extend(separator)
        stream.extend(tokenizer.encode(document, add_special_tokens=False).ids)
    taken = length - (bos is not None)
    count = len(stream) // taken
    if count == 0:
        raise CalibrationError(
            f"the evaluation text has {len(stream)} tokens, less than one window of {taken}: "
            "give more text or a smaller window length"
        )
    windows = np.asarray(stream[: count * taken], np.int32).reshape(count, taken)
    windows = windows[_kept(count, max_windows, keep)]
    if bos is not None:
        windows = np.concatenate([np.full((len(windows), 1), bos, np.int32), windows], axis=1)
    return windows


def _kept(count: int, max_windows: int | None, keep: str) -> np.ndarray:
    if max_windows is None or count <= max_windows:
        return np.arange(count)
    if keep == "spread":
        return np.arange(max_windows) * count // max_windows
    return np.arange(max_windows) + (count - max_windows if keep == "last" else 0)
