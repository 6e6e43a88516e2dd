"""Tests that CITATION.cff, CONTRIBUTING.md and CHANGELOG.md are correct."""

import importlib
import pathlib
import re
import tomllib

import yaml

import wamjax
from wamjax.models import kernels

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Keys of the Citation File Format 1.2.0.
REQUIRED = {"authors", "cff-version", "message", "title"}
KNOWN = REQUIRED | {
    "abstract", "commit", "contact", "date-released", "doi", "identifiers", "keywords", "license",
    "license-url", "preferred-citation", "references", "repository", "repository-artifact",
    "repository-code", "type", "url", "version",
}  # fmt: skip


def people_are_named(authors):
    for author in authors:
        assert author and set(author) <= {"name", "family-names", "given-names"}
        assert "name" in author or "family-names" in author
        assert all(isinstance(x, str) for x in author.values())  # a bare Y is a boolean in YAML
    return True


def test_the_citation_is_valid_and_has_the_current_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert REQUIRED <= set(citation) <= KNOWN and citation["cff-version"] == "1.2.0"
    assert citation["type"] in ("software", "dataset") and people_are_named(citation["authors"])
    assert citation["version"] == PROJECT["version"] == wamjax.__version__
    assert citation["license"] == PROJECT["license"]
    cited = {i["value"] for r in citation["references"] for i in r["identifiers"]}
    for work in citation["references"]:
        assert {"authors", "title", "type"} <= set(work) and people_are_named(work["authors"])
    rooms = (ROOT / "wamjax", ROOT / "experiments", ROOT / "tests")
    sources = "".join(path.read_text() for room in rooms for path in room.rglob("*.py"))
    assert cited and all(x.replace("arXiv:", "arXiv ") in sources for x in cited)


def test_files_rows_and_tests_named_in_contributing_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = set(re.findall(r"`((?:wamjax|tests|experiments|docs|tpu|\.ci)/[\w./]+)`", text))
    paths |= set(re.findall(r"\]\(([^)#:]+)\)", text))
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path.partition("NAME")[0]).exists(), path
    for name, file in re.findall(r"`([A-Z]+)` in `(wamjax/[\w/]+)\.py`", text):
        module = file.replace("/", ".").removesuffix(".__init__")
        assert len(getattr(importlib.import_module(module), name)) > 1
    assert set(kernels.KERNELS) > {"cudnn"} and "`KERNELS` and `attend` there" in text
    for kind in ("robot", "data set", "format", "method", "backbone", "world", "kernel"):
        assert re.search(rf"^\| [^|]*\b{kind}\b", text, re.M), kind
    style = re.search(r"## House style\n\n(.*?)\n\n", text, re.S)[1].splitlines()
    assert [line.split(".")[0] for line in style] == [str(i) for i in range(1, 11)]


def test_the_changelog_starts_with_unreleased_changes_and_names_existing_keys():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.M)
    assert versions[0] == "Unreleased" and versions[1] == PROJECT["version"]
    reference = (ROOT / "docs" / "configuration.md").read_text()
    for key in re.findall(r"--config\.([\w.]+)=|`((?:objective|eval|optim)\.\w+)`", text):
        assert f"`{key[0] or key[1]}`" in reference, key
    commands = re.findall(r"`wamjax\.(\w+)[` ]", text)
    assert len(commands) > 5
    for name in commands:
        assert (ROOT / "wamjax" / f"{name}.py").exists() or name == "load_policy", name
