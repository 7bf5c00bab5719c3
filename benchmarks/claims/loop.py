"""Claims of the training loop: it costs next to nothing, kills change no loss, meshes agree, memory falls with fsdp.

    python -m benchmarks.claims.loop [--rounds 5] [--kills 10] [--parts overhead kill meshes tpu]

Every part runs in processes of its own. The bare step is the same jitted step on one batch that lies on the device: no
input, no metrics, no file. The run that is killed reads array_record files and saves every five steps; its losses and
its last state are compared bit for bit with those of a run that nobody disturbed. The part `tpu` compiles a decoder of
155 million parameters for 16 chips of v5e by libtpu (the extra `aot`); it is left out where that is missing.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.bars import Bar, conclude
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from train.config import LoopConfig
from train.input import ArrayExamples, Batches, open_examples, write_array_record
from train.loop import fit
from train.program import Program, build
from train.sharding import make_mesh

PARTS = {"overhead": 1, "kill": 1, "meshes": 8, "tpu": 1}  # CPU devices of each
MILLION = DecoderConfig(
    vocab_size=512, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
)
FOUR_MILLION = DecoderConfig(
    vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4
)
LARGE = DecoderConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    scan_layers=True,
    remat=True,
)
MESHES = ("data=1", "data=8", "fsdp=8", "data=2,fsdp=2,tensor=2")
KILL_STEPS, KILL_BATCH, VOCABULARY, WIDTH = 150, 16, 256, 128


def loss_of(shape: DecoderConfig) -> Any:
    """Next-token cross-entropy of windows."""
    model = Decoder(shape)

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        del key
        windows = batch["tokens"]
        logits = jnp.asarray(model.apply({"params": params}, windows[:, :-1]), jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return losses.sum(), jnp.float32(losses.size)

    return loss_fn


def init_of(shape: DecoderConfig) -> Any:
    return lambda key: Decoder(shape).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def windows_of(vocabulary: int, count: int, length: int) -> np.ndarray:
    """Random walks over the vocabulary: something to learn."""
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 4, (count, length + 1)).cumsum(1) + rng.integers(0, vocabulary, (count, 1))
    return (steps % vocabulary).astype(np.int32)


def overhead(rounds: int) -> dict[str, Any]:
    """Seconds a step, bare and in the loop, in turns."""
    found: dict[str, Any] = {}
    for name, shape, batch, length, steps in (
        ("1 M", MILLION, 8, 64, 60),
        ("4 M", FOUR_MILLION, 8, 64, 30),
    ):
        windows = windows_of(shape.vocab_size, 512, length)
        data = Batches(examples=ArrayExamples({"tokens": windows}), batch=batch)
        config = LoopConfig(steps=steps + 12, warmup=5, save_every=10**6, log_every=20, eval_every=0)
        program = build(loss_of(shape), init_of(shape), config, make_mesh("data=1"))
        times: dict[str, list[float]] = {"bare": [], "loop": []}
        for _ in range(rounds):
            times["bare"].append(_bare(program, data.read(0, slice(0, batch)), steps))
            times["loop"].append(_looped(shape, data, config, steps))
        ratios = [loop / bare for bare, loop in zip(times["bare"], times["loop"], strict=True)]
        count = sum(x.size for x in jax.tree.leaves(program.shapes.params))
        text = " ".join(f"{1e3 * b:.1f}/{1e3 * x:.1f}" for b, x in zip(times["bare"], times["loop"], strict=True))
        print(f"{name}: {count:,} parameters; ms a step, bare/loop: {text}", flush=True)
        found[name] = {"parameters": count, "ratios": ratios, **times}
    return found


def _bare(program: Program, batch: Any, steps: int) -> float:
    state, rows = program.start(), program.put(batch, False)
    with jax.set_mesh(program.mesh):
        for index in range(steps + 5):
            if index == 5:
                jax.block_until_ready(state)
                began = time.perf_counter()
            state, _ = program.step(state, rows)
        jax.block_until_ready(state)
    return (time.perf_counter() - began) / steps


class _Clocked:
    """Batches that note when each of them was asked for: the loop does so once a step, always as far ahead."""

    def __init__(self, batches: Batches):
        self._inner = batches.open(build_across())
        self.times: list[float] = []

    def __next__(self) -> Any:
        self.times.append(time.perf_counter())
        return next(self._inner)

    def get_state(self) -> Any:
        return self._inner.get_state()

    def set_state(self, state: Any) -> None:
        self._inner.set_state(state)


def build_across() -> Any:
    """Where batches lie on one device."""
    return jax.sharding.NamedSharding(make_mesh("data=1"), jax.P(("data", "fsdp")))


def _looped(shape: DecoderConfig, data: Batches, config: LoopConfig, steps: int) -> float:
    clocked = _Clocked(data)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        fit(loss_of(shape), init_of(shape), clocked, config, Path(folder) / "run")
    return (clocked.times[steps + 7] - clocked.times[7]) / steps


def init_small(key: jax.Array) -> Any:
    """A network that starts in seconds: two tokens to the next, with dropout, so that keys matter."""
    shapes = {"embed": (VOCABULARY, WIDTH), "up_proj": (2 * WIDTH, 4 * WIDTH), "lm_head": (4 * WIDTH, VOCABULARY)}
    keys = jax.random.split(key, len(shapes))
    return {
        n: {"kernel": jax.random.normal(k, s) * s[0] ** -0.5} for k, (n, s) in zip(keys, shapes.items(), strict=True)
    }


def small_loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Next-token cross-entropy of `init_small`."""
    embedded = params["embed"]["kernel"][batch["tokens"][:, :-1]]
    pairs = jnp.concatenate([embedded[:, :-1], embedded[:, 1:]], axis=-1)
    hidden = jax.nn.relu(pairs @ params["up_proj"]["kernel"])
    hidden = hidden * jax.random.bernoulli(key, 0.9, hidden.shape)
    logits = hidden @ params["lm_head"]["kernel"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 2:])
    return losses.sum(), jnp.float32(losses.size)


