"""Observations as clients name them, as those that a policy takes.

A message is flattened: ``{"images": {"cam_high": x}}`` has the key ``images/cam_high``. A `Table`
says what each key is: a camera, a part of the state, the instruction, or nothing to this policy.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wamjax.bundle.observation import BadObservation
from wamjax.config import did_you_mean

FILE = "names.json"  # in a bundle: the table of its clients
PROPRIO, INSTRUCTION = "proprio", "instruction"
PREFIX = "prefix"  # beside an observation: actions that the robot is committed to

# What a client may add to an observation. All are echoed in the answer; `mode` is also obeyed.
EXTRAS = ("request_id", "timestamp", "executed_actions", "inference_delay", "mode", "budget_ms")

# Keys of well-known clients: of the cameras in the order of the policy's, of the parts of the
# state, of the instruction, and of what no policy here takes.
CLIENTS = {
    "libero": (("observation/image", "observation/wrist_image"), ("observation/state",),
               "prompt", ()),
    "droid": (("observation/exterior_image_1_left", "observation/wrist_image_left"),
              ("observation/joint_position", "observation/gripper_position"), "prompt", ()),
    "aloha": (("images/cam_high", "images/cam_left_wrist", "images/cam_right_wrist",
               "images/cam_low"), ("state",), "prompt", ()),
    "openvla": (("image", "wrist_image"), ("state",), "instruction", ("unnorm_key",)),
    "openvla_oft": (("full_image", "wrist_image"), ("state",), "instruction", ("unnorm_key",)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Table:
    """What the keys of one kind of client are.

    Attributes:
      cameras: key -> camera of the policy.
      proprio: keys whose values, one after the other, are the state.
      instruction: the key of the words.
      unused: keys that such a client sends and this policy does not take.
    """

    cameras: Mapping[str, str]
    proprio: tuple[str, ...]
    instruction: str
    unused: frozenset[str] = frozenset()

    @property
    def keys(self) -> tuple[str, ...]:
        """All that such a client has to send."""
        return (*self.cameras, *self.proprio, self.instruction)

    def to_json(self) -> dict[str, str]:
        """Key -> what it is."""
        out = dict(self.cameras) | dict.fromkeys(self.proprio, PROPRIO)
        return out | {self.instruction: INSTRUCTION} | dict.fromkeys(sorted(self.unused), "")


@dataclasses.dataclass(frozen=True)
class Names:
    """Turns messages into observations, by whichever table fits best.

    Attributes:
      tables: of the clients that are expected.
      default_instruction: for clients that send none; '' = they must.
      max_pixels: of one picture.
    """

    tables: tuple[Table, ...]
    default_instruction: str = ""
    max_pixels: int = 2**22

    def __call__(self, message: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what `LoadedPolicy` takes of one robot, what the client added to it).

        Raises:
          BadObservation: keys are missing or unknown, or a picture is too large.
        """
        if not isinstance(message, Mapping):
            raise BadObservation(
                f"an observation is a map of keys, not a {type(message).__name__}"
            )
        extras = {key: _echo(key, message[key]) for key in EXTRAS if key in message}
        values = _flat({key: x for key, x in message.items() if key not in (*EXTRAS, PREFIX)})
        table = max(self.tables, key=lambda t: len(set(t.keys) & set(values)))
        if self.default_instruction and table.instruction not in values:
            values[table.instruction] = self.default_instruction
        _check(values, table)
        images = {name: self._picture(key, values[key]) for key, name in table.cameras.items()}
        proprio = [np.atleast_1d(np.asarray(values[key])) for key in table.proprio]
        for key, part in zip(table.proprio, proprio, strict=True):
            if part.ndim != 1 or part.dtype.kind not in "fiu":
                raise BadObservation(f"{key} is {part.dtype} {part.shape}, numbers in a row are "
                                     "wanted")  # fmt: skip
        text = values[table.instruction]
        if not isinstance(text, str) or len(text) > 4096:
            raise BadObservation(f"{table.instruction} is no text of at most 4096 characters")
        return {"images": images, PROPRIO: np.concatenate(proprio), INSTRUCTION: text}, extras

    def _picture(self, key: str, value: Any) -> np.ndarray:
        """Channels last; ALOHA's clients have them first."""
        try:
            x = np.asarray(value)
        except ValueError:
            raise BadObservation(f"{key} is no array: its rows differ in length") from None
        if x.ndim != 3:
            raise BadObservation(f"{key} is {x.dtype} {x.shape}, one picture (H, W, 3) is wanted")
        if x.size > 3 * self.max_pixels:
            raise BadObservation(f"{key} is {x.shape}, a picture has at most {self.max_pixels} "
                                 "pixels here")  # fmt: skip
        if x.dtype.kind in "iu" and x.dtype != np.uint8 and isinstance(value, list):
            if x.size and (x.min() < 0 or x.max() > 255):
                raise BadObservation(f"{key} has numbers beyond [0, 255]")
            x = x.astype(np.uint8)  # json knows no bytes
        if x.shape[0] == 3 and x.shape[2] != 3:
            x = np.ascontiguousarray(np.moveaxis(x, 0, -1))
        return x


