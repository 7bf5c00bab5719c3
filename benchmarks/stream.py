"""Checkpoints larger than memory: peak memory under the budget, flat time a layer, and the same bytes after 20 kills.

    python -m benchmarks.stream            (needs 8 GiB of disk, in a directory that is removed afterwards)
    python -m benchmarks.stream --smoke    (a tenth of it)
    python -m benchmarks.stream --parts kills

Models are generated: random weights in shards as Hugging Face writes them, in bfloat16 or float32. Every compression is
the command `effjax compress` in a process of its own, whose peak memory the system counts. The first process of each
method is the one that is timed; kills come at random times of a run whose length is known by then.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.bars import Bar, conclude
from effjax.io.safetensors_file import layout, put
from effjax.models.config import DecoderConfig
from effjax.models.hf import expected_tensors
from effjax.stream.work import only_naming_left, read_journal, work_directory

_CALIBRATION = "--calibration-windows 16 --calibration-length 256"
_BLOCK = 1 << 22  # values that are drawn; larger tensors repeat them, which no method here can tell


def generate(directory: Path, config: DecoderConfig, dtype: str, *, shards: int, seed: int = 0) -> int:
    """Writes a random model in shards, one tensor after the other; returns the bytes of its weights."""
    directory.mkdir()
    tensors = expected_tensors(config)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    names, index = list(tensors), {}
    rng, total = np.random.default_rng(seed), 0
    block = rng.standard_normal(_BLOCK).astype(np.float32)
    for number in range(shards):
        file = directory / f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        head, entries = layout(file, {name: (kind, tensors[name].shape) for name in own}, metadata={"format": "pt"})
        with file.open("wb") as stream:
            stream.write(head)
            for name, entry in entries.items():
                put(stream, entry, _values(block, entry.shape, kind, tensors[name].path, rng))
                index[name], total = file.name, total + entry.nbytes
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (directory / "config.json").write_text(json.dumps(config.to_hf() | {"torch_dtype": dtype}))
    return total


def _values(
    block: np.ndarray, shape: tuple[int, ...], kind: np.dtype, path: str, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    if path.endswith("scale"):
        yield np.ones(shape, kind)
        return
    size, scale = int(np.prod(shape)), shape[-1] ** -0.5
    for start in range(0, size, _BLOCK):
        part = np.roll(block, int(rng.integers(_BLOCK)))[: min(_BLOCK, size - start)]
        yield (part * np.float32(scale)).astype(kind)


def byte_tokenizer(directory: Path) -> None:
    """A token a byte, so that any text calibrates the random model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


def decoder(layers: int, hidden: int, inner: int, vocab: int) -> DecoderConfig:
    """A decoder of these sizes, with heads of 64."""
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_ids=(1,),
        tie_word_embeddings=True,
    )


@dataclasses.dataclass(frozen=True)
class Ran:
    """One process: exit code, seconds, most memory in bytes, what it said, and when each unit was finished."""

    code: int
    seconds: float
    peak: int
    err: str
    finished: dict[str, float]


def compress(model: Path, out: Path, flags: str, *, kill_after: float | None = None) -> Ran:
    """`effjax compress` in a process of its own, killed after some seconds where that is asked for."""
    command = [sys.executable, "-m", "effjax.cli", "compress", str(model), *flags.split(), "--out", str(out)]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, env=os.environ)
        finished: dict[str, float] = {}
        peak = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            now = time.monotonic() - began
            for line in read_journal(work_directory(out) / "journal.jsonl")[0]:
                if "unit" in line:
                    finished.setdefault(line["unit"], now)
            peak = max(peak, _peak(process.pid))
            if kill_after is not None and now >= kill_after:
                os.kill(process.pid, signal.SIGKILL)  # Popen would wait for it too, and so take its usage
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        err.seek(0)
        text = err.read()
    peak = max(peak, usage.ru_maxrss * 1024)
    return Ran(process.returncode, time.monotonic() - began, peak, text, finished)


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * int(match[1]) if match else 0


