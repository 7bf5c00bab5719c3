"""Every array type comes back from Orbax and from safetensors with its type, metadata and bytes."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding

import effjax as ej
from effjax.errors import LeafError
from tests.common.cases import ARRAYS, STACKED, assert_same_bytes, dense, example, mesh_of, place, spec_of

# One directory for all types: a write of Orbax takes long whatever is in it.
DTYPES = {"matrix": "float32", "stacked": "bfloat16"}


def tree():
    """Every case, as a float32 matrix and as bfloat16 layers, among dense leaves of all ranks."""
    params = {
        f"case_{i}": {
            "matrix": {"kernel": example(case, (), "float32")},
            "stacked": {"kernel": example(case, (STACKED,), "bfloat16")},
        }
        for i, case in enumerate(ARRAYS)
    }
    params["dense"] = {
        "scalar": jnp.float32(0.5),
        "bias": jnp.arange(3, dtype=jnp.bfloat16),
        "steps": jnp.arange(6, dtype=jnp.int32).reshape(2, 3),
        "with.dot": jnp.ones(2),
    }
    return params


@pytest.fixture(scope="module")
def orbax_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("orbax") / "checkpoint"
    ej.io.save_orbax(directory, tree())
    return directory


@pytest.fixture(scope="module")
def safetensors_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("safetensors") / "checkpoint"
    ej.io.save_checkpoint(directory, tree(), config={"model_type": "test"})
    return directory


@pytest.fixture(scope="module")
def from_orbax(orbax_directory):
    return ej.io.load_orbax(orbax_directory)


@pytest.fixture(scope="module")
def from_safetensors(safetensors_directory):
    return ej.io.load_checkpoint(safetensors_directory).params


@pytest.mark.parametrize("source", ["from_orbax", "from_safetensors"])
@pytest.mark.parametrize("i", range(len(ARRAYS)), ids=[case.name for case in ARRAYS])
def test_round_trip(source, i, request):
    restored = request.getfixturevalue(source)[f"case_{i}"]
    for name, leaf in tree()[f"case_{i}"].items():
        assert type(restored[name]["kernel"]) is type(leaf["kernel"])
        assert_same_bytes(restored[name], leaf)


@pytest.mark.parametrize("source", ["from_orbax", "from_safetensors"])
def test_dense_leaves_round_trip(source, request):
    restored = request.getfixturevalue(source)
    assert_same_bytes(restored["dense"], tree()["dense"])
    assert jax.tree.structure(restored) == jax.tree.structure(tree())


def test_bytes_on_disk(safetensors_directory):
    """The data section holds the packed bytes and nothing else."""
    file = safetensors_directory / "model.safetensors"
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        names = json.loads(stream.read(header))
    data = file.stat().st_size - 8 - header
    assert data == ej.nbytes(tree())
    expected = sum(case.nbytes((), DTYPES["matrix"]) + case.nbytes((STACKED,), DTYPES["stacked"]) for case in ARRAYS)
    assert data - ej.nbytes(tree()["dense"]) == expected
    assert not any("/work" in name or name.startswith("/") for name in names)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_orbax_restores_onto_another_mesh(tmp_path, mode):
    """Saved from one mesh, restored onto another: cut as asked there, the same bytes."""
    kept = {type(example(case)): case for case in ARRAYS if case.sharded}.values()  # the last of each type
    params = {case.name: {"w": example(case)} for case in kept}
    specs = {case.name: {"w": spec_of(len(case.shape), case.sharded[-1])} for case in kept}
    before = mesh_of(AxisType.Auto)
    saved = place(params, ej.partition_specs(params, specs, before), before)
    ej.io.save_orbax(tmp_path / "checkpoint", saved)
    after = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(mode, mode))
    wanted = jax.tree.map(lambda s: NamedSharding(after, s), ej.partition_specs(params, specs, after))
    restored = ej.io.load_orbax(tmp_path / "checkpoint", wanted)
    assert_same_bytes(restored, params)
    for x, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    halves = [x for x in jax.tree.leaves(restored) if x.addressable_shards[0].data.size * 2 == x.size]
    assert len(halves) >= len(kept)


def test_saved_sharded_restored_on_one_device(tmp_path):
    mesh = mesh_of(AxisType.Auto)
    params = {"w": example(ARRAYS[1])}
    ej.io.save_checkpoint(
        tmp_path / "m", place(params, ej.partition_specs(params, {"w": spec_of(2, -1)}, mesh), mesh), config={}
    )
    restored = ej.io.load_checkpoint(tmp_path / "m").params
    assert_same_bytes(restored, params)
    assert (jnp.asarray(restored["w"].materialize()) == dense(ARRAYS[1])).all()


def test_orbax_names_an_empty_array_before_it_writes(tmp_path):
    with pytest.raises(LeafError, match=r"^a/b has no elements \[0, 4\]: Orbax stores none such; leave it out"):
        ej.io.save_orbax(tmp_path / "checkpoint", {"a": {"b": jnp.zeros((0, 4))}})
    assert list(tmp_path.iterdir()) == []
