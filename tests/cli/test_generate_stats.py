"""`effjax generate`: the figures it prints, packed weights, and several continuations at once."""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

import effjax as ej
from effjax.arrays.base import is_compressed
from effjax.io.checkpoint import load_checkpoint
from tests.cli.conftest import CONFIG, Ran

OPTIONS = "--prompt the --max-new-tokens 8 --temperature 0"


@pytest.fixture
def small(effjax: Callable[[str], Ran], work: Path) -> str:
    assert effjax("compress tiny --method rtn --bits 4 --group-size 16 --out small").code == 0
    return "small"


def test_stats(effjax: Callable[[str], Ran], small: str) -> None:
    plain, ran = effjax(f"generate {small} {OPTIONS}"), effjax(f"generate {small} {OPTIONS} --stats")
    assert ran.code == 0, ran.err
    assert ran.out == plain.out, "figures change no token and are not among the text"
    first, decoding, sizes = ran.err.strip().splitlines()
    assert re.fullmatch(r"first token: [\d.]+ ms \(4 prompt tokens, [\d,.]+ a second\)", first)
    found = re.fullmatch(r"decoding: ([\d.]+) tokens a second \((\d+) steps of ([\d.]+) ms\)", decoding)
    assert found and 1 <= int(found[2]) <= 7
    assert abs(1e3 / float(found[1]) - float(found[3])) < 0.02, "one row, so a step gives a token"
    unpacked = sum(4 * leaf.size for leaf in _leaves(small))
    assert f"(weights {unpacked:,}, cache " in sizes and sizes.endswith("GB/s")


def test_packed_stats_count_packed_bytes(effjax: Callable[[str], Ran], small: str) -> None:
    ran = effjax(f"generate {small} {OPTIONS} --stats --packed")
    assert ran.code == 0, ran.err
    assert f"(weights {ej.nbytes(load_checkpoint(small).params):,}, cache " in ran.err
    slots, heads = 32 + 8, CONFIG.num_hidden_layers * CONFIG.num_key_value_heads
    assert f"cache {heads * (slots * (2 * 4 * CONFIG.head_dim + 8) + 4) + 4:,} a step" in ran.err


def test_evicting(effjax: Callable[[str], Ran], work: Path) -> None:
    """A budget for all changes no token; a small one says what it kept."""
    drawn = "generate tiny --prompt the --max-new-tokens 24 --temperature 0 --stats"
    plain, whole = effjax(drawn), effjax(f"{drawn} --kv h2o --kv-budget 100")
    assert whole.code == 0 and whole.out == plain.out, whole.err
    heads, each = CONFIG.num_hidden_layers * CONFIG.num_key_value_heads, 2 * 4 * CONFIG.head_dim + 8
    few = effjax(f"{drawn} --kv scissorhands --kv-budget 0.25 --prefill-chunk 8")
    assert few.code == 0, few.err
    kept, full = (heads * (slots * each + 4) + 4 for slots in (14, 32 + 24))
    share = f"({100 * kept / full:.1f} %)"
    assert few.err.strip().endswith(f"cache: 14 slots a head, {kept:,} bytes of the {full:,} of all tokens {share}")
    assert f"cache {kept:,} a step" in few.err
    assert "cache:" not in plain.err
    assert (
        "--kv-budget 1.5: a share between 0 and 1, or a whole number of tokens"
        in effjax(f"{drawn} --kv h2o --kv-budget 1.5").err
    )
    refused = effjax(f"{drawn} --kv snapkv --kv-budget 20").err
    assert "SnapKV: a budget of 20 tokens leaves nothing besides the newest 64" in refused
    assert "prefill_chunk needs a method that evicts" in effjax(f"{drawn} --prefill-chunk 8").err


def test_batch(effjax: Callable[[str], Ran], work: Path) -> None:
    drawn = "--prompt the --max-new-tokens 6 --temperature 1.2 --seed 4"
    one, three = effjax(f"generate tiny {drawn}"), effjax(f"generate tiny {drawn} --batch 3")
    assert three.code == 0, three.err
    assert three.out.startswith(one.out) and three.out.count("the") >= 3
    assert "--batch 0: at least one continuation" in effjax(f"generate tiny {drawn} --batch 0").err


