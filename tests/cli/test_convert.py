"""`effjax convert`: verdicts, refusals, and the chain of all formats on the tiny model of the command line's tests."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cli.conftest import Ran

Effjax = Callable[[str], Ran]
ROUND = "--approximate --group-size 16"


def test_a_dense_model_is_rounded_only_when_allowed(effjax: Effjax, work: Path) -> None:
    ran = effjax("convert tiny packed --format compressed-tensors")
    assert ran.code == 2 and not (work / "packed").exists()
    assert "14 of 20 tensors cannot be kept exactly as compressed-tensors: add --approximate" in ran.err
    assert "approximate" in ran.out and "it is dense, and would be rounded to a grid" in ran.out
    ran = effjax(f"convert tiny packed --format compressed-tensors {ROUND}")
    assert ran.code == 0 and "written: packed" in ran.err
    assert "tiny -> compressed-tensors: approximate (14 of 20 tensors)" in ran.out
    assert {path.name for path in (work / "packed").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    ran = effjax("verify packed")
    assert ran.code == 0 and "shapes and values only, a flipped bit cannot be seen" in ran.out


def test_a_chain_of_exact_conversions(effjax: Effjax, work: Path) -> None:
    """compressed-tensors -> effjax -> AWQ -> compressed-tensors: no value changes, and the bytes come back."""
    assert effjax(f"convert tiny a --format compressed-tensors {ROUND}").code == 0
    for source, target, name in (("a", "b", "effjax"), ("b", "c", "awq"), ("c", "d", "compressed-tensors")):
        ran = effjax(f"convert {source} {target} --format {name} --json")
        found = json.loads(ran.out)
        assert ran.code == 0 and found["exact"] and all(tensor["error"] == 0 for tensor in found["tensors"])
    assert (work / "a/model.safetensors").read_bytes() == (work / "d/model.safetensors").read_bytes()
    assert effjax("verify b").out == "b: whole\n"


def test_a_shape_without_a_place_stays_dense(effjax: Effjax, work: Path) -> None:
    ran = effjax(f"convert tiny a --format gptq {ROUND} --bits 3")
    assert ran.code == 0
    assert (
        "k_proj/kernel: it is written dense: 32 inputs and 16 outputs at 3 bits fill no whole 32-bit words" in ran.out
    )
    ran = effjax("convert a b --format gptq_v2 --json")
    tensors = {tensor["path"]: tensor for tensor in json.loads(ran.out)["tensors"]}
    assert tensors["layers_0/attention/k_proj/kernel"]["stored"] == "dense float32"
    assert tensors["layers_0/attention/q_proj/kernel"]["stored"] == "gptq_v2 3-bit, groups of 16"


def test_gguf(effjax: Effjax, work: Path) -> None:
    assert effjax("convert tiny tiny.gguf --format gguf").code == 0
    ran = effjax("convert tiny.gguf back --format effjax")
    assert ran.code == 0 and "tiny.gguf -> effjax: exact" in ran.out
    assert "whole" in effjax("verify tiny.gguf").out
    damaged = (work / "tiny.gguf").read_bytes()[:-64]
    (work / "tiny.gguf").write_bytes(damaged)
    assert effjax("verify tiny.gguf").code == 1


def test_ambiguous_zero_points_are_told(effjax: Effjax, work: Path) -> None:
    effjax("convert tiny old --format gptq --approximate --group-size 32")
    file = work / "old" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("up_proj.qzeros"))
    tensors[name] = tensors[name] | np.int32(15)
    save_file(tensors, file)
    note = "1 zero points are stored as 15, which in this version of GPTQ means 0 or 16"
    count = tensors[name].size
    ran = effjax("verify old")
    assert ran.code == 0 and f"note: {name}: {count} zero points" in ran.out and note[1:] in ran.out
    ran = effjax("convert old new --format gptq_v2")
    assert ran.code == 0 and note[1:] in ran.err
    ran = effjax("convert old again --format gptq")
    assert ran.code == 2 and "zero points are 0, which version 1 of GPTQ stores like 16" in ran.out


BAD = {
    "existing": ("convert tiny text.txt --format gptq", "text.txt exists already: choose another name"),
    "no parent": ("convert tiny a/b --format gptq", "a/b: the directory a does not exist"),
    "directory as GGUF": (
        "convert tiny a --format gguf",
        "a GGUF model is one file: give it a name that ends in .gguf",
    ),
    "GGUF as directory": ("convert tiny a.gguf --format awq", "--format awq writes a directory"),
    "no model": ("convert nowhere a --format awq", "nowhere: no such directory"),
    "no groups": ("convert tiny a --format nvfp4", "cannot be kept exactly as nvfp4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(effjax: Effjax, work: Path, name: str) -> None:
    command, message = BAD[name]
    before = sorted(work.rglob("*"))
    ran = effjax(command)
    assert ran.code == 2 and message in ran.err and "Traceback" not in ran.err
    assert sorted(work.rglob("*")) == before


def test_the_format_must_be_named(effjax: Effjax, work: Path) -> None:
    assert effjax("convert tiny a").code == 2
    assert effjax("convert tiny a --format zip").code == 2
