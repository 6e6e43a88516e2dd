"""Writes docs/configuration.md from the keys of the config.

    python docs/site/configuration.py

A test compares the page with what this would write.
"""

from __future__ import annotations

import itertools
import pathlib
import sys

from wamjax.config_keys import FROZEN, RENAMED, SOURCE, TABLE

PAGE = pathlib.Path(__file__).parents[1] / "configuration.md"

HEAD = """# Configuration

Every key, its default and what it is. The file is written by `docs/site/configuration.py` from the
tables beside their owners (`wamjax/config_keys.py`, `wamjax/models/keys.py` and the `keys.py` of
each method), and a test compares it.

A config file has a function `get_config(arg)` that starts from `wamjax.config.base_config()` and
changes values; `--config.KEY=VALUE` on the command line changes one more. A key that does not exist
is an error with a suggestion, and so is one that is set and that the chosen method does not read.
`python -m wamjax.doctor --config=FILE --keys` prints the keys with the values of a config.

A key with ❄ gives a checkpoint its meaning: it cannot change when a run is continued.
"""

TAIL = """
## Names of before

Saved configs may have them; they are read as those of now.

| before | now |
|---|---|
"""


def frozen(key: str) -> str:
    """A mark if a run cannot change `key`; see `wamjax.config.frozen`."""
    from wamjax import config

    return " ❄" if config.frozen(key.replace("*", "name")) else ""


def rows(table, below: str = "") -> str:
    """A table of keys in Markdown."""
    lines = ["| key | default | |", "|---|---|---|"]
    for key, default, doc in table:
        text = doc.replace("|", "\\|").replace("*", "\\*")
        lines.append(f"| `{below}{key}`{frozen(below + key)} | `{default!r}` | {text} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    parts, top = [HEAD], lambda row: row[0].partition(".")[0] if "." in row[0] else "run"
    for name, group in itertools.groupby(sorted(TABLE, key=top), key=top):
        parts += [f"\n## {name}\n\n", rows(group)]
        if name == "data":
            parts += ["\n### data.sources\n\nOne entry for each data set; its name is free.\n\n"]
            parts += [rows(SOURCE, "data.sources.*.")]
    parts += [TAIL, *(f"| `{old}` | `{new}` |\n" for old, new in RENAMED.items())]
    assert FROZEN and "❄" in "".join(parts)
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}", file=sys.stderr)