def digest(directory: Path) -> str:
    """One hash of all files of a checkpoint."""
    total = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        total.update(file.name.encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                total.update(chunk)
    return total.hexdigest()


def remove(directory: Path) -> None:
    """Removes a checkpoint."""
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()


def killed(model: Path, out: Path, flags: str, expected: str, runs: int, rng: random.Random, seconds: float) -> int:
    """Of `runs` random kills, how many were survived: the bytes at the end are those of the whole run."""
    kills = 0
    while kills < runs:
        since = 0
        for _ in range(100):
            begun = kills < runs and since < 4
            ran = compress(model, out, flags, kill_after=rng.uniform(0.1, 1.0) * seconds if begun else None)
            if ran.code == 0:
                break
            if ran.code != -signal.SIGKILL:
                raise SystemExit(f"a killed run does not go on: {ran.err}")
            kills, since = kills + 1, since + 1
            print(f"  killed after {ran.seconds:.1f} s, {kills} kills", flush=True)
            if out.exists() and not only_naming_left(out):  # it had its name already: nothing was left to do
                break
        same = digest(out) == expected
        remove(out)
        if not same or work_directory(out).exists():
            return 0
    return kills


def slope(finished: dict[str, float]) -> float:
    """Median seconds of the last third of the blocks over those of the first third, the first block left out."""
    times = [t for name, t in sorted(finished.items(), key=lambda pair: pair[1]) if name.startswith("layers_")]
    steps = np.diff(np.asarray(times))
    third = max(1, len(steps) // 3)
    return float(np.median(steps[-third:]) / np.median(steps[:third]))


def data_free(work: Path, smoke: bool) -> tuple[dict[str, Bar], dict[str, object]]:
    """RTN of a model that is larger than the budget, under two budgets and one that is too small."""
    config = decoder(4, 1024, 4096, 4096) if smoke else decoder(18, 2048, 8192, 32000)
    model, flags = work / "big", "--method rtn --bits 4 --group-size 128"
    total = generate(model, config, "float32", shards=5)
    print(f"RTN: {total / 2**30:.2f} GiB of float32 in 5 shards", flush=True)
    ran = _must(compress(model, work / "out", f"{flags} --memory 2GiB"))
    whole = digest(work / "out")
    remove(work / "out")
    tight = _must(compress(model, work / "out", f"{flags} --memory 600MiB"))
    same = digest(work / "out") == whole
    remove(work / "out")
    refused = compress(model, work / "out", f"{flags} --memory 300MiB")
    told = refused.code == 2 and "allow at least" in refused.err and not work_directory(work / "out").exists()
    remove(model)
    bars = {
        "RTN: peak memory over a budget of 2 GiB": Bar(ran.peak / 2**31, high=1.0),
        "RTN: peak memory over a budget of 600 MiB": Bar(tight.peak / (600 * 2**20), high=1.0),
        "RTN: same bytes under both budgets": Bar(float(same), low=1.0),
        "RTN: a budget of 300 MiB is refused": Bar(float(told), low=1.0),
        "RTN: seconds a layer, last third over first": Bar(slope(ran.finished), high=1.5),
    }
    peaks = {"rtn_peak_mib": ran.peak / 2**20, "rtn_tight_peak_mib": tight.peak / 2**20}
    return bars, {"rtn_gib": total / 2**30, "rtn_seconds": ran.seconds, **peaks}


def calibrated(work: Path, smoke: bool) -> tuple[dict[str, Bar], dict[str, object]]:
    """GPTQ and LeanQuant of a model that is larger than their budgets."""
    config = decoder(4, 256, 512, 2048) if smoke else decoder(26, 1024, 2048, 2048)
    model = work / "small"
    total = generate(model, config, "float32", shards=3)
    byte_tokenizer(model)
    print(f"GPTQ and LeanQuant: {total / 2**30:.2f} GiB of float32 in 3 shards", flush=True)
    bars: dict[str, Bar] = {}
    extra: dict[str, object] = {"calibrated_gib": total / 2**30}
    for name, flags, budget in (
        ("GPTQ", "--method gptq", 768),
        ("LeanQuant", "--method lean_quant --set group_size=none", 896),
    ):
        ran = _must(compress(model, work / "out", f"{flags} --bits 4 {_CALIBRATION} --memory {budget}MiB"))
        remove(work / "out")
        bars[f"{name}: peak memory over a budget of {budget} MiB"] = Bar(ran.peak / (budget * 2**20), high=1.0)
        bars[f"{name}: seconds a layer, last third over first"] = Bar(slope(ran.finished), high=1.5)
        extra |= {f"{name.lower()}_seconds": ran.seconds, f"{name.lower()}_peak_mib": ran.peak / 2**20}
    remove(model)
    return bars, extra


def kills(work: Path, smoke: bool, count: int) -> tuple[dict[str, Bar], dict[str, object]]:
    """Random kills, half of them of RTN and half of GPTQ."""
    rng = random.Random(0)
    model = work / "tiny"
    generate(model, decoder(6, 128 if smoke else 256, 512, 512), "bfloat16", shards=2)
    byte_tokenizer(model)
    survived = 0
    for flags in ("--method rtn --bits 4", f"--method gptq --bits 4 {_CALIBRATION}"):
        ran = _must(compress(model, work / "out", flags))
        expected = digest(work / "out")
        remove(work / "out")
        survived += killed(model, work / "out", flags, expected, count // 2, rng, ran.seconds)
    return {"kills with the same bytes at the end": Bar(survived, low=2 * (count // 2))}, {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tenth of the sizes, two kills")
    parser.add_argument("--directory", type=Path, default=None, help="where the models are made")
    parser.add_argument("--parts", nargs="+", default=["data-free", "calibrated", "kills"])
    arguments = parser.parse_args()
    smoke = arguments.smoke
    parts = {
        "data-free": data_free,
        "calibrated": calibrated,
        "kills": lambda work, smoke: kills(work, smoke, 2 if smoke else 20),
    }
    bars: dict[str, Bar] = {}
    extra: dict[str, object] = {}
    for name in arguments.parts:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as work:
            found, more = parts[name](Path(work), smoke)
        bars |= found
        extra |= more
    return conclude("stream", bars, extra)


def _must(ran: Ran) -> Ran:
    if ran.code:
        raise SystemExit(f"exit code {ran.code}: {ran.err}")
    print(f"  {ran.seconds:.1f} s, peak {ran.peak / 2**20:.0f} MiB", flush=True)
    return ran


if __name__ == "__main__":
    sys.exit(main())
