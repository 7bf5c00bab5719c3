"""Every bad input: one clear line, an exit code that is not 0, and a working directory that looks as before."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from effjax.cli import _terminated_like_interrupted, main
from tests.cli.conftest import Ran

COMPRESS = "compress tiny --method rtn --bits 4 --group-size 16 --out small"
ROOT = Path(__file__).resolve().parents[2]


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def change_config(work: Path, **changes: object) -> None:
    path = work / "tiny" / "config.json"
    entries = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))


def change_tensors(work: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    path = work / "tiny" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def truncate(work: Path) -> None:
    path = work / "tiny" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def put_nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated weights": (truncate, COMPRESS, "model.safetensors: 1000 bytes are missing at the end"),
    "no weights": (lambda w: (w / "tiny" / "model.safetensors").unlink(), COMPRESS, "neither model.safetensors nor"),
    "NaN weight": (
        lambda w: change_tensors(w, put_nan),
        COMPRESS,
        "model.layers.1.mlp.up_proj.weight has 1 values that are NaN or infinite, the first at [3, 5]",
    ),
    "missing tensor": (
        lambda w: change_tensors(w, lambda t: t.pop("model.norm.weight")),
        COMPRESS,
        "missing model.norm.weight [32]",
    ),
    "wrong width": (
        lambda w: change_config(w, intermediate_size=48),
        COMPRESS,
        "model.layers.0.mlp.gate_proj.weight has shape [64, 32], config.json says [48, 32]",
    ),
    "unknown family": (lambda w: change_config(w, model_type="mamba"), COMPRESS, "model_type 'mamba' is not known"),
    "missing entry": (lambda w: change_config(w, hidden_size=None), "plan tiny", "config.json: missing hidden_size"),
    "config is no JSON": (
        lambda w: (w / "tiny" / "config.json").write_text("{"),
        "plan tiny",
        "config.json is damaged",
    ),
    "group": (lambda w: None, COMPRESS.replace("16", "24"), "group_size=24 does not divide its 32 inputs"),
    "group in plan": (
        lambda w: None,
        "plan tiny --method rtn --group-size 24",
        "layers_0/attention/k_proj/kernel [32, 16]: group_size=24 does not divide its 32 inputs",
    ),
    "rule without a leaf": (
        lambda w: (w / "r.yaml").write_text("rules: [{where: '*/experts/*', method: nf4}]"),
        "compress tiny --rules r.yaml --out small",
        "'*/experts/*') matches no leaf",
    ),
    "recipe with a mistake": (
        lambda w: (w / "r.yaml").write_text("rules:\n- method: rtn\n  args: {bitz: 3}\n"),
        "compress tiny --rules r.yaml --out small",
        "r.yaml, line 3: method 'rtn' has no field 'bitz' (did you mean 'bits'?)",
    ),
    "no recipe": (lambda w: None, "compress tiny --rules none.yaml --out small", "none.yaml: No such file"),
    "empty text": (
        lambda w: (w / "text.txt").write_text(" \n"),
        "compress tiny --text text.txt --window-length 32 --out small",
        "text.txt is empty: give a text of at least two windows",
    ),
    "one window": (
        lambda w: (w / "text.txt").write_text("x" * 40),
        "compress tiny --text text.txt --window-length 32 --out small",
        "needs at least 2 windows, got 1",
    ),
    "text that is none": (
        lambda w: (w / "text.txt").write_bytes(b"\xff\xfe"),
        "eval tiny --text text.txt",
        "is not UTF-8 text",
    ),
    "no text": (lambda w: (w / "text.txt").unlink(), "eval tiny --text text.txt", "text.txt: No such file"),
    "window too long": (
        lambda w: None,
        "eval tiny --text text.txt --window-length 65",
        "--window-length 65 is more than the 64 positions of tiny: choose at most 64",
    ),
    "no tokenizer": (
        lambda w: (w / "tiny" / "tokenizer.json").unlink(),
        "generate tiny",
        "has no tokenizer.json",
    ),
    "existing output": (
        lambda w: (w / "small").mkdir(),
        COMPRESS,
        "small exists already: choose another --out, or add --overwrite",
    ),
    "output is a file": (
        lambda w: (w / "small").write_text("mine"),
        COMPRESS + " --overwrite",
        "small was not written by effjax, so it is not replaced",
    ),
    "no place for the output": (
        lambda w: None,
        COMPRESS.replace("small", "a/small"),
        "a/small: the directory a does not exist",
    ),
    "unknown method": (lambda w: None, "compress tiny --method rtm --out small", "unknown method 'rtm' (did you mean"),
    "field of another method": (
        lambda w: None,
        "compress tiny --method nf4 --bits 4 --out small",
        "method 'nf4' has no field 'bits'",
    ),
    "bits without method": (lambda w: None, "compress tiny --bits 4 --out small", "--bits needs --method"),
    "two sources": (
        lambda w: (w / "r.yaml").write_text("rules: [{method: nf4}]"),
        "compress tiny --rules r.yaml --bits 4 --out small",
        "--rules and --bits exclude each other",
    ),
    "malformed field": (lambda w: None, COMPRESS + " --set clip", "--set clip: write FIELD=VALUE"),
    "no such model": (lambda w: None, "eval nowhere", "nowhere: no such directory"),
    "no such model for plan": (lambda w: None, "plan nowhere", "nowhere: no such directory"),
    "no such directory": (lambda w: None, "verify nowhere", "nowhere: no such directory"),
    "dense required": (lambda w: None, "eval tiny --require worse", "name one with --original"),
    "dense in a report": (lambda w: None, "report tiny --out r", "tiny is not compressed"),
    "margin": (lambda w: None, "eval tiny --original tiny --text text.txt --window-length 32 --margin 0", "must rise"),
    "temperature": (lambda w: None, "generate tiny --temperature -1", "temperature must be 0"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_bad_input(effjax: Callable[[str], Ran], work: Path, name: str) -> None:
    damage, command, message = DAMAGES[name]
    damage(work)
    before = listing(work)
    ran = effjax(command)
    assert ran.code == 2
    assert message in ran.err
    assert ran.err.splitlines()[-1].startswith("effjax: error: ") and "Traceback" not in ran.err
    assert ran.out == ""
    assert listing(work) == before


def test_every_complaint_is_one_line(effjax: Callable[[str], Ran], work: Path) -> None:
    assert len(effjax("eval nowhere").err.splitlines()) == 1


def test_flipped_bit_in_our_own_output(effjax: Callable[[str], Ran], work: Path) -> None:
    assert effjax(COMPRESS).code == 0
    path = work / "small" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)
    ran = effjax("verify small")
    assert ran.code == 1
    assert "is damaged (its hash differs)" in ran.out
    for command in ("generate small", "eval small --original tiny", "report small --original tiny --out r"):
        ran = effjax(command)
        assert ran.code == 2 and "is damaged (its hash differs)" in ran.err
    assert not (work / "r").exists()


def test_verify_finds_what_is_wrong(effjax: Callable[[str], Ran], work: Path) -> None:
    assert effjax(COMPRESS).code == 0
    (work / "small" / "config.json").write_text("{}")
    assert "config.json was changed" in effjax("verify small").out
    (work / "small" / "effjax.json").unlink()
    ran = effjax("verify small")
    assert ran.code == 1 and "effjax.json is missing" in ran.out
    truncate(work)
    ran = effjax("verify tiny")
    assert ran.code == 1 and "1000 bytes are missing" in ran.out


def test_compressing_twice_is_refused(effjax: Callable[[str], Ran], work: Path) -> None:
    assert effjax(COMPRESS).code == 0
    ran = effjax("compress small --method nf4 --out twice")
    assert ran.code == 2 and "small is compressed already" in ran.err
    ran = effjax("eval small --original small")
    assert ran.code == 2 and "--original small is compressed itself" in ran.err
    ran = effjax("eval small")
    assert (
        ran.code == 2 and "small: name the model it was made from with --original (it was made from 'tiny')" in ran.err
    )


def test_another_original_is_refused(effjax: Callable[[str], Ran], work: Path) -> None:
    assert effjax(COMPRESS).code == 0
    change_config(work, tie_word_embeddings=False)
    change_tensors(work, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    ran = effjax("eval small --original tiny --text text.txt --window-length 32")
    assert ran.code == 2 and "do not have the same tensors (1 differ: lm_head/kernel" in ran.err


def test_debug_shows_where_it_comes_from(work: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        main(["eval", "nowhere", "--debug"])


def test_interrupted_while_writing(effjax: Callable[[str], Ran], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import effjax.cli.report as command

    def interrupted(directory: Path, found: object) -> None:
        (directory / "report.json").write_text("half")
        raise KeyboardInterrupt

    assert effjax(COMPRESS).code == 0
    monkeypatch.setattr(command, "write_report", interrupted)
    before = listing(work)
    ran = effjax("report small --original tiny --text text.txt --window-length 32 --windows 2 --out shown")
    assert ran.code == 130 and "interrupted; nothing unfinished was left behind" in ran.err
    assert listing(work) == before


def run_process(work: Path, arguments: str, *, limit: int | None = None) -> subprocess.Popen[str]:
    """The command line in a process of its own, which may not write files above `limit` bytes."""

    limited = (
        "" if limit is None else f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
    )
    return subprocess.Popen(
        [sys.executable, "-c", f"{limited}from effjax.cli import main; raise SystemExit(main())", *arguments.split()],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_disk_that_takes_no_more(work: Path) -> None:
    before = listing(work)
    process = run_process(work, COMPRESS, limit=20_000)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    assert "effjax: error: small cannot be written" in err and "nothing was left behind" in err
    assert "Traceback" not in err
    assert listing(work) == before


def test_full_disk(effjax: Callable[[str], Ran], work: Path) -> None:
    disk = work / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs more rights than these; the file size limit is tested without")
    try:
        ran = effjax(COMPRESS.replace("--out small", "--out disk/small"))
        assert ran.code == 2
        assert "small cannot be written" in ran.err and "nothing was left behind" in ran.err
        assert listing(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_terminated(work: Path) -> None:
    before = listing(work)
    process = run_process(work, "compress tiny --text text.txt --window-length 32 --out all")
    assert process.stderr is not None
    first = process.stderr.readline()  # the first stage has begun
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=240)
    assert first.startswith("compress 8-bit")
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "effjax: error: interrupted; nothing unfinished was left behind"
    assert listing(work) == before


def test_interrupt_in_a_finalizer_is_not_lost() -> None:
    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), _terminated_like_interrupted():
        finalized = Finalized()
        del finalized  # Python cannot raise from here
        threading.Event().wait(30)
    assert sys.unraisablehook is hook
