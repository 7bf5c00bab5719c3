"""Our GPTQ beside llm-compressor's: same model, same calibration windows, same settings, each from its packed form.

python -m benchmarks.peers.weight_quant --data DIR [--environment DIR] [--threads N] [--models M ...] [--parts P ...]

`DIR` holds `models/stories260K/hf` and `text/tinystories_sample/tinystories_sample.txt`. llm-compressor runs in an
environment of its own, made with pip from the default index where `--environment` has none; it gets the model as a
Hugging Face directory and the token windows as an array, and what it saves is read by our importer.

Both sides calibrate block by block: the statistics of all weights of a decoder layer on one run of it, dense, then one
run of it, compressed, for the inputs of the next. That is llm-compressor's default. Ours goes in four groups within a
layer ("true sequential") by default; it is listed as well. Times are of calibration and compression, not of imports,
loading or saving; the two sides take turns on the same cores with as many threads, each with the batch it is fastest
with. Processor seconds are compared: with one thread they are the wall seconds of an idle machine, and other work on a
busy one changes them less.
"""

import argparse
import dataclasses
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import effjax as ej
from benchmarks import language_models
from benchmarks.bars import Bar, conclude
from benchmarks.claims.stories260k import LENGTH, MODEL, TEXT, weight_bytes
from benchmarks.peers import scaling
from benchmarks.peers.process import Timing, Worker, environment, gptq_recipe, save_tokens
from effjax.errors import EffjaxError
from effjax.evaluate import Comparison, compare_many
from effjax.models.decoder import stages
from effjax.models.hf import LoadedModel, load_model, save_hf
from effjax.paths import leaves_with_paths
from effjax.recipe import Recipe
from effjax.rules import is_dense_matrix
from effjax.sequential import compress_sequentially

CALIBRATION, FEW, DAMPING, GROUP, REPEATS = 64, 8, 0.01, 32, 3
# Windows at once, for each side what it is fastest with on a CPU; llm-compressor's default is 1.
BATCH, PEER_BATCH = 1, 8
DOWN = "*/mlp/down_proj/kernel"
MODELS, PARTS, PEER = ("stories260K", "embedded"), ("speed", "quality", "growth"), "llm-compressor"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One row: what both sides are asked for."""

    bits: int
    group_size: int | None
    symmetric: bool = False
    act_order: bool = False

    def __str__(self) -> str:
        grouping = "per channel" if self.group_size is None else f"group {self.group_size}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits} bits {kind}, {grouping}" + (", act-order" if self.act_order else "")


SETTINGS = (
    Setting(bits=4, group_size=GROUP),
    Setting(bits=4, group_size=GROUP, symmetric=True),
    Setting(bits=4, group_size=None),
    Setting(bits=3, group_size=GROUP),
    Setting(bits=3, group_size=GROUP, act_order=True),
    Setting(bits=3, group_size=None, symmetric=True),
    Setting(bits=2, group_size=GROUP),
    Setting(bits=2, group_size=GROUP, act_order=True),
)
TIMED = SETTINGS[0]
BY_GROUPS = (SETTINGS[0], SETTINGS[3], SETTINGS[6])  # those for which our own order within a layer is listed too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A model with its windows, in memory and as the files that llm-compressor reads."""

    name: str
    model: LoadedModel
    calibration: np.ndarray
    evaluation: np.ndarray
    directory: Path
    tokens: Path

    @property
    def channelwise_down(self) -> bool:
        """Whether groups do not divide the inputs of the last projection of a layer; it is per channel then."""
        return self.model.config.intermediate_size % GROUP != 0


def stories(data: Path, work: Path, seed: int) -> Task:
    """stories260K on disk, with the windows of all benchmarks."""
    return on_disk(language_models.stories(data), work, seed)


def embedded(work: Path, seed: int) -> Task:
    """The model in the package, judged on all of its held-out documents."""
    return on_disk(language_models.embedded(judged=sys.maxsize), work, seed)


def on_disk(task: language_models.Task, work: Path, seed: int) -> Task:
    directory, calibration = work / task.name, task.calibration(seed, CALIBRATION)
    save_hf(directory, task.model.config, task.model.params)
    return Task(
        name=task.name,
        model=task.model,
        calibration=calibration,
        evaluation=task.evaluation,
        directory=directory,
        tokens=save_tokens(work / f"{task.name}.npy", calibration),
    )


