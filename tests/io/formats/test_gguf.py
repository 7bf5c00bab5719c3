"""The GGUF container: read from bytes made by hand, written, and every kind of damage refused."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.errors import CheckpointError
from effjax.io.formats.gguf import read_gguf
from effjax.io.formats.gguf_types import BY_NAME
from effjax.io.formats.gguf_writer import NewTensor, write_gguf

HUGE = 2**40
Q8_0 = np.arange(2 * 34, dtype=np.uint8).tobytes()  # [2, 32], finite scales
F32 = np.arange(3, dtype=np.float32).tobytes()


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str | bytes, sizes: tuple[int, ...], number: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, number, offset)


ARCHITECTURE = pair("general.architecture", 8, text("none"))
INFOS = [info("blocks", (32, 2), 8, 0), info("vector", (3,), 0, 96)]


def made(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: int | None = None,
    pairs: int | None = None,
    metadata: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    data: bytes = Q8_0.ljust(96, b"\0") + F32,
    alignment: int = 32,
) -> bytes:
    """A file put together by hand: `blocks` of Q8_0 [2, 32] and `vector` of F32 [3]."""
    metadata = [ARCHITECTURE] if metadata is None else metadata
    infos = INFOS if infos is None else infos
    counts = struct.pack("<QQ", len(infos) if tensors is None else tensors, len(metadata) if pairs is None else pairs)
    head = magic + struct.pack("<I", version) + counts + b"".join(metadata) + b"".join(infos)
    return head.ljust(-(-len(head) // alignment) * alignment, b"\0") + data


@pytest.fixture
def write(tmp_path):
    def write(content: bytes):
        (tmp_path / "x.gguf").write_bytes(content)
        return tmp_path / "x.gguf"

    return write


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("padding", [0, 20])  # writers differ in whether they fill up the last tensor
def test_read(write, version, padding):
    found = read_gguf(write(made(version=version) + b"\0" * padding))
    assert found.metadata == {"general.architecture": "none"} and list(found.tensors) == ["blocks", "vector"]
    blocks = found.tensors["blocks"]
    assert (blocks.kind.name, blocks.shape, blocks.nbytes) == ("Q8_0", (2, 32), 68)
    assert blocks.raw().tobytes() == Q8_0
    assert blocks.read().shape == (32, 2)
    assert found.tensors["vector"].read().tolist() == [0, 1, 2]


def test_rows_in_another_order(write):
    found = read_gguf(write(made()))
    order = np.array([1, 0])
    straight = np.asarray(ej.materialize(found.tensors["blocks"].read()))
    np.testing.assert_array_equal(ej.materialize(found.tensors["blocks"].read(rows=order)), straight[:, order])
    assert found.tensors["vector"].read(rows=np.array([2, 0, 1])).tolist() == [2, 0, 1]


def test_every_type_of_value(write):
    numbers = [
        (0, "B", 255),
        (1, "b", -128),
        (2, "H", 65535),
        (3, "h", -32768),
        (4, "I", 2**32 - 1),
        (5, "i", -(2**31)),
        (6, "f", 0.5),
        (7, "?", True),
        (10, "Q", 2**64 - 1),
        (11, "q", -(2**63)),
        (12, "d", 1e300),
    ]
    metadata = [pair(f"n{kind}", kind, struct.pack(f"<{code}", value)) for kind, code, value in numbers]
    for kind, code, value in numbers:
        array = struct.pack(f"<IQ2{code}", kind, 2, value, value)
        metadata.append(pair(f"a{kind}", 9, array))
    metadata += [pair("s", 8, text("naïve")), pair("t", 9, struct.pack("<IQ", 8, 2) + text("a") + text(""))]
    metadata.append(pair("e", 9, struct.pack("<IQ", 4, 0)))
    found = read_gguf(write(made(metadata=metadata))).metadata
    for kind, _, value in numbers:
        assert found[f"n{kind}"] == value and type(found[f"n{kind}"]) is type(value)
        assert found[f"a{kind}"].tolist() == [value, value]
    assert found["s"] == "naïve" and found["t"] == ["a", ""] and found["e"].size == 0


def test_another_alignment(write):
    aligned = pair("general.alignment", 4, struct.pack("<I", 64))
    infos = [INFOS[0], info("vector", (3,), 0, 128)]
    content = made(metadata=[aligned], infos=infos, data=Q8_0.ljust(128, b"\0") + F32, alignment=64)
    assert read_gguf(write(content)).tensors["vector"].read().tolist() == [0, 1, 2]


def test_written_is_what_hands_make(tmp_path):
    """The same bytes as put together by hand, last tensor filled up."""
    tensors = {
        "blocks": NewTensor(kind=BY_NAME["Q8_0"], shape=(2, 32), data=lambda: np.frombuffer(Q8_0, np.uint8)),
        "vector": NewTensor(kind=BY_NAME["F32"], shape=(3,), data=lambda: np.frombuffer(F32, np.float32)),
    }
    write_gguf(tmp_path / "y.gguf", {"general.architecture": "none"}, tensors)
    assert (tmp_path / "y.gguf").read_bytes() == made() + b"\0" * 20
    assert [file.name for file in tmp_path.iterdir()] == ["y.gguf"]


def test_written_metadata_is_read_back(tmp_path):
    metadata = {
        "u": 7,
        "i": -7,
        "large": 2**40,
        "least": -(2**40),
        "f": 0.25,
        "yes": True,
        "s": "naïve",
        "list": ["a", "b"],
        "small": np.uint16(3),
        "array": np.array([1, -1], np.int32),
    }
    write_gguf(tmp_path / "y.gguf", metadata, {})
    found = read_gguf(tmp_path / "y.gguf").metadata
    assert found.pop("array").tolist() == [1, -1] and metadata.pop("array") is not None
    assert found == metadata


def test_refused_when_writing(tmp_path):
    target = tmp_path / "y.gguf"
    tensor = NewTensor(kind=BY_NAME["F32"], shape=(3,), data=lambda: np.zeros(2, np.float32))
    for metadata, tensors, message in [
        ({"k": object()}, {}, "metadata 'k' is a object, which GGUF has no type for"),
        ({"k": np.zeros((2, 2), np.int32)}, {}, "metadata 'k' is a ndarray, which GGUF has no type for"),
        ({"k": 2**65}, {}, "metadata 'k' is 36893488147419103232, beyond 64 bits"),
        ({}, {"../x": tensor}, r"the tensor name '../x' is no name of 1 to 64 bytes"),
        ({}, {"x": tensor}, "x has 8 bytes, its shape and type take 12"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            write_gguf(target, metadata, tensors)
        assert list(tmp_path.iterdir()) == []
    target.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="y.gguf exists already; choose another name, or overwrite it"):
        write_gguf(target, {}, {})
    assert target.read_bytes() == b"mine"
    write_gguf(target, {}, {}, overwrite=True)
    assert read_gguf(target).tensors == {}
    with pytest.raises(CheckpointError, match="z.gguf cannot be made: its parent directory does not exist"):
        write_gguf(tmp_path / "absent" / "z.gguf", {}, {})


DAMAGE = {
    "no file type": (made(magic=b"GGML"), "does not begin with 'GGUF'"),
    "empty": (b"", "does not begin with 'GGUF'"),
    "version 1": (made(version=1), "has GGUF version 1, which is not read"),
    "big-endian": (
        made(version=3 << 24),
        "has GGUF version 50331648, which is not read .it was written for a big",
    ),
    "only a magic": (b"GGUF", "the version takes 4 bytes where 0 are left; the file is truncated"),
    "tensor count": (made(tensors=HUGE), f"the description of {HUGE} tensors takes {33 * HUGE} bytes where"),
    "largest tensor count": (made(tensors=2**64 - 1), "the description of 18446744073709551615 tensors takes"),
    "metadata count": (made(pairs=HUGE), f"metadata of {HUGE} entries takes {14 * HUGE} bytes where"),
    "key length": (made(metadata=[struct.pack("<Q", HUGE) + b"key"]), f"metadata key 0 takes {HUGE} bytes where"),
    "key not UTF-8": (made(metadata=[pair(b"\xff", 4, bytes(4))]), "metadata key 0 is not UTF-8"),
    "empty key": (made(metadata=[pair("", 4, bytes(4))]), "metadata key 0 is ''"),
    "control characters": (made(metadata=[pair("a\n", 4, bytes(4))]), r"metadata key 0 is 'a\\n'"),
    "key twice": (made(metadata=[ARCHITECTURE] * 2), "the metadata has 'general.architecture' more than once"),
    "value type": (made(metadata=[pair("k", 13, bytes(8))]), "the value of 'k' has type 13, known are 0 to 12"),
    "truth value": (made(metadata=[pair("k", 7, b"\2")]), "the value of 'k' is a truth value that is neither 0 nor 1"),
    "string length": (made(metadata=[pair("k", 8, struct.pack("<Q", HUGE))]), f"the value of 'k' takes {HUGE} bytes"),
    "array count": (
        made(metadata=[pair("k", 9, struct.pack("<IQ", 10, HUGE))]),
        f"the value of 'k' takes {8 * HUGE} bytes where",
    ),
    "strings count": (
        made(metadata=[pair("k", 9, struct.pack("<IQ", 8, HUGE))]),
        f"the value of 'k' takes {8 * HUGE} bytes where",
    ),
    "nested arrays": (
        made(metadata=[pair("k", 9, struct.pack("<IQ", 9, 1) * 2)]),
        "the value of 'k' is an array of",
    ),
    "alignment": (
        made(metadata=[pair("general.alignment", 4, struct.pack("<I", 24))]),
        "general.alignment is 24, not a power of two",
    ),
    "alignment 0": (made(metadata=[pair("general.alignment", 4, bytes(4))]), "general.alignment is 0, not a power"),
    "alignment of text": (made(metadata=[pair("general.alignment", 8, text("a"))]), "general.alignment is 'a', not a"),
    "name upwards": (
        made(infos=[info("../x", (32, 2), 8, 0), INFOS[1]]),
        r"tensor 0 is called '../x'; a name has",
    ),
    "name from the root": (made(infos=[info("/x", (32, 2), 8, 0), INFOS[1]]), "tensor 0 is called '/x'"),
    "name with another slash": (made(infos=[info("a\\..\\x", (32, 2), 8, 0), INFOS[1]]), "tensor 0 is called"),
    "no name": (made(infos=[info("", (32, 2), 8, 0), INFOS[1]]), "tensor 0 is called ''"),
    "long name": (made(infos=[info("x" * 65, (32, 2), 8, 0), INFOS[1]]), "tensor 0 is called 'xxx"),
    "name twice": (made(infos=[INFOS[0], info("blocks", (3,), 0, 96)]), "the tensor blocks is there more than once"),
    "no dimensions": (made(infos=[info("x", (), 0, 0)]), "x has 0 dimensions, 1 to 4 are possible"),
    "dimensions": (made(infos=[text("x") + struct.pack("<I", 2**32 - 1) + bytes(64)]), "x has 4294967295 dimensions"),
    "sizes": (
        made(infos=[info("x", (HUGE, HUGE), 8, 0)]),
        rf"x of Q8_0 \[{HUGE}, {HUGE}\] ends at byte .* but",
    ),
    "size 0": (made(infos=[info("x", (32, 0), 8, 0)]), r"x of Q8_0 has shape \[0, 32\]; its rows must be whole blocks"),
    "cut blocks": (made(infos=[info("x", (33, 2), 8, 0)]), r"x of Q8_0 has shape \[2, 33\]; .* whole blocks of 32"),
    "tensor type": (made(infos=[info("x", (32, 2), 99, 0)]), "x has tensor type 99, which is not known"),
    "removed type": (made(infos=[info("x", (32, 2), 4, 0)]), "x has tensor type 4, which is not known"),
    "huge offset": (
        made(infos=[INFOS[0], info("vector", (3,), 0, HUGE)]),
        f"vector starts at byte {HUGE} of the",
    ),
    "shifted": (made(infos=[INFOS[0], info("vector", (3,), 0, 128)]), "vector starts at byte 128 of the data where"),
    "overlapping": (
        made(infos=[INFOS[0], info("vector", (3,), 0, 64)]),
        "vector starts at byte 64 of the data where",
    ),
    "on one another": (
        made(infos=[INFOS[0], info("vector", (3,), 0, 0)]),
        "(blocks|vector) starts at byte 0",
    ),
    "unaligned": (
        made(infos=[INFOS[0], info("vector", (3,), 0, 68)]),
        "vector starts at byte 68 .* no multiple",
    ),
    "truncated": (made()[:-1], r"vector of F32 \[3\] ends at byte \d+ but the file has \d+; it is truncated"),
    "trailing bytes": (made() + bytes(32), "32 bytes too many behind the last tensor"),
    "data of no tensor": (made(infos=[]), "108 bytes of data but no tensor"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused(write, what):
    content, message = DAMAGE[what]
    with pytest.raises(CheckpointError, match=f"x.gguf: {message}"):
        read_gguf(write(content))


def test_absent_and_shrinking_files(write, tmp_path):
    with pytest.raises(CheckpointError, match="absent.gguf: cannot be read .No such file"):
        read_gguf(tmp_path / "absent.gguf")
    file = write(made())
    found = read_gguf(file)
    file.write_bytes(made()[:-8])
    with pytest.raises(CheckpointError, match="x.gguf: became shorter while it was read"):
        found.tensors["vector"].read()


def test_scale_that_is_not_finite(write):
    damaged = bytearray(Q8_0)
    damaged[34:36] = b"\x00\x7c"
    file = write(made(data=bytes(damaged).ljust(96, b"\0") + F32))
    with pytest.raises(CheckpointError, match="x.gguf: blocks has scales that are NaN or infinite, the first in row 1"):
        read_gguf(file).tensors["blocks"].read()


@given(data=st.data())
@settings(max_examples=150)
def test_any_edit_is_refused_or_harmless(tmp_path_factory, data):
    """Bytes changed, put in, taken out or the end cut off: a CheckpointError, or finite tensors of the right size."""
    file = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    extra = [pair("a", 9, struct.pack("<IQ", 8, 1) + text("b")), pair("c", 6, bytes(4))]
    raw = bytearray(made(metadata=[ARCHITECTURE, *extra]))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        edit = data.draw(st.sampled_from(["change", "number", "insert", "delete", "cut"]))
        if edit == "change":
            raw[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
        elif edit == "number":
            raw[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from([0, 1, 32, HUGE, 2**63, 2**64 - 1])))
        elif edit == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=40))
        elif edit == "delete":
            del raw[at : at + data.draw(st.integers(1, 40))]
        else:
            del raw[at:]
    file.write_bytes(raw)
    try:
        tensors = read_gguf(file).tensors
        leaves = {name: tensor.read() for name, tensor in tensors.items()}
    except CheckpointError as error:
        assert "fuzz.gguf" in str(error)
        return
    for name, leaf in leaves.items():
        dense = np.asarray(ej.materialize(leaf))
        assert dense.size == np.prod(tensors[name].shape) and (dense.dtype.kind in "iu" or np.isfinite(dense).all())
