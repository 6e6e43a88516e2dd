"""Converts demonstrations recorded elsewhere to a data set.

    python -m wamjax.ingest --list
    python -m wamjax.ingest --format=libero --source=libero_object/ --out=DIR --workers=8
    python -m wamjax.ingest --format=lerobot --source=so101_pick/ --out=DIR --resize=224,224
    python -m wamjax.ingest --format=robomimic --source=lift.hdf5 --out=DIR --fps=10 \
        --state=robot0_eef_pos,robot0_eef_quat:quat_xyzw:rotation_6d,robot0_gripper_qpos

Prints a report and keeps it as ``ingest.json`` in the data set: the number of steps, the terms of
state and actions, the gripper convention, whether actions are deltas, how observations pair with
actions, and how the end of an episode is handled. If the command is killed, run it again to
continue. ``--map`` names a json or toml file with the flags as keys.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import tomllib
from typing import Any

from absl import app, flags

from wamjax import cli, console, files
from wamjax.data.ingest import guess, plan, reader, run, signals

KEYS = ("cameras", "state", "action", "resize", "fit", "pictures", "fps", "source_fps", "pairing",
        "end", "no_op", "gripper", "gripper_is", "action_is", "relative", "absolute", "instruction",
        "discount")  # fmt: skip


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    flags.DEFINE_bool("list", False, "list the formats and exit")
    flags.DEFINE_string(
        "format",
        None,
        "format of the source, guessed by default; or the full name of your own module",
    )
    flags.DEFINE_string("source", None, "file or folder to read")
    flags.DEFINE_string("out", None, "folder of the data set; must not exist")
    flags.DEFINE_string("map", None, "json or toml file with the options below; flags override it")
    flags.DEFINE_multi_string("option", [], "KEY=VALUE, an option of the format; repeatable")
    flags.DEFINE_integer("workers", 0, "worker processes; 0 = work in this process")
    flags.DEFINE_integer("skip_bad", 0, "bad episodes that may be skipped")
    flags.DEFINE_integer("episodes", 0, "read only the first N episodes; 0 = all")
    flags.DEFINE_bool("json", False, "print the report as json")
    default = plan.Request()
    flags.DEFINE_list("cameras", [], "NEW=OLD or OLD, in this order; all cameras by default")
    flags.DEFINE_list("state", [], "terms: KEY, KEY[0:3], KEY[3:7]:quat_xyzw:rotation_6d")
    flags.DEFINE_list("action", [], "terms, as for --state")
    flags.DEFINE_list("resize", [], "HEIGHT,WIDTH of all pictures")
    flags.DEFINE_string("fit", default.fit, "how to resize: stretch, or pad with black")
    flags.DEFINE_string(
        "pictures",
        default.pictures,
        "png, jpeg, or video (kept as it is); auto = keep encoded pictures, others lossless",
    )
    flags.DEFINE_float("fps", 0.0, "resample to this many steps per second; 0 = as in the source")
    flags.DEFINE_float("source_fps", 0.0, "rate of the source, if it says nothing or is wrong")
    flags.DEFINE_string(
        "pairing",
        "",
        "observation t belongs before action t, after it, or late (real ALOHA: with action t - 1)",
    )
    flags.DEFINE_string(
        "end",
        default.end,
        "for T observations and T actions: repeat the last observation, or drop the last action",
    )
    flags.DEFINE_float(
        "no_op",
        0.0,
        "drop actions smaller than this unless the gripper switches; 1e-4 as published; 0 = none",
    )
    names = ", ".join(f"{k} {v}" for k, v in signals.CONVENTIONS.items())
    flags.DEFINE_string("gripper", "", f"convention to write (opens, closes): {names}")
    flags.DEFINE_string("gripper_is", "", "convention of the source, instead of the detected one")
    flags.DEFINE_string(
        "action_is", "", "delta, absolute or velocity, instead of the detected kind"
    )
    flags.DEFINE_list("relative", [], "A:B=C:D*SCALE: actions minus states, e.g. 0:6,7:13")
    flags.DEFINE_list("absolute", [], "A:B=C:D*SCALE: the reverse, e.g. 0:3*0.05,3:6*0.5")
    flags.DEFINE_string(
        "instruction",
        "",
        "instruction of all episodes, instead of the source's; {file} and {folder} insert names",
    )
    flags.DEFINE_float("discount", default.discount, "discount of the returns")


def request() -> plan.Request:
    """Combines the map and the flags.

    Raises:
      ValueError: a key or a value does not exist.
    """
    asked, values = flags.FLAGS, {}
    if asked.map:
        text = pathlib.Path(asked.map).read_text()
        try:
            values = tomllib.loads(text) if asked.map.endswith(".toml") else json.loads(text)
        except ValueError as error:
            raise ValueError(f"--map={asked.map} cannot be read: {error}") from error
    choices = {key: asked[key].value for key in KEYS if asked[key].present}
    if "resize" in choices:
        choices["resize"] = _sizes(choices["resize"])
    return plan.request(values | choices, f"--map={asked.map}")


def _sizes(words: list[str]) -> list[int]:
    if not all(word.isdigit() for word in words):
        raise ValueError(f"--resize={','.join(words)} must be HEIGHT,WIDTH")
    return [int(word) for word in words]


def options() -> dict[str, str]:
    """Returns the options of the format."""
    out = {}
    for text in flags.FLAGS.option:
        key, equal, value = text.partition("=")
        if not equal:
            raise ValueError(f"--option={text} must be KEY=VALUE")
        out[key] = value
    return out


def guess_format(source: str | os.PathLike) -> str:
    """Guesses the format of a source.

    Raises:
      FileNotFoundError: the source does not exist.
      ValueError: its format cannot be recognized.
    """
    if not pathlib.Path(source).expanduser().exists():
        raise FileNotFoundError(2, "no such file or directory", str(source))
    if not (name := guess.guess(source)):
        raise ValueError(f"nothing says which format {source} is of: give --format, one of "
                         f"{', '.join(reader.formats())}")  # fmt: skip
    console.say(f"--format={name}, by what is in it")
    return name


def show(report: dict[str, Any]) -> str:
    """Formats the report as text."""
    lines = []
    for key, value in report.items():
        if key in ("warnings", "bad") or value in ("", [], {}):
            continue
        if isinstance(value, dict):
            value = "; ".join(f"{k} = {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        lines.append(f"  {key:<20}{value}")
    lines += [f"left out: {text}" for text in report["bad"].values()]
    lines += [f"warning: {text}" for text in report["warnings"]] or ["no warnings"]
    return "\n".join(lines)


def _local(place: str, flag: str) -> pathlib.Path:
    """Returns a local folder, because parts of episodes are written and renamed there.

    Raises:
      UsageError: the folder is in a bucket.
    """
    folder = files.path(place, flag)
    if files.is_remote(folder):
        raise app.UsageError(f"{flag}={place} is in a bucket: mount it and give the folder where "
                             "it is mounted, or copy it here")  # fmt: skip
    return pathlib.Path(folder)


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    asked = flags.FLAGS
    if asked.list:
        for name, text in reader.formats().items():
            print(f"  {name:<14}{text}")
        return
    if missing := [k for k in ("source", "out") if not asked[k].value]:
        raise app.UsageError(f"give {', '.join('--' + k for k in missing)} (or --list)")
    source = files.fetch_all(files.path(asked.source, "--source"))
    report = run.ingest(
        asked.format or guess_format(source),
        source,
        _local(asked.out, "--out"),
        request(),
        options(),
        workers=asked.workers,
        skip_bad=asked.skip_bad,
        limit=asked.episodes,
    )
    if asked.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        print(show(report))
    print(f"wrote {asked.out}", file=sys.stderr if asked.json else sys.stdout)


if __name__ == "__main__":
    cli.run(main, define_flags)
