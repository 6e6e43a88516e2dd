"""Resolves a user's choices against what a source has, into complete settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from wamjax.config import did_you_mean
from wamjax.data.images import RESIZES
from wamjax.data.ingest import frame, signals, steps, terms
from wamjax.data.ingest.convert import PICTURES, Settings
from wamjax.data.ingest.reader import KINDS, PAIRINGS, About, Entry, Reader, SourceError
from wamjax.data.spec import Info

SAMPLE = 8  # episodes whose numbers are read to infer conventions


@dataclasses.dataclass(frozen=True)
class Request:
    """Holds the user's choices as text, from the flags of `wamjax.ingest` or its ``--map``.

    '' and 0 leave a choice to the source. The flags document each one.
    """

    cameras: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    action: tuple[str, ...] = ()
    resize: tuple[int, ...] = ()
    fit: str = "stretch"
    pictures: str = "auto"
    fps: float = 0.0
    source_fps: float = 0.0
    pairing: str = ""
    end: str = "repeat"
    no_op: float = 0.0
    gripper: str = ""
    gripper_is: str = ""
    action_is: str = ""
    relative: tuple[str, ...] = ()
    absolute: tuple[str, ...] = ()
    instruction: str = ""
    discount: float = 0.99


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds the result of `resolve`.

    Attributes:
      settings: settings for every episode.
      info: description of the data set.
      facts: what was decided and why, in words, for the report.
      warnings: what the user should check.
    """

    settings: Settings
    info: Info
    facts: dict[str, Any]
    warnings: list[str]


def resolve(reader: Reader, entries: Sequence[Entry], ask: Request) -> Plan:
    """Resolves a request into settings, and infers what it leaves open.

    Args:
      entries: the reader's; the numbers of up to `SAMPLE` are read.

    Raises:
      ValueError: a choice does not exist or does not fit the source; names the flag.
    """
    about = reader.about
    _check(ask, about)
    state = tuple(terms.parse(t, about, "--state") for t in ask.state or about.state)
    action = tuple(terms.parse(t, about, "--action") for t in ask.action or about.action)
    state_names, action_names = terms.names(state, about), terms.names(action, about)
    sample = _sample(reader, entries, state, action)
    dims = tuple(signals.grippers(action_names, sample[1]))
    # Padding after the end of an episode keeps the command of dimensions named as grippers.
    action_names = tuple(
        name if i not in dims or signals.GRIPPER.search(name) else f"{name}.gripper"
        for i, name in enumerate(action_names)
    )
    kind = ask.action_is or ("" if ask.action else about.kind) or signals.action_kind(*sample, dims)
    facts, warnings = {}, []
    old, new = _gripper(ask, sample, dims, state_names, action_names, facts, warnings)
    hz, fps = _rates(ask, about, kind)
    cameras = _cameras(ask, about)
    size = tuple(ask.resize) or None
    moves = _moves(ask, state, action)
    motion = tuple(i for i in range(len(action_names)) if i not in dims)
    outcomes = any(entry.success is not None for entry in entries)
    settings = Settings(
        cameras=cameras,
        sizes={new: size or about.cameras[old] for new, old in cameras.items()},
        resize=size is not None,
        fit=ask.fit,
        pictures=ask.pictures,
        state=state,
        action=action,
        hz=hz,
        fps=fps,
        pairing=ask.pairing or about.pairing,
        end=ask.end,
        no_op=ask.no_op,
        grippers=dims,
        old_gripper=old,
        new_gripper=new,
        deltas=motion if kind == "delta" else (),
        velocities=motion if kind == "velocity" else (),
        relative=moves["relative"],
        absolute=moves["absolute"],
        instruction=ask.instruction,
        discount=ask.discount,
        outcomes=outcomes,
    )
    if moves["absolute"]:
        changed_dims = {i for move in moves["absolute"] for i in range(*move.action)}
        left = tuple(i for i in settings.deltas if i not in changed_dims)
        settings = dataclasses.replace(settings, deltas=left)
    info = Info(
        cameras=settings.sizes,
        proprio_dim=len(state_names),
        action_dim=len(action_names),
        control_hz=fps,
        robot=about.robot,
        action_names=action_names,
        proprio_names=state_names,
        final_observation=about.final or settings.pairing == "after" or ask.end == "drop",
        outcomes=outcomes,
    )
    facts |= _facts(settings, info, about, kind, ask)
    return Plan(settings, info, facts, warnings + _warnings(entries, settings, kind))


