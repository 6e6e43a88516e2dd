"""Tests the import graph: which subpackage ("room") may import which."""

import ast
import collections
import pathlib

import pytest

import wamjax

ROOT = pathlib.Path(wamjax.__file__).parent
MODULES = {
    ".".join(("wamjax", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in ROOT.rglob("*.py")
}
COMMANDS = {
    "branches", "collect", "convert", "doctor", "drive", "evaluate", "export_policy", "foresight",
    "ingest", "reconstruct", "rollouts", "sample", "serve", "stats", "train",
}  # fmt: skip
# Modules that all may import, and that import no subpackage.
GROUND = {
    "config", "config_keys", "console", "disk", "files", "hardware", "locks", "named", "tree",
}
# room -> rooms that it may import; `DOORS` lists exceptions.
MAY = {
    "diffusion": set(),
    "models": {"config"},
    "wam": {"models", "diffusion"},
    "training": {"flops"},
    "data": {"cli", "models", "weights"},
    "envs": {"data"},
    "weights": {"models", "training"},
    "runs": {"data", "envs", "training", "viz", "wam", "models", "scores", "weights"},
    "viz": {"envs", "models", "diffusion", "training", "runs", "cli", "data", "wam", "flops"},
    "scores": {"models", "viz"},
    "bundle": {"data", "models", "runs", "training", "wam", "weights"},
    "serving": {"bundle", "data", "envs", "training", "viz"},
}
# Exceptions (module, room): modules that build objects, or find them by a name in the config.
DOORS = {
    ("config_keys", "models"): "keys stand beside their owners",
    ("config_keys", "wam"): "keys stand beside their owners",
    ("wam", "data"): "the spec of a run, by its json",
    ("wam.fast_wam.builder", "training"): "hands the mesh in",
    ("wam.cosmos_policy.builder", "data"): "builds from the sizes of the data",
    ("wam.cosmos_policy.builder", "training"): "hands the mesh in",
    ("wam.video.builder", "training"): "hands the mesh in",
    ("wam.video.inputs", "data"): "builds from the sizes of the data",
    ("wam.codecs", "training"): "what the optimiser may not move",
    ("training.step", "data"): "the pattern that sources stand in",
    ("training.init_from", "weights"): "parameters to start from",
    ("training.checkpoint", "weights"): "parameters, one by one",
    ("data.makers", "envs"): "clips of the tabletop, by name",
    ("data.sources", "envs"): "a source that is missing is collected",
    ("envs.remote", "serving"): "the bytes of a message",
    ("data.page", "viz"): "the frame that all pages share",
    ("serving.remote", "wam"): "the prefix that a policy takes",
}


def imports():
    """Yields (module, imported module) without the package's name, from anywhere in a file."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found = [f"{node.module}.{alias.name}" for alias in node.names]
                found = [x if x in MODULES or f"{x}.__init__" in MODULES else node.module
                         for x in found]  # fmt: skip
            else:
                continue
            for other in found:
                if other.startswith("wamjax."):
                    own = name.removeprefix("wamjax.").removesuffix(".__init__")
                    yield own, other.removeprefix("wamjax.")


GRAPH = sorted(set(imports()))


def room(module):
    return module.partition(".")[0]


def test_subpackages_import_only_allowed_subpackages():
    strays = collections.defaultdict(set)
    for module, other in GRAPH:
        own, target = room(module), room(other)
        if own not in MAY or own == target or target in GROUND:
            continue
        if target not in MAY[own] and (module, target) not in DOORS:
            strays[module].add(other)
    assert not strays, dict(strays)


def test_every_import_exception_is_used():
    used = {(module, room(other)) for module, other in GRAPH}
    assert not set(DOORS) - used


def test_nothing_imports_a_command_and_shared_modules_import_no_subpackage():
    rooms = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert not {(m, o) for m, o in GRAPH if room(o) in COMMANDS and m != "__init__"}
    assert not {
        (m, o)
        for m, o in GRAPH
        if m in GROUND and room(o) in rooms and (m, room(o)) not in DOORS
    }


def test_families_do_not_import_each_other_and_wam_imports_no_family():
    families = {"fast_wam", "cosmos_policy", "video"}
    shared = {"fast_wam.presets", "video.inputs"}  # of the tabletop, and of codecs
    strays = set()
    for module, other in GRAPH:
        if not (module.startswith("wam.") and other.startswith("wam.")):
            continue
        mine, theirs = (m.split(".")[1] for m in (module, other))
        if theirs in families and mine != theirs and other.removeprefix("wam.") not in shared:
            strays.add((module, other))
    assert not strays


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_listed_command_exists_and_every_command_is_listed(name):
    text = (ROOT / f"{name}.py").read_text()
    assert "cli.run(main" in text and f"python -m wamjax.{name}" in text


OUTSIDE = sorted(
    path
    for folder in ("wamjax", "experiments", "tests", "tpu")
    for path in (ROOT.parent / folder).rglob("*.py")
)


def names_in(path):
    """Returns the names that a module defines at its top level, including imports."""
    out = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            out |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            out.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            out |= {x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name)}
        elif isinstance(node, ast.If | ast.Try | ast.With):
            out |= {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
            out |= {x.name for x in ast.walk(node) if isinstance(x, ast.FunctionDef)}
    return out


def test_every_imported_name_exists():
    """Also for late imports inside functions that no test may call."""
    modules = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}
    missing = set()
    for path in OUTSIDE:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
                continue
            if node.module.partition(".")[0] != "wamjax":
                continue
            for alias in node.names:
                if f"{node.module}.{alias.name}" in modules:
                    continue
                there = names_in(modules[node.module]) if node.module in modules else set()
                if not {alias.name, "__getattr__"} & there:
                    missing.add((path.name, node.module, alias.name))
    assert not missing