def our_gptq(setting: Setting) -> Any:
    """GPTQ with llm-compressor's rules: grids of the weights as they are, symmetric scales of absmax / 7.5, float32."""
    return ej.quantize.GPTQ(
        bits=setting.bits,
        group_size=setting.group_size,
        symmetric=setting.symmetric,
        act_order=setting.act_order,
        static_groups=setting.group_size is not None,
        clip="full" if setting.symmetric else "absmax",
        damping=DAMPING,
        scale_dtype="float32",
    )


def our_recipe(task: Task, method: Any) -> Recipe:
    """`method` for all dense layers, per channel where its groups do not divide."""
    if method.group_size is None or not task.channelwise_down:
        return Recipe(rules=((None, method),))
    changes = {"group_size": None} | ({"static_groups": False} if hasattr(method, "static_groups") else {})
    return Recipe(rules=((DOWN, dataclasses.replace(method, **changes)), (None, method)))


def compress(task: Task, method: Any, *, whole_block: bool = True, windows: int = CALIBRATION) -> Any:
    """Our sequential compression; `whole_block` takes all weights of a layer as one group, as llm-compressor does."""
    parts = stages(task.model.config)
    if whole_block:
        parts = [dataclasses.replace(p, groups=(sum(p.groups, ()),)) if p.groups else p for p in parts]
    recipe = our_recipe(task, method)
    return jax.block_until_ready(
        compress_sequentially(task.model.params, recipe, parts, task.calibration[:windows], micro_batch=BATCH)
    )


