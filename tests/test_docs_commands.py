"""Tests the commands in the docstrings of the configs: everything that they name exists."""

import ast
import importlib
import json
import pathlib
import shlex
import subprocess
import sys

import jax
import pytest
from test_configs import get, some_data, spec_of

from wamjax import tree, wam
from wamjax.training import init_from
from wamjax.training import state as states
from wamjax.weights import families

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "experiments" / "configs").glob("*.py"))
PUBLISHED = ("fast_wam_libero", "fast_wam_robotwin", "cosmos_policy_libero",
             "cosmos_policy_robocasa", "cosmos_policy_aloha")  # fmt: skip


def commands(path):
    """Returns the arguments of every ``python -m wamjax...`` in a docstring, the module first."""
    text = ast.get_docstring(ast.parse(path.read_text())).replace("\\\n", " ")
    lines = (shlex.split(line) for line in text.splitlines() if "python -m wamjax" in line)
    return [words[words.index("-m") + 1 :] for words in lines]


COMMANDS = [(path.stem, words) for path in FILES for words in commands(path)]

# Parses the commands of its input, each with the flags of its module alone.
PARSE = """
import importlib, json, sys
from absl import flags
errors = []
for module, *arguments in json.load(sys.stdin):
    before = set(flags.FLAGS)
    sys.argv = [module, *arguments]  # where overrides of a config are looked for
    try:
        importlib.import_module(module).define_flags()
        rest = flags.FLAGS(sys.argv)[1:]
        if rest:
            errors.append(f"{module}: {rest} are no flags")
    except Exception as error:
        errors.append(f"{module} {arguments}: {type(error).__name__}: {error}")
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
print(json.dumps(errors))
"""


def parse(found):
    # A config that follows from a data set reads it.
    own = str(some_data())
    found = [[word.replace("data=DATA/mine,", f"data={own},") for word in words] for words in found]
    done = subprocess.run([sys.executable, "-c", PARSE], input=json.dumps(found), text=True,
                          capture_output=True, check=True, cwd=ROOT)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def test_every_command_parses():
    found = [words for _, words in COMMANDS]
    modules = [m if m != "wamjax.bench" else "wamjax.bench.__main__" for m, *_ in found]
    assert parse([[m, *words[1:]] for m, words in zip(modules, found, strict=True)]) == []


def test_a_wrong_command_does_not_parse():
    config = "--config=experiments/configs/quickstart.py"
    wrong = [
        ["wamjax.convert", "--family=dit", "--sorce=x"],
        ["wamjax.convert", "--source=x"],
        ["wamjax.train", config, "--workdir=x", "--config.init_from.pat=y"],
        ["wamjax.train", config, "--workdir=x", "stray"],
    ]
    errors = parse([["wamjax.convert", "--family=dit"], *wrong])
    assert len(errors) == len(wrong), errors
    for error, text in zip(errors, ("sorce", "family", "init_from", "stray"), strict=True):
        assert text in error


def options(words):
    return dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)


def test_families_layouts_and_encoders_exist():
    seen = set()
    for name, words in COMMANDS:
        given = options(words)
        if words[0] == "wamjax.convert":
            kind = families.family(given["family"])
            assert given.get("layout", next(iter(kind.layouts))) in kind.layouts
            seen.add(given["family"])
        if "encode" in given:
            module, function = given["encode"].split(":")
            assert hasattr(importlib.import_module(module), function), name
    assert {"wan22_ti2v", "wan22_vae", "umt5", "fast_wam", "cosmos_predict2", "cosmos_policy",
            "wan21_vae", "t5"} <= seen  # fmt: skip


@pytest.mark.parametrize("name", ["fast_wam_libero", "cosmos_policy_libero"])
def test_commands_read_what_earlier_commands_write(name):
    """Folders that our commands write are weights/ and DATA/*-text, -t5, -latents."""
    made, asked = set(), 0
    for words in commands(ROOT / "experiments" / "configs" / f"{name}.py"):
        given = options(words)
        for flag in ("weights", "codec", "embeddings", "config.init_from.path", "source"):
            for part in given.get(flag, "").split(","):
                folder = part.split("=")[-1]
                if folder.startswith(("weights/", "runs/", "DATA/")):
                    assert folder in made, (words, folder)
                    asked += 1
        made |= {given[k] for k in ("output", "cache", "out", "workdir") if k in given}
    assert asked >= 5 and any(folder.startswith("bundles/") for folder in made)


def shapes_of(family, prefix=""):
    more = families.named(action_dim=14, proprio_dim=14) if prefix == "14" else {}
    sizes = families.sizes(family, more)
    flat = tree.flatten(families.family(family).params(sizes))
    head = "codec/" if prefix == "codec" else ""
    return {head + path: tuple(x.shape) for path, x in flat.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_converted_weights_are_the_parameters_of_the_config(name):
    """At full size, for the released policy and the backbone that training starts from."""
    config = get(name)
    objective = wam.build(config, spec_of(config))
    abstract = jax.eval_shape(lambda: states.init_params(objective, config))
    want = tree.flatten(abstract)
    if name.startswith("fast_wam"):
        released = shapes_of("fast_wam", "14" if name.endswith("robotwin") else "")
        backbone = shapes_of("wan22_ti2v")
    else:
        codec = shapes_of("wan21_vae", "codec")
        released = shapes_of("cosmos_policy") | codec
        backbone = shapes_of("cosmos_predict2") | codec
    assert released == {path: tuple(x.shape) for path, x in want.items()}
    for words in commands(ROOT / "experiments" / "configs" / f"{name}.py"):
        given = options(words)
        if "config.init_from.path" in given:
            missing = given.get("config.init_from.missing", "()")
            config.init_from.missing = ast.literal_eval(missing)
            lacking = init_from.check(backbone, want, config.init_from)
            assert bool(lacking) == name.startswith("fast_wam")