def child(out: Path) -> None:
    """The run that is killed: goes on where it was, and says a hash of its parameters when it is done."""
    data = Batches(examples=open_examples(str(out.parent / "*.array_record")), batch=KILL_BATCH, seed=1)
    config = LoopConfig(steps=KILL_STEPS, warmup=10, save_every=5, keep=2, eval_every=0, log_every=1000)
    state = fit(small_loss, init_small, data, config, out, resume=True)
    digest = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state)))
    print("state", digest.hexdigest(), flush=True)


def kill(kills: int) -> dict[str, Any]:
    """Kills one run again and again; moments are drawn, some of them before its first step."""
    rng = np.random.default_rng(int(time.time()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        windows = windows_of(VOCABULARY, 300, 64)
        for part in range(3):
            rows = ({"tokens": row} for row in windows[part::3])
            write_array_record(folder / f"part-{part}.array_record", rows)
        whole, began = _finish(folder / "whole"), time.perf_counter()
        moments, saving = [], 0
        for index in range(kills):
            run = subprocess.Popen(_command("child", folder / "killed"), stdout=subprocess.DEVNULL)
            log = folder / "killed" / "metrics.jsonl"
            before = _last(log)  # a run that goes on drops the lines that it will repeat
            starting = index % 5 == 4  # two of ten while it starts, the others while it trains
            while not starting and run.poll() is None and _last(log) <= before:
                time.sleep(0.005)
            time.sleep(float(rng.uniform(0, 3)))
            if run.poll() is None:
                run.send_signal(signal.SIGKILL)
            run.wait()
            moments.append(_last(log))
            saving += any("tmp" in path.name for path in (folder / "killed").glob("checkpoints/*"))
            print(f"kill {index + 1}: exit {run.returncode}, last line of step {moments[-1]}", flush=True)
        killed = _finish(folder / "killed")
        print(f"{kills} kills in {time.perf_counter() - began:.0f} s, {saving} of them left a checkpoint half written")
    different = sum(a != b for a, b in zip(whole[0], killed[0], strict=True))
    return {"kills": kills, "moments": moments, "saving": saving, "different": different, "same": whole[1] == killed[1]}


def _last(log: Path) -> int:
    """Step of the last whole line."""
    lines = log.read_text().splitlines() if log.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return steps[-1] if steps else 0


def _finish(out: Path) -> tuple[list[float], str]:
    """Losses of all steps, and the hash of the state, after the run was let go to its end."""
    done = subprocess.run(_command("child", out), capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, KILL_STEPS + 1))
    return [record["loss"] for record in records], done.stdout.split("state ")[1].strip()


def meshes() -> dict[str, Any]:
    """Losses of 20 steps and bytes on a device, by mesh; then the same in four parts, and in bfloat16."""
    windows = windows_of(MILLION.vocab_size, 320, 32)
    data = Batches(examples=ArrayExamples({"tokens": windows}), batch=32, threads=0)
    losses: dict[str, list[float]] = {}
    found: dict[str, Any] = {}
    arms = [(mesh, mesh, {}) for mesh in MESHES]
    arms += [("data=2, 4 parts", "data=2", {"accumulate": 4}), ("bfloat16", "data=8", {"compute_dtype": "bfloat16"})]
    for name, mesh, options in arms:
        config = LoopConfig(steps=20, warmup=2, **options)
        program = build(loss_of(MILLION), init_of(MILLION), config, make_mesh(mesh))
        batches = data.open(program.across)
        compiled = program.lower({"tokens": windows[:32]}).compile()
        with jax.set_mesh(program.mesh):
            state, losses[name] = program.start(), []
            for _ in range(20):
                rows = program.put(next(batches), False)
                state, measured = compiled(state, rows)
                losses[name].append(float(measured["loss"][0]) / float(measured["loss"][1]))
        memory = compiled.memory_analysis()
        held = memory.argument_size_in_bytes - rows["tokens"].addressable_shards[0].data.nbytes
        first = np.array(losses[MESHES[0]])
        found[name] = {
            "difference": float(np.abs(np.array(losses[name]) / first - 1).max()),
            "state": held,
            "arithmetic": program.state_bytes[1],
            "temporary": memory.temp_size_in_bytes,
        }
        print(
            f"{name:24} loss {losses[name][0]:.4f} to {losses[name][-1]:.4f}, off by {found[name]['difference']:.1e}; "
            f"on a device {held / 1e6:.3f} MB of state, {program.state_bytes[1] / 1e6:.3f} by arithmetic, "
            f"{memory.temp_size_in_bytes / 1e6:.2f} temporary",
            flush=True,
        )
    return found


def tpu() -> dict[str, Any]:
    """Bytes on each of 16 chips that are not there, as their compiler plans them."""
    from jax.experimental import topologies

    chips = topologies.get_topology_desc("v5e:4x4", platform="tpu").devices
    batch = {"tokens": jax.ShapeDtypeStruct((64, 513), "int32")}
    found: dict[str, Any] = {}
    for mesh in ("fsdp=16", "fsdp=4,tensor=4", "data=16"):
        config = LoopConfig(steps=20, warmup=2, compute_dtype="bfloat16")
        program = build(loss_of(LARGE), init_of(LARGE), config, make_mesh(mesh, chips))
        whole, each = program.state_bytes
        memory = program.lower(batch).compile().memory_analysis()
        held = memory.argument_size_in_bytes
        taken = held + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        found[mesh] = {"arithmetic": each, "state": held, "taken": taken}
        print(
            f"v5e:4x4 {mesh:16} state {each / 1e9:.2f} GB of {whole / 1e9:.2f}, arguments {held / 1e9:.2f}, "
            f"with all that is temporary {taken / 1e9:.2f}",
            flush=True,
        )
    return found


def _command(part: str, *rest: Any) -> list[str]:
    return [sys.executable, "-m", "benchmarks.claims.loop", "--run", part, *map(str, rest)]


def _part(name: str, *rest: Any) -> Any:
    """What a part found, in a process of its own; its other lines are shown."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    run = subprocess.Popen(_command(name, *rest), stdout=subprocess.PIPE, text=True, env=environment)
    assert run.stdout is not None
    last = ""
    for line in run.stdout:
        last = line
        if not line.startswith("{"):
            print(line, end="", flush=True)
    if run.wait():
        raise RuntimeError(f"the part {name} ended with exit code {run.returncode}: {last}")
    return json.loads(last)


def judge(found: dict[str, Any]) -> dict[str, Bar]:
    bars: dict[str, Bar] = {}
    for name, arm in found.get("overhead", {}).items():
        bars[f"step in the loop over the bare step, {name}"] = Bar(statistics.median(arm["ratios"]), high=1.03)
    if "kill" in found:
        bars["kill -9: steps whose loss differs"] = Bar(found["kill"]["different"], high=0)
        bars["kill -9: last state bit for bit the same"] = Bar(float(found["kill"]["same"]), low=1)
    if "meshes" in found:
        arms = {name: arm for name, arm in found["meshes"].items() if name != "bfloat16"}
        bars["largest relative difference of a loss, meshes and parts"] = Bar(
            max(arm["difference"] for arm in arms.values()), high=1e-4
        )
        ratios = [arm["state"] / arm["arithmetic"] for arm in arms.values()]
        bars["8 devices: compiled state over arithmetic, furthest from 1"] = Bar(
            max(ratios, key=lambda r: abs(r - 1)), low=1, high=1
        )
        fsdp, data = (found["meshes"][mesh]["state"] for mesh in ("fsdp=8", "data=8"))
        bars["8 devices: state on a device, fsdp=8 over data=8"] = Bar(fsdp / data, high=0.13)
    if found.get("tpu"):
        chips = found["tpu"]
        for mesh, arm in chips.items():
            bars[f"v5e:4x4 {mesh}: arguments over arithmetic"] = Bar(arm["state"] / arm["arithmetic"], low=1, high=1.02)
        bars["v5e:4x4: all bytes of a chip, fsdp=16 over data=16"] = Bar(
            chips["fsdp=16"]["taken"] / chips["data=16"]["taken"], high=0.5
        )
    return bars


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims.loop", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of the bare step and the loop, in turns")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)  # one part, in this process
    args = parser.parse_args(argv)
    if args.run:
        name, *rest = args.run
        if name == "child":
            child(Path(rest[0]))
            return 0
        jax.config.update("jax_num_cpu_devices", PARTS[name])
        found = {"overhead": overhead, "kill": kill, "meshes": meshes, "tpu": tpu}[name](*map(int, rest))
        print(json.dumps(found))
        return 0
    found: dict[str, Any] = {}
    for name in args.parts:
        if name == "tpu" and importlib.util.find_spec("libtpu") is None:
            print("v5e:4x4: left out, there is no libtpu; pip install 'effjax[aot]'")
            continue
        found[name] = _part(name, *{"overhead": [args.rounds], "kill": [args.kills]}.get(name, []))
    return conclude("loop", judge(found), found)


if __name__ == "__main__":
    sys.exit(main())
