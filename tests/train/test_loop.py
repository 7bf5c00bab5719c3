"""The training loop: learning, exact resume after SIGTERM, a crash and kill -9, meshes, metrics, errors."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.errors import CheckpointError, ConfigError
from effjax.io.safetensors_file import read_entries
from train.config import LoopConfig
from train.loop import NonFiniteLossError
from train.loop import fit as fit_loop
from train.sharding import make_mesh, partition_spec
from train.step import init_state, make_optimizer, make_step

WIDTH, BATCH = 16, 64
CONFIG = LoopConfig(steps=10, learning_rate=0.1, warmup=2, save_every=4, log_every=5, seed=3)


def init(key):
    first, second = jax.random.split(key)
    return {
        "in": {"kernel": jax.random.normal(first, (WIDTH, 32)) / 4, "bias": jnp.zeros(32)},
        "out": {"kernel": jax.random.normal(second, (32, 1)) / 6},
    }


def loss_fn(params, batch, key):
    x, y = batch["x"], batch["y"]
    x = x + 0.01 * jax.random.normal(key, x.shape)  # so that a resumed run needs the right key
    hidden = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"][None])
    return jnp.sum((hidden @ params["out"]["kernel"] - y) ** 2), jnp.float32(len(x))


def batch_at(step):
    x = np.random.default_rng((0, step)).normal(size=(BATCH, WIDTH)).astype(np.float32)
    return {"x": x, "y": x[:, :1] * 2}


def fit(out, config=CONFIG, *, batches=batch_at, **options):
    return fit_loop(loss_fn, init, batches, config, out, **options)


def losses(out):
    return {r["step"]: r["loss"] for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    return fit(out), out


def test_loss_falls_and_every_step_is_recorded(uninterrupted):
    state, out = uninterrupted
    values = losses(out)
    assert list(values) == list(range(1, CONFIG.steps + 1))
    assert np.mean([values[9], values[10]]) < 0.5 * np.mean([values[1], values[2]])
    assert int(state.step) == CONFIG.steps


def test_resume_after_sigterm_gives_identical_losses_and_parameters(uninterrupted, tmp_path, capsys):
    expected, out = uninterrupted

    def terminated(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(step)

    before = signal.getsignal(signal.SIGTERM)
    stopped = fit(tmp_path, batches=terminated)
    assert int(stopped.step) == 6, "the step under way is finished and saved"
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = fit(tmp_path, resume=True)
    assert losses(tmp_path) == losses(out)
    chex.assert_trees_all_equal(resumed, expected)
    assert "step 10/10" in capsys.readouterr().out


def test_resume_after_a_crash_repeats_the_steps_since_the_last_checkpoint(uninterrupted, tmp_path):
    expected, out = uninterrupted

    def crashing(step):
        if step == 7:
            raise RuntimeError("power cut")
        return batch_at(step)

    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, batches=crashing)
    assert max(losses(tmp_path)) == 7
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a line cut short, as kill -9 leaves it
    chex.assert_trees_all_equal(fit(tmp_path, resume=True), expected)
    assert losses(tmp_path) == losses(out)


def test_resume_of_a_finished_run_returns_its_state_and_old_checkpoints_go(uninterrupted):
    expected, out = uninterrupted
    chex.assert_trees_all_equal(fit(out, resume=True), expected)
    kept = sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [8, 10]


def test_a_run_is_not_overwritten_by_accident(uninterrupted):
    _, out = uninterrupted
    with pytest.raises(ConfigError, match="already holds a run at step 10: pass resume, or name another folder"):
        fit(out)


KILLED = """
import sys, time, jax
jax.config.update("jax_num_cpu_devices", 8)
from pathlib import Path
from tests.train.test_loop import batch_at, fit
fit(Path(sys.argv[1]), batches=lambda step: (time.sleep(0.05), batch_at(step))[1])
"""


def test_resume_after_kill_9_gives_identical_losses_and_parameters(uninterrupted, tmp_path):
    expected, out = uninterrupted
    root = Path(__file__).resolve().parents[2]
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, stdout=subprocess.DEVNULL)
    log, limit = tmp_path / "metrics.jsonl", time.monotonic() + 120
    while run.poll() is None and not (log.exists() and log.read_text().count("\n") >= 6) and time.monotonic() < limit:
        time.sleep(0.005)
    run.kill()
    assert run.wait() == -signal.SIGKILL, "it was to be killed before it ends"
    chex.assert_trees_all_equal(fit(tmp_path, resume=True), expected)
    assert losses(tmp_path) == losses(out)


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_same_losses_on_eight_devices(uninterrupted, tmp_path, mesh):
    expected, out = uninterrupted
    config = LoopConfig(
        **{
            **vars(CONFIG),
            "mesh": mesh,
        }
    )
    rules = [("in/kernel", jax.P("fsdp", "tensor")), ("*", jax.P())] if "tensor" in mesh else None
    state = fit(tmp_path, config, rules=rules)
    here, there = losses(tmp_path), losses(out)
    np.testing.assert_allclose([here[s] for s in there], list(there.values()), rtol=1e-4)
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(expected.params), rtol=1e-3, atol=1e-4)
    sizes = make_mesh(mesh).shape
    for tree in (state.params, optax.tree.get(state.opt_state, "mu")):
        kernel = tree["in"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // (sizes["fsdp"] * sizes["tensor"])


def test_a_checkpoint_goes_on_on_another_mesh(uninterrupted, tmp_path):
    _, out = uninterrupted

    def crashing(step):
        if step == 5:
            raise RuntimeError("power cut")
        return batch_at(step)

    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, batches=crashing)
    fit(tmp_path, LoopConfig(**{**vars(CONFIG), "mesh": "data=2,fsdp=2"}), resume=True)
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(losses(out).values()), rtol=1e-4)


def test_metrics_are_sums_and_counts_that_add_over_batches():
    optimizer = make_optimizer(CONFIG)
    state = jax.jit(lambda: init_state(init, optimizer, seed=0))()
    step = jax.jit(make_step(lambda params, batch, key: loss_fn(params, batch, jax.random.key(0)), optimizer))
    _, metrics = step(state, batch_at(0))
    total, count = metrics["loss"]
    assert count == BATCH
    expected, _ = loss_fn(state.params, batch_at(0), jax.random.key(0))
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_decay_takes_kernels_alone():
    config = LoopConfig(steps=10, warmup=0, learning_rate=0.1, weight_decay=0.5)
    params = {
        "mlp": {"kernel": jnp.ones((2, 2))},
        "embed": {"embedding": jnp.ones((2, 2))},
        "norm": {"scale": jnp.ones(2)},
    }
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["mlp"]["kernel"], -0.05, rtol=1e-6)
    chex.assert_trees_all_equal(
        (updates["embed"], updates["norm"]), jax.tree.map(jnp.zeros_like, (params["embed"], params["norm"]))
    )


def test_nan_stops_before_anything_bad_is_saved(tmp_path):
    def poisoned(step):
        batch = batch_at(step)
        return {**batch, "y": batch["y"] * np.float32(np.nan)} if step == 5 else batch

    with pytest.raises(
        NonFiniteLossError,
        match=r"nan at step 6, whose batch is in .*: lower learning_rate=0.1 or resume from step 4 in ",
    ):
        fit(tmp_path, batches=poisoned)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert max(losses(tmp_path)) == 5
    kept = read_entries(tmp_path / "failed_step_6.safetensors")
    np.testing.assert_array_equal(kept["x"].read(), batch_at(5)["x"])
    assert np.isnan(kept["y"].read()).all()


def test_evaluation_runs_when_asked_and_at_the_end(tmp_path):
    config = LoopConfig(**{**vars(CONFIG), "eval_every": 4})
    fit(tmp_path, config, evaluate=lambda params: {"size": jnp.sum(jnp.abs(params["out"]["kernel"]))})
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in records if "size" in record] == [4, 8, 10]


def test_event_files_hold_what_the_lines_hold(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    config = LoopConfig(**{**vars(CONFIG), "tensorboard": True, "steps": 3})
    fit(tmp_path, config)
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # length, its checksum, an event, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
    assert {step: found[step, "loss"] for step in (1, 2, 3)} == losses(tmp_path)
    assert {tag for _, tag in found} == {"loss", "grad_norm", "count", "seconds"}


def test_a_checkpoint_of_another_model_is_refused(uninterrupted):
    _, out = uninterrupted
    with pytest.raises(CheckpointError, match="checkpoint 10 in checkpoints does not hold the state of this run"):
        fit_loop(loss_fn, lambda key: {"in": jnp.ones(3)}, batch_at, CONFIG, out, resume=True)


def test_data_that_end_are_an_error_after_their_last_step(tmp_path):
    class Short:
        def __init__(self):
            self.done = 0

        def __next__(self):
            if self.done == 3:
                raise StopIteration
            self.done += 1
            return batch_at(self.done)

        def get_state(self):
            return self.done

        def set_state(self, state):
            self.done = state

    with pytest.raises(ConfigError, match="the data end after 3 of steps=10: repeat them"):
        fit(tmp_path, batches=Short())
    assert list(losses(tmp_path)) == [1, 2, 3]


def test_partition_spec_takes_the_largest_dimension_that_fits():
    assert partition_spec((256, 640), 2) == jax.P(None, "fsdp")
    assert partition_spec((256, 641), 2) == jax.P("fsdp")
    assert partition_spec((255, 641), 2) == jax.P()
    assert partition_spec((256,), 2) == jax.P()
    assert partition_spec((256, 640), 1) == jax.P()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_mesh("model=2"), "cannot read 'model=2'; write axis=size with axes data, fsdp, tensor"),
        (lambda: make_mesh("data=0"), "cannot read 'data=0'"),
        (lambda: make_mesh("data=3,fsdp=3"), "needs 9 devices, 8 exist: lower an axis"),
        (lambda: LoopConfig(steps=0), "steps=0: must be at least 1"),
        (lambda: LoopConfig(accumulate=0), "accumulate=0: must be at least 1"),
        (lambda: LoopConfig(compute_dtype="int8"), "compute_dtype='int8': must be float32 or bfloat16"),
        (lambda: LoopConfig(steps=5, warmup=5), "warmup=5: must be at least 0 and below steps=5"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
