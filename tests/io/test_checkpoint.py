"""Damaged checkpoints are refused with what is wrong, and a write that fails leaves nothing behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import effjax as ej
from effjax.errors import CheckpointError
from effjax.io.checkpoint import is_checkpoint
from tests.common.cases import assert_same_bytes

REPOSITORY = Path(__file__).parents[2]


def params():
    w = jax.random.normal(jax.random.key(0), (32, 8))
    return {"mlp": {"kernel": ej.quantize.RTN(bits=4, group_size=16).quantize(w)}, "norm": {"scale": jnp.ones(8)}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "model"
    ej.io.save_checkpoint(
        directory,
        params(),
        config={"model_type": "llama"},
        recipe={"rules": [{"where": "*/kernel", "bits": 4}]},
        tokenizer_json='{"version": "1.0"}',
        card="# A model\n",
        files={"report.json": "{}"},
    )
    return directory


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


def test_contents(whole):
    loaded = ej.io.load_checkpoint(whole)
    assert_same_bytes(loaded.params, params())
    assert loaded.config == {"model_type": "llama"}
    assert loaded.recipe == {"rules": [{"where": "*/kernel", "bits": 4}]}
    assert loaded.tokenizer_json == '{"version": "1.0"}'
    assert set(loaded.hashes) == {"mlp/kernel.codes", "mlp/kernel.scales", "mlp/kernel.zeros", "norm/scale"}
    assert ej.io.verify_checkpoint(whole) == []
    assert is_checkpoint(whole) and not is_checkpoint(whole.parent)
    assert sorted(p.name for p in whole.iterdir()) == [
        "README.md", "config.json", "effjax.json", "model.safetensors", "recipe.yaml", "report.json", "tokenizer.json"
    ]  # fmt: skip
    assert str(whole.parent) not in (whole / "effjax.json").read_text()


def edit_manifest(root, change, *, hashed=False):
    """As one that an earlier version wrote, without a hash of its own; or with that of before the change."""
    manifest = json.loads((root / "effjax.json").read_text())
    change(manifest)
    if not hashed:
        del manifest["sha256"]
    (root / "effjax.json").write_text(json.dumps(manifest))


def edit_tensors(root, change):
    tensors = load_file(root / "model.safetensors")
    change(tensors)
    save_file(tensors, root / "model.safetensors")


def flip_bit(root):
    raw = bytearray((root / "model.safetensors").read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little") + 3] ^= 16
    (root / "model.safetensors").write_bytes(raw)


def truncate(root):
    raw = (root / "model.safetensors").read_bytes()
    (root / "model.safetensors").write_bytes(raw[:-5])


def lose(name):
    return lambda root: (root / name).unlink()


def manifest_edit(change):
    return lambda root: edit_manifest(root, change)


def tensor_edit(change):
    return lambda root: edit_tensors(root, change)


def drop_zeros_everywhere(root):
    edit_tensors(root, lambda t: t.pop("mlp/kernel.zeros"))
    edit_manifest(root, lambda m: m["tensors"].pop("mlp/kernel.zeros"))


DAMAGE = {
    "flipped bit": (flip_bit, r"model\.safetensors: .* is damaged \(its hash differs\)"),
    "truncated": (truncate, r"model\.safetensors: 5 bytes are missing at the end; the file is truncated"),
    "short": (
        lambda root: (root / "model.safetensors").write_bytes(b"\0" * 4),
        r"model\.safetensors: 4 bytes is too short for safetensors",
    ),
    "no weights": (lose("model.safetensors"), r"model\.safetensors: cannot be read \(No such file or directory\)"),
    "no manifest": (lose("effjax.json"), r"effjax\.json is missing in model"),
    "no config": (lose("config.json"), r"config\.json is missing in model"),
    "no tokenizer": (lose("tokenizer.json"), r"tokenizer\.json is missing in model"),
    "manifest no JSON": (
        lambda root: (root / "effjax.json").write_text("{"),
        r"effjax\.json is no JSON \(.*\): it is damaged",
    ),
    "manifest no object": (lambda root: (root / "effjax.json").write_text("[]"), "must hold an object, not a list"),
    "manifest edited": (
        lambda root: edit_manifest(root, lambda m: m["leaves"].clear(), hashed=True),
        r"effjax\.json was changed after it was written \(its hash differs\)",
    ),
    "manifest entry": (manifest_edit(lambda m: m.pop("tensors")), "lacks a valid 'tensors' entry"),
    "newer format": (
        manifest_edit(lambda m: m.update(format=99)),
        "has format 99, this version reads 1 and 2: update effjax",
    ),
    "path outside": (
        manifest_edit(lambda m: m["files"].update({"../secret": "0"})),
        r"names a file outside of the directory: '\.\./secret'",
    ),
    "missing tensor": (
        tensor_edit(lambda t: t.pop("mlp/kernel.scales")),
        r"model\.safetensors lacks mlp/kernel\.scales: it does not belong to effjax\.json",
    ),
    "extra tensor": (
        tensor_edit(lambda t: t.update(other=np.ones(1))),
        r"model\.safetensors has an unknown other: it does not belong to effjax\.json",
    ),
    "zero points lost in both": (drop_zeros_everywhere, r"mlp/kernel\.zeros is missing: a Quantized leaf cannot be"),
    "other bits": (
        manifest_edit(lambda m: m["leaves"]["mlp/kernel"].update(bits=8)),
        r"mlp/kernel( is float32\[16, 8\], the manifest says|: its fields do not fit together)",
    ),
    "other dtype": (
        manifest_edit(lambda m: m["leaves"]["mlp/kernel"].update(dtype="bfloat16")),
        r"mlp/kernel is bfloat16\[32, 8\], the manifest says \[\[32, 8\], 'float32'\]",
    ),
    "other shape": (
        manifest_edit(lambda m: m["shapes"].update({"mlp/kernel": [[64, 8], "float32"]})),
        r"mlp/kernel is float32\[32, 8\], the manifest says \[\[64, 8\], 'float32'\]",
    ),
    "no bits at all": (
        manifest_edit(lambda m: m["leaves"]["mlp/kernel"].update(bits=0)),
        "mlp/kernel: its fields do not fit together",
    ),
    "changed config": (
        lambda root: (root / "config.json").write_text('{"model_type": "mistral"}'),
        r"config\.json was changed after it was written \(its hash differs\)",
    ),
    "changed recipe": (
        lambda root: (root / "recipe.yaml").write_text("rules: []\n"),
        r"recipe\.yaml was changed after it was written \(its hash differs\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name(copy, damage):
    """Loading raises, verifying reports, in the same words."""
    act, text = DAMAGE[damage]
    act(copy)
    with pytest.raises(CheckpointError, match=text):
        ej.io.load_checkpoint(copy)
    findings = ej.io.verify_checkpoint(copy)
    assert findings
    with pytest.raises(CheckpointError, match=text):
        raise CheckpointError("\n".join(findings))


def test_card_may_be_edited(copy):
    """A README is for people; loading does not care, verifying tells."""
    (copy / "README.md").write_text("# Mine\n")
    assert_same_bytes(ej.io.load_checkpoint(copy).params, params())
    assert ej.io.verify_checkpoint(copy) == ["README.md was changed after it was written (its hash differs)"]


def test_non_finite_values_are_not_written(tmp_path):
    bad = {"mlp": {"kernel": params()["mlp"]["kernel"].replace(scales=jnp.full((2, 8), jnp.nan, jnp.float16))}}
    with pytest.raises(CheckpointError, match=r"^mlp/kernel\.scales has non-finite values \(1 such tensors\): not wr"):
        ej.io.save_checkpoint(tmp_path / "model", bad, config={})
    assert list(tmp_path.iterdir()) == []


def test_existing_directory(copy):
    text = "^model exists already; choose another name, or overwrite it explicitly$"
    with pytest.raises(CheckpointError, match=text):
        ej.io.save_checkpoint(copy, params(), config={})
    assert ej.io.verify_checkpoint(copy) == []
    ej.io.save_checkpoint(copy, {"w": jnp.ones(3)}, config={"new": True}, overwrite=True)
    assert ej.io.load_checkpoint(copy).config == {"new": True}
    assert sorted(p.name for p in copy.parent.iterdir()) == ["model"]
    with pytest.raises(CheckpointError, match="^new cannot be made: its parent directory does not exist; make that"):
        ej.io.save_checkpoint(copy / "nowhere" / "new", params(), config={})


FULL_DISK = """
import resource, signal, sys
import jax.numpy as jnp
import effjax as ej
from effjax.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    ej.io.save_checkpoint(sys.argv[1], {"w": jnp.ones((256, 256))}, config={}, overwrite=len(sys.argv) > 2)
except CheckpointError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_full_disk_leaves_nothing_behind(copy, overwrite):
    """A file that may not grow beyond 64 KiB stands for a full disk; what was there before stays whole."""
    target = copy if overwrite else copy.with_name("other")
    command = [sys.executable, "-c", FULL_DISK, str(target), *(["overwrite"] if overwrite else [])]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 7, ran.stderr
    assert f"{target.name} cannot be written" in ran.stdout and "nothing was left behind" in ran.stdout
    assert sorted(p.name for p in copy.parent.iterdir()) == ["model"]
    assert ej.io.verify_checkpoint(copy) == []


def test_orbax_directories_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match="^nowhere: no such Orbax checkpoint$"):
        ej.io.load_orbax(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="^empty is no checkpoint of effjax, or damaged"):
        ej.io.load_orbax(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="^empty exists already: choose another name or remove it$"):
        ej.io.save_orbax(tmp_path / "empty", params())


def test_orbax_shardings_must_be_complete(tmp_path):
    ej.io.save_orbax(tmp_path / "model", params())
    device = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    shardings = jax.tree.map(lambda _: device, params())
    assert_same_bytes(ej.io.load_orbax(tmp_path / "model", shardings), params())
    with pytest.raises(CheckpointError, match="^shardings lack norm/scale: give one for every array of the tree$"):
        ej.io.load_orbax(tmp_path / "model", {"mlp": shardings["mlp"]})
