"""Generates docs/api.md from the docstrings of what people call from Python.

    python docs/site/api.py

A test compares the page with the output of this script. mkdocstrings would show the page on the
site only, and it does not find names that are imported on first use, such as `wamjax.load_policy`.
"""

from __future__ import annotations

import ast
import inspect
import pathlib
import pkgutil
import re
import sys
import textwrap

PAGE = pathlib.Path(__file__).parents[1] / "api.md"
# The page without its entries: each line "MODULE: NAME NAME ..." stands for those of these names.
NAMES = pathlib.Path(__file__).with_name("api_names.md")
SECTIONS = {"Args": "Arguments", "Attributes": "Attributes", "Raises": "Errors"}


def parsed(thing) -> tuple[ast.AST, list[str]]:
    """The syntax tree of a function or class, and the lines of its source."""
    lines = textwrap.dedent(inspect.getsource(thing)).splitlines()
    return ast.parse("\n".join(lines)).body[0], lines


def header(thing) -> list[str]:
    """The source of a function up to its docstring."""
    node, lines = parsed(thing)
    return lines[node.lineno - 1 : node.body[0].lineno - 1]


def cell(text: str) -> str:
    """Text in a table; lines in columns stay lines."""
    lines = [line.strip() for line in text.splitlines()]
    lines = ["<br>" + re.sub("  +", ": ", x) if re.search(r"\w  +\w", x) else x for x in lines]
    return " ".join(lines).replace("|", "\\|").strip()


def described(thing, more: tuple[str, ...] = ()) -> str:
    """A docstring, with its sections as tables; `more` are items of "Attributes"."""
    heads = r"^(Args|Attributes|Returns|Raises):\n"
    first, *rest = re.split(heads, inspect.getdoc(thing), flags=re.M)
    sections, out = dict(zip(rest[::2], rest[1::2], strict=True)), [first.strip()]
    if more:
        sections["Attributes"] = "".join([sections.get("Attributes", "").rstrip(), *more])
    for kind, body in sections.items():
        if kind == "Returns":
            out.append(f"**Returns** {textwrap.dedent(body).strip()}")
            continue
        items = re.split(r"^  (?=\S)", body, flags=re.M)[1:]
        rows = [x.partition(": ") if ": " in x else ("", "", x) for x in items]
        lines = [f"| {name and f'`{cell(name)}`'} | {cell(text)} |" for name, _, text in rows]
        out.append("\n".join([f"| {SECTIONS[kind]} | |", "|---|---|", *lines]))
    return "\n\n".join(out)


def documented(name: str, thing) -> str:
    """The entry of a name; for a class, with the public members that it does not inherit."""
    node, lines = parsed(thing)
    if not isinstance(node, ast.ClassDef):
        return "\n".join(["```python", *header(thing), "```", "", described(thing)])
    head, more, members = [lines[node.lineno - 1]], [], []
    for part in node.body:
        if isinstance(part, ast.AnnAssign | ast.Assign):
            head += lines[part.lineno - 1 : part.end_lineno]
        if not isinstance(part, ast.FunctionDef):
            continue
        member, path = inspect.getattr_static(thing, part.name), f"{name}.{part.name}"
        doc = member.__doc__ if part.name == "__init__" else inspect.getdoc(member)  # no object's
        text = " ".join((doc or "").split()).removeprefix("Returns ")
        if part.name == "__init__" and (text or "\nArgs:" in inspect.getdoc(thing)):
            head += ["    " + line for line in header(member)]
            members += [described(member)] if text else []
        elif not text or any(part.name in vars(base) for base in thing.__mro__[1:]):
            continue
        elif isinstance(member, property):
            more.append(f"\n  {part.name}: {text[0].lower()}{text[1:]}")
        elif part.name in ("__call__", "__getitem__") or part.name[0] != "_":
            members += [f"#### `{path}`", documented(path, getattr(thing, part.name))]
    source = "\n".join(["```python", *head, "```"])
    return "\n\n".join([source, described(thing, tuple(more)), *members])


def entries(line: re.Match) -> str:
    """The entries of a line of `NAMES`."""
    module, names = line.groups()
    things = {name: pkgutil.resolve_name(f"{module}:{name}") for name in names.split()}
    return "".join(f"\n### `{module}.{k}`\n\n{documented(k, x)}\n" for k, x in things.items())


def page() -> str:
    """The whole page."""
    text = re.sub(r"^(wamjax[\w.]*): (.*)\n", entries, NAMES.read_text(), flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}", file=sys.stderr)
