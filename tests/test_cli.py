"""Tests commands: usage errors are one line and status 2, bugs keep their traceback."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from absl import app

from wamjax import __main__ as wamjax_main
from wamjax import cli
from wamjax import config as configs

QUICKSTART = "--config=experiments/configs/quickstart.py"
ROOT = pathlib.Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "experiments" / "configs").glob("*.py"))


# Imports the dependencies of the commands once, and then runs each command from its input like
# `python -m`, in a forked process.
SERVER = """
import json, os, runpy, sys
import wamjax.train
del sys.modules["wamjax.train"]
for line in sys.stdin:
    module, arguments, out, err = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    for path, number in (os.devnull, 0), (out, 1), (err, 2):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    break
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Returns a function of arguments and a module that returns the command's (status, output,
    standard error)."""
    said = [tmp_path_factory.mktemp("said") / name for name in ("out", "err")]
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], text=True, cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as server:  # fmt: skip

        def run(*arguments, module="wamjax.train"):
            print(json.dumps([module, arguments, *map(str, said)]), file=server.stdin, flush=True)
            status = int(server.stdout.readline())
            return status, *(path.read_text() for path in said)

        yield run


def raised(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "arguments, line",
    [
        ([QUICKSTART, "--config.optim.learnig_rate=3", "--workdir=x"],
         "error: --config.optim.learnig_rate: there is no such key, did you mean "
         "'optim.learning_rate'?"),
        ([QUICKSTART + ":debg", "--workdir=x"], "error: config argument 'debg' does not exist, did "
         "you mean 'debug'?; there are ['debug', 'preset', 'variant']"),
        ([QUICKSTART, "--config.optim.learning_rate=fast", "--workdir=x"],
         "error: flag --config.optim.learning_rate=fast: could not convert string to float: "
         "'fast'"),
        (["--config=experiments/configs/quickstar.py", "--workdir=x"],
         "error: --config: [Errno 2] No such file or directory: "
         "'experiments/configs/quickstar.py', did you mean 'quickstart'?"),
        (["--config=quickstrt:debug", "--workdir=x"],
         "error: there is no experiment 'quickstrt', did you mean 'quickstart'?; there are "
         + ", ".join(NAMES) + ", and files of your own by their path, ending in .py"),
        (["--config=quickstart:variant=idn", "--workdir=x"],
         "error: variant 'idn' does not exist, did you mean 'idm'?; there are "
         "['fast', 'idm', 'joint', 'ladder', 'no_cotrain', 'optional_idm']"),
        ([QUICKSTART, "--workdir=x", "debug"],
         "error: unknown arguments ['debug']; did you forget a '--'?"),
        ([QUICKSTART, "--wrkdir=x"], "error: Unknown command line flag 'wrkdir'. Did you mean: "
         "workdir ?"),
    ],
)  # fmt: skip
def test_usage_errors_print_one_line_and_exit_with_2(command, arguments, line):
    status, _, errors = command(*arguments)
    assert (status, errors) == (2, line + "\n")


def test_errors_in_a_config_file_name_file_and_line(command, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from wamjax import config\n\n\ndef get_config(arg=None):\n"
                    "    made = config.base_config()\n    made.optim.lr = 3\n    return made\n")
    status, _, errors = command(f"--config={path}", "--workdir=x")
    assert status == 2
    assert errors == (f'error: {path}:6: Key "lr" does not exist and cannot be added since the '
                      "config is locked\n")  # fmt: skip


def test_help_lists_the_flags_and_exits_with_0(command):
    for argument in ("--help", "-h"):
        status, text, _ = command(argument)
        assert status == 0 and "python -m wamjax.train" in text
        for name in ("workdir", "config", "[no]traceback"):  # wherever they are defined
            assert f"--{name}:" in text


def test_the_traceback_flag_shows_the_traceback(command):
    status, _, errors = command(QUICKSTART, "--config.optim.lr=3", "--workdir=x", "--traceback")
    assert status == 1 and "Traceback" in errors


def test_experiments_are_found_by_name_and_paths_are_unchanged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(cli.experiments()) == NAMES and len(NAMES) > 15
    for name in NAMES:
        file = pathlib.Path(cli.experiment_file(name))
        assert file.samefile(ROOT / "experiments" / "configs" / f"{name}.py")
    (tmp_path / "mine").write_text("")
    for path in ("mine", "mine.py", "./quickstart", "quickstart.py", "configs/quickstart"):
        assert cli.experiment_file(path) == path


def test_expected_errors_are_one_line_and_bugs_keep_their_traceback():
    name = raised(lambda: configs.parse_arg("debg", debug=False))
    assert cli.told(name).startswith("config argument 'debg' does not exist")
    assert cli.told(app.UsageError("give --source")) == "give --source"
    assert cli.told(raised(lambda: open("/does/not/exist"))) == (
        "No such file or directory: /does/not/exist"
    )
    # A missing key by mistake, in the package or elsewhere, and errors of other libraries.
    assert cli.told(raised(lambda: configs.load({"optim": 3, "data": 7}))) == ""
    assert cli.told(raised(lambda: {}["shapes"])) == ""
    assert cli.told(raised(lambda: int("x"))) == ""


def test_every_command_runs_through_the_shared_main():
    """The exceptions run other commands, or run at the simulator, without absl."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sources = {}
    for folder in ("wamjax", "experiments"):
        for path, _, names in os.walk(os.path.join(root, folder)):
            for name in names:
                if name.endswith(".py"):
                    with open(os.path.join(path, name)) as file:
                        sources[os.path.join(path, name)] = file.read()
    mains = {path for path, text in sources.items() if '__name__ == "__main__"' in text}
    assert len(mains) > 15
    others = "wamjax/__main__.py", "wamjax/envs/remote.py"  # the first runs the others
    mains -= {path for path in mains if path.endswith(others)}
    for path in mains:
        assert "cli.run(main, define_flags" in sources[path], path


def test_the_wamjax_command_runs_every_command(command):
    status, text, _ = command(module="wamjax")
    assert status == 0
    for name in wamjax_main.COMMANDS:
        assert f"  {name} " in text and len(wamjax_main.summary(name)) > 15
    status, _, errors = command("trian", module="wamjax")
    assert status == 2 and errors.startswith("error: there is no command 'trian', did you mean")
    status, text, _ = command("doctor", "--help", module="wamjax")
    assert status == 0 and "python -m wamjax.doctor" in text
    missing = command("evaluate", "--workdir=/no/such/run", module="wamjax")
    assert missing == command("--workdir=/no/such/run", module="wamjax.evaluate")