def prefix_of(message: Mapping[str, Any]) -> np.ndarray | None:
    """The actions (d, a) that a client is committed to; None: it says of none.

    Raises:
      BadObservation: they are no numbers in rows.
    """
    value = message.get(PREFIX)
    if value is None or (isinstance(value, list) and not value):  # json's rows have no width then
        return None
    try:
        actions = np.asarray(value)
    except ValueError:
        raise BadObservation("prefix is no array: its rows differ in length") from None
    if actions.ndim != 2 or actions.dtype.kind not in "fiu":
        raise BadObservation(f"prefix is {actions.dtype} {actions.shape}, numbers (d, a) of d "
                             "committed actions are wanted")  # fmt: skip
    return actions


def tables(chosen: Sequence[str], cameras: Sequence[str], bundle: str = "") -> tuple[Table, ...]:
    """The tables that a server goes by, those asked for first.

    Always there are that of `load_policy` (``images/CAMERA``, ``proprio``, ``instruction``) and
    that of openpi's style (``observation/CAMERA``, ``observation/state``, ``prompt``).

    Args:
      chosen: names of `CLIENTS`, and pairs ``KEY=CAMERA``, ``KEY=proprio``, ``KEY=instruction``,
        ``KEY=`` (not used), which make one table together.
      cameras: of the policy, in order.
      bundle: folder, whose ``names.json`` maps keys likewise, if it has one.

    Raises:
      ValueError: there is no such client or camera, or the policy has more cameras than it.
    """
    out, pairs = [], dict(word.split("=", 1) for word in chosen if "=" in word)
    if pairs:
        out.append(of_pairs(pairs, cameras, "--names"))
    for name in (word for word in chosen if "=" not in word):
        if name not in CLIENTS:
            raise ValueError(f"--names: there is no client {name!r}{did_you_mean(name, CLIENTS)}; "
                             f"there are {', '.join(CLIENTS)}, or KEY=CAMERA")  # fmt: skip
        out.append(_of_client(name, cameras))
    file = pathlib.Path(bundle) / FILE
    if bundle and file.is_file():
        out.append(of_pairs(json.loads(file.read_text()), cameras, str(file)))
    native = Table({f"images/{name}": name for name in cameras}, (PROPRIO,), INSTRUCTION)
    style = {f"observation/{name}": name for name in cameras}
    return (*out, native, Table(style, ("observation/state",), "prompt"))


def of_pairs(pairs: Mapping[str, str], cameras: Sequence[str], where: str) -> Table:
    """A table of key -> camera, ``proprio``, ``instruction`` or '' (not used).

    Raises:
      ValueError: a camera is unknown or missing, or state or instruction have no key.
    """
    kinds = set(pairs.values())
    unknown = sorted(kinds - {*cameras, PROPRIO, INSTRUCTION, ""})
    missing = [name for name in (*cameras, PROPRIO, INSTRUCTION) if name not in kinds]
    if unknown or missing:
        raise ValueError(f"{where} names {unknown or 'nothing'} that the policy does not have, and "
                         f"has no key for {missing or 'nothing'}; the policy takes cameras "
                         f"{list(cameras)}, proprio and instruction")  # fmt: skip
    of = {kind: [key for key, x in pairs.items() if x == kind] for kind in kinds}
    for kind in (*cameras, INSTRUCTION):
        if len(of[kind]) > 1:
            raise ValueError(f"{where}: {of[kind]} are all said to be {kind}")
    pictures = {of[name][0]: name for name in cameras}
    return Table(pictures, tuple(of[PROPRIO]), of[INSTRUCTION][0], frozenset(of.get("", ())))


def _of_client(name: str, cameras: Sequence[str]) -> Table:
    keys, proprio, instruction, unused = CLIENTS[name]
    if len(cameras) > len(keys):
        raise ValueError(f"--names={name}: such clients have cameras {list(keys)}, the policy "
                         f"has {list(cameras)}; say which is which by KEY=CAMERA")  # fmt: skip
    pairs = {key: camera for key, camera in zip(keys, cameras, strict=False)}
    return Table(pairs, proprio, instruction, frozenset((*keys[len(cameras) :], *unused)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in values.items():
        if not isinstance(key, str) or len(key) > 200:
            raise BadObservation(f"key {str(key)[:40]!r} is no text of at most 200 characters")
        if isinstance(value, Mapping) and not prefix:
            out |= _flat(value, f"{key}/")
        else:
            out[prefix + key] = value
    return out


def _check(values: Mapping[str, Any], table: Table) -> None:
    missing = [key for key in table.keys if key not in values]
    unknown = [key for key in values if key not in table.keys and key not in table.unused]
    if missing or unknown:
        hint = did_you_mean(unknown[0], missing) if unknown and missing else ""
        raise BadObservation(
            f"keys {missing} are missing and {unknown[:16]} are unknown{hint}; the policy has "
            f"cameras {list(table.cameras.values())} and takes them as {list(table.cameras)}, its "
            f"state as {list(table.proprio)}, its instruction as {table.instruction!r} (--names)"
        )


def _echo(key: str, value: Any) -> Any:
    """What a client added, if it is something that can be given back."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is not None and not isinstance(value, bool | int | float | str):
        raise BadObservation(f"{key} is a {type(value).__name__}, a number or a text is wanted")
    if isinstance(value, str) and len(value) > 200:
        raise BadObservation(f"{key} is longer than 200 characters")
    return value
