"""Generates docs/configuration.md from the config keys.

    python docs/site/configuration.py

A test compares the page with the output of this script.
"""

from __future__ import annotations

import itertools
import pathlib
import sys

from wamjax.config_keys import FROZEN, RENAMED, SOURCE, TABLE

PAGE = pathlib.Path(__file__).parents[1] / "configuration.md"

HEAD = """# Configuration

Look up config keys here: every key with its default and meaning. `docs/site/configuration.py`
generates this page from the key tables in the code (`wamjax/config_keys.py`,
`wamjax/models/keys.py` and the `keys.py` of each method).

A config file defines `get_config(arg)`, which starts from `wamjax.config.base_config()` and changes
values. On the command line, `--config.KEY=VALUE` changes one more. A key that does not exist is an
error with a suggestion; so is setting a key that the chosen method does not read. To print the keys
of a config with their values, run `python -m wamjax.doctor --config=FILE --keys`.

Keys marked ❄ determine what the saved parameters mean. They cannot change when a run is resumed.
"""

TAIL = """
## Renamed keys

Saved configs may still contain the old names; they are read as the new ones.

| old | new |
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
            parts += ["\n### data.sources\n\nOne entry per data set; choose any name for it.\n\n"]
            parts += [rows(SOURCE, "data.sources.*.")]
    parts += [TAIL, *(f"| `{old}` | `{new}` |\n" for old, new in RENAMED.items())]
    assert FROZEN and "❄" in "".join(parts)
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}", file=sys.stderr)