def _check(ask: Request, about: About) -> None:
    for flag, value, names in (
        ("fit", ask.fit, RESIZES),
        ("pictures", ask.pictures, PICTURES),
        ("pairing", ask.pairing or about.pairing, PAIRINGS),
        ("end", ask.end, steps.ENDS),
        ("gripper", ask.gripper or "plus_opens", signals.CONVENTIONS),
        ("gripper_is", ask.gripper_is or "plus_opens", signals.CONVENTIONS),
        ("action_is", ask.action_is or "delta", KINDS),
    ):
        if value not in names:
            raise ValueError(f"--{flag}={value} is not one of {', '.join(names)}"
                             f"{did_you_mean(value, names)}")  # fmt: skip
    still = [old for old in _cameras(ask, about).values() if old not in about.videos]
    if ask.pictures == "video" and (still or ask.resize):
        what = f"but cameras {still} are not video" if still else "without --resize"
        raise ValueError(f"--pictures=video copies the video of the source, {what}: give "
                         "--pictures=jpeg, or leave these out; training can resize by "
                         "config.data.image_size or config.data.layout")  # fmt: skip
    if ask.resize and (len(ask.resize) != 2 or min(ask.resize) < 1):
        raise ValueError(f"--resize={','.join(map(str, ask.resize))} must be HEIGHT,WIDTH")
    if not 0 < ask.discount <= 1:
        raise ValueError(f"--discount={ask.discount:g} must be in (0, 1]")
    if ask.no_op < 0 or ask.fps < 0 or ask.source_fps < 0:
        raise ValueError("--no_op, --fps and --source_fps cannot be negative")
    for key in ("state", "action"):
        if not (getattr(about, key) or getattr(ask, key)):
            arrays = ", ".join(f"{k} ({n})" for k, n in about.arrays.items())
            raise ValueError(
                f"give --{key}: the source does not say which of its arrays it is; it has {arrays}"
            )


