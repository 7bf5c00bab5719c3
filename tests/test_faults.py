"""Damaged files of every kind: each is refused by name, or read as it was written; and the damage is real."""

import numpy as np
import pytest

from benchmarks.faults import KINDS, Kind, damaged, main, tried
from effjax.errors import CheckpointError


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_refused_by_name(name, tmp_path):
    found = tried(KINDS[name], 12, 7, tmp_path)
    assert found.accounts == [] and found.counts["refused"] >= 5


def test_damage_changes_bytes_and_entries():
    told = b'{"a": [1, 2], "b": {"c": "x"}}'
    made = {damaged(told, np.random.default_rng(i)) for i in range(60)}
    assert len(made) > 40 and any(len(text) < len(told) for text in made)
    header = len(told).to_bytes(8, "little") + told + b"data"
    made = [damaged(header, np.random.default_rng(i)) for i in range(60)]
    entries = [text for text in made if text.endswith(b"data") and text[8:9] == b"{" and text != header]
    assert len(entries) > 20
    assert any(int.from_bytes(text[:8], "little") == len(text) - 12 for text in entries), "headers are of their length"


def test_what_should_not_be_is_counted(tmp_path, capsys):
    """A reader that lets everything through, one that names nothing, one that dies."""

    def write(path):
        path.write_bytes(b"0123456789")

    def unnamed(path):
        if path.read_bytes() != b"0123456789":
            raise CheckpointError("something is wrong")

    def dies(path):
        assert path.read_bytes() == b"0123456789"

    for reader, outcome in ((lambda path: path.read_bytes(), "otherwise"), (unnamed, "unnamed"), (dies, "crash")):
        folder = tmp_path / outcome
        folder.mkdir()
        found = tried(Kind(write, reader, hashed=True), 10, 0, folder)
        assert found.counts[outcome] >= 8 and len(found.accounts) == found.counts[outcome]
    assert main(["--tries", "4", "--kinds", "sketch"]) == 0
    assert '"tried": 4' in capsys.readouterr().out
