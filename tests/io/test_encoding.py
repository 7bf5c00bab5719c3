"""Trees as named arrays and a manifest: what comes back, and what is refused with which words."""

import json

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.errors import CheckpointError, LeafError
from effjax.io.encoding import decode, encode
from tests.common.cases import ARRAYS, assert_same_bytes, example

keys = st.text("abc._-0", min_size=1, max_size=4).filter(lambda key: key != "..")
leaves = st.sampled_from([np.float32(1), np.arange(3), example(ARRAYS[1]), example(ARRAYS[6]), example(ARRAYS[16])])
trees = st.recursive(leaves, lambda children: st.dictionaries(keys, children, min_size=1, max_size=3), max_leaves=6)


@given(st.dictionaries(keys, trees, min_size=1, max_size=3))
@settings(max_examples=60)
def test_decode_inverts_encode_or_encode_refuses(tree):
    """Any tree of dicts comes back whole, through JSON; one that could not is refused when it is written."""
    try:
        named, manifest = encode(tree)
    except LeafError as error:
        assert "reads as a field of the compressed leaf" in str(error)
        return
    restored = decode(named, json.loads(json.dumps(manifest)))
    assert_same_bytes(restored, tree)


@pytest.mark.parametrize("case", ARRAYS, ids=lambda case: case.name)
def test_every_lost_array_is_named(case):
    """Optional fields too: a lost zero point must not turn an asymmetric grid into a symmetric one."""
    named, manifest = encode({"mlp": {"kernel": example(case)}})
    for name in named:
        rest = {other: x for other, x in named.items() if other != name}
        with pytest.raises(CheckpointError, match=f"^{name} is missing: a [A-Za-z]+ leaf cannot be read without it$"):
            decode(rest, manifest)


@pytest.mark.parametrize("case", ARRAYS, ids=lambda case: case.name)
def test_every_lost_entry_is_named(case):
    _, manifest = encode({"w": example(case)})
    named, _ = encode({"w": example(case)})
    kind = type(example(case)).__name__
    for field in example(case).static_fields:
        entry = {key: value for key, value in manifest["w"].items() if key != field}
        with pytest.raises(CheckpointError, match=f"^w: the manifest lacks '{field}' of {kind}$"):
            decode(named, {"w": entry})


def test_foreign_entries():
    named, manifest = encode({"w": example(ARRAYS[1])})
    known = (
        "Adapter, Codebook, Hashed, LowRank, NMSparse, Permuted, Prepared, Quantized, RowScaled, Shared, Sum, "
        "UserTables, View"
    )
    for entry, text in (
        ({**manifest["w"], "kind": "Pickle"}, f"w: unknown kind 'Pickle'; known are {known}"),
        ({**manifest["w"], "colour": 1}, "w: Quantized has no field 'colour'; written by a newer version?"),
        ({**manifest["w"], "dtype": "float33"}, "w: 'float33' is no dtype"),
    ):
        with pytest.raises(CheckpointError) as found:
            decode(named, {"w": entry})
        assert str(found.value) == text
    with pytest.raises(CheckpointError, match=r"^w\.extra: the manifest knows no such field; the files do not belong"):
        decode({**named, "w.extra": np.ones(2)}, manifest)
    with pytest.raises(CheckpointError, match="^a/b: 'a' is both a leaf and a branch of the tree$"):
        decode({"a": np.ones(1), "a/b": np.ones(1)}, {})


def test_nested_orphans():
    """An array below a part of a sum that no part has."""
    named, manifest = encode({"w": example(ARRAYS[16])})
    with pytest.raises(CheckpointError, match=r"^w\.parts\.7\.codes: the manifest knows no such field"):
        decode({**named, "w.parts.7.codes": np.ones(2)}, manifest)


@pytest.mark.parametrize("key", ["a/b", "", ".."])
def test_keys_that_are_no_names(key):
    with pytest.raises(LeafError, match="cannot be stored under that name: rename the keys that are empty, '..' or"):
        encode({"outer": {key: jnp.ones(2)}})


def test_key_that_reads_as_a_field():
    tree = {"w": example(ARRAYS[1]), "w.codes": jnp.ones(2)}
    with pytest.raises(LeafError, match=r"^'w.codes' reads as a field of the compressed leaf 'w': rename one of the"):
        encode(tree)


def test_shardings_are_named_like_arrays():
    """`encode` takes trees of anything: `load_orbax` names shardings with it."""
    params = {"w": example(ARRAYS[1]), "b": jnp.ones(2)}
    specs, _ = encode(jax.tree.map(lambda x: x.dtype, params))
    assert specs["b"] == jnp.float32 and set(specs) == set(encode(params)[0])
    assert ej.nbytes(list(encode(params)[0].values())) == ej.nbytes(params)
