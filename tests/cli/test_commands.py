"""Every subcommand does its job on a tiny model, and its outputs agree with each other."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import effjax as ej
from effjax.cli import main
from effjax.io.checkpoint import load_checkpoint
from tests.cli.conftest import Ran

JUDGE = "--text text.txt --windows 6 --window-length 32"


@pytest.mark.parametrize("command", ["", "plan", "compress", "convert", "verify", "eval", "generate", "report"])
def test_help(effjax: Callable[[str], Ran], command: str) -> None:
    ran = effjax(f"{command} --help")
    assert ran.code == 0
    assert "usage: effjax" in ran.out and "{None}" not in ran.out
    if not command:
        assert all(name in ran.out for name in ("plan", "compress", "convert", "verify", "eval", "generate", "report"))


def test_unknown_command_and_flag(effjax: Callable[[str], Ran]) -> None:
    assert effjax("squeeze").code == 2
    assert effjax("compress --bitz 4").code == 2


def test_plan_promises_what_compress_delivers(effjax: Callable[[str], Ran], work: Path) -> None:
    plan = json.loads(effjax("plan tiny --method rtn --bits 3 --group-size 16 --json").out)
    assert effjax("compress tiny --method rtn --bits 3 --group-size 16 --out small").code == 0
    params = load_checkpoint("small").params
    assert plan["after"] == ej.nbytes(params)
    assert plan["before"] > plan["after"] and plan["peak"] > plan["before"]
    assert sum(row["after"] for row in plan["rows"]) == plan["after"]


def test_plan_needs_no_weights_and_lists_the_default_job(effjax: Callable[[str], Ran], work: Path) -> None:
    (work / "tiny" / "model.safetensors").unlink()
    ran = effjax("plan tiny")
    assert ran.code == 0
    assert all(name in ran.out for name in ("dense", "8-bit", "4-bit", "3-bit", "2-bit", "2:4", "low rank"))
    table = effjax("plan tiny --method magnitude --set pattern=2:4").out
    assert re.search(r"layers_\*/mlp/up_proj/kernel +32x64 +NMSparse +2 ", table)
    every = effjax("plan tiny --method nf4 --set block_size=16 --all").out
    assert "layers_1/mlp/up_proj/kernel" in every
    half = json.loads(effjax("plan tiny --method nf4 --set block_size=16 --dtype bfloat16 --json").out)
    full = json.loads(effjax("plan tiny --method nf4 --set block_size=16 --json").out)
    assert full["before"] == 2 * half["before"]


def test_one_model(effjax: Callable[[str], Ran], work: Path) -> None:
    ran = effjax("compress tiny --method rtn --bits 4 --group-size 16 --set clip=mse symmetric=true --out small")
    assert ran.code == 0
    names = {"README.md", "config.json", "effjax.json", "model.safetensors", "recipe.yaml", "tokenizer.json"}
    assert {path.name for path in (work / "small").iterdir()} == names
    assert "written: small" in ran.err
    card = (work / "small" / "README.md").read_text()
    assert "RTN bits 4, group size 16, symmetric True, clip mse" in card and "Not judged yet" in card
    assert not any(str(work) in (work / "small" / name).read_text() for name in names if not name.endswith("tensors"))
    assert effjax("verify small") == Ran(code=0, out="small: whole\n", err="")
    assert "carries no hashes" in effjax("verify tiny").out


def test_a_recipe_reproduces_the_bytes(effjax: Callable[[str], Ran], work: Path) -> None:
    effjax("compress tiny --method hashed --set ratio=4 --out first")
    recipe = (work / "first" / "recipe.yaml").read_text().replace("seed: 0", "seed: 7")
    (work / "recipe.yaml").write_text(recipe)
    assert effjax("compress tiny --rules recipe.yaml --out second").code == 0
    assert effjax("compress tiny --rules second/recipe.yaml --out third").code == 0
    weights = [(work / name / "model.safetensors").read_bytes() for name in ("first", "second", "third")]
    assert weights[1] == weights[2] != weights[0]


def test_main_job(effjax: Callable[[str], Ran], work: Path) -> None:
    ran = effjax(f"compress tiny {JUDGE} --out all --seed 3")
    assert ran.code == 0, ran.err
    variants = ["8-bit", "4-bit", "3-bit", "2-bit", "2-4", "low-rank"]
    assert {path.name for path in (work / "all").iterdir()} == {*variants, "report.html", "report.json"}
    report = json.loads((work / "all" / "report.json").read_text())
    assert [v["name"] for v in report["variants"]] == ["dense", "8-bit", "4-bit", "3-bit", "2-bit", "2:4", "low rank"]
    dense, eight, *_, two, _, _ = report["variants"]
    assert dense["comparison"] is None and dense["ratio"] == 1.0
    assert dense["perplexity"] == pytest.approx(eight["comparison"]["perplexity_reference"])
    assert eight["comparison"]["kl_mean"] < two["comparison"]["kl_mean"]
    assert report["evaluation"]["windows"] == 6 and report["evaluation"]["tokens"] == 6 * 31
    assert report["evaluation"]["text"] == "text.txt"
    for variant, directory in zip(report["variants"][1:], variants, strict=True):
        assert effjax(f"verify all/{directory}").code == 0
        assert variant["nbytes"] == ej.nbytes(load_checkpoint(work / "all" / directory).params)
        assert variant["nbytes"] == sum(leaf["nbytes"] for leaf in variant["leaves"])
        assert variant["recipe"]["model"] == "tiny"
        assert "| verdict |" in (work / "all" / directory / "README.md").read_text()
    html = (work / "all" / "report.html").read_text()
    assert html.count("<svg") == 3 and "<script" not in html
    assert not re.search(r"(src|href)=\"(?!#)", html)  # nothing is loaded from outside
    assert str(work) not in html and str(work) not in json.dumps(report)
    assert all(name in ran.out for name in ("low rank", "ΔNLL", "same top-1", "verdict"))
    again = effjax(f"compress tiny {JUDGE} --out again --seed 3")
    assert again.code == 0
    assert json.loads((work / "again" / "report.json").read_text())["variants"] == report["variants"]


def test_eval(effjax: Callable[[str], Ran], work: Path) -> None:
    dense = effjax(f"eval tiny {JUDGE}")
    assert dense.code == 0 and re.match(r"perplexity \d+\.\d{3} ", dense.out)
    effjax("compress tiny --method rtn --bits 8 --group-size 16 --out good")
    effjax("compress tiny --method low_rank --set rank=1 --out bad")
    good = effjax(f"eval good --original tiny {JUDGE} --require indistinguishable")
    assert good.code == 0 and "95% interval [" in good.out and "verdict        indistinguishable" in good.out
    found = json.loads(effjax(f"eval bad --original tiny {JUDGE} --json").out)
    assert found["windows"] == 6 and found["kl_mean"] > 0 and found["rule"]["margin"] == 0.02
    strict = f"eval bad --original tiny {JUDGE} --margin 1e-9 --require indistinguishable"
    assert effjax(strict).code == 1
    same = json.loads(effjax(f"eval tiny --original tiny {JUDGE} --json").out)
    assert (same["delta_nll"], same["kl_mean"], same["same_top1"]) == (0.0, 0.0, 1.0)


def test_generate(effjax: Callable[[str], Ran], work: Path) -> None:
    effjax("compress tiny --method rtn --bits 8 --group-size 16 --out good")
    options = "--prompt the --max-new-tokens 8 --temperature 0.8 --top-p 0.9"
    first, again, other = (effjax(f"generate tiny {options} --seed {seed}") for seed in (1, 1, 2))
    assert first.code == 0 and first.out.startswith("the") and len(first.out) > 4
    assert first == again != other
    assert effjax(f"generate good {options}").out.startswith("the")


def test_report_of_models_compressed_before(effjax: Callable[[str], Ran], work: Path) -> None:
    effjax("compress tiny --method rtn --bits 4 --group-size 16 --out four")
    effjax("compress tiny --method magnitude --set sparsity=0.5 --out half")
    ran = effjax(f"report four half --original tiny {JUDGE} --out shown --prompt fox")
    assert ran.code == 0, ran.err
    report = json.loads((work / "shown" / "report.json").read_text())
    assert [v["name"] for v in report["variants"]] == ["dense", "four", "half"]
    assert report["variants"][2]["ratio"] == 1.0
    pruned = next(leaf for leaf in report["variants"][2]["leaves"] if leaf["path"].endswith("up_proj/kernel"))
    assert pruned["kind"] == "float32" and 0 < pruned["errors"][0] < 1
    assert "<svg" in (work / "shown" / "report.html").read_text()


def test_overwrite_replaces_only_what_effjax_wrote(effjax: Callable[[str], Ran], work: Path) -> None:
    command = "compress tiny --method rtn --bits 4 --group-size 16"
    assert effjax(f"{command} --out small").code == 0
    before = (work / "small" / "model.safetensors").read_bytes()
    assert effjax(f"{command.replace('4 -', '8 -')} --out small --overwrite").code == 0
    assert (work / "small" / "model.safetensors").read_bytes() != before
    refused = effjax(f"{command} --out tiny --overwrite")
    assert refused.code == 2 and "was not written by effjax, so it is not replaced" in refused.err
    assert (work / "tiny" / "config.json").exists()


def test_main_is_the_console_entry() -> None:
    from importlib.metadata import EntryPoint

    assert EntryPoint("effjax", "effjax.cli:main", "console_scripts").load() is main


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_is_never_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    import types

    from rich.console import Console

    import effjax.cli.compress as command
    from effjax.evaluate import Comparison, VerdictRule

    monkeypatch.setattr(command, "out", lambda: Console(width=width, highlight=False))
    comparison = Comparison(
        nll=2.5,
        nll_reference=2.4,
        delta_nll=-0.1234,
        delta_low=-1.2345,
        delta_high=1.2345,
        perplexity=12345.678,
        perplexity_reference=12.3,
        kl_mean=0.1,
        kl_q999=2.0,
        same_top1=0.876,
        verdict="indistinguishable",
        windows=3,
        tokens=90,
        rule=VerdictRule(),
    )
    shown = {"nbytes": 123_456_789, "ratio": 12.34, "sample": None}
    variants = [
        types.SimpleNamespace(name="dense", comparison=None, perplexity=12.3, **shown),
        types.SimpleNamespace(name="low rank", comparison=comparison, perplexity=12345.678, **shown),
    ]
    command.show(types.SimpleNamespace(variants=variants, rule=VerdictRule()))
    out = capsys.readouterr().out
    assert "…" not in out and "indistinguishable" in out and max(map(len, out.splitlines())) <= width
    assert (
        ("+1.2345]" in out and "12345.678" in out) if width == 160 else ("[-1.234,+1.234]" in out or "+1.235]" in out)
    )
