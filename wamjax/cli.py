"""Starts every command and reports its failures: flags, `--help`, one line for a wrong request.

Exit status: 0 done (or help was printed), 2 the request is invalid, 1 it failed while running.
Errors that wamjax raises are written for people, so they are printed in one line; ``--traceback``
shows the traceback, as do errors of other libraries in any case.
"""

from __future__ import annotations

import dis
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import config_flags

from wamjax.config import did_you_mean, docs

# A link to experiments/configs, of which a wheel holds the files; the second is for a checkout on
# a disk without links.
PLACES = (
    pathlib.Path(__file__).parent / "experiments",
    pathlib.Path(__file__).parents[1] / "experiments" / "configs",
)
USAGE, FAILURE = 2, 1
_HELP = ("help", "helpshort", "helpfull", "helpxml")
_FOR_PEOPLE = (ValueError, LookupError, AttributeError, OSError, ImportError, NotImplementedError)
_FILES = (
    FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError
)  # fmt: skip


def run(
    main: Callable[[list[str]], Any],
    define_flags: Callable[[], None],
    positional: bool = False,
    huge_pages: bool = False,
) -> None:
    """Runs a command with the arguments of this process and ends the process.

    Args:
      main: takes the program's name and the arguments that are not flags.
      define_flags: defines the command's flags; called here, since importing a command must define
        none.
      positional: whether the command takes arguments without a flag.
      huge_pages: see `hardware.restart_with_huge_pages`.
    """
    before = set(flags.FLAGS)
    define_flags()
    flags.DEFINE_bool("traceback", False, "show where an error was raised")
    # `--help` shows the flags of the main module; several are defined in modules that it calls.
    for name in set(flags.FLAGS) - before:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def start(argv: list[str]) -> None:
        from wamjax import console, hardware

        console.quiet()
        if huge_pages:
            hardware.restart_with_huge_pages()
        try:
            if len(argv) > 1 and not positional:
                raise app.UsageError(f"unknown arguments {argv[1:]}; did you forget a '--'?")
            main(argv)
        except Exception as error:
            if flags.FLAGS.traceback or not (text := told(error)):
                raise
            fail(text)

    app.run(start, flags_parser=_parse)


class _ConfigParser(flags.ArgumentParser):
    """Reads `NAME[:ARG]` of an experiment of the package as well as `FILE[:ARG]`."""

    def __init__(self, files: flags.ArgumentParser):
        self._files = files

    def parse(self, argument: str) -> Any:
        name, colon, arg = argument.partition(":")
        return self._files.parse(f"{experiment_file(name)}{colon}{arg}")

    def flag_type(self) -> str:
        return self._files.flag_type()


def define_config(name: str = "config", text: str = "") -> None:
    """Defines the flag of a config, and one flag for each of its keys that is set.

    Args:
      name: name of the flag.
      text: its help text.
    """
    help_text = "experiment, as FILE[:ARG] or NAME[:ARG] of one of " + ", ".join(experiments())
    config_flags.DEFINE_config_file(name, None, f"{text}: {help_text}" if text else help_text)
    flag = flags.FLAGS[name]
    flag.parser = _ConfigParser(flag.parser)


def experiments() -> dict[str, pathlib.Path]:
    """Returns the files of the experiments in the package, by name."""
    folder = next((place for place in PLACES if place.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.py"))} if folder else {}


def experiment_file(name: str) -> str:
    """Returns the file of an experiment in the package by its name; a path is returned unchanged.

    Raises:
      ValueError: a bare word is neither an experiment nor a file.
    """
    names = experiments()
    if name in names:
        return str(names[name])
    if not re.fullmatch(r"[\w-]+", name) or pathlib.Path(name).is_file():
        return name
    raise ValueError(
        f"there is no experiment {name!r}{did_you_mean(name, names)}; there are "
        f"{', '.join(names)}, and files of your own by their path, ending in .py"
    )


def fail(text: str, status: int = USAGE) -> NoReturn:
    """Ends the process with one line on standard error."""
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    raise SystemExit(status)


def told(error: BaseException) -> str:
    """Returns the message that a person sees instead of an error's traceback; '' if that would not
    help."""
    if isinstance(error, app.UsageError | flags.Error):
        return str(error)
    if not isinstance(error, _FOR_PEOPLE):
        return ""
    if isinstance(error, _FILES) and error.filename:
        return f"{error.strerror}: {error.filename}"
    return _text(error) if _is_ours(error) else ""


def _parse(argv: list[str]) -> list[str]:
    """Parses flags as absl does, but with other output and another exit status."""
    app.define_help_flags()
    argv = ["--help" if argument == "-h" else argument for argument in argv]
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:  # help was printed
        raise SystemExit(0 if any(a.strip("-") in _HELP for a in argv) else USAGE) from None
    except Exception as error:
        if "--traceback" in argv:
            raise
        fail(_misspelt(argv, error) or _of_flags(error))
    _check_file()
    return rest


def _of_flags(error: Exception) -> str:
    """Returns what went wrong in the file of a config, from deep inside absl's error, and where."""
    for cause in _causes(error):
        if not isinstance(cause, flags.Error) and _is_ours(cause):
            return _text(cause)
    # absl keeps the traceback of a config's file as text only.
    match = re.search(r"Traceback.*^\s*(\w*(?:Error|Exception): [^\n]*)", str(error), re.M | re.S)
    text = match[1] if match else _text(error).lstrip("'\"").partition(". Other fields present")[0]
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if (name := frame.f_code.co_filename) and any(f"={name}" in a for a in sys.argv):
            return f"{name}:{line}: {text}"
    return text


def _misspelt(argv: list[str], error: Exception) -> str:
    """Returns which ``--config.a.b=`` the config lacks, with a suggestion; '' for other errors."""
    if not isinstance(error, AttributeError | KeyError):
        return ""
    # ml_collections quotes the part that is missing, within quotes.
    name = re.match(r"\W*(\w+)", str(error))[1]
    for argument in argv:
        key = argument.lstrip("-").removeprefix("config.").partition("=")[0]
        if "config." in argument and name in key.split("."):
            hint = did_you_mean(key, docs())
            return f"--config.{key}: there is no such key{hint}"
    return ""


def _check_file() -> None:
    """Checks that the file of a config can be read, which absl reports only on first use."""
    value = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    if type(value).__name__ != "_ErrorConfig":
        return
    try:
        value.anything  # noqa: B018
    except OSError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        text = next((x for x in lines if x.startswith("[Errno")), str(error))
        name = pathlib.Path(flags.FLAGS["config"].config_filename.partition(":")[0]).stem
        fail(f"--config: {text}{did_you_mean(name, experiments())}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_ours(error: BaseException) -> bool:
    """Whether it comes of a `raise` in wamjax, or in a file that is run: of a sentence that was
    written for people. A key that is missing by mistake is a bug, and its traceback is wanted."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    name = last.tb_frame.f_globals.get("__name__", "")
    raised = last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and bool(re.match(r"wamjax(\.|$)|__main__$", name))


def _text(error: BaseException) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return str(text) or type(error).__name__
