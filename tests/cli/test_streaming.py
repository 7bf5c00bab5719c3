"""The flags of compression on disk: budgets, calibration texts, going on, and what is said of each."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import effjax.stream.engine as engine
from effjax.io import load_checkpoint
from tests.cli.conftest import WORDS, Ran

RTN = "compress tiny --method rtn --bits 4 --group-size 16"
LOW = "compress tiny --method low_rank --set rank=2 weighted=true --calibration text.txt --calibration-windows 3"


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compress tiny --memory 2GiB", "--memory and --restart need --method or --rules"),
        ("compress tiny --restart", "--memory and --restart need --method or --rules"),
        ("plan tiny --memory 2GiB", "--memory needs --method or --rules"),
        (f"{RTN} --memory much", "'much' is no size: write a number and a unit, such as 2GiB or 900MB"),
        (f"{RTN} --shard-size 1X", "'1X' is no size"),
        (f"{RTN} --memory 8GiB --evaluate", "--evaluate holds both models in memory: run effjax eval on the result"),
        (f"{RTN} --memory 50MiB", "a budget of 50 MiB cannot hold"),
        (f"{LOW} --calibration-length 65", "--calibration-length 65: tiny has 64 positions, choose from 2 to 64"),
        (f"{LOW} --calibration-length 1", "--calibration-length 1: tiny has 64 positions"),
        (LOW.replace("windows 3", "windows 0"), "--calibration-windows 0: at least one"),
        (LOW.replace("text.txt", "empty.txt"), "empty.txt is empty: give a text"),
        (LOW.replace("text.txt", "none.txt"), "none.txt: No such file or directory"),
    ],
)
def test_what_is_refused_leaves_nothing(effjax: Callable[[str], Ran], work: Path, arguments: str, message: str) -> None:
    (work / "empty.txt").write_text(" \n")
    before = sorted(work.iterdir())
    ran = effjax(arguments)
    assert ran.code == 2 and message in ran.err, ran.err
    assert sorted(work.iterdir()) == before


def test_a_budget_changes_nothing_but_the_words(effjax: Callable[[str], Ran], work: Path) -> None:
    assert effjax(f"{LOW} --out small").code == 0
    first = files(work / "small")
    ran = effjax(f"{LOW} --memory 8GiB --overwrite --out small")
    assert ran.code == 0 and re.search(r"peak memory .* of 8.59 GB", ran.err), ran.err
    assert "median error" in ran.out and "largest error" in ran.out
    assert files(work / "small") == first
    other = effjax(f"{LOW} --calibration-seed 1 --out other")
    assert other.code == 0 and files(work / "other")["model.safetensors"] != first["model.safetensors"]
    assert type(load_checkpoint("small").params["layers_1"]["mlp"]["down_proj"]["kernel"]).__name__ == "LowRank"


def test_interrupted_and_gone_on_with(
    effjax: Callable[[str], Ran], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert effjax(f"{RTN} --out small").code == 0
    whole = files(work / "small")
    (work / "small").rename(work / "whole")
    real, seen = engine._Run._one, []

    def interrupted(self: engine._Run, unit: object) -> object:
        seen.append(unit)
        if len(seen) in (1, 6):
            raise KeyboardInterrupt
        return real(self, unit)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._Run, "_one", interrupted)
    before = sorted(work.iterdir())
    ran = effjax(f"{RTN} --out small")
    assert ran.code == 130 and ran.err.splitlines()[-1].endswith("interrupted; nothing unfinished was left behind")
    assert sorted(work.iterdir()) == before
    ran = effjax(f"{RTN} --out small")
    assert ran.code == 130 and "give the same command again to go on, or add --restart to start over" in ran.err
    ran = effjax(f"{RTN.replace('4', '3')} --out small")
    assert ran.code == 2 and "was begun with other recipe rules: finish it with the command" in ran.err
    ran = effjax(f"{RTN} --memory 8GiB --out small")
    assert ran.code == 0 and "went on after 4 of" in ran.err and "4 of" in ran.err
    assert files(work / "small") == whole
    assert effjax("verify small").out == "small: whole\n"
    assert not list(work.glob(".small*"))


def test_plan_says_what_compress_takes(effjax: Callable[[str], Ran], work: Path) -> None:
    plan = f"{LOW.replace('compress', 'plan').replace('--calibration text.txt ', '')} --memory 8GiB"
    found = json.loads(effjax(f"{plan} --json").out)
    assert found["stream"]["least"] <= found["stream"]["peak"] <= 2**33
    assert found["stream"]["units"] == 4  # the embedding, two blocks, the last norm
    assert effjax(f"{LOW} --memory {found['stream']['least'] + 2**26} --out small").code == 0
    assert "4 units, peak memory" in effjax(plan).out
    assert "a budget of 1 MiB cannot hold" in effjax(plan.replace("8GiB", "1MiB")).err


def test_calibration_texts(effjax: Callable[[str], Ran], work: Path) -> None:
    """By default they come from the documentation of Python; a text with less than was asked for gives what it has."""
    default = "compress tiny --method low_rank --set rank=2 weighted=true --calibration-windows 2 --out default"
    assert effjax(default).code == 0
    (work / "short.txt").write_text(WORDS)
    assert effjax(f"{LOW.replace('text.txt', 'short.txt')} --out short").code == 0
