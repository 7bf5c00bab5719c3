"""Plans of image sizes: the published tables, whole epochs, resume, equal shapes on all hosts, costs, curricula."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data import MultiScale, Shape, growing_range, of_host, relative_cost, stepped_range
from effjax.errors import ConfigError

SMALL = MultiScale(base=(28, 28), batch=128, low=16, high=40, divisor=4)


def test_tables_are_the_published_ones():
    def table(**options):
        return {s.height: s.batch for s in MultiScale(base=(224, 224), batch=256, **options).table()}

    assert table(low=128, high=320) == {128: 784, 192: 348, 224: 256, 288: 154, 320: 125}
    assert table(low=160, high=320) == {160: 501, 192: 348, 224: 256, 256: 196, 288: 154, 320: 125}
    assert table(low=128, high=320, scales=1) == {128: 784, 224: 256}
    assert set(table(low=128, high=320, kind="msc_fbs").values()) == {256}
    assert table(low=128, high=320, kind="ssc_fbs") == {224: 256}
    assert {s.height: s.batch for s in SMALL.table()} == {16: 392, 24: 174, 28: 128, 36: 77, 40: 62}


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 30), st.integers(0, 60), st.integers(1, 7), st.integers(1, 6)
)
def test_shapes_divide_and_keep_the_pixels(height, width, low, range_, scales, devices):
    base, batch = (4 * height, 4 * width), 24 * devices
    sampler = MultiScale(base=base, batch=batch, low=low, high=low + range_, scales=scales, divisor=4, devices=devices)
    table = sampler.table()
    assert len(table) <= scales + 1 and Shape(*base, batch) in table
    for shape in table:
        assert shape.height % 4 == 0 and shape.width % 4 == 0 and shape.batch % devices == 0 and shape.batch > 0
        if shape.batch > devices:
            assert shape.pixels <= base[0] * base[1] * batch * 1.001
        assert min(0.9 * low, base[0]) <= shape.height <= max(low + range_ + 4, base[0])
    for small, large in itertools.pairwise(table):
        assert small.height < large.height and small.batch >= large.batch


@pytest.mark.parametrize("n", [1, 61, 1000])
def test_an_epoch_has_every_example_and_wraps_around_to_the_first(n):
    steps = list(SMALL.epoch(n, 3, seed=1))
    ids = np.concatenate([step.ids for step in steps])
    assert [len(step.ids) for step in steps] == [step.shape.batch for step in steps]
    np.testing.assert_array_equal(np.sort(ids[:n]), np.arange(n))
    np.testing.assert_array_equal(ids[n:], np.resize(ids[:n], len(ids) - n))
    assert len(ids) - n < 392


def test_plans_resume_and_are_alike_on_all_hosts():
    sampler = MultiScale(base=(28, 28), batch=128, low=16, high=40, divisor=4, devices=4)
    whole = list(sampler.epoch(3000, 2, seed=5))
    again = list(sampler.epoch(3000, 2, seed=5, start=6))
    assert [s.shape for s in again] == [s.shape for s in whole[6:]]
    for a, b in zip(again, whole[6:], strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
    for step in whole:
        parts = [of_host(step.ids, host, 4) for host in range(4)]
        np.testing.assert_array_equal(np.concatenate(parts), step.ids)
    others = list(sampler.epoch(3000, 3, seed=5)), list(sampler.epoch(3000, 2, seed=6))
    assert all([s.shape for s in other] != [s.shape for s in whole] for other in others)


def test_cost_is_the_published_formula_and_what_plans_cost():
    """1 / mean(R0^2 / R^2) for equal pixels; over 60 epochs the plans cost it within 1 %."""
    big = MultiScale(base=(224, 224), batch=256, low=128, high=320)
    sides = np.array([128, 192, 224, 288, 320])
    assert abs(relative_cost(big.table(), Shape(224, 224, 256)) - 1 / np.mean(224**2 / sides**2)) < 2e-3
    base = Shape(28, 28, 128)
    plans = [step.shape for epoch in range(60) for step in SMALL.epoch(20_000, epoch)]
    assert abs(relative_cost(plans, base) / relative_cost(SMALL.table(), base) - 1) < 0.01
    steps = len(plans) / 60 / (20_000 / 128)
    assert abs(steps / relative_cost(SMALL.table(), base) - 1) < 0.02
    assert relative_cost(MultiScale(kind="ssc_fbs").table(), Shape(224, 224, 256)) == 1


def test_few_programs_are_compiled():
    traced = []

    @jax.jit
    def step(images):
        traced.append(images.shape)
        return images.sum()

    for epoch in range(2):
        for planned in SMALL.epoch(2000, epoch):
            step(jnp.zeros((planned.shape.batch, planned.shape.height, planned.shape.width)))
    assert len(traced) == len(SMALL.table()) == 5


def test_curricula():
    assert growing_range(0.3, 10, 20, until=0.6) == (10, 15)
    assert growing_range(0.3, 10, 20, until=0.6, kind="cosine")[1] == pytest.approx(15)
    assert growing_range(0.15, 10, 20, until=0.6, kind="cosine")[1] == pytest.approx(10 + 10 * 0.146447, abs=1e-4)
    assert [stepped_range(e, 7, 9, at=(1, 3), factors=(0.5, 1.0)) for e in range(4)] == [
        (7, 9),
        (10, 18),
        (10, 18),
        (15, 36),
    ]
    grown = SMALL.table(growing_range(0.0, 16, 40))
    assert {s.height for s in grown} == {16, 28}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "vbs"}, "kind='vbs': choose 'ssc_fbs', 'msc_fbs' or 'msc_vbs'"),
        ({"base": (30, 28), "divisor": 4}, r"base=\(30, 28\): divisor=4 must divide it"),
        ({"batch": 10, "devices": 4}, "batch=10: devices=4 does not divide it; choose a multiple"),
        ({"low": 5, "high": 4}, "low not above high"),
    ],
)
def test_bad_settings(options, text):
    with pytest.raises(ConfigError, match=text):
        MultiScale(**{"base": (28, 28), "low": 16, "high": 40, "divisor": 4} | options)
    with pytest.raises(ConfigError, match="until=0, kind='linear': above 0 and up to 1"):
        growing_range(0.5, 1, 2, until=0)