def timed(fn: Callable[[], Any]) -> tuple[Any, Timing]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = fn()
    return result, Timing(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def peer_recipe(task: Task, setting: Setting) -> dict[str, Any]:
    return gptq_recipe(
        bits=setting.bits,
        group_size=setting.group_size,
        symmetric=setting.symmetric,
        act_order=setting.act_order,
        damping=DAMPING,
        channelwise_down=task.channelwise_down,
    )


def quality(task: Task, worker: Worker, threads: int, console: Console) -> dict[str, dict[str, float]]:
    """Every setting by both sides."""
    candidates: dict[str, Any] = {}
    for setting in SETTINGS:
        out = task.directory.with_name(f"{task.name}-{len(candidates)}")
        worker.run(task.directory, task.tokens, peer_recipe(task, setting), batch=PEER_BATCH, threads=threads, save=out)
        candidates[f"{setting}: {PEER}"] = load_model(out).params
        candidates[f"{setting}: effjax"] = compress(task, our_gptq(setting))
        if setting in BY_GROUPS:
            own = compress(task, our_gptq(setting), whole_block=False)
            candidates[f"{setting}: effjax, groups in a layer"] = own
        print(f"weight_quant: {task.name}, {setting}: done", file=sys.stderr)
    # Lifted with no allowance: any dense copy of a packed weight would raise.
    apply = ej.lift(task.model.apply, on_materialize="error", limit=0)
    results = compare_many(apply, task.model.params, candidates, task.evaluation, batch_size=2)
    show_quality(task, candidates, results, console)
    return {
        name: {"perplexity": c.perplexity, "excess": c.delta_nll, "bytes": matrix_bytes(task, candidates[name])}
        for name, c in results.items()
    }


def matrix_bytes(task: Task, params: Any) -> int:
    paths = {path for path, leaf in leaves_with_paths(task.model.params) if is_dense_matrix(path, leaf)}
    return weight_bytes(params, paths)


def show_quality(task: Task, candidates: dict[str, Any], results: dict[str, Comparison], console: Console) -> None:
    dense = next(iter(results.values())).perplexity_reference
    size = matrix_bytes(task, task.model.params)
    windows = f"{len(task.evaluation)} windows of {LENGTH}, calibrated on {len(task.calibration)}"
    table = Table(title=f"{task.name}: perplexity {dense:.4f} dense, {size:,} bytes; {windows}")
    for column in ("setting", "by", "bytes", "perplexity", "excess", "95 % interval", "ours / peer's"):
        table.add_column(column)
    for setting in SETTINGS:
        peer = results[f"{setting}: {PEER}"].perplexity
        for by in (PEER, "effjax", "effjax, groups in a layer"):
            name = f"{setting}: {by}"
            if name not in results:
                continue
            c = results[name]
            ratio = "" if by == PEER else f"{c.perplexity / peer:.4f}"
            first = str(setting) if by == PEER else ""
            bytes_ = f"{matrix_bytes(task, candidates[name]):,}"
            table.add_row(first, by, bytes_, f"{c.perplexity:.4f}", f"{c.delta_nll:+.4f}", c.interval, ratio)
        table.add_section()
    console.print(table)


def speed(task: Task, worker: Worker, threads: int, console: Console) -> dict[str, Any]:
    """Seconds of both sides for one setting, taking turns; ours also cold, by its solver alone, and LeanQuant's."""
    recipe = peer_recipe(task, TIMED)
    gptq = our_gptq(TIMED)
    lean = ej.quantize.LeanQuant(bits=TIMED.bits, group_size=TIMED.group_size)
    stats = ej.calibrate(
        lambda params, tokens: task.model.apply({"params": params}, tokens),
        task.model.params,
        [(task.calibration[i : i + BATCH],) for i in range(0, CALIBRATION, BATCH)],
    )

    def solver(method: Any) -> Callable[[], Any]:
        rules = [(is_dense_matrix if where is None else where, m) for where, m in our_recipe(task, method).rules]
        return lambda: jax.block_until_ready(ej.quantize_params(task.model.params, rules, stats=stats))

    ours: dict[str, Callable[[], Any]] = {
        "effjax GPTQ": lambda: compress(task, gptq),
        f"effjax GPTQ, {FEW} windows": lambda: compress(task, gptq, windows=FEW),
        "effjax GPTQ, groups in a layer": lambda: compress(task, gptq, whole_block=False),
        "effjax LeanQuant": lambda: compress(task, lean),
        "effjax GPTQ, solver": solver(gptq),
        "effjax LeanQuant, solver": solver(lean),
    }
    cold: dict[str, Timing] = {}
    compilations: dict[str, scaling.Compilations] = {}
    for name, run in ours.items():
        jax.clear_caches()
        with scaling.counted() as compilations[name]:
            cold[name] = timed(run)[1]
        print(f"weight_quant: {task.name}, {name}: first run", file=sys.stderr)
    for run in ours.values():  # the caches were emptied for each of the first runs
        run()
    few_tokens = save_tokens(task.tokens.with_stem(f"{task.name}-few"), task.calibration[:FEW])
    few = f"{PEER}, {FEW} windows"
    first = worker.run(task.directory, task.tokens, recipe, batch=PEER_BATCH, threads=threads)
    firsts = {PEER: first["compress_s"], f"{PEER}, solver": first["solver_s"]}
    rounds: dict[str, list[Timing]] = {name: [] for name in (PEER, few, f"{PEER}, solver", *ours)}
    for _ in range(REPEATS):
        answer = worker.run(task.directory, task.tokens, recipe, batch=PEER_BATCH, threads=threads)
        rounds[PEER].append(Timing(wall=answer["compress_s"], cpu=answer["compress_cpu_s"]))
        rounds[f"{PEER}, solver"].append(Timing(wall=answer["solver_s"], cpu=answer["solver_cpu_s"]))
        answer = worker.run(task.directory, few_tokens, recipe, batch=PEER_BATCH, threads=threads)
        rounds[few].append(Timing(wall=answer["compress_s"], cpu=answer["compress_cpu_s"]))
        for name, run in ours.items():
            rounds[name].append(timed(run)[1])
    table = Table(title=f"{task.name}, {TIMED}: seconds to calibrate and compress, median of {REPEATS} in turn")
    for column in ("what", "wall", "processor", "first run, wall", "compiled then", "of it compiling"):
        table.add_column(column)
    figures: dict[str, Any] = {}
    for name, runs in rounds.items():
        wall, cpu = statistics.median(t.wall for t in runs), statistics.median(t.cpu for t in runs)
        start = cold[name].wall if name in cold else firsts.get(name)
        programs = compilations.get(name)
        counts = ("", "") if programs is None else (str(programs.count), f"{programs.seconds:.2f}")
        begun = "" if start is None else f"{start:.3f}"
        table.add_row(name, f"{wall:.3f}", f"{cpu:.3f}", begun, *counts)
        figures[name] = {"wall_s": wall, "cpu_s": cpu, "first_s": start, "all": [dataclasses.astuple(t) for t in runs]}
    console.print(table)
    return figures


def growth(console: Console) -> dict[str, Any]:
    """Cost against layers and against inputs."""
    method = ej.quantize.GPTQ(bits=4, group_size=GROUP)
    depths, widths = scaling.by_layers(method), scaling.by_inputs(method)
    table = Table(title="GPTQ against depth (width 128) and against the inputs of a square matrix; processor seconds")
    for column in ("", "seconds", "compiled in the first run", "in the next"):
        table.add_column(column)
    for d in depths:
        table.add_row(f"{d.layers} layers", f"{d.seconds:.3f}", str(d.compilations), str(d.again))
    for n, taken in widths.items():
        table.add_row(f"{n} inputs", f"{taken:.3f}")
    console.print(table)
    slope, departure = scaling.linearity(depths)
    return {
        "layers": [dataclasses.asdict(d) for d in depths],
        "inputs": widths,
        "seconds_per_layer": slope,
        "departure_from_line": departure,
        "exponent": scaling.exponent(widths),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.weight_quant", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"directory that holds {MODEL} and {TEXT}")
    parser.add_argument("--environment", type=Path, default=Path("build/llmcompressor"), help="of llm-compressor")
    parser.add_argument("--threads", type=int, default=1, help="cores that each side has while its turn is")
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration windows")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args(argv)
    for name in (MODEL, TEXT):
        if not (options.data / name).exists():
            print(f"weight_quant: --data {options.data} holds no {name}; name the directory that does", file=sys.stderr)
            return 2
    # Before jax makes its threads; the worker inherits it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
    console, python = Console(width=140), environment(options.environment)
    judged: dict[str, Bar] = {}
    with tempfile.TemporaryDirectory() as name, Worker(python, Path(name) / "worker.log") as worker:
        work = Path(name)
        figures: dict[str, Any] = {"versions": worker.versions | {"jax": jax.__version__}, "threads": options.threads}
        try:
            for model in options.models:
                task = (
                    embedded(work, options.seed) if model == "embedded" else stories(options.data, work, options.seed)
                )
                if "speed" in options.parts:
                    figures[f"{model}, seconds"] = seconds = speed(task, worker, options.threads, console)
                    judged |= speed_bars(model, seconds)
                if "quality" in options.parts:
                    figures[f"{model}, quality"] = results = quality(task, worker, options.threads, console)
                    judged |= quality_bars(model, results)
        except EffjaxError as error:
            print(f"weight_quant: {error}", file=sys.stderr)
            return 2
    if "growth" in options.parts:
        figures["growth"] = grown = growth(console)
        judged |= growth_bars(grown)
    return conclude("weight_quant", judged, figures)


def quality_bars(model: str, results: dict[str, dict[str, float]]) -> dict[str, Bar]:
    """Our perplexity over llm-compressor's."""
    ratios = {str(s): results[f"{s}: effjax"]["perplexity"] / results[f"{s}: {PEER}"]["perplexity"] for s in SETTINGS}
    worst = max(ratios, key=lambda setting: ratios[setting])
    mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios.values()))
    return {
        f"{model}: perplexity ours / {PEER}, worst ({worst})": Bar(ratios[worst], high=1.005),
        f"{model}: perplexity ours / {PEER}, geometric mean": Bar(mean, high=1.005),
    }


