"""The commands of wamjax.

    wamjax COMMAND --help
    wamjax COMMAND ...

``python -m wamjax COMMAND ...`` and ``python -m wamjax.COMMAND ...`` do the same.
"""

from __future__ import annotations

import ast
import pathlib
import runpy
import sys

from wamjax.config import did_you_mean

# In the order in which people need them; the first line of each says what it does.
COMMANDS = (
    "train", "evaluate", "sample", "foresight", "rollouts", "branches", "collect", "ingest",
    "stats", "doctor", "reconstruct", "convert", "export_policy", "serve", "drive",
    "data.embeddings", "data.precompute", "viz", "bench",
)  # fmt: skip


def summary(command: str) -> str:
    """Returns the first line of a command's docstring, without importing it."""
    path = pathlib.Path(__file__).parent.joinpath(*command.split("."))
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.partition("\n")[0]


def listing() -> str:
    """Lists all commands, one per line."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary(name)}" for name in COMMANDS]
    return "\n".join([__doc__.strip(), "", *lines])


def main() -> None:
    """Runs the command that the first argument names, as its own module would."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(listing())
        return
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}{did_you_mean(name, COMMANDS)}; there are "
              f"{', '.join(COMMANDS)}", file=sys.stderr)  # fmt: skip
        raise SystemExit(2)
    del sys.argv[1]
    runpy.run_module(f"wamjax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
