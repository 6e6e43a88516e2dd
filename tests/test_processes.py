"""Tests several processes as one: results, stopping, and resuming with another number.

This file is also the script of one of two processes: ``python tests/test_processes.py WORKDIR PORT
PROCESS [key=value ...]`` trains the small objective.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import compiler
import jax
import numpy as np
import pytest
import toy
from data import synthetic

from wamjax import train
from wamjax.data.records import Writer
from wamjax.envs import collection
from wamjax.runs import closed_loop, trained
from wamjax.training import guards, metrics, sharding
from wamjax.training.checkpoint import Checkpoints

STEPS = 24
ALONE = 4  # steps that a single process takes first
SIGNAL = 6  # batch before which one of two processes gets a signal
DEATH = 19  # batch before which one of two is killed
INTERRUPT = 14  # batch before which one of two is interrupted from a keyboard
EPISODES = 22
WIDTH = 512  # of the small objective, so that a process's shards are in its own files


def config(**changes):
    """Tests a run too short for any metrics line."""
    every = {"total_steps": STEPS, "log_every": 100_000, "checkpoint.every": 4}
    return toy.config(**every | changes)


# ---- the script ----


def data_of(root):
    return synthetic.config(root, demos={"collect": {"episodes": 3}}, batch_size=4)


def slow_collect(out, settings):
    """Replaces collection by synthetic episodes, and logs each collection."""
    with (out.parent / "collections.txt").open("a") as file:
        file.write(f"{jax.process_index()}\n")
    time.sleep(0.5)
    of = synthetic.info(collection=settings.to_json())
    with Writer(out, of) as writer:
        for i in range(settings.episodes):
            writer.write(synthetic.episode(i, 5 + i, of))


def roll_out(rolled=None):
    """Replaces evaluation by random outcomes from an episode's key; `rolled` counts episodes."""

    def chance(policy, config, world, tasks, keys, shift, function):
        luck = np.asarray(jax.vmap(jax.random.uniform)(keys))
        if rolled is not None:
            rolled.append(len(luck))
        steps = (100 * luck).astype(int)
        actions = np.zeros((len(luck), 100, 4))
        return types.SimpleNamespace(
            success=luck > 0.4, steps=steps, crashes=0 * steps, actions=actions, extras=None
        )

    asked = config()
    asked.eval.update({"tasks": ("reach_red", "pick_red"), "episodes": EPISODES, "batch_size": 8,
                       "blind": False})  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closed_loop, "play", chance)
        return closed_loop.roll_out(trained.Policy(None, {}, {}), asked, {})


def prepare(workdir):
    """Runs the steps before and after training: collects data, evaluates a policy."""
    collection.collect = slow_collect
    asked = data_of(workdir / "data")
    mesh = sharding.make_mesh(asked.mesh)
    rows = sharding.batch_rows(mesh, asked.data.batch_size)
    batch = next(train.build_data(asked, rows).iterator)
    rolled = []
    report = {
        "rows": rows.tolist(), "episode": batch["episode"].tolist(),
        "evaluation": roll_out(rolled), "rolled": rolled, "crossed": crossed(),
    }  # fmt: skip
    (workdir / f"process{jax.process_index()}.json").write_text(json.dumps(report))


def crossed():
    """Reports the rows of this process, and the global batch, on a mesh in which the devices of a
    process are not neighbours, as on a torus."""
    devices = np.array(jax.devices())[[0, 2, 1, 3]].reshape(4, 1, 1)
    mesh = jax.sharding.Mesh(devices, sharding.AXES)
    rows = sharding.batch_rows(mesh, 8)
    batch = sharding.global_batch({"x": 10 * rows}, mesh)["x"]
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(batch)
    return [rows.tolist(), np.asarray(whole).tolist()]


def end(number):
    """Lets pending checkpoints finish, while the other process waits, then signals this process."""
    time.sleep(1.5)
    os.kill(os.getpid(), number)


def script(workdir, port, process, *options):
    asked = dict(option.split("=") for option in options)
    workdir, at = pathlib.Path(workdir), int(asked.pop("at"))
    number, toy.WIDTH = signal.Signals[asked.pop("signal")], WIDTH
    train.join(f"localhost:{port}", 2, process)
    with guards.company():
        if asked.pop("prepare", ""):
            prepare(workdir)
        trap = (at, lambda: end(number)) if process == 1 else None
        toy.run(config(**{k: int(v) for k, v in asked.items()}), workdir / "run", trap=trap)


