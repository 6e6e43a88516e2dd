"""Tests docs/: commands parse, Python prints the shown output, names exist, the site builds."""

import ast
import contextlib
import glob
import io
import pathlib
import re
import shlex
import subprocess
import sys

import jobset
import pytest
from test_docs_commands import parse

from wamjax.__main__ import COMMANDS
from wamjax.envs import remote
from wamjax.wam.fast_wam.uses import FAST
from wamjax.weights import families

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
# These have tests of their own.
ELSEWHERE = {"data.md", "robot.md"}
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.M | re.S)
# Commands of other projects, whose arguments are not checked.
CONFIG = "experiments/configs/quickstart.py"
OTHERS = ("pip install", ". .venv", "python3 -m venv", "mkdocs ", "jupytext ", "jupyter ",
          "docker ", "kubectl ", "export ")  # fmt: skip


def blocks(page, language):
    return [code for kind, _, code in FENCE.findall(page.read_text()) if kind == language]


def lines(page):
    """Returns the commands of a page, in blocks and in sentences."""
    starts = r"python (?:-m )?|bash tpu/|sbatch |kubectl "
    quoted = re.findall(rf"`((?:{starts})\S[^`]*)`", FENCE.sub("", page.read_text()))
    text = "".join(blocks(page, "bash") + blocks(page, "sh")).replace("\\\n", " ")
    return [part for line in [*text.splitlines(), *quoted] for part in line.split(" && ") if part]


def commands():
    for page in PAGES:
        if page.name not in ELSEWHERE:
            for line in lines(page):
                yield page.name, line


def test_every_command_parses_and_every_script_knows_its_flags(monkeypatch):
    ours, scripts, launches = [], [], []
    for page, line in commands():
        words = shlex.split(line.partition(" > ")[0], comments=True)
        if words[0] in ("bash", "sbatch") or "tpu/jobset.py" in words:
            launches.append(words)
        if words[:3] == ["python", "-m", "wamjax.envs.remote"]:
            remote.parser().parse_args(words[3:])
        elif words[:2] == ["python", "-m"] and words[2].startswith("wamjax"):
            which = words[2] in ("wamjax.bench", "wamjax.viz")  # folders, which take a word
            name = f"{words[2]}.__main__" if which else words[2]
            flags = words[4:] if which else words[3:]
            # Placeholders for the reader become an existing config.
            flags = [f.replace("FILE[:ARG]", CONFIG).replace("=FILE", f"={CONFIG}") for f in flags]
            if name != "wamjax" and flags not in ([], ["--help"], ["..."]):
                ours.append([name, *(f for f in flags if f != "--config.key=value")])
        elif words[0] in ("bash", "sbatch"):
            assert (ROOT / next(w for w in words if w.startswith("tpu/"))).is_file(), (page, line)
        elif words[0] == "python" and words[1].endswith(".py"):
            words = words[: words.index("--")] if "--" in words else words
            scripts.append((page, words[1:]))
        else:
            assert line.startswith(OTHERS) or words[:3] == ["python", "-m", "pytest"], (page, line)
    # Launchers pass these on to the training.
    for words in launches:
        at = words.index("tpu/slurm.sbatch") if words[0] == "sbatch" else None
        at = words.index("--") if "--" in words else at
        if at is not None:
            ours.append(["wamjax.train", *words[at + 1 :]])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    errors = parse(ours)
    assert len(ours) > 30 and not errors, errors
    for page, (script, *arguments) in scripts:
        source = (ROOT / script).read_text()
        known = re.findall(r"(?:DEFINE_\w+\(\s*|add_argument\(\s*)\"(?:--)?(\w+)\"", source)
        # Scripts share some of their flags.
        study = "".join((ROOT / f).read_text() for f in ("experiments/study.py", "tpu/search.py"))
        known += re.findall(r"(?:DEFINE_\w+\(\s*)\"(\w+)\"", study) + ["config"]
        for argument in arguments:
            assert argument.lstrip("-").partition("=")[0] in known, (page, script, argument)
    assert len(scripts) >= 5
    settings = ["--name=a", "--zone=z", "--type=v6e-8", "--dry-run"]
    shells = [words for words in launches if words[0] == "bash"]
    for _, script, verb, *rest in shells:
        subprocess.run(["bash", ROOT / script, verb, *settings, *rest], check=True,
                       stdout=subprocess.DEVNULL)  # fmt: skip
    assert {words[2] for words in shells} >= {"setup", "run", "tail", "stop", "resume"}
    for words in launches:
        if words[0] == "python":
            jobset.render(words[2:])


def test_the_readmes_two_commands_are_the_ones_that_ci_runs():
    """`.ci/run` runs the second one; both install before they start."""
    one, two = (x for x in blocks(README, "bash"))
    first, second = one.strip(), two.strip()
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^tests='(.*)'$", script, re.M)[1] == second
    assert second.split(" && ")[:2] == first.split(" && ")[:2]
    assert first.endswith(f"--config={CONFIG} --workdir=runs/quickstart") and "\n" not in first
    assert len(README.read_text().splitlines()) < 130
    shown = [line.rstrip() for line in str(FAST).splitlines()[1:]]
    assert all(f"\n{line}" in README.read_text() for line in shown)
    for link in re.findall(r"\]\(([^)#]+)", README.read_text()):
        assert (ROOT / link).is_file(), link


def test_the_readme_lists_every_command():
    listed = set(re.findall(r"python -m wamjax\.(\w+)", README.read_text()))
    assert {c for c in COMMANDS if "." not in c} == listed


def printed(page):
    """Returns (code, shown output) of the Python blocks that are followed by a text block."""
    found = FENCE.findall(page.read_text())
    for (kind, _, code), (after, _, text) in zip(found, found[1:], strict=False):
        if (kind, after) == ("python", "text"):
            yield code, text


