"""The corpus from the running Python: the same every time, split by text alone, parsed without importing."""

import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest

from effjax.data.python_docs import documents, is_heldout, windows
from effjax.errors import ConfigError

MODULE = '''"""A module."""
import does_not_exist
if True:
    def outer(x):
        """Outer.

        flush
            indented
        """
        def inner():
            "Inner."
try:
    class Thing:
        """A thing."""
        async def method(self): "A method."
except ImportError:
    def fallback(): "A fallback."
def again(): "A thing."
def empty(): "   "
def control(): "a\\x00b"
def plain(): return 1
'''


@pytest.fixture(scope="module")
def standard_library():
    return documents("all")


def test_same_texts_every_time_and_splits_that_part_them():
    root = Path(asyncio.__file__).parent  # a piece of the standard library, since reading all of it takes seconds
    everything, train, heldout = (documents(split, root=root) for split in ("all", "train", "heldout"))
    assert documents("all", root=root) == everything
    assert set(train).isdisjoint(heldout) and heldout
    assert sorted(train + heldout) == sorted(everything)
    assert [text for text in everything if is_heldout(text)] == heldout


def test_heldout_share_is_near_five_percent(standard_library):
    share = np.mean([is_heldout(text) for text in standard_library])
    assert 0.04 < share < 0.065


def test_texts_are_clean_distinct_and_enough(standard_library):
    assert all(text.strip() == text and text for text in standard_library)
    assert len(set(standard_library)) == len(standard_library) > 3000
    assert sum(map(len, standard_library)) > 1_000_000
    assert any("with" in text and "context manager" in text for text in standard_library)  # a pydoc topic


def test_docstrings_are_found_wherever_they_are_defined_and_nothing_is_imported(tmp_path):
    (tmp_path / "b_module.py").write_text(MODULE)
    (tmp_path / "a_broken.py").write_text("def (")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_it.py").write_text('"""Skipped."""')
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text('topics = {"if": "The if statement"}')
    assert documents("all", root=tmp_path) == [
        "A module.",
        "A thing.",
        "A method.",
        "A fallback.",
        "Outer.\n\nflush\n    indented",
        "Inner.",
        "The if statement",
    ]
    assert "does_not_exist" not in sys.modules


def test_split_depends_on_the_text_alone(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        texts = [f"Text number {i}." for i in range(200)]
        lines = [f"def f{name}{i}(): {text!r}\n" for i, text in enumerate(texts)]
        (tmp_path / name / "module.py").write_text("".join(lines if name == "one" else reversed(lines)))
    one, two = (set(documents("heldout", root=tmp_path / name)) for name in ("one", "two"))
    assert one == two
    assert 0 < len(one) < 30


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="unknown split 'test': use 'train', 'heldout' or 'all'"):
        documents("test")
    with pytest.raises(ConfigError, match="no docstrings under .*name another library with root="):
        documents("train", root=tmp_path)
    with pytest.raises(ConfigError, match="cannot cut 1 tokens into windows of 4"):
        windows([[7]], 4)


@pytest.mark.parametrize("count", [2, 8, 9, 10, 17])
def test_every_token_but_the_first_is_a_target_once(count):
    stream = np.arange(1, count + 1)
    rows, mask = windows([stream[:1], stream[1:]], 4)
    assert rows.shape == (mask.shape[0], 5) and rows.dtype == np.int32
    np.testing.assert_array_equal(rows[:, 1:][mask], stream[1:])
    np.testing.assert_array_equal(rows[:, :-1][mask], stream[:-1])
