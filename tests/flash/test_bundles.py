"""Bundles and their files: every bit comes back, codes are close, and a damaged file says so."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import CheckpointError, LeafError
from effjax.flash import (
    FeedForward,
    Layout,
    bundle_ffn,
    ffn_prefix,
    load_layer,
    open_bundles,
    unbundle,
    verify_bundles,
    write_bundles,
)
from effjax.flash.bundles import BITS, DTYPES

FLOATS, CODES = ("float32", "float16", "bfloat16"), ("int8", "int4")


def random_ffn(rng, d, neurons, *, gated, biases=True):
    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    vectors = {"up_bias": draw(neurons), "down_bias": draw(d)} if biases else {}
    if gated:
        vectors |= {"gate": draw(d, neurons)} | ({"gate_bias": draw(neurons)} if biases else {})
    return FeedForward(up=draw(d, neurons), down=draw(neurons, d), **vectors)


@settings(max_examples=25, deadline=None)
@given(
    d=st.integers(1, 70),
    neurons=st.integers(1, 9),
    gated=st.booleans(),
    kind=st.sampled_from(FLOATS),
    block=st.sampled_from([1, 64, 512, 4096]),
)
def test_rows_hold_the_columns_and_rows_of_the_matrices_bit_for_bit(d, neurons, gated, kind, block):
    ffn = random_ffn(np.random.default_rng(d), d, neurons, gated=gated)
    layout = Layout(width=d, gated=gated, kind=kind, block=block)
    rows, scales = bundle_ffn(ffn, layout)
    assert scales is None and rows.shape == (neurons, layout.stride) and layout.stride % block == 0
    for i in range(neurons):
        parts = [m[:, i] for m in (ffn.gate, ffn.up) if m is not None] + [ffn.down[i]]
        expected = b"".join(np.ascontiguousarray(p, DTYPES[kind]).tobytes() for p in parts)
        assert rows[i].tobytes() == expected.ljust(layout.stride, b"\0")


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("d", [1, 31, 32, 50, 96])
def test_codes_are_within_half_a_step(kind, d):
    ffn = random_ffn(np.random.default_rng(d), d, 7, gated=True)
    ffn.down[2] = 0  # a part of zeros
    layout = Layout(width=d, gated=True, kind=kind)
    rows, scales = bundle_ffn(ffn, layout)
    parts = unbundle(rows, layout, scales)
    most = 2 ** (BITS[kind] - 1) - 1
    for name, exact in (("gate", ffn.gate.T), ("up", ffn.up.T), ("down", ffn.down)):
        step = np.abs(exact).max(1, keepdims=True) / most
        assert parts[name].shape == exact.shape
        assert (np.abs(parts[name] - exact) <= 0.5001 * step).all()
    assert (parts["down"][2] == 0).all() and scales[2, 2] == 1


def test_a_layer_that_does_not_fit_is_refused():
    with pytest.raises(LeafError, match=r"up \[4, 6\], down \[6, 5\] do not fit: up and gate are \[d, neurons\]"):
        FeedForward(up=np.ones((4, 6)), down=np.ones((6, 5)))
    with pytest.raises(LeafError, match=r"FeedForward: up \[4\], down"):
        FeedForward(up=np.ones(4), down=np.ones((6, 5)))
    ffn = FeedForward(up=np.full((4, 6), np.inf), down=np.ones((6, 4)))
    with pytest.raises(LeafError, match=r"up \[6, 4\] holds numbers that are not finite"):
        bundle_ffn(ffn, Layout(width=4, gated=False))
    with pytest.raises(LeafError, match="for a layer of width 4 with no gate"):
        bundle_ffn(ffn, Layout(width=4, gated=True))
    with pytest.raises(LeafError, match="kind='int2': choose one of float32"):
        Layout(width=4, gated=True, kind="int2")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [*FLOATS, *CODES])
@pytest.mark.parametrize("gated", [False, True])
def test_a_file_gives_back_what_was_written(tmp_path, kind, gated):
    rng = np.random.default_rng(0)
    layers = [random_ffn(rng, 33, 11, gated=gated, biases=i > 0) for i in range(3)]
    written = write_bundles(tmp_path / "model.flash", layers, kind=kind, block=64)
    file = open_bundles(tmp_path / "model.flash")
    assert file.layout == written.layout == Layout(width=33, gated=gated, kind=kind, block=64)
    assert file.rows_at % 4096 == 0 and file.path.stat().st_size % 4096 == 0
    assert verify_bundles(file.path) == []
    for i, ffn in enumerate(layers):
        rows, scales = bundle_ffn(ffn, file.layout)
        expected = unbundle(rows, file.layout, scales)
        found = load_layer(file, i)
        np.testing.assert_array_equal(found.up, expected["up"].T)
        np.testing.assert_array_equal(found.down, expected["down"])
        for name in ("up_bias", "down_bias"):
            exact = getattr(ffn, name)
            np.testing.assert_array_equal(getattr(found, name), 0 if exact is None else exact)
        if gated:
            np.testing.assert_array_equal(found.gate, expected["gate"].T)
            np.testing.assert_array_equal(found.gate_bias, 0 if ffn.gate_bias is None else ffn.gate_bias)
    with pytest.raises(IndexError, match="layer 3 of 3"):
        load_layer(file, 3)


def damage(name, content, file):
    middle = file.rows_at + 5
    return {
        "empty": b"",
        "short": content[:20],
        "other": b"GGUF" + content[4:],
        "version": content[:8] + b"\2" + content[9:],
        "header": content[:60] + b"X" + content[61:],
        "header cut": content[:100],
        "biases": content[:4100] + b"X" + content[4101:],
        "cut": content[:-4096],
        "longer": content + b"\0",
        "rows": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "is no file of bundles"),
        ("short", "is no file of bundles"),
        ("other", "is no file of bundles"),
        ("version", "has version 2 and this effjax reads 1; update effjax"),
        ("header", "its header is damaged"),
        ("header cut", "its header is damaged"),
        ("biases", "its biases or scales are damaged"),
        ("cut", r"has 8,192 bytes and should have 12,288"),
        ("longer", r"has 12,289 bytes and should have 12,288"),
    ],
)
def test_a_damaged_file_is_told(tmp_path, name, message):
    file = write_bundles(tmp_path / "a.flash", [random_ffn(np.random.default_rng(0), 8, 5, gated=False)], block=1)
    content = file.path.read_bytes()
    assert len(content) == 12288
    bad = tmp_path / "bad.flash"
    bad.write_bytes(damage(name, content, file))
    with pytest.raises(CheckpointError, match=message) as error:
        open_bundles(bad)
    assert str(bad) in str(error.value)
    assert name == "version" or "write it again with write_bundles, or copy it again" in str(error.value)


def test_damaged_rows_are_found_by_their_layer(tmp_path):
    rng = np.random.default_rng(0)
    file = write_bundles(tmp_path / "a.flash", [random_ffn(rng, 8, 5, gated=False) for _ in range(2)])
    file.path.write_bytes(damage("rows", file.path.read_bytes(), file))
    assert verify_bundles(file.path) == [0]
    assert len({*file.digests}) == 2 and all(len(d) == hashlib.sha256().digest_size * 2 for d in file.digests)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    rng = np.random.default_rng(0)
    good, other = random_ffn(rng, 8, 5, gated=False), random_ffn(rng, 8, 6, gated=False)
    with pytest.raises(LeafError, match=r"layer 1 has up \[8, 6\] and no gate .* whose up is \[8, 5\]"):
        write_bundles(tmp_path / "a.flash", [good, other])
    assert list(tmp_path.iterdir()) == []
    write_bundles(tmp_path / "a.flash", [good])
    with pytest.raises(CheckpointError, match="exists already"):
        write_bundles(tmp_path / "a.flash", [good])
    write_bundles(tmp_path / "a.flash", [other], overwrite=True)
    assert open_bundles(tmp_path / "a.flash").neurons == 6
    with pytest.raises(LeafError, match="no layer"):
        write_bundles(tmp_path / "b.flash", [])
    with pytest.raises(CheckpointError, match=r"none.flash cannot be read \(No such file or directory\)"):
        open_bundles(tmp_path / "none.flash")


def test_the_order_of_neurons_does_not_matter():
    rng = np.random.default_rng(0)
    ffn = random_ffn(rng, 20, 30, gated=True)
    layout = Layout(width=20, gated=True)
    rows, _ = bundle_ffn(ffn, layout)
    biases = np.stack([ffn.gate_bias, ffn.up_bias])
    x, order = rng.standard_normal(20).astype(np.float32), rng.permutation(30)
    whole = ffn_prefix(x, rows, 30, layout, biases)
    shuffled = ffn_prefix(x, rows[order], 30, layout, np.ascontiguousarray(biases[:, order]))
    expected = (np.maximum(x @ ffn.gate + ffn.gate_bias, 0) * (x @ ffn.up + ffn.up_bias)) @ ffn.down
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(shuffled, expected, rtol=1e-4, atol=1e-4)
