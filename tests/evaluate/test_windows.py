"""Texts become windows of the stated length, in order, with nothing invented."""

import numpy as np
import pytest

from effjax.errors import CalibrationError, ConfigError
from effjax.evaluate import windows_from_text


class ByteTokenizer:
    """One token a byte, as small as a tokenizer gets."""

    def encode(self, text: str, add_special_tokens: bool = True) -> "ByteTokenizer":
        assert not add_special_tokens
        self.ids = list(text.encode())
        return self


def test_windows_tile_the_stream_and_drop_the_tail() -> None:
    windows = windows_from_text(ByteTokenizer(), "abcdefgh", length=3)
    assert windows.dtype == np.int32
    assert windows.tolist() == [[97, 98, 99], [100, 101, 102]]


def test_bos_goes_in_front_of_every_window() -> None:
    assert windows_from_text(ByteTokenizer(), "abcd", length=3, bos=1).tolist() == [[1, 97, 98], [1, 99, 100]]


def test_documents_are_joined_with_the_separator() -> None:
    assert windows_from_text(ByteTokenizer(), ["ab", "c"], length=4, separator=[9]).tolist() == [[97, 98, 9, 99]]


@pytest.mark.parametrize(("keep", "first_tokens"), [("first", [0, 2]), ("last", [6, 8]), ("spread", [0, 4])])
def test_which_windows_are_kept(keep: str, first_tokens: list[int]) -> None:
    text = bytes(range(10)).decode()
    windows = windows_from_text(ByteTokenizer(), text, length=2, max_windows=2, keep=keep)
    assert windows[:, 0].tolist() == first_tokens


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="has 0 tokens, less than one window of 256"):
        windows_from_text(ByteTokenizer(), [])
    with pytest.raises(CalibrationError, match="has 3 tokens"):
        windows_from_text(ByteTokenizer(), "abc", length=4)


@pytest.mark.parametrize("wrong", [{"length": 1}, {"max_windows": 0}, {"keep": "best"}])
def test_wrong_arguments_are_named(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        windows_from_text(ByteTokenizer(), "abcdef", **wrong)
