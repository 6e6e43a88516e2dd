"""Defines the one config: every key with its default and a line of documentation, locked.

An experiment file starts from `base_config` and changes values; a misspelt key is an error with a
suggestion. `config_keys` holds keys, defaults and docs; error messages show a key's line, and
``python -m wamjax.doctor --keys`` shows all of them.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from wamjax import files
from wamjax.config_keys import BEFORE, FROZEN, RENAMED, SOURCE, TABLE

# Below a key of `FROZEN`, but they change how a step is computed, not what.
_THAWED = {"model.remat", "model.unroll", "model.attention", "model.pad_slots"}

# What `validate` knows of values.
_POSITIVE = (
    "total_steps", "log_every", "data.batch_size", "data.frames", "data.frame_stride",
    "data.chunk", "data.instruction_length", "checkpoint.every", "checkpoint.keep",
    "optim.accumulate", "guard.max_consecutive_skips", "model.layers", "model.heads",
    "model.head_dim", "model.patch", "model.video.width", "model.video.ffn", "model.action.width",
    "model.action.ffn", "model.codec.patch", "objective.infer_steps", "eval.execute",
    "eval.max_steps", "eval.batch_size",
)  # fmt: skip
_NOT_NEGATIVE = (
    "optim.learning_rate", "optim.weight_decay", "optim.clip_norm", "objective.video_weight",
    "objective.action_weight", "objective.video_shift", "objective.action_shift", "lora.rank",
    "eval.episodes", "profile.start", "profile.steps", "data.skip_bad",
)  # fmt: skip
_SHARES = (
    "optim.b1", "optim.b2", "optim.ema_decay", "optim.warmup_fraction", "optim.final_fraction",
    "objective.cond_noise_prob", "objective.idm_prob", "objective.drop", "objective.uniform",
)  # fmt: skip
_ONE_OF = {
    "precision.params": ("float32", "float64"),
    "precision.compute": ("float32", "bfloat16", "float64"),
    "model.residual": ("compute", "float32"),
    "model.text.kind": ("tokens", "context"),
    "data.resize": ("pad", "stretch"),
    "data.vocabulary": ("words", "hash"),
}


class Sources(ConfigDict):
    """Holds ``data.sources``; a source that only the command line names exists with its defaults.

    So ``--config.data.sources.mine.path=DIR`` adds one. Any other missing name is an error.
    """

    def __getitem__(self, name: str) -> Any:
        if isinstance(name, str) and name not in self and _on_command_line(name):
            with self.unlocked():
                self[name] = source()
        return super().__getitem__(name)


def _on_command_line(name: str) -> bool:
    """Returns whether a flag of a config sets a key of the source `name`."""
    pattern = re.compile(rf"--?(no)?\w*config\.data\.sources\.{re.escape(name)}\.")
    return any(pattern.match(argument) for argument in sys.argv[1:])


def base_config() -> ConfigDict:
    """Returns the documented config with all defaults; locked, except that sources may be added."""
    config = _nest(TABLE)
    config.data.sources = Sources()
    config.eval.shift = ConfigDict()
    config.lock()
    config.data.sources.unlock()  # names are free
    config.eval.shift.unlock()  # dials belong to the world, which checks their names
    return config


def source(**values: Any) -> ConfigDict:
    """Returns one entry of ``data.sources``; ``collect`` may be given as a dict."""
    config = _nest(SOURCE).lock()
    for key, value in values.items():
        if isinstance(value, dict):
            config[key].update(value)
        else:
            config[key] = value
    return config


def docs() -> dict[str, str]:
    """Returns every key with its one-line documentation; ``*`` stands for the name of a source."""
    return {k: d for k, _, d in TABLE} | {f"data.sources.*.{k}": d for k, _, d in SOURCE}


def doc(key: str) -> str:
    """Returns the line of one key, or ''."""
    return docs().get(re.sub(r"^data\.sources\.[^.]+", "data.sources.*", key), "")


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """Parses the text after the colon of ``--config=FILE:ARG``, e.g. ``variant=idm,debug``.

    Args:
      arg: comma-separated ``name=value``; a bare name sets a bool to True.
      **defaults: the names that exist; a value is converted to the type of its default.

    Raises:
      ValueError: an unknown name (with a suggestion), or a value of the wrong type.
    """
    out = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, given, text = part.partition("=")
        if name not in defaults:
            raise ValueError(
                f"config argument {name!r} does not exist{did_you_mean(name, defaults)}; "
                f"there are {sorted(defaults)}"
            )
        out[name] = _parse(name, text if given else "True", defaults[name])
    return ConfigDict(out).lock()


def validate(config: ConfigDict) -> None:
    """Checks everything that needs no building; the ValueError names the key."""
    flat = flatten(config)
    for key in _POSITIVE:
        if flat[key] < 1:
            raise ValueError(f"config.{key} = {flat[key]} must be at least 1 ({doc(key)})")
    for key in _NOT_NEGATIVE:
        if flat[key] < 0:
            raise ValueError(f"config.{key} = {flat[key]} must not be negative ({doc(key)})")
    for key, allowed in _ONE_OF.items():
        if flat[key] not in allowed:
            hint = did_you_mean(flat[key], allowed)
            raise ValueError(f"config.{key} = {flat[key]!r} must be one of {allowed}{hint}")
    for key in _SHARES:
        if not 0 <= flat[key] <= 1:
            raise ValueError(f"config.{key} = {flat[key]} must lie in [0, 1] ({doc(key)})")


def unread(config: ConfigDict, patterns: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Returns keys of the method and the model that are set but never read: (value, default).

    Args:
      patterns: patterns of the keys that are read, with ``*`` as in a shell.
    """
    defaults = flatten(base_config())
    found = {}
    for key, value in flatten(config).items():
        ours = key.startswith(("objective.", "model.")) and key != "objective.name"
        read = any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
        if ours and not read and value != defaults[key]:
            found[key] = value, defaults[key]
    return found