def speed_bars(model: str, seconds: dict[str, Any]) -> dict[str, Bar]:
    """Processor seconds over processor seconds once all is compiled, of the whole and of the solvers."""

    def over(a: str, b: str) -> float:
        return seconds[a]["cpu_s"] / seconds[b]["cpu_s"]

    return {
        f"{model}: {PEER} / our GPTQ, time": Bar(over(PEER, "effjax GPTQ"), low=10),
        f"{model}: the same, solvers alone": Bar(over(f"{PEER}, solver", "effjax GPTQ, solver"), low=10),
        f"{model}: LeanQuant / GPTQ, time": Bar(over("effjax LeanQuant", "effjax GPTQ"), high=2),
        f"{model}: the same, solvers alone ": Bar(over("effjax LeanQuant, solver", "effjax GPTQ, solver"), high=2),
    }


def growth_bars(grown: dict[str, Any]) -> dict[str, Bar]:
    """Straight in the layers, cubic in the inputs, and as many programs for 16 layers as for 2."""
    depths = grown["layers"]
    return {
        "compilations, 16 layers / 2 layers": Bar(depths[-1]["compilations"] / depths[0]["compilations"], high=1),
        "departure from a line in the layers": Bar(grown["departure_from_line"], high=0.1),
        "power of the inputs, 1024 to 2048": Bar(grown["exponent"], high=3.3),
    }


if __name__ == "__main__":
    raise SystemExit(main())
