"""The reader against slices of the file: native and Python, direct and ordinary, many threads, and what goes wrong."""

import concurrent.futures
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import CheckpointError, ConfigError
from effjax.flash import RowReader, aligned_empty, plan_requests
from effjax.flash.reader import MOST

IMPLEMENTATIONS = ("cpu", "python")
SIZE = 300_000


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reader") / "rows.bin"
    content = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    path.write_bytes(content.tobytes())
    return path, content


@settings(max_examples=40, deadline=None)
@given(
    start=st.sampled_from([0, 4096, 100]),
    stride=st.sampled_from([1, 24, 512, 1000, 1536, 4096]),
    count=st.integers(0, 40),
    gap=st.sampled_from([0, 1, 5]),
    direct=st.booleans(),
    implementation=st.sampled_from(IMPLEMENTATIONS),
    seed=st.integers(0, 99),
)
def test_any_rows_to_any_slots(file, start, stride, count, gap, direct, implementation, seed):
    path, content = file
    rng = np.random.default_rng(seed)
    rows = (SIZE - start) // stride  # the last one ends within a block
    ids = rng.integers(0, min(rows, 60), count) + rng.choice([0, rows - min(rows, 60)])
    out = aligned_empty(count + 3, stride)
    slots = rng.permutation(count + 3)[:count]
    with RowReader(
        path, start=start, stride=stride, rows=rows, threads=3, gap=gap, direct=direct, implementation=implementation
    ) as reader:
        found = reader.read(ids, out, slots)
        align = reader.align
    expected = np.zeros_like(out)
    for row, slot in zip(ids, slots, strict=True):
        expected[slot] = content[start + row * stride : start + (row + 1) * stride]
    np.testing.assert_array_equal(out, expected)
    # By hand: rows at most `gap` apart share a request, whose ends are rounded outwards.
    runs: list[list[int]] = []
    for row in sorted({*ids.tolist()}):
        if runs and row - runs[-1][1] <= gap + 1:
            runs[-1][1] = row
        else:
            runs.append([row, row])
    ends = [(start + a * stride, start + (b + 1) * stride) for a, b in runs]
    assert found.requests == len(runs)
    assert found.bytes == sum(-(-b // align) * align - a // align * align for a, b in ends)


def test_long_runs_are_cut_so_that_threads_share_them():
    ids = np.arange(1000)
    requests, pieces = plan_requests(ids, ids[::-1], start=0, stride=4096, most=MOST)
    assert requests[:, 1].max() == MOST and requests[:, 1].sum() == 1000 * 4096 and len(requests) == 4
    assert requests[:, 2].tolist() == [0, 256, 512, 768] and pieces[0].tolist() == [0, 999 * 4096, 4096]
    requests, _ = plan_requests(ids[:2], ids[:2], start=0, stride=4 * MOST)
    assert requests[:, 1].tolist() == [4 * MOST, 4 * MOST]  # one row at least


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_file_system_that_refuses_direct_reads(implementation):
    path = pathlib.Path("/proc/version")
    if not path.exists():
        pytest.skip("no /proc, which refuses O_DIRECT")
    with RowReader(path, start=1, stride=3, rows=5, implementation=implementation) as reader:
        assert not reader.direct
        out = aligned_empty(5, 3)
        reader.read(np.arange(5), out)
    assert out.tobytes() == path.read_bytes()[1:16]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_direct_read_that_is_refused_only_when_it_happens(file, implementation):
    path, content = file
    with RowReader(path, start=0, stride=100, rows=100, implementation=implementation) as reader:
        if not reader.direct:
            pytest.skip("no direct reads here")
        reader.align = 2  # now requests begin where the device does not read
        out = aligned_empty(2, 100)
        reader.read(np.array([3, 50]), out)
        assert not reader.direct
    np.testing.assert_array_equal(out, content[:10_000].reshape(100, 100)[[3, 50]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_is_cut_short(tmp_path, implementation, direct):
    path = tmp_path / "short.bin"
    path.write_bytes(bytes(10 * 512))
    with pytest.raises(
        CheckpointError, match=r"short.bin has 5,120 bytes, and 11 rows of 512 from byte 0 on need 5,632"
    ):
        RowReader(path, start=0, stride=512, rows=11)
    with RowReader(path, start=0, stride=512, rows=10, direct=direct, implementation=implementation) as reader:
        with path.open("r+b") as stream:
            stream.truncate(5 * 512 + 100)
        out = aligned_empty(10, 512)
        reader.read(np.arange(5), out)
        for ids in (np.array([5]), np.arange(10), np.array([9])):
            with pytest.raises(CheckpointError, match=r"short.bin ends before row \d; copy or write it again"):
                reader.read(ids, out)
        reader.read(np.arange(5), out)  # still usable


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_threads_at_once(file, implementation):
    path, content = file
    rows = content[: 500 * 512].reshape(500, 512)
    with RowReader(path, start=0, stride=512, rows=500, threads=5, implementation=implementation) as reader:

        def work(seed):
            rng = np.random.default_rng(seed)
            out = aligned_empty(40, 512)
            for _ in range(20):
                ids = rng.choice(500, int(rng.integers(0, 40)), replace=False)
                reader.read(ids, out)
                np.testing.assert_array_equal(out[: len(ids)], rows[ids])
            return True

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8)))


def test_bad_requests_are_refused_before_anything_is_read(file):
    path, _ = file
    out = aligned_empty(2, 512)
    with RowReader(path, start=0, stride=512, rows=10) as reader:
        for ids, slots, message in (
            ([10], [0], "row 10 of 10"),
            ([-1], [0], "row -1 of 10"),
            ([1], [2], "slot 2 of 2"),
            ([1, 2], [0], "1 slots for 2 rows"),
        ):
            with pytest.raises(IndexError, match=message):
                reader.read(np.array(ids), out, np.array(slots))
        with pytest.raises(IndexError, match=r"out \[2, 100\]"):
            reader.read(np.array([1]), aligned_empty(2, 100))
        assert reader.read(np.array([], np.int64), out).requests == 0
    assert not out.any()
    reader.close()  # again, which changes nothing
    with pytest.raises(CheckpointError, match=r"cannot be opened for reading \(No such file"):
        RowReader(path.with_name("none"), start=0, stride=1, rows=1)
    with pytest.raises(ConfigError, match="stride=0"):
        RowReader(path, start=0, stride=0, rows=1)
    with pytest.raises(ConfigError, match="choose 'cpu' or 'python'"):
        RowReader(path, start=0, stride=1, rows=1, implementation="rust")  # type: ignore[arg-type]


def test_without_the_native_library(file, tmp_path, monkeypatch):
    from effjax.flash import reader as module
    from kernels_cpu._native import NativeLibrary

    path, content = file
    monkeypatch.setattr(module, "NATIVE", NativeLibrary(tmp_path))
    with pytest.raises(ConfigError, match="implementation='cpu' does not run: the native library was never built"):
        RowReader(path, start=0, stride=512, rows=10, implementation="cpu")
    with RowReader(path, start=0, stride=512, rows=10) as reader:
        assert reader.pool is None
        out = aligned_empty(1, 512)
        reader.read(np.array([7]), out)
    np.testing.assert_array_equal(out[0], content[7 * 512 : 8 * 512])