# ---- the tests ----


def launch(workdir, *options, devices=2):
    """Runs both processes; returns their output, exit statuses, and seconds between their ends."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": compiler.flags(devices)}
    here = pathlib.Path(__file__)
    env["PYTHONPATH"] = os.pathsep.join([str(here.parent.parent), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(here), str(workdir), str(port)]
    both = [
        subprocess.Popen([*command, str(i), *options], env=env, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said, ends = ["", ""], [0.0, 0.0]

    def listen(i):
        said[i] = both[i].communicate(timeout=120)[1]
        ends[i] = time.monotonic()

    listeners = [threading.Thread(target=listen, args=(i,)) for i in range(2)]
    try:
        for listener in listeners:
            listener.start()
        for listener in listeners:
            listener.join()
    finally:
        for process in both:
            process.kill()
    return said, [process.returncode for process in both], abs(ends[0] - ends[1])


def damage(run, part):
    """Truncates files of the newest checkpoint."""
    paths = list((run / "checkpoints" / str(latest(run))).glob(part))
    assert paths, part
    for path in paths:
        path.write_bytes(path.read_bytes()[:5])


def latest(run):
    with Checkpoints(run, keep=2) as checkpoints:
        return checkpoints.latest


@pytest.fixture(scope="module")
def wide():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "WIDTH", WIDTH)
        yield


@pytest.fixture(scope="module")
def alone(wide, tmp_path_factory):
    """Runs one process without interruption."""
    workdir = tmp_path_factory.mktemp("alone")
    assert toy.run(config(), workdir, devices=jax.devices()[:1])
    return metrics.read(workdir)


@pytest.fixture(scope="module")
def pod(wide, tmp_path_factory):
    """Runs one process, then two until a signal stops them, two until one dies, two until one is
    interrupted, then one. Before the second and the third pair, the newest checkpoint is damaged:
    process 1's data position, and shards that only process 1 reads."""
    workdir = tmp_path_factory.mktemp("pod")
    run, out = workdir / "run", {"workdir": workdir}
    trap = (ALONE - 1, lambda: signal.raise_signal(signal.SIGTERM))
    assert toy.run(config(), run, devices=jax.devices()[:1], trap=trap) is False
    out["signal"] = launch(workdir, "prepare=1", "mesh.data=1", "mesh.tensor=4", f"at={SIGNAL}",
                           "signal=SIGTERM")  # fmt: skip
    out["stopped"] = latest(run), len(metrics.read(run))
    out["positions"] = {p.name for p in (run / "checkpoints" / str(latest(run)) / "data").iterdir()}
    damage(run, "data/process_1-of-2.json")
    halves = ("mesh.data=1", "mesh.fsdp=2")
    out["death"] = launch(workdir, *halves, f"at={DEATH}", "signal=SIGKILL", devices=1)
    out["left"] = latest(run)
    damage(run, "*/ocdbt.process_1/d/*")
    out["interrupt"] = launch(workdir, *halves, f"at={INTERRUPT}", "signal=SIGINT", devices=1)
    out["interrupted"] = latest(run), len(metrics.read(run))
    out["kept"] = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert toy.run(config(), run, devices=jax.devices()[:1])
    return out


@pytest.mark.parametrize(
    "event, stopped, at", [("signal", "stopped", SIGNAL), ("interrupt", "interrupted", INTERRUPT)]
)
def test_a_signal_to_one_of_two_stops_both_after_the_same_step(pod, event, stopped, at):
    said, status, _ = pod[event]
    assert status == [0, 0], said
    # The step in preparation, and those in flight until all processes know.
    step = at + 1 + guards.LAG
    assert pod[stopped] == (step, step)
    assert f"another process was stopped: saved at step {step}" in said[0]
    assert {"process_0-of-2.json", "process_1-of-2.json"} <= pod["positions"]


def test_the_death_of_one_of_two_ends_the_other(pod):
    said, status, seconds = pod["death"]
    assert status[1] == -signal.SIGKILL, said
    assert status[0] in (1, -signal.SIGABRT), said  # by itself, or by JAX
    assert seconds < 30
    last = said[0].strip().splitlines()[-1]
    assert last.startswith("process 0 of 2") and "another process of this run died" in last
    assert "continue from the newest checkpoint" in last
    assert "process 1 of 2 ended without a word: it was killed" in said[1]
    assert pod["left"] == 16


