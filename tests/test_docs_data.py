"""Tests docs/data.md: its commands parse, its formats and choices exist, and its code runs."""

import json
import pathlib
import re
import shlex
import tomllib

from data import synthetic
from data.ingest import layouts
from test_docs_commands import parse

from wamjax import ingest, stats
from wamjax.data import pipeline
from wamjax.data.examine import examine
from wamjax.data.ingest import plan, reader, rotations, signals

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "data.md"
TEXT = PAGE.read_text()


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.S)


def commands():
    lines = "\n".join(blocks("bash")).splitlines() + re.findall(r"`(python -m [^`]*)`", TEXT)
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python -m")]


def test_every_command_parses_and_every_format_exists():
    # The reader writes one config of the page.
    known = [c for c in commands() if not any("mine.py" in argument for argument in c)]
    assert len(known) > 8 and parse(known) == []
    named = {a.partition("=")[2] for c in known for a in c if a.startswith("--format=")}
    table = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", TEXT, re.M))))
    assert named < table == set(reader.formats())


def test_every_rotation_and_gripper_convention_exists():
    for name in (*rotations.SIZES, *signals.CONVENTIONS, *plan.steps.ENDS):
        assert f"`{name}`" in TEXT or f"={name}`" in TEXT, name
    plan.request(tomllib.loads(blocks("toml")[0]), "the map")


def test_the_first_command_runs(tmp_path):
    layouts.libero(tmp_path / "lift_demo.hdf5")
    arguments = [a for a in commands()[2][1:] if not a.startswith(("--source", "--out", "--work"))]
    out = tmp_path / "out"
    with synthetic.command(ingest, *arguments, f"--source={tmp_path}", f"--out={out}"):
        ingest.main([])
    assert json.loads((out / "ingest.json").read_text())["steps"] == 21


def test_ten_lines_write_what_the_config_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, train = blocks("python")
    assert len([line for line in write.splitlines() if line.strip()]) <= 13
    exec(write, {})
    assert examine("DATA/mine").facts["outcomes"] == "returns"
    with synthetic.command(stats, "--data=DATA/mine"):
        stats.main([])
    names = {}
    exec(train, names)
    config = names["get_config"]()
    spec, statistics, sources = pipeline.open_episodes(config)
    assert spec.cameras == {"front": (64, 64)} and spec.control_hz == 20
    batch = pipeline.batches(config, spec, statistics, sources)[0]
    assert batch["actions"].shape[-1] == 4
