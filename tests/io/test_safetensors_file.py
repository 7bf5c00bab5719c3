"""The safetensors reader: what the format says is read, everything else is refused, whatever the bytes."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from effjax.errors import CheckpointError
from effjax.io.safetensors_file import read_entries

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(2.5, ml_dtypes.bfloat16),
    "c": np.zeros((0, 4), np.float16),
    "d": np.array([True, False, True]),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def write(file, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_the_reference_writes(file):
    entries = read_entries(file)
    assert set(entries) == set(TENSORS)
    for name, expected in TENSORS.items():
        found = entries[name].read()
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b'{"a": {}, "a": {}}', b"", "the header names a more than once; write it anew"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', b"", "the header names dtype more than once"),
        (b"{", b"", "the header is not JSON"),
        (b"\xff\xff", b"", "the header is not JSON"),
        (b"[" * 100000, b"", "the header is not JSON"),
        ([], b"", "the header is a list, not an object"),
        ({"a": 3}, b"", "the header entry of a lacks dtype, shape or data_offsets"),
        ({"a": entry(dtype="Q4")}, b"1234", "a has dtype 'Q4'; known are F64"),
        ({"a": entry(dtype=["F32"])}, b"1234", "a has dtype"),
        ({"a": entry(shape=(-1,))}, b"1234", r"a has shape \[-1\]"),
        ({"a": entry(shape=(True,))}, b"1234", r"a has shape \[True\]"),
        ({"a": entry(shape=(2,))}, b"1234", r"a of F32 \[2\] takes 8 bytes, but its data_offsets span 4"),
        ({"a": entry(offsets=(4, 8))}, b"12345678", "a starts at byte 4 of the data where 0 is expected"),
        ({"a": entry(), "b": entry()}, b"1234", "b starts at byte 0 of the data where 4 is expected"),
        ({"a": entry()}, b"123", "1 bytes are missing at the end; the file is truncated"),
        ({"a": entry()}, b"12345", "1 bytes too many at the end"),
    ],
)
def test_refused(tmp_path, header, data, message):
    write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=f"x.safetensors: {message}"):
        read_entries(tmp_path / "x.safetensors")


def test_short_or_absent_files(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="x: 3 bytes is too short for safetensors"):
        read_entries(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match="the header claims 18446744073709551615 bytes but the file has 20"):
        read_entries(tmp_path / "x")
    with pytest.raises(CheckpointError, match="cannot be read .No such file"):
        read_entries(tmp_path / "absent")


def test_file_that_shrinks_after_the_check(file):
    found = read_entries(file)["a"]
    file.write_bytes(file.read_bytes()[: found.start + 8])
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        found.read()


@given(data=st.data())
def test_any_damage_is_refused_or_harmless(tmp_path_factory, data):
    """Cut, or one byte changed: either a CheckpointError, or tensors of the promised sizes."""
    file = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_file(TENSORS, file)
    raw = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        file.write_bytes(raw[:at])
        with pytest.raises(CheckpointError):
            read_entries(file)
        return
    raw[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(raw)
    try:
        entries = read_entries(file)
    except CheckpointError:
        return
    assert sum(item.read().nbytes for item in entries.values()) == sum(x.nbytes for x in TENSORS.values())