def test_a_checkpoint_damaged_for_one_process_is_set_aside_for_both(pod):
    """The process that reports it is not the one that could not read it."""
    events = (("death", pod["stopped"][0], 8, "process_1-of-2.json: "),
              ("interrupt", pod["left"], 12, rf"slice\({WIDTH // 2}, {WIDTH}, 1\)"))  # fmt: skip
    for event, step, older, part in events:
        said = pod[event][0]
        told = f"checkpoint {step} in .* cannot be read: .*{part}.* one before, checkpoint {older}"
        assert re.search(told, said[0])
        assert f"continuing from checkpoint {older}\n" in said[0]
        assert f"checkpoint {step} is set aside as" in said[0]
        assert "Damaged" not in said[1]
    damaged = [f"damaged-{step}" for step in (pod["left"], pod["stopped"][0])]
    assert pod["kept"] == ["16", "17", *damaged]


def test_resuming_with_another_number_of_processes_changes_nothing(pod, alone):
    """Runs one process, two with a tensor axis, twice two that share the batch, then one."""
    assert f"continuing from checkpoint {ALONE}\n" in pod["signal"][0][0]
    got = metrics.read(pod["workdir"] / "run")
    assert [row["step"] for row in got] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm"):
        ours, theirs = ([row[key] for row in rows] for rows in (got, alone))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=key)


def reports(pod):
    return [json.loads((pod["workdir"] / f"process{i}.json").read_text()) for i in range(2)]


def test_two_processes_collect_missing_data_once(pod):
    assert (pod["workdir"] / "data/collections.txt").read_text() == "0\n"
    whole = next(train.build_data(data_of(pod["workdir"] / "data")).iterator)["episode"]
    rows = [report["rows"] for report in reports(pod)]
    assert rows == [[0, 1], [2, 3]]
    for report in reports(pod):
        assert report["episode"] == whole[report["rows"]].tolist()


def test_the_rows_of_a_process_are_those_that_its_devices_hold(pod):
    rows, batches = zip(*(report["crossed"] for report in reports(pod)), strict=True)
    assert rows == ([0, 1, 4, 5], [2, 3, 6, 7])
    assert batches == 2 * (list(range(0, 80, 10)),)


def test_episodes_of_an_evaluation_are_shared_and_are_those_of_one_process(pod):
    for report in reports(pod):
        assert report["evaluation"] == roll_out()
        assert sum(report["rolled"]) == 16  # 22 in waves of 2 x 8


@pytest.mark.parametrize(
    "error, text",
    [
        (jax.errors.JaxRuntimeError("Gloo AllReduce failed: Connection closed by peer"), "died or"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), "Traceback"),
        (ValueError("bad data"), "Traceback.*ValueError: bad data"),
        (SystemExit("stopped: occupied"), "process 0 of 2: stopped: occupied\n"),
        (KeyboardInterrupt(), "Traceback"),
    ],
)
def test_a_process_that_fails_does_not_wait_for_the_others(error, text, monkeypatch, capfd):
    def fail():
        with guards.company():
            raise error

    with pytest.raises(type(error)):  # alone it ends as usual
        fail()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.exit(f"status {status}"))
    with pytest.raises(pytest.exit.Exception, match="status 1"):
        fail()
    assert re.search(text, capfd.readouterr().err, re.DOTALL)
    with pytest.raises(SystemExit), guards.company():
        sys.exit(0)


def test_two_runs_on_one_host_collect_the_same_data_once(tmp_path, monkeypatch):
    """Starts two independent runs."""
    monkeypatch.setattr(collection, "collect", slow_collect)
    asked, opened = data_of(tmp_path), []

    def open_it():
        opened.append(next(train.build_data(asked).iterator)["episode"].tolist())

    both = [threading.Thread(target=open_it) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert (tmp_path / "collections.txt").read_text() == "0\n"
    assert len(opened) == 2 and opened[0] == opened[1]
    assert not list(tmp_path.glob(".*"))


if __name__ == "__main__":
    compiler.collect_rarely()
    script(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
