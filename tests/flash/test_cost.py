"""The cost model against counting and against a device whose times are known."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import ConfigError
from effjax.flash import (
    Device,
    FlashDecoder,
    Layout,
    apply_windowed,
    fit_device,
    independent_shares,
    io_table,
    largest_window,
    measure_device,
    most_resident,
    predict_reads,
    resident_params,
    used_shares,
    write_bundles,
)
from effjax.flash.model import feed_forwards
from tests.flash.small import OPT, make, predictors

PAPER = Device(bandwidth=6.1e9, half=3.88 * 8192)


def texts(rng, layers=2, tokens=60, neurons=50):
    """Neurons that fire in runs: each token keeps most of what the one before used."""
    active = rng.random((layers, tokens, neurons)) < 0.02
    for t in range(1, tokens):
        active[:, t] |= active[:, t - 1] & (rng.random((layers, neurons)) < 0.6)
    return active


def test_the_published_throughputs():
    assert PAPER.throughput(8192) == pytest.approx(1.25e9, rel=0.01)
    assert PAPER.throughput(16384) == pytest.approx(2.25e9, rel=0.09)  # as it is written, the fit gives 2.07
    assert PAPER.throughput(1e12) == pytest.approx(6.1e9, rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**7), st.integers(1, 10**9), st.integers(0, 10**6), st.floats(1.0, 4.0))
def test_more_bytes_and_smaller_rows_are_never_faster(requests, size, more, factor):
    seconds = PAPER.seconds(requests=requests, bytes=size)
    assert PAPER.seconds(requests=requests, bytes=size + more) >= seconds
    assert PAPER.seconds(requests=requests * factor, bytes=size) >= seconds
    assert PAPER.throughput(size * factor) >= PAPER.throughput(size)
    assert seconds == pytest.approx(size / PAPER.throughput(size / requests))


@settings(max_examples=20, deadline=None)
@given(st.floats(1e8, 1e10), st.floats(0, 1e5), st.floats(0, 1e-3))
def test_a_fit_finds_the_device(bandwidth, half, call):
    true = Device(bandwidth=bandwidth, half=half, call=call)
    requests = np.array([1, 8, 32, 128] * 3, float)
    size = requests * np.repeat([4096, 65536, 262144], 4)
    seconds = [true.seconds(requests=r, bytes=b, calls=1) for r, b in zip(requests, size, strict=True)]
    found = fit_device(requests, size, np.array(seconds))
    again = [found.seconds(requests=r, bytes=b, calls=1) for r, b in zip(requests, size, strict=True)]
    np.testing.assert_allclose(again, seconds, rtol=1e-3)
    assert found.bandwidth == pytest.approx(bandwidth, rel=0.01)


def test_bad_numbers_are_told():
    with pytest.raises(ConfigError, match="bandwidth must be positive"):
        Device(bandwidth=0, half=1)
    with pytest.raises(ConfigError, match="reading more took no longer"):
        fit_device(np.array([1.0, 2]), np.array([10.0, 20]), np.array([1.0, 0.1]))
    with pytest.raises(ConfigError, match="windows=4 of 3 tokens"):
        used_shares(np.zeros((1, 3, 2), bool), 4)


def test_shares_and_windows_by_counting():
    active = texts(np.random.default_rng(0))
    layers, tokens, neurons = active.shape
    rows = []
    for k, share in enumerate(used_shares(active, 6), start=1):
        unions = [active[:, t : t + k].any(1).mean() for t in range(tokens - k + 1)]
        assert share == pytest.approx(np.mean(unions))
        most = tuple(max(active[i, t : t + k].any(0).sum() for t in range(tokens - k + 1)) for i in range(layers))
        assert most_resident(active, k) == most
        rows.append(sum(most))
    for room in range(0, rows[-1], 3):
        assert largest_window(active, room, most=6) == sum(need <= room for need in rows)
    independent = np.random.default_rng(1).random((1, 20_000, 30)) < np.linspace(0, 0.3, 30)
    np.testing.assert_allclose(used_shares(independent, 5), independent_shares(independent, 5), atol=0.01)
    assert (used_shares(active, 6)[1:] < independent_shares(active, 6)[1:]).all()  # tokens in a row are alike


@pytest.mark.parametrize("block", [1, 4096])
def test_the_table_of_ideas(block):
    active, layout = texts(np.random.default_rng(0)), Layout(width=2048, gated=False, kind="float16")
    every = 2 * 50 * 2 * 4096
    table = io_table(active, layout, PAPER, window=5, other=0.5 * every, block=block)
    assert list(table) == ["naive", "hybrid", "predictor", "windowing", "bundling"]
    used = active.sum() / active.shape[1]
    new = np.mean([(active[:, t] & ~active[:, t - 5 : t].any(1)).sum() for t in range(5, 60)])
    assert table["naive"].bytes == 1.5 * every and table["hybrid"].bytes == table["naive"].bytes / 2
    assert table["predictor"].bytes == pytest.approx(used * 8192) and table["predictor"].requests == pytest.approx(
        2 * used
    )
    assert table["bundling"].bytes == pytest.approx(new * 8192, rel=0.1)
    assert table["windowing"].bytes == table["bundling"].bytes
    assert table["bundling"].requests == table["windowing"].requests / 2
    seconds = [row.seconds for row in table.values()]
    assert seconds == sorted(seconds, reverse=True)
    small = io_table(active, dataclasses.replace(layout, width=128), PAPER, window=5, other=0.0, block=block)
    assert small["bundling"].bytes == pytest.approx(table["bundling"].bytes / (16 if block == 1 else 2))


@pytest.mark.parametrize("block", [1, 512])
def test_reads_are_predicted_from_the_neurons(tmp_path, block):
    params, scores, seen = make(OPT), predictors(OPT), {}
    tokens = np.random.default_rng(0).integers(0, OPT.vocab_size, 30)
    apply_windowed(OPT, scores, 2, see=lambda i, q, p, h: seen.update({i: np.asarray(p[0])}))(
        {"params": params}, tokens[None]
    )
    file = write_bundles(tmp_path / "a.flash", feed_forwards(OPT, params), block=block)
    with FlashDecoder(OPT, resident_params(params), scores, file.path, budget=64 << 20, window=2, slots=30) as flash:
        for token in tokens:
            flash.step(int(token))
        trace, align = flash.trace[2:], flash.reader.align
    found = predict_reads(np.stack([seen[0], seen[1]]), file, PAPER, window=2, align=align)
    reads = [layer.reads for token in trace for layer in token]
    assert found.requests == pytest.approx(sum(r.requests for r in reads) / 28)
    assert found.bytes == pytest.approx(sum(r.bytes for r in reads) / 28, rel=1e-6 if block == 512 else 0.2)
    assert found.resident == sum(max(t[i].resident for t in trace) for i in range(2)) * file.layout.stride
    with pytest.raises(ConfigError, match="2 tokens tell nothing of a window of 2"):
        predict_reads(np.zeros((2, 2, 70), bool), file, PAPER, window=2)


def test_a_real_device_is_measured(tmp_path):
    path = tmp_path / "some.bin"
    path.write_bytes(np.random.default_rng(0).bytes(8 << 20))
    device = measure_device(path, chunks=(4096, 1 << 20), requests=(1, 4), repeats=15)
    assert 0 < device.throughput(4096) <= device.throughput(1 << 20) <= device.bandwidth
    with pytest.raises(ConfigError, match=r"has 8,388,608 bytes; 128 chunks of 65536 need twice"):
        measure_device(path)
