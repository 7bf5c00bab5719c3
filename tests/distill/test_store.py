"""The store of a teacher's outputs: what comes back, going on after a kill, and damage that is named."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.distill import StoreConfig, kl_divergence, open_store, top_k_divergence, write_store
from effjax.errors import CheckpointError, ConfigError

LABELS = 19
TABLE = np.random.default_rng(0).normal(size=(LABELS, LABELS)).astype(np.float32) * 3
WINDOWS = np.random.default_rng(1).integers(0, LABELS, (11, 5)).astype(np.int32)


def bigram(tokens):
    return jnp.asarray(TABLE)[tokens]


def write(directory, apply=bigram, windows=WINDOWS, teacher="bigram", progress=None, **options):
    config = StoreConfig(**{"k": 4, "shard_rows": 3, "temperature": 2.0} | options)
    return write_store(directory, apply, windows, config, teacher=teacher, batch=2, progress=progress)


@pytest.mark.parametrize(("dtype", "rtol"), [("float16", 1e-3), ("float32", 1e-6)])
def test_what_comes_back(tmp_path, dtype, rtol):
    seen = []
    store = write(tmp_path / "store", dtype=dtype, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 11), (6, 11), (9, 11), (11, 11)]
    ids = np.array([10, 0, 4, 4])
    top = open_store(tmp_path / "store").rows(ids)
    assert top.temperature == 2.0 and top.log_probs.dtype == dtype and top.labels.shape == (4, 5, 4)
    z = TABLE[WINDOWS[ids]].astype(np.float64) / 2.0
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    best = np.argsort(-log_p)[..., :4]
    np.testing.assert_array_equal(top.labels, best)
    head = np.take_along_axis(log_p, best, -1)
    np.testing.assert_allclose(top.log_probs, head, rtol=rtol)
    np.testing.assert_allclose(top.tail, np.log(1 - np.exp(head).sum(-1)), rtol=rtol)
    assert store.shards[0]["labels"].dtype == np.uint16


def test_a_store_of_all_labels_is_the_teacher(tmp_path):
    store = write(tmp_path / "store", k=LABELS, dtype="float32")
    student = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, LABELS)), jnp.float32)
    ids = np.array([7, 2])
    wanted = kl_divergence(bigram(WINDOWS[ids]), student, temperature=2.0)
    np.testing.assert_allclose(top_k_divergence(store.rows(ids), student), wanted, rtol=1e-4)


class Killed(BaseException):
    pass


def test_goes_on_after_a_kill_with_the_same_bytes(tmp_path):
    write(tmp_path / "whole")
    calls = []

    def dying(tokens):
        calls.append(len(tokens))
        if len(calls) == 5:  # one is the shape, two a shard: in the middle of the third
            raise Killed
        return bigram(tokens)

    with pytest.raises(Killed):
        write(tmp_path / "store", dying)
    with pytest.raises(CheckpointError, match=r"store: shard-0000\d.safetensors is missing, \d of 4 shards are"):
        open_store(tmp_path / "store")
    again = []

    def counting(tokens):
        again.append(len(tokens))
        return bigram(tokens)

    write(tmp_path / "store", counting)
    assert len(calls) + len(again) < 2 * (1 + 4 * 2)  # finished shards are not made again
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert sorted(file.name for file in (tmp_path / "store").iterdir()) == names and len(names) == 5
    for name in names:
        assert (tmp_path / "store" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def damaged(file, how):
    data = bytearray(file.read_bytes())
    if how == "byte":
        data[-3] ^= 1
    elif how == "short":
        data = data[:-10]
    elif how == "empty":
        data = b""
    elif how == "header":
        data[12] ^= 255
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["byte", "short", "empty", "header"])
def test_damage_is_named_and_mended(tmp_path, how):
    write(tmp_path / "store")
    file = tmp_path / "store" / "shard-00002.safetensors"
    before = file.read_bytes()
    damaged(file, how)
    message = r"store/shard-00002.safetensors: is damaged \(.*\); delete it and write the store again"
    with pytest.raises(CheckpointError, match=message):
        open_store(tmp_path / "store")
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "store")
    file.unlink()
    write(tmp_path / "store")
    assert file.read_bytes() == before


def test_shards_of_other_stores_are_refused(tmp_path):
    write(tmp_path / "store")
    write(tmp_path / "other", windows=WINDOWS[::-1])
    shards = [tmp_path / "store" / f"shard-0000{i}.safetensors" for i in range(2)]
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match="store/shard-00001.safetensors: belongs to another store"):
        open_store(tmp_path / "store")
    shards[1].write_bytes((tmp_path / "other" / shards[1].name).read_bytes())
    with pytest.raises(CheckpointError, match="store/shard-00001.safetensors: belongs to another store"):
        open_store(tmp_path / "store")


def test_what_does_not_fit(tmp_path):
    store = write(tmp_path / "store")
    store.check_windows(WINDOWS)
    with pytest.raises(CheckpointError, match="store: was made of 11 other windows of 5 tokens than these 10"):
        store.check_windows(WINDOWS[1:])
    for changes, what in (
        ({"teacher": "other"}, "teacher='bigram', not 'other'"),
        ({"k": 5}, "k=4, not 5"),
        ({"temperature": 1.0}, "temperature=2.0, not 1.0"),
        ({"windows": WINDOWS[:9]}, "windows=11, not 9"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(f"store: holds a store of {what}: name another")):
            write(tmp_path / "store", **changes)
    with pytest.raises(ConfigError, match="k=20: bigram has 19 labels"):
        write(tmp_path / "wide", k=20)
    assert not (tmp_path / "wide").exists()
    with pytest.raises(CheckpointError, match="shard-00000.safetensors: broken gave outputs that are not finite"):
        write(tmp_path / "broken", lambda tokens: bigram(tokens) * jnp.nan, teacher="broken")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="full: is not empty and holds no store"):
        write(tmp_path / "full")
    with pytest.raises(CheckpointError, match="full: has no store.json, so it is no store"):
        open_store(tmp_path / "full")
    (tmp_path / "store" / "store.json").write_text("{")
    with pytest.raises(CheckpointError, match="store/store.json: is damaged"):
        open_store(tmp_path / "store")
    (tmp_path / "store" / "store.json").write_text(json.dumps({"format": "x"}))
    with pytest.raises(CheckpointError, match="store/store.json: is not of this format"):
        open_store(tmp_path / "store")
    for changes, message in (({"dtype": "int8"}, "dtype='int8': choose"), ({"k": 0}, "must be positive")):
        with pytest.raises(ConfigError, match=message):
            StoreConfig(**changes)
