"""Batches: the same order on any number of hosts, every example once an epoch, going on in its middle, files."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from effjax.errors import ConfigError
from train.input import ArrayExamples, ArrayRecordExamples, Batches, open_examples, permute, write_array_record
from train.sharding import BATCH_AXES, make_mesh, process_rows


def across(mesh="data=1"):
    return NamedSharding(make_mesh(mesh), P(BATCH_AXES))


def numbered(count):
    return ArrayExamples({"id": np.arange(count), "x": np.arange(count, dtype=np.float32)[:, None] / 2})


@settings(max_examples=25)
@given(
    count=st.integers(1, 23),
    per_host=st.integers(1, 4),
    hosts=st.integers(1, 4),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_hosts_together_read_what_one_reads_and_an_epoch_has_every_example_once(count, per_host, hosts, seed, shuffle):
    batch = per_host * hosts
    batches = Batches(examples=numbered(count), batch=batch, seed=seed, shuffle=shuffle)
    seen = []
    for step in range(-(-3 * count // batch)):
        whole = batches.read(step, slice(0, batch))
        parts = [batches.read(step, slice(h * per_host, (h + 1) * per_host)) for h in range(hosts)]
        np.testing.assert_array_equal(whole["id"], np.concatenate([part["id"] for part in parts]))
        np.testing.assert_array_equal(whole["x"][:, 0], whole["id"] / 2)
        seen += whole["id"].tolist()
    epochs = [seen[i * count : (i + 1) * count] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    if count > 10:
        assert (epochs[0] != epochs[1]) == shuffle
        other = Batches(examples=numbered(count), batch=count, seed=seed + 1, shuffle=shuffle)
        assert (other.read(0, slice(0, count))["id"].tolist() != epochs[0]) == shuffle


@pytest.mark.parametrize("threads", [0, 2])
def test_an_iterator_goes_on_in_the_middle_of_an_epoch_on_another_mesh(threads):
    rng = {}

    def noisy(example, generator):
        rng[int(example["id"])] = generator
        return {**example, "x": example["x"] + generator.normal(size=1).astype(np.float32)}

    batches = Batches(examples=numbered(13), batch=4, seed=1, transform=noisy, threads=threads)
    iterator = batches.open(across())
    taken = [next(iterator) for _ in range(2)]
    state = iterator.get_state()
    later = [next(iterator) for _ in range(3)]
    again = batches.open(across("data=4"))
    again.set_state(state)
    for a, b in zip(later, (next(again) for _ in range(3)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert len({tuple(batch["id"]) for batch in taken + later}) == 5
    assert len({float(x) for batch in taken + later for x in (batch["x"][:, 0] - batch["id"] / 2)}) == 20


def test_every_permutation_is_as_likely():
    drawn = [tuple(permute(np.arange(3), 3, (seed, 5)).tolist()) for seed in range(1200)]
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and ((counts - 200) ** 2 / 200).sum() < 20.5  # chi squared, 5 degrees, 1 in 1000


def test_epochs_end():
    batches = Batches(examples=numbered(5), batch=2, epochs=3, shuffle=False)
    assert [batch["id"].tolist() for batch in iter(batches.open(across()))] == [
        [0, 1], [2, 3], [4, 0], [1, 2], [3, 4], [0, 1], [2, 3],
    ]  # fmt: skip


def test_array_record_files_are_read_as_one_collection(tmp_path):
    examples = [{"tokens": np.arange(i, i + 3, dtype=np.int32), "weight": np.float32(i)} for i in range(7)]
    assert write_array_record(tmp_path / "part-0.array_record", examples[:4]) == 4
    assert write_array_record(tmp_path / "part-1.array_record", iter(examples[4:])) == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["part-0.array_record", "part-1.array_record"]
    found = open_examples(str(tmp_path / "part-*.array_record"))
    assert len(found) == 7
    batch = next(Batches(examples=found, batch=7, shuffle=False).open(across()))
    np.testing.assert_array_equal(batch["tokens"], [example["tokens"] for example in examples])
    np.testing.assert_array_equal(batch["weight"], np.arange(7, dtype=np.float32))


def test_arrays_of_a_file_by_name(tmp_path):
    np.savez(tmp_path / "some.npz", x=np.arange(6).reshape(3, 2), y=np.arange(3))
    found = open_examples(str(tmp_path / "some.npz"))
    assert len(found) == 3 and found[1]["x"].tolist() == [2, 3]


def test_the_rows_of_a_process_are_those_of_its_devices():
    np.testing.assert_array_equal(process_rows(across("data=4,fsdp=2"), 24), np.arange(24))
    with pytest.raises(ConfigError, match="a batch of 12 rows does not divide over data=4,fsdp=2,tensor=1"):
        process_rows(across("data=4,fsdp=2"), 12)


def wrong_record(folder):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(folder / "x.array_record"), "group_size:1")
    writer.write(b"something else")
    writer.close()
    return ArrayRecordExamples([folder / "x.array_record"])[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: Batches(examples=numbered(3), batch=0), "batch=0 of 3 examples, threads=2: give at least"),
        (lambda folder: ArrayExamples({"x": np.ones(3), "y": np.ones(4)}), r"leading axes of \[3, 4\]"),
        (lambda folder: ArrayRecordExamples([]), "no array_record files: name some that exist"),
        (lambda folder: open_examples(str(folder / "none*.array_record")), "no such files; name an .npz"),
        (lambda folder: open_examples(str(folder / "none.npz")), "none.npz: cannot be read as arrays"),
        (lambda folder: open_examples("tfds:mnist/train"), "pip install tensorflow-datasets importlib_resources"),
        (wrong_record, "record 0 of .*x.array_record: is not an example of write_array_record"),
    ],
)
def test_what_cannot_be_read_is_named(make, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path)