def _sample(reader: Reader, entries: Sequence[Entry], state, action):
    """Returns (states, actions) of some episodes, paired as in the source."""
    good = [i for i, entry in enumerate(entries) if not entry.error]
    states, actions = [], []
    for i in good[:: max(1, len(good) // SAMPLE)][:SAMPLE]:
        try:
            arrays = reader.arrays(i)
            states.append(terms.assemble(state, arrays))
            actions.append(terms.assemble(action, arrays))
        except (SourceError, ValueError, KeyError):
            continue  # its conversion will report it
    return states, actions


def _cameras(ask: Request, about: About) -> dict[str, str]:
    out = {}
    for text in ask.cameras or tuple(about.cameras):
        new, _, old = text.rpartition("=")
        if old not in about.cameras:
            raise ValueError(f"--cameras: the source has no camera {old!r}"
                             f"{did_you_mean(old, about.cameras)}; it has "
                             f"{', '.join(about.cameras) or 'none'}")  # fmt: skip
        if (new or old) in out:
            raise ValueError(f"--cameras: two cameras would have the name {new or old!r}")
        out[new or old] = old
    return out


def _rates(ask: Request, about: About, kind: str) -> tuple[float, float]:
    hz = ask.source_fps or about.hz
    if not hz:
        raise ValueError("the source does not say its rate: give --source_fps")
    fps = ask.fps or hz
    if fps > hz:
        raise ValueError(
            f"--fps={fps:g} is above the source's {hz:g}: a conversion can only lower the rate"
        )
    if fps != hz and kind == "unclear":
        raise ValueError(f"--fps={fps:g}: the data does not show whether the actions are deltas, "
                         "which are added up when the rate is lowered: give "
                         f"--action_is={'|'.join(KINDS)}")  # fmt: skip
    return hz, fps


def _moves(ask: Request, state, action) -> dict[str, tuple[frame.Move, ...]]:
    sizes = sum(t.size for t in action), sum(t.size for t in state)
    blocks = terms.rotation_blocks(action), terms.rotation_blocks(state)
    return {
        name: tuple(frame.parse(text, f"--{name}", sizes, *blocks) for text in getattr(ask, name))
        for name in ("relative", "absolute")
    }


def _gripper(ask, sample, dims, state_names, action_names, facts, warnings) -> tuple[str, str]:
    """Returns the (old, new) convention, and adds what it infers to `facts` and `warnings`."""
    conventions = {action_names[i]: signals.convention(*sample, i, state_names) for i in dims}
    facts["gripper"] = ", ".join(f"{k} {v}" for k, v in conventions.items()) or "none found"
    kinds = {ask.gripper_is} if ask.gripper_is else set(conventions.values())
    if ask.gripper_is:
        facts["gripper"] += f"; taken as {ask.gripper_is}, as asked"
    if not ask.gripper:
        if "unclear" in kinds:
            warnings.append(f"gripper: {facts['gripper']}: nothing says which command opens it")
        return "", ""
    if len(kinds) != 1 or not kinds <= set(signals.CONVENTIONS):
        raise ValueError(f"--gripper={ask.gripper}: the data does not show which command of the "
                         f"source opens it ({facts['gripper']}): give --gripper_is")  # fmt: skip
    facts["gripper"] += f"; written as {ask.gripper}"
    return kinds.pop(), ask.gripper


def _facts(settings: Settings, info: Info, about: About, kind: str, ask: Request) -> dict[str, Any]:
    ends = {
        (True, "repeat"): "the source has what was seen after the last action",
        (True, "drop"): "the source has what was seen after the last action",
        (False, "repeat"): "T observations for T actions: the last observation is stored twice",
        (False, "drop"): "T observations for T actions: the last action is left out",
    }
    pairings = {
        "before": "observation t was seen before action t",
        "after": "observation t was stored after action t: paired with action t + 1, the first "
        "action is left out",
        "late": "observation t is paired with action max(0, t - 1)",
    }
    explicit = ask.action_is or (about.kind and not ask.action)
    final = about.final or settings.pairing == "after"
    return {
        "robot": info.robot,
        "rate": f"{settings.hz:g} Hz" + ("" if settings.fps == settings.hz else
                                         f" to {settings.fps:g} Hz"),
        "cameras": {new: f"{old}, {about.cameras[old]} to {settings.sizes[new]}"
                    for new, old in settings.cameras.items()},
        "state": [f"{t.key}[{t.start}:{t.end}]{_turn(t)}" for t in settings.state],
        "action": [f"{t.key}[{t.start}:{t.end}]{_turn(t)}" for t in settings.action],
        "actions are": kind + ("" if explicit else " (from the data)"),
        "relative": list(ask.relative),
        "absolute": list(ask.absolute),
        "pairing": pairings[settings.pairing],
        "end": ends[final, settings.end],
        "no-ops": f"dropped below {settings.no_op:g}" if settings.no_op else "kept",
        "outcomes": "of the source" if settings.outcomes else
                    "none in the source: taken as demonstrations that succeed, without returns",
        "notes": list(about.notes),
    }  # fmt: skip


def _turn(term: terms.Term) -> str:
    if not term.old:
        return ""
    return f" {term.old}" + (f" to {term.new}" if term.new != term.old else "")


def _warnings(entries: Sequence[Entry], settings: Settings, kind: str) -> list[str]:
    out = []
    silent = [e for e in entries if not (e.error or e.instruction or settings.instruction)]
    if silent:
        out.append(f"{len(silent)} of {len(entries)} episodes have no instruction ({silent[0].name}"
                   "): give one by --instruction")  # fmt: skip
    if kind == "unclear":
        out.append("whether the actions are deltas or absolute is not clear from the data")
    return out


def request(values: Mapping[str, Any], where: str) -> Request:
    """Builds a request from a mapping, as read from JSON or TOML.

    Raises:
      ValueError: a key does not exist, or a value has the wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(Request)}
    out = {}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"{where}: there is no key {key!r}{did_you_mean(key, fields)}; there "
                             f"are {', '.join(fields)}")  # fmt: skip
        default = fields[key].default
        if isinstance(default, tuple):
            if isinstance(value, Mapping):  # new name -> old name
                value = [f"{new}={old}" for new, old in value.items()]
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(f"{where}: {key} = {value!r} must be a list")
            out[key] = tuple(value)
        elif isinstance(default, float) and isinstance(value, int | float):
            out[key] = float(value)
        elif isinstance(value, type(default)):
            out[key] = value
        else:
            raise ValueError(f"{where}: {key} = {value!r} must be {type(default).__name__}")
    return Request(**out)