def test_drafts(effjax: Callable[[str], Ran], small: str) -> None:
    """A draft changes no greedy token, and says how many passes it saved."""
    plain = effjax(f"generate tiny {OPTIONS}")
    for draft, most in (("tiny", 3), (small, 8)):
        ran = effjax(f"generate tiny {OPTIONS} --draft {draft} --draft-tokens 3 --stats")
        assert ran.code == 0 and ran.out == plain.out, ran.err
        found = re.fullmatch(r"speculation: (\d+) tokens in (\d+) passes of the model \(([\d.]+) a pass\)\n", ran.err)
        assert found and int(found[2]) <= most and abs(int(found[1]) / int(found[2]) - float(found[3])) < 0.01
    refused = effjax(f"generate tiny {OPTIONS} --draft tiny --kv h2o")
    assert refused.code != 0 and "--draft: tokens cannot be taken back from an evicted or coded cache" in refused.err
    refused = effjax(f"generate tiny {OPTIONS} --draft tiny --draft-tokens 0")
    assert refused.code != 0 and "draft_tokens must be a whole number, at least 1: 0" in refused.err


def _leaves(directory: str) -> list:
    return jax.tree.leaves(load_checkpoint(directory).params, is_leaf=is_compressed)


def test_coded_cache(effjax: Callable[[str], Ran], work: Path) -> None:
    """A file of tables gives what the name of its coding gives; bytes fall, with eviction too."""
    drawn = "generate tiny --prompt the --max-new-tokens 24 --temperature 0 --stats"
    windows = "--calibration-windows 4 --calibration-length 32"
    made = effjax(f"calibrate-kv tiny --code cq-4c4b --out kv.safetensors {windows}")
    assert made.code == 0 and "kv.safetensors: cq-4c4b, 1 bits a number, tables of " in made.err, made.err
    named, filed = effjax(f"{drawn} --kv-code cq-4c4b {windows}"), effjax(f"{drawn} --kv-code kv.safetensors")
    assert named.code == filed.code == 0 and named.out == filed.out, filed.err
    share = re.search(r"cache: 56 slots a head, ([\d,]+) bytes of the ([\d,]+) of all tokens", filed.err)
    assert share and int(share[1].replace(",", "")) < 0.5 * int(share[2].replace(",", ""))
    looked_up = effjax(f"calibrate-kv tiny --code nomad2 --out nomad.safetensors {windows}")
    assert looked_up.code == 0 and "nomad2, 2 bits a number" in looked_up.err, looked_up.err
    assert effjax(f"{drawn} --kv-code nomad.safetensors").code == 0
    plain, eight = effjax(drawn), effjax(f"{drawn} --kv-code kivi8")
    assert eight.code == 0 and eight.out == plain.out, "the window holds all 56 tokens as they came"
    refused = effjax("calibrate-kv tiny --code kivi2 --out none.safetensors")
    assert refused.code != 0 and "kivi2: learns nothing from a text" in refused.err, refused.err
    both = effjax(f"{drawn} --kv-code kv.safetensors --kv h2o --kv-budget 0.25 --prefill-chunk 8")
    assert both.code == 0 and "cache: 14 slots a head" in both.err, both.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("generate tiny --kv-code cq3", "--kv-code cq3: no such coding or file; choose cq1, cq2, cq4"),
        ("generate tiny --kv-code cq-3c3b", "--kv-code cq-3c3b: 3 channels do not divide a head of 8"),
        ("generate tiny --kv-code int9", "--kv-code int9: bits=9: choose 1 to 8"),
        ("generate tiny --kv-code tables.safetensors", "tables.safetensors: cannot be read"),
        ("calibrate-kv tiny --code zip", "--kv-code zip: no such coding or file"),
        ("calibrate-kv tiny --out tiny", "tiny exists already: choose another --out, or add --overwrite"),
        ("calibrate-kv tiny --calibration-length 999", "tiny has 64 positions, choose from 2 to 64"),
    ],
)
def test_codes_that_cannot_be(effjax: Callable[[str], Ran], work: Path, arguments: str, told: str) -> None:
    ran = effjax(arguments)
    assert ran.code == 2 and told in " ".join(ran.err.split()), ran.err
    assert not (work / "kv.safetensors").exists()
