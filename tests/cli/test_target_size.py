"""`effjax compress --target-size`: the size holds to the byte, the widths differ, the recipe says which."""

from collections.abc import Callable
from pathlib import Path

import pytest

import effjax as ej
from effjax.errors import ConfigError
from effjax.io.checkpoint import load_checkpoint
from effjax.recipe import Recipe
from effjax.target import parse_target
from tests.cli.conftest import Ran

CALIBRATE = "--calibration text.txt --calibration-windows 6 --calibration-length 16"


def test_the_size_holds_and_the_widths_differ(effjax: Callable[[str], Ran], work: Path) -> None:
    ran = effjax(f"compress tiny --method rtn --group-size 16 --target-size 45% {CALIBRATE} --out small")
    assert ran.code == 0, ran.err
    found, dense = load_checkpoint("small"), load_checkpoint_bytes()
    assert 0.43 * dense < ej.nbytes(found.params) <= 0.45 * dense
    recipe = Recipe.from_dict(found.recipe)
    widths = {where: method.bits for where, method in recipe.rules}
    assert len(widths) == 14 and len(set(widths.values())) > 1 and recipe.model == "tiny"
    for where, bits in widths.items():
        leaf = found.params
        for part in str(where).split("/"):
            leaf = leaf[part]
        assert leaf.bits == bits
        assert f"RTN {bits}" in next(line for line in ran.err.splitlines() if line.startswith(str(where)))
    again = effjax("compress tiny --rules small/recipe.yaml --out again")
    assert again.code == 0
    assert (work / "again/model.safetensors").read_bytes() == (work / "small/model.safetensors").read_bytes()


def load_checkpoint_bytes() -> int:
    from effjax.models.hf import load_model

    return ej.nbytes(load_model("tiny").params)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--method rtn --bits 4 --target-size 50%", "--target-size chooses the bits of one --method"),
        ("--target-size 50%", "--target-size chooses the bits of one --method"),
        ("--method rtn --target-size 50% --memory 2GiB", "holds the dense model in memory: leave --memory out"),
        (f"--method nf4 --set block_size=16 --target-size 50% {CALIBRATE}", "NF4 has no field bits"),
        (f"--method rtn --group-size 16 --target-size 10KiB {CALIBRATE}", "is below the least possible, "),
        (f"--method rtn --target-size 120% {CALIBRATE}", "choose more than 0% and at most 100%"),
        (f"--method rtn --target-size much {CALIBRATE}", "'much' is no size"),
    ],
)
def test_refused_before_anything_is_written(
    effjax: Callable[[str], Ran], work: Path, arguments: str, message: str
) -> None:
    ran = effjax(f"compress tiny {arguments} --out small")
    assert ran.code != 0 and message in " ".join(ran.err.split())
    assert not (work / "small").exists()


def test_parse_target() -> None:
    assert parse_target("12.5%", 800) == 100
    with pytest.raises(ConfigError, match="more than 0%"):
        parse_target("0%", 800)
