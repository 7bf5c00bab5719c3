"""The journal and what stands behind it: torn lines, foreign work, two processes, a kill at any write."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.errors import CheckpointError, ConfigError
from effjax.recipe import Recipe
from effjax.stream import Job, compress_checkpoint, open_source
from effjax.stream.memory import parse_bytes, peak_resident, resident
from effjax.stream.work import FileArray, Work, only_naming_left, read_journal, work_directory

JOBS = {
    "data-free": Recipe(rules=[(None, ej.quantize.RTN(bits=4, group_size=16))]),
    "calibrated": Recipe(rules=[(None, ej.sketch.LowRank(rank=3, weighted=True))]),
}


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it, nothing is cleaned up."""


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("kind", JOBS)
def test_a_kill_at_any_point_loses_nothing(kind, tiny, tokens, tmp_path, monkeypatch):
    """The process dies at its n-th call that reaches the disk, for n = 1, 2, ... until it gets through."""
    job = Job(source=open_source(tiny), recipe=JOBS[kind], calibration=tokens, shard_bytes=12_000)
    compress_checkpoint(job, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    calls = [0, 0]

    def dying(real):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == calls[1]:
                raise Killed
            return real(*args, **kwargs)

        return call

    real = os.fsync, Path.rename, Path.unlink
    deaths = 0
    for point in range(1, 400):
        calls[:] = [0, point]
        monkeypatch.setattr(os, "fsync", dying(real[0]))
        monkeypatch.setattr(Path, "rename", dying(real[1]))
        monkeypatch.setattr(Path, "unlink", dying(real[2]))
        try:
            compress_checkpoint(job, tmp_path / "out")
        except Killed:
            deaths += 1
        else:
            break
        finally:
            monkeypatch.setattr(os, "fsync", real[0])
            monkeypatch.setattr(Path, "rename", real[1])
            monkeypatch.setattr(Path, "unlink", real[2])
        left = work_directory(tmp_path / "out")
        if (tmp_path / "out").exists() and not (left / "journal.jsonl").exists():  # only an empty directory is left
            assert [path.name for path in left.iterdir()] in ([], ["lock"])
            shutil.rmtree(left)
        else:
            compress_checkpoint(job, tmp_path / "out")
        assert contents(tmp_path / "out") == whole, point
        assert not left.exists()
        shutil.rmtree(tmp_path / "out")
    assert deaths > 20


def test_finished_units_are_not_done_again(tiny, tmp_path, monkeypatch):
    job = Job(source=open_source(tiny), recipe=JOBS["data-free"])
    seen: list[tuple[int, int]] = []

    def die_after_five(stage: str, done: int, total: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        compress_checkpoint(job, tmp_path / "out", progress=die_after_five)
    streamed = compress_checkpoint(job, tmp_path / "out", progress=lambda _, done, total: seen.append((done, total)))
    assert streamed.resumed == 5 and seen[0][0] == 5 and seen[-1][0] == seen[-1][1] == streamed.units
    assert len(seen) == streamed.units - 5 + 1


def stopped(job: Job, out: Path, units: int) -> Path:
    def die(stage: str, done: int, total: int) -> None:
        if done == units:
            raise Killed

    with pytest.raises(Killed):
        compress_checkpoint(job, out, progress=die)
    return work_directory(out)


def test_work_of_another_kind_is_not_gone_on_with(tiny, tokens, tmp_path):
    source = open_source(tiny)
    job = Job(source=source, recipe=JOBS["data-free"])
    work = stopped(job, tmp_path / "out", 3)
    other = Job(source=source, recipe=Recipe(rules=[(None, ej.quantize.RTN(bits=3, group_size=16))]))
    with pytest.raises(CheckpointError, match="^an unfinished compression to out was begun with other recipe rules:"):
        compress_checkpoint(other, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"other shard size \(4294967296 then, 5000 now\)"):
        compress_checkpoint(Job(source=source, recipe=job.recipe, shard_bytes=5000), tmp_path / "out")
    with pytest.raises(CheckpointError, match="other calibration"):
        compress_checkpoint(Job(source=source, recipe=job.recipe, calibration=tokens), tmp_path / "out")
    os.utime(tiny / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="other input model.safetensors: .*start over with --restart"):
        compress_checkpoint(job, tmp_path / "out")
    journal = (work / "journal.jsonl").read_text().splitlines()
    first = json.loads(journal[0])
    first["fingerprint"]["versions"]["jax"] = "0.0.1"
    (work / "journal.jsonl").write_text("\n".join([json.dumps(first), *journal[1:]]) + "\n")
    with pytest.raises(CheckpointError, match=r"versions jax \('0\.0\.1' then, '"):
        compress_checkpoint(job, tmp_path / "out")
    compress_checkpoint(other, tmp_path / "out", restart=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_damaged_work_is_not_gone_on_with(tiny, tmp_path):
    job = Job(source=open_source(tiny), recipe=JOBS["data-free"])
    work = stopped(job, tmp_path / "out", 6)
    file = work / "output" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little") + 5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"the unfinished work on out is damaged \(.* of .*\): start over with"):
        compress_checkpoint(job, tmp_path / "out")
    assert work.exists()


def test_two_processes_do_not_write_the_same_output(tmp_path):
    with Work(tmp_path / "out", {"a": 1}):
        with pytest.raises(CheckpointError, match="^another process is writing out: wait for it, or choose another"):
            Work(tmp_path / "out", {"a": 1})
    with Work(tmp_path / "out", {"a": 1}) as work:
        work.remove()
    assert list(tmp_path.iterdir()) == []


def test_only_the_renaming_was_left(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "before").touch()
    with Work(tmp_path / "out", {}) as work:
        work.output.mkdir()
        (work.output / "after").touch()
        assert not only_naming_left(tmp_path / "out")
        work.append({"finished": True})
    assert only_naming_left(tmp_path / "out")
    with Work(tmp_path / "out", {}) as work:
        assert work.finished
        with pytest.raises(CheckpointError, match="^out exists already"):
            work.publish(overwrite=False)
        work.publish(overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "after"]


@given(cut=st.integers(0, 200), junk=st.binary(max_size=8))
@settings(max_examples=50, deadline=None)
def test_a_torn_journal_is_read_up_to_its_last_whole_line(cut, junk, tmp_path_factory):
    file = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    lines = [{"unit": f"layers_{i}", "tensors": {"a": "é"}} for i in range(4)]
    raw = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
    kept = raw[:cut]
    file.write_bytes(kept + (junk.replace(b"\n", b"") if cut < len(raw) else b""))
    found, whole = read_journal(file)
    assert found == lines[: len(found)] and len(found) == kept.count(b"\n")
    assert raw[:whole] == b"".join(raw.splitlines(keepends=True)[: len(found)])


@given(rows=st.integers(1, 5), width=st.integers(1, 4), data=st.data())
@settings(max_examples=25, deadline=None)
def test_arrays_in_files_are_arrays(rows, width, data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("array")
    array = FileArray(directory / "new", (rows, width, 2), make=True)
    expected = np.zeros((rows, width, 2), np.float32)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    part = np.random.default_rng(0).standard_normal((stop - start, width, 2)).astype(np.float32)
    array[start:stop] = part
    expected[start:stop] = part
    array.keep_as(directory / "kept")
    again = FileArray(directory / "kept", (rows, width, 2))
    np.testing.assert_array_equal(again[0:rows], expected)
    np.testing.assert_array_equal(again[start : rows + 3], expected[start:])


def test_sizes():
    assert [parse_bytes(text) for text in ("7", "2k", "3 KiB", "1.5MB", "2GiB", "1g", "1TiB")] == [
        7, 2000, 3072, 1_500_000, 2**31, 10**9, 2**40
    ]  # fmt: skip
    for text in ("", "two", "-1GB", "1 PB", "1i", "GiB"):
        with pytest.raises(ConfigError, match="is no size: write a number and a unit"):
            parse_bytes(text)
    assert 2**20 < resident() <= peak_resident()