@pytest.mark.parametrize("name", ["index.md", "concepts.md"])
def test_python_blocks_print_the_output_below_them(name):
    names, cases = {}, list(printed(DOCS / name))
    assert len(cases) >= 2
    for code, text in cases:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, names)
        assert out.getvalue() == text


def test_every_file_that_a_page_names_is_there():
    named = set()
    for page in PAGES:
        places = r"`((?:wamjax|tests|experiments|docs|tpu)/[\w./]+)`"
        for path in re.findall(places, page.read_text()):
            assert (ROOT / path).exists(), (page.name, path)
            named.add(path)
    assert len(named) > 25
    configs = {p.stem for p in (ROOT / "experiments" / "configs").glob("*.py")}
    methods = (DOCS / "methods.md").read_text()
    of_tables = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `.*", methods, re.M)))
    published = {n for n in of_tables if n.startswith(("cosmos_policy_", "fast_wam_", "quick"))}
    assert published <= configs and len(published) >= 6


def test_numbers_on_method_pages_are_in_the_notes():
    """With their intervals: a number that is not in the notes must not be on a page."""
    notes = " ".join((ROOT / "BUILD_NOTES.md").read_text().replace("**", "").split())
    page = " ".join((DOCS / "methods.md").read_text().split())
    found = re.findall(r"-?\d[\d.]* \[-?\d[\d.]*, -?\d[\d.]*\]", page)
    assert len(found) > 25
    for name in ("faq.md", "comparison.md"):  # percentages, few of which have an interval
        rates = re.findall(r"(\d+\.\d) %", (DOCS / name).read_text().split("**Published by")[0])
        assert rates or name == "comparison.md"
        assert not [x for x in rates if x not in notes]
    for number in found:
        value, interval = number.split(" ", 1)
        assert number in notes or f"{value} % {interval}" in notes, number


def messages():
    """Returns every string of the package, with `{}` for inserted values."""
    for path in glob.glob(str(ROOT / "wamjax" / "**" / "*.py"), recursive=True):
        for node in ast.walk(ast.parse(pathlib.Path(path).read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_error_on_the_page_exists_in_the_code():
    headings = re.findall(r"^### (.*)$", (DOCS / "errors.md").read_text(), re.M)
    every = list(messages())
    assert len(headings) > 20
    for heading in headings:
        pattern = re.compile(".*".join(re.escape(p.strip()) for p in heading.split("…")), re.S)
        assert any(pattern.search(m) for m in every), heading


def generated(script):
    """Returns the page that a script of docs/site makes."""
    return subprocess.run(
        [sys.executable, "-c", f"import {script}; print({script}.page(), end='')"], text=True,
        capture_output=True, check=True, env={"PYTHONPATH": f"{ROOT}:{DOCS / 'site'}"},
    ).stdout  # fmt: skip


def test_the_key_reference_matches_the_keys():
    page = (DOCS / "configuration.md").read_text()
    assert page == generated("configuration"), "run python docs/site/configuration.py"
    assert "`objective.variant` ❄" in page and page.count("\n| `") > 150


def test_the_python_reference_matches_the_docstrings():
    page = (DOCS / "api.md").read_text()
    assert page == generated("api"), "run python docs/site/api.py"
    entries = re.split(r"^###+ `(.*)`$", page, flags=re.M)[1:]
    assert len(entries) > 200 and "wamjax.load_policy" in entries[::2]
    for name, entry in zip(entries[::2], entries[1::2], strict=True):
        code, *tables = re.split(r"^\| Arguments \| \|$", entry, flags=re.M)
        assert len(re.sub(r"```.*?```", "", entry, flags=re.S).strip()) > 15, f"{name}: no text"
        for row in re.findall(r"^\| `(.*?)` \|", "".join(t.split("\n\n")[0] for t in tables), re.M):
            for argument in row.replace("*", "").split(", "):  # that it documents exists
                assert re.search(rf"\b{argument}\b[:,)=]", code), (name, argument)


def test_every_question_has_an_answer_that_leads_on():
    text = (DOCS / "faq.md").read_text()
    questions = re.split(r"^### (.*)$", re.sub(r"^## .*$", "", text, flags=re.M), flags=re.M)[1:]
    assert len(questions) >= 2 * 15
    for question, answer in zip(questions[::2], questions[1::2], strict=True):
        assert question.endswith("?"), question
        assert re.search(r"\]\([a-z]+\.md|`python -m ", answer), question
    # Keys that an answer names exist.
    keys = (DOCS / "configuration.md").read_text()
    groups = "|".join(re.findall(r"^## (\w+)$", keys, re.M))
    named = set(re.findall(rf"`((?:{groups})\.[\w.*]+)(?:=\w+)?`", text)) - {"eval.json"}
    assert len(named) > 15
    assert not {key for key in named if f"| `{key}`" not in keys}


def test_pages_link_to_pages_only():
    """Nothing that a page links to is outside of docs, where the site would lack it."""
    for page in PAGES[1:]:
        for link in re.findall(r"\]\(([^)#\s]+)", FENCE.sub("", page.read_text())):
            assert link.startswith("https://") or (DOCS / link).is_file(), (page.name, link)
            assert not link.startswith(".."), (page.name, link)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}",
         f"--config-file={DOCS / 'site' / 'mkdocs.yml'}"], text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for page in PAGES[1:]:
        place = tmp_path if page.stem == "index" else tmp_path / page.stem
        assert (place / "index.html").stat().st_size > 5000
    # Reading a page makes no network requests.
    html = (tmp_path / "index.html").read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://", html)


def test_families_of_pages_exist():
    for _, line in commands():
        for name in re.findall(r"--family=(\w+)(?=\s|$)", line):
            assert families.family(name)
