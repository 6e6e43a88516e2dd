"""Tests experiments/colab: each notebook matches its text, states what it needs, and runs."""

import ast
import json
import os
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "colab"
TEXTS = sorted(FOLDER.glob("*.py"))
# Lines with the numbers with which a test runs a notebook.
SMALL = {
    "01_quickstart": "miniature, steps, demonstrations, episodes = True, 6, 16, 6",
    "02_noise_to_video": "points, states, shown, steps, frames = 64, 11, 4, (2, 5), 4",
    "03_three_factorizations": 'layers, width, calls, variants = 2, 64, 3, ("fast",)',
    "04_your_own_demonstrations": "miniature, lab, mine, steps, tuning = True, 12, 6, 8, 8",
    "05_imagine_when_it_pays": "miniature, steps, states, judge_steps, held_out, episodes, prices"
    " = True, 6, 16, 4, 16, 9, (0.0, 0.01)",
}
# What each must print then.
PRINTED = {
    "01_quickstart": "success .*% .* of 9 episodes",
    "02_noise_to_video": r"in_context +[\d,]+ parameters; attention: .*condition",
    "03_three_factorizations": r"actions differ by \S+ of the largest\n(?s:.*)frozen changes",
    "04_your_own_demonstrations": r"format +robomimic\n(?s:.*)format +lerobot\n(?s:.*)"
    r"predicted actions are off by \d\.\d+, the mean action of your data by 0\.\d+",
    "05_imagine_when_it_pays": r"headroom of eight: .* points\n(?s:.*)adaptive:0\.01 +\d",
}


def cells(path):
    """Returns the cells of a notebook, or of its text: (type, tags, lines)."""
    if path.suffix == ".ipynb":
        return [(c["cell_type"], c["metadata"].get("tags", []), "".join(c["source"]))
                for c in json.loads(path.read_text())["cells"]]  # fmt: skip
    out, parts = [], re.split(r"^# %%(.*)\n", path.read_text(), flags=re.M)[1:]
    for marks, text in zip(parts[::2], parts[1::2], strict=True):
        tags = re.findall(r'"(\w+)"', marks)
        if "[markdown]" in marks:
            text = re.sub(r"^# ?", "", text, flags=re.M)
        out.append(("markdown" if "[markdown]" in marks else "code", tags, text.strip("\n")))
    return out


@pytest.mark.parametrize("text", TEXTS, ids=lambda p: p.stem)
def test_notebooks_match_their_source_text(text):
    assert cells(text.with_suffix(".ipynb")) == cells(text), f"run jupytext --sync {text}"
    notebook = json.loads(text.with_suffix(".ipynb").read_text())
    assert not any(c.get("outputs") for c in notebook["cells"])  # outputs would bloat reviews
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("text", TEXTS, ids=lambda p: p.stem)
def test_notebooks_state_their_requirements(text):
    kinds, tags, sources = zip(*cells(text), strict=True)
    assert sources[0].startswith("# ") and "In Colab: *File*, *Open notebook*" in sources[0]
    assert "OWNER" not in "".join(sources)  # a placeholder address
    for word in ("Hardware", "Time", "Expected"):
        assert f"* **{word}**: " in sources[0]
    assert kinds[0] == "markdown" and tags.count(["parameters"]) == 1
    numbers = ast.parse(sources[tags.index(["parameters"])]).body
    names = {node.targets[0].id for node in numbers}
    assert {n.id for n in ast.walk(ast.parse(SMALL[text.stem])) if isinstance(n, ast.Name)} <= names
    for kind, source in zip(kinds, sources, strict=True):
        if kind == "code":
            ast.parse(source)
    # A checkout is not needed: nothing of it is imported or opened.
    code = "".join(s for kind, s in zip(kinds, sources, strict=True) if kind == "code")
    assert not re.search(r"experiments[/.]", code)
    assert set(SMALL) == {p.stem for p in TEXTS}


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS, ids=lambda p: p.stem)
def test_notebooks_run(text, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("ipywidgets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(text.with_suffix(".ipynb"), as_version=4)
    tags = [c.metadata.get("tags", []) for c in notebook.cells]
    small = nbformat.v4.new_code_cell(SMALL[text.stem])
    notebook.cells.insert(tags.index(["parameters"]) + 1, small)
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3",
                            resources={"metadata": {"path": str(tmp_path)}}).execute()  # fmt: skip
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert re.search(PRINTED[text.stem], printed)
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
