"""Runs the five commands of docs/robot.md on a small bundle."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest
from bundle import runs
from test_configs import get, spec_of
from test_docs_commands import parse

from wamjax.envs.joins import WAYS
from wamjax.serving.chunks import JOININGS
from wamjax.serving.names import CLIENTS, EXTRAS

pytest.importorskip("uvicorn")
ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "robot.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_has_five_commands_that_parse():
    script = blocks("sh")[0]
    assert re.findall(r"^# (\d)\.", script, re.M) == list("12345")
    commands = re.findall(r"^python -m (wamjax\S+) ?(.*?)(?: &)?$", "\n".join(blocks("sh")), re.M)
    found = [[name, *words.split()] for name, words in commands]
    assert [name for name, *_ in found] == [
        "wamjax.export_policy", "wamjax.serve", "wamjax.drive", "wamjax.drive", "wamjax.bench",
        "wamjax.bench",
    ]  # fmt: skip
    assert parse(found[:4]) == []


def test_the_five_commands_from_a_checkpoint_to_a_robot(tmp_path):
    """They are unchanged except for the port, and fewer episodes and batches."""
    config = get("quickstart", "debug")
    config.model.layers, config.objective.infer_steps = 1, 2
    runs.save(tmp_path / "runs" / "quickstart", config, spec_of(config), steps=(1,))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = blocks("sh")[0].replace("8000", port).replace("--max_batch=16", "--max_batch=2")
    script = script.replace("--episodes=96", "--episodes=4 --robots=4 --tasks=pick_red,reach_red")
    assert script.count(port) == 4 and "--robots=4" in script and "--max_batch=2" in script
    place = {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, text=True, capture_output=True, timeout=300,
        env=dict(os.environ, PYTHONPATH=str(ROOT)) | place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "OK\n" in done.stdout and '"episodes": 4' in done.stdout
    counted = re.search(r'requests_total\{outcome="ok"\} (\d+)\.0', done.stdout)
    assert int(counted[1]) >= 4 * 40 // 2 // 2 and done.stdout.endswith("ended\n")
    assert "Traceback" not in done.stderr


def test_names_on_the_page_exist():
    for name in (*CLIENTS, *JOININGS, *WAYS, *EXTRAS):
        assert f"`{name}`" in PAGE, name
    for keys, proprio, instruction, _ in CLIENTS.values():
        for key in (*keys, *proprio, instruction):
            assert f"`{key}`" in PAGE, key
    for code in blocks("python"):
        compile(code, "docs/robot.md", "exec")
