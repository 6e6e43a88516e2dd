"""Tests that resuming is bitwise exact after a real kill at any point."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import compiler
import jax
import numpy as np
import pytest
import toy

from wamjax.training import metrics, optim, sharding
from wamjax.training import state as states
from wamjax.training.checkpoint import Checkpoints, restore_params
from wamjax.tree import flatten

STEPS = 12  # checkpoints every 4 steps
TIMING = ("step_time", "data_wait", "mfu")


def start(workdir, kill_at=-1, devices=2, **options):
    """Starts the loop in its own process."""
    env = os.environ | {"XLA_FLAGS": compiler.flags(devices)}
    root = pathlib.Path(toy.__file__).parent.parent
    env["PYTHONPATH"] = os.pathsep.join([str(root), env.get("PYTHONPATH", "")])
    args = [sys.executable, toy.__file__, str(workdir), str(STEPS), str(kill_at)]
    args += [f"{k}={v}" for k, v in options.items()]
    return subprocess.Popen(args, env=env, stderr=subprocess.PIPE, text=True)


def launch(workdir, kill_at=-1):
    """Runs it to its end; returns (stderr, exit status)."""
    process = start(workdir, kill_at)
    return process.communicate(timeout=300)[1], process.returncode


def losses(workdir):
    return [{k: v for k, v in r.items() if k not in TIMING} for r in metrics.read(workdir)]


def state_of(workdir):
    """Returns the content of the last checkpoint by path, and the data position."""
    run = pathlib.Path(workdir)
    with Checkpoints(run, keep=2) as checkpoints:
        step = checkpoints.latest
        config = toy.config(total_steps=STEPS)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        abstract = jax.eval_shape(lambda: states.create(toy.Toy(), optim.make(config), config))
        places = sharding.state_shardings(abstract, abstract.params, mesh)
        data = toy.iterator(8)
        state = checkpoints.restore(sharding.with_shardings(abstract, places), data)
    return step, {k: np.asarray(v) for k, v in flatten(state).items()}, data.get_state()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reference")
    assert toy.run(toy.config(total_steps=STEPS), workdir, devices=jax.devices()[:2])
    return workdir


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Returns a run that was killed repeatedly."""
    workdir = tmp_path_factory.mktemp("killed")
    # Before the first checkpoint; right after one started, which may or may not complete in the
    # background; between two.
    for kill_at, latest in ((2, [None]), (8, [4, 8]), (10, [4, 8])):
        said, status = launch(workdir, kill_at)
        assert status == -signal.SIGKILL, said
        assert not (workdir / "DONE").exists()
        with Checkpoints(workdir, keep=2) as checkpoints:
            assert checkpoints.latest in latest
    return workdir


@pytest.fixture
def run(killed, tmp_path):
    """Returns a copy of the killed run, to resume."""
    return shutil.copytree(killed, tmp_path / "run")


def test_a_run_killed_repeatedly_ends_bitwise_the_same(uninterrupted, run):
    said, status = launch(run)
    assert status == 0, said
    assert "continuing from checkpoint" in said
    assert losses(run) == losses(uninterrupted)
    assert [r["step"] for r in losses(run)] == list(range(1, STEPS + 1))
    step, state, position = state_of(run)
    want_step, want, want_position = state_of(uninterrupted)
    assert step == want_step == STEPS and position == want_position
    assert state.keys() == want.keys()
    for key in want:
        assert state[key].tobytes() == want[key].tobytes(), key
    assert json.loads((run / "DONE").read_text()) == {"step": STEPS}


@pytest.mark.parametrize("devices, mesh", [(4, {"data": 2, "fsdp": 2}), (1, {})])
def test_resumes_on_another_number_of_devices(uninterrupted, run, devices, mesh):
    config = toy.config(total_steps=STEPS, **{f"mesh.{k}": v for k, v in mesh.items()})
    assert toy.run(config, run, devices=jax.devices()[:devices])
    got, want = losses(run), losses(uninterrupted)
    assert [r["step"] for r in got] == [r["step"] for r in want]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
    a, b = (flatten(restore_params(w, ema=False).params) for w in (run, uninterrupted))
    for key in b:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-4, err_msg=key)


def test_a_run_stopped_by_a_signal_saves_and_resumes_bitwise(uninterrupted, tmp_path, capsys):
    config, devices = toy.config(total_steps=STEPS), jax.devices()[:2]
    for number, at in ((signal.SIGTERM, 5), (signal.SIGINT, 8)):
        before = signal.getsignal(number)
        trap = (at, lambda number=number: signal.raise_signal(number))
        assert toy.run(config, tmp_path, devices=devices, trap=trap) is False
        assert signal.getsignal(number) is before
        assert signal.Signals(number).name in capsys.readouterr().err
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            assert checkpoints.latest == at + 1  # the step in flight is finished and saved
        assert not (tmp_path / "DONE").exists()
        assert losses(tmp_path) == losses(uninterrupted)[: at + 1]
    assert toy.run(config, tmp_path, devices=devices)
    assert losses(tmp_path) == losses(uninterrupted)


def test_two_processes_train_as_one(uninterrupted, tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    both = [start(tmp_path, devices=1, port=port, processes=2, process=i) for i in range(2)]
    said = [p.communicate(timeout=300)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    got, want = losses(tmp_path), losses(uninterrupted)
    assert [r["step"] for r in got] == [r["step"] for r in want]  # only one of them writes
    np.testing.assert_allclose([r["loss"] for r in got], [r["loss"] for r in want], rtol=1e-5)
    assert not any("loss" in line for line in said[1].splitlines() if line.startswith("step"))
    positions = sorted(p.name for p in (tmp_path / "checkpoints" / str(STEPS) / "data").iterdir())
    assert {"process_0-of-2.json", "process_1-of-2.json"} <= set(positions)
