"""Tests worlds behind a socket: the same outcomes, restarts after crashes, refused calls."""

import ast
import contextlib
import os
import pathlib
import re
import socket
import struct
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from envs import fake
from envs.test_host import KEYS, TASKS, play

from wamjax.envs import host, remote, worker
from wamjax.envs.world import World, open_world
from wamjax.serving import wire

ROOT = pathlib.Path(__file__).parents[2]


class Served:
    """Runs a server of `env` in another process at `address`."""

    def __init__(self, env, port=0, path=""):
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(path)])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "wamjax.envs.remote", f"--env={env}", f"--port={port}"],
            env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.address = self.process.stdout.readline().split(" at ")[1].strip()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        host.close_idle()
        self.process.terminate()
        assert self.process.wait(timeout=20) == 0
        self.process.stdout.close()


@pytest.fixture(scope="module")
def served():
    with Served("envs.fake:Line") as server:
        yield server


def same(one, two):
    for name in ("success", "steps", "rewards", "returns", "actions", "proprio", "crashes"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    assert one.tasks == two.tasks and one.instructions == two.instructions
    jax.tree.map(np.testing.assert_array_equal, (one.frames, one.extras), (two.frames, two.extras))


def test_a_remote_world_describes_itself(served):
    world, here = open_world(f"remote:at={served.address},workers=3"), fake.world()
    assert isinstance(world, World) and world.workers == 3
    for name in ("tasks", "cameras", "proprio_names", "action_names", "shifts", "dials", "versions",
                 "control_hz", "max_steps", "expert", "noisy", "name"):  # fmt: skip
        assert getattr(world, name) == getattr(here, name), name
    assert open_world(f"remote:at={served.address}").workers == os.cpu_count()


@pytest.mark.parametrize("record", [False, True])
def test_episodes_equal_those_of_the_local_environment(served, record):
    world = open_world(f"remote:at={served.address},workers=3")
    for shift in ({}, {"slip": 0.1}):
        there, here = (play(w, record=record, shift=shift) for w in (world, fake.world()))
        assert record == bool(there.frames)
        same(there, here)
        assert there.success.any()


def test_demonstrations_equal_those_of_the_local_environment():
    with Served("envs.fake:Line") as server:
        world = open_world(f"remote:at={server.address},workers=2")
        world = host.dataclasses.replace(world, expert=True, noisy=(1.0,))
        there = world.demonstrate(TASKS, KEYS, noise=0.1)
        here = fake.world(expert=True, noisy=(1.0,)).demonstrate(TASKS, KEYS, noise=0.1)
    same(there.recording, here.recording)
    np.testing.assert_array_equal(there.intended, here.intended)
    np.testing.assert_array_equal(there.length, here.length)


def test_crashed_environments_are_restarted_and_counted(tmp_path, caplog):
    for i in range(2):
        (tmp_path / f"crash-{i}").touch()
    with Served(f"envs.fake:Line:crash={tmp_path}") as server:
        done = play(open_world(f"remote:at={server.address},workers=3"))
    whole = play(fake.world())
    assert done.crashes.sum() == 2 and "the connection broke" in caplog.text
    np.testing.assert_array_equal(done.success, whole.success)
    np.testing.assert_array_equal(done.steps, whole.steps)


def test_a_restarted_server_is_found_again(caplog, monkeypatch):
    """Idle connections break, and each one counts as a crash."""
    monkeypatch.setattr(remote, "GRACE", 0.1)
    with Served("envs.fake:Line") as first:
        world = open_world(f"remote:at={first.address},workers=2")
        before = play(world)
        first.process.terminate()
        first.process.wait(timeout=20)
        with Served("envs.fake:Line", port=int(first.address.rpartition(":")[2])):
            after = play(world)
    np.testing.assert_array_equal(before.steps, after.steps)
    assert before.crashes.sum() == 0 and 1 <= after.crashes.sum() <= 2


def test_an_answer_that_takes_too_long_is_a_crash(served, caplog):
    connection = remote.Connection(served.address, timeout=0.0)
    connection.send("reset", "left", 0, {})
    with pytest.raises(worker.Died, match="no answer within 0 s"):
        connection.receive()
    connection.close()


def test_errors_of_the_environment_are_reported(served):
    with pytest.raises(RuntimeError, match="'sideways' cannot be reset .*KeyError: 'sideways'"):
        play(open_world(f"remote:at={served.address},workers=1"), ["sideways"], KEYS[:1])


@pytest.mark.parametrize(
    "message",
    [
        ("make", ["os:system", {"command": "true"}]),  # the call of a local worker
        ("__init__", []),
        ["reset"],
        {"reset": []},
        b"\x93garbage",
        2**40,
    ],
)
def test_the_server_closes_invalid_connections_and_continues(served, message):
    place, port = remote.split(served.address)
    with socket.create_connection((place, port), timeout=20) as peer:
        data = message if isinstance(message, bytes) else wire.pack(message)
        length = message if isinstance(message, int) else len(data)
        peer.sendall(struct.pack(">Q", length) + data)
        with contextlib.suppress(ConnectionResetError):  # the server did not read everything
            assert peer.recv(1) == b""
    play(open_world(f"remote:at={served.address},workers=1"), TASKS[:1], KEYS[:1])


def test_an_environment_that_hangs_ends_with_its_connection(tmp_path):
    """The socket tells its process that the client is gone, however long a step takes."""
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "class Slow:\n"
        "    def reset(self, task, seed, shift):\n"
        "        open(task, 'w').write(str(os.getpid()))\n"
        "        time.sleep(1000)\n"
    )
    number = tmp_path / "pid"
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        a, b = socket.socketpair()
        program = remote._PROGRAM.format(b.fileno(), "slow:Slow", {})
        process = subprocess.Popen([sys.executable, "-c", program], pass_fds=[b.fileno()])
    b.close()
    remote.Channel(a, 2**20).send(("reset", [str(number), 0, {}]))
    end = time.monotonic() + 60
    while not (number.exists() and number.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    assert int(number.read_text()) == process.pid and process.poll() is None
    a.close()
    assert process.wait(timeout=30) == 1


def test_the_environment_of_the_docs_page_can_be_served(tmp_path):
    page = (ROOT / "docs" / "worlds.md").read_text()
    code = re.search(r'```python title="my_kitchen.py"\n(.*?)```', page, re.S)[1]
    (tmp_path / "my_kitchen.py").write_text(code)
    with Served("my_kitchen:Kitchen", path=tmp_path) as server:
        world = open_world(f"remote:at={server.address},workers=2")
        rise = jax.tree_util.Partial(lambda o, k: np.ones((2, 5, 1)))
        done = world.roll_out(rise, ["rise"] * 2, KEYS[:2], shift={}, told={}, execute=5)
    assert world.name == "kitchen" and done.success.all() and (done.steps < 6).all()


def test_a_wrong_address_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", 0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=rf"{address}.*python -m wamjax.envs.remote --env="):
        open_world(f"remote:at={address}")
    with pytest.raises(ValueError, match="address 'localhost' of a world must be HOST:PORT"):
        open_world("remote:at=localhost")
    with pytest.raises(ValueError, match=r"'remote:att=1'.*argument 'att'"):
        open_world("remote:att=1")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"camera": {}}, "unknown key 'camera', did you mean 'cameras'"),
        ({"tasks": None}, "lacks 'tasks'"),
    ],
)
def test_an_invalid_description_is_an_error(change, message):
    about = {k: v for k, v in (fake.Line().describe() | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        host.described(about)


def test_arrays_of_any_size_are_sent_completely():
    """Covers all kinds and sizes of an answer, also larger than a socket's buffer."""
    a, b = socket.socketpair()
    near, far = remote.Channel(a, 2**30), remote.Channel(b, 2**30)
    rng = np.random.default_rng(0)
    for shape, dtype in [((3, 40, 700, 3), "u1"), ((7,), "?"), ((5, 2), "f4"), ((0, 4), "f8")]:
        value = rng.integers(0, 2, shape).astype(dtype)
        thread = threading.Thread(target=near.send, args=({"x": value},))
        thread.start()
        got = far.recv(timeout=20)["x"]
        thread.join()
        np.testing.assert_array_equal(got, value)
        assert got.dtype == value.dtype
    near.close()
    with pytest.raises(EOFError):
        far.recv()
    far.close()


@pytest.mark.parametrize(
    "text, place, options",
    [
        ("line", "line", {}),
        ("a.b:c", "a.b:c", {}),
        ("a.b:c:size=96,fast=False,x=0.5", "a.b:c", {"size": 96, "fast": False, "x": 0.5}),
        ("remote:at=localhost:7000,workers=2", "remote", {"at": "localhost:7000", "workers": 2}),
        ("libero:suite=libero_goal", "libero", {"suite": "libero_goal"}),
    ],
)
def test_a_name_may_contain_options(text, place, options):
    assert worker.parts_of(text) == (place, options)
    changed = worker.with_option(text, "workers", 3)
    assert worker.parts_of(changed) == (place, options | {"workers": 3})


def test_the_simulators_side_needs_only_python_3_9_without_jax():
    for name in ("envs/__init__", "envs/worker", "envs/remote", "serving/wire"):
        ast.parse((ROOT / f"wamjax/{name}.py").read_text(), feature_version=(3, 9))
    code = ("import sys, wamjax.envs.remote, envs.fake; "
            "print(*{m.partition('.')[0] for m in sys.modules})")  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": path})  # fmt: skip
    heavy = {"jax", "flax", "absl", "ml_collections", "pickle5", "websockets", "einops"}
    assert not heavy & set(done.stdout.split()) and "msgpack" in done.stdout
    text = (ROOT / "wamjax/envs/remote.py").read_text()
    assert not re.search(r"import (pickle|multiprocessing)|\bloads\(", text)