def only(config: ConfigDict, key: str) -> ConfigDict:
    """Returns the defaults with one key changed."""
    out = base_config()
    out.update_from_flattened_dict({key: flatten(config)[key]})
    return out


def reset(config: ConfigDict, part: str) -> None:
    """Sets all keys below `part`, such as "model.codec", to their defaults, in place."""
    below = f"{part}."
    defaults = {k: v for k, v in flatten(base_config()).items() if k.startswith(below)}
    config.update_from_flattened_dict(defaults)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens a nested config (or dict of a JSON file) to ``{"a.b.c": value}``; lists become
    tuples."""
    return dict(_leaves(config, prefix))


def save(config: ConfigDict, path: str | os.PathLike) -> None:
    """Writes ``config`` as JSON, in one atomic step."""
    files.write_text(path, json.dumps(to_json(config), indent=2) + "\n")


def to_json(config: ConfigDict) -> dict[str, Any]:
    """Returns ``config`` as plain nested dicts of JSON values."""
    return json.loads(json.dumps(config.to_dict()))


def load(path_or_json: str | os.PathLike | dict) -> ConfigDict:
    """Reads the output of `save` (or its dict); missing keys get the behaviour of the code at that
    time.

    Raises:
      ValueError: a key does not exist.
    """
    given = path_or_json
    if not isinstance(given, dict):
        given = json.loads(files.path(given).read_text())
    config = base_config()
    defaults = flatten(config)
    config.update_from_flattened_dict(BEFORE)
    for name in given.get("data", {}).get("sources", {}):
        config.data.sources[name] = source()
        defaults |= flatten(config.data.sources[name], f"data.sources.{name}")
    for key, value in _renamed(flatten(given)).items():
        if key.startswith("eval.shift."):
            config.eval.shift[key.removeprefix("eval.shift.")] = value
        elif key not in defaults:
            raise ValueError(f"saved config has unknown key {key!r}{did_you_mean(key, defaults)}")
        else:
            config.update_from_flattened_dict({key: value})
    return config


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Returns keys whose values differ, as (old, new); a key that one side lacks is `ABSENT`
    there."""
    old, new = flatten(old), flatten(new)
    keys = [*old, *(k for k in new if k not in old)]
    pairs = {k: (old.get(k, ABSENT), new.get(k, ABSENT)) for k in keys}
    return {k: (a, b) for k, (a, b) in pairs.items() if a != b}


