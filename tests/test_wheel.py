"""Tests that the wheel starts an experiment by its name, without a checkout."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "wamjax", "experiments")
CONFIGS = sorted(path.name for path in (ROOT / "experiments" / "configs").glob("*.py"))

# Parses a command like `python -m wamjax.train`, and builds its objects without running it.
START = """
import json, sys
import jax
import wamjax
from absl import flags
from wamjax import cli, train, tree, wam
from wamjax.data import pipeline
train.define_flags()
flags.FLAGS(sys.argv)
config = flags.FLAGS.config
wam.check_training(config)
config.data.declared.update({"action_dim": 4, "proprio_dim": 4, "camera_size": (64, 64)})
params = jax.eval_shape(wam.build(config, pipeline.declared(config.data)).init, jax.random.key(0))
print(json.dumps({"package": wamjax.__file__, "experiments": list(cli.experiments()),
                  "variant": config.objective.variant, "steps": config.total_steps,
                  "parameters": tree.count(params)}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy of the sources, since a build leaves files behind."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    words = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([sys.executable, "-m", *words, "--wheel-dir", out, source], check=True)
    (file,) = out.glob("wamjax-*.whl")
    return file


def test_the_wheel_holds_all_experiments_and_only_the_package(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = [pathlib.PurePosixPath(name) for name in file.namelist()]
        got = sorted(p.name for p in names if p.parent.as_posix() == "wamjax/experiments")
        assert got == CONFIGS and len(got) > 15
        for name in CONFIGS:
            text = (ROOT / "experiments" / "configs" / name).read_bytes()
            assert file.read(f"wamjax/experiments/{name}") == text
    tops = {p.parts[0] for p in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"wamjax"}
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "wamjax").rglob("*.py")}
    assert package <= {str(p) for p in names}


def test_an_experiment_starts_by_its_name_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    words = [sys.executable, "-c", START, "--config=quickstart:variant=idm,debug",
             "--config.total_steps=7", "--workdir=x"]  # fmt: skip
    done = subprocess.run(words, cwd=empty, env=os.environ | {"PYTHONPATH": str(site)}, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert pathlib.Path(said["package"]).is_relative_to(site)
    assert [f"{name}.py" for name in said["experiments"]] == CONFIGS
    assert (said["variant"], said["steps"]) == ("idm", 7)
    assert 10_000 < said["parameters"] < 1e6
    assert not list(empty.iterdir())