class _Absent:
    def __repr__(self):
        return "(absent)"


ABSENT = _Absent()


def frozen(key: str) -> bool:
    """Returns whether the meaning of a checkpoint depends on `key`."""
    if key in _THAWED:
        return False
    plain = re.sub(r"^data\.sources\.[^.]+", "data.sources.*", key)
    return any(plain == f or plain.startswith(f + ".") for f in FROZEN)


def check_resume(old: Any, new: Any, where: str) -> dict[str, tuple[Any, Any]]:
    """Refuses to resume `where` under a config that changes the meaning of its state.

    A key that is newer than the checkpoint is refused unless it has the behaviour of the code at
    that time: its default, or the value in `BEFORE`.

    Returns:
      The harmless changes, for printing.

    Raises:
      ValueError: a frozen key changed; names key, both values and the fix.
    """
    changes = diff(_renamed(flatten(old)), flatten(new))
    sources = {k.split(".")[2] for k in flatten(old) if k.startswith("data.sources.")}
    for key, (a, b) in changes.items():
        new_source = key.startswith("data.sources.") and key.split(".")[2] not in sources
        if a is ABSENT and not new_source and frozen(key):
            a = BEFORE.get(key, _default(key))
        if frozen(key) and (a != b or new_source):
            raise ValueError(
                f"config.{key} was {a!r} when {where} was saved and is now {b!r} "
                f"({doc(key) or 'no documentation'}). A run cannot change it: set it back to "
                f"{a!r}, or train in another --workdir"
            )
    return changes


def _renamed(flat: dict[str, Any]) -> dict[str, Any]:
    """Renames the keys of a saved config to the current ones; of two merged keys the method's
    wins."""
    flat = dict(flat)
    if not flat.get("objective.name", "fast_wam").startswith("fast_wam"):
        flat["objective.variant"] = "fast"  # was the method's name, and nothing reads it
        flat.pop("objective.lambda_action", None)
    elif "objective.lambda_action" in flat:
        flat.pop("objective.action_weight", None)
    return {RENAMED.get(key, key): value for key, value in flat.items()}


def _default(key: str) -> Any:
    """Returns the default of a key as in `flatten`."""
    plain = re.sub(r"^data\.sources\.[^.]+\.", "", key)
    rows = TABLE if plain == key else SOURCE
    return {k: d for k, d, _ in rows}.get(plain, ABSENT)


def did_you_mean(name: str, known) -> str:
    """Returns ', did you mean ...?' if something in `known` is close to `name`, else ''."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _nest(table) -> ConfigDict:
    config = ConfigDict()
    for key, default, _ in table:
        node = config
        *parents, name = key.split(".")
        for parent in parents:
            if parent not in node:
                node[parent] = ConfigDict()
            node = node[parent]
        node[name] = default
    return config


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict | ConfigDict):
            yield from _leaves(value, path)
        else:
            yield path, tuple(value) if isinstance(value, list) else value


def _parse(name: str, text: str, default: Any) -> Any:
    kind = type(default)
    if kind is bool:
        if text.lower() in ("true", "1", "yes", "false", "0", "no"):
            return text.lower() in ("true", "1", "yes")
    elif kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            pass
    raise ValueError(f"config argument {name}={text!r} is not a {kind.__name__}")
