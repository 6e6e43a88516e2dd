"""Maps the observation keys of clients to those of a policy.

A message is flattened: ``{"images": {"cam_high": x}}`` has the key ``images/cam_high``. A `Table`
gives each key's meaning: a camera, a part of the state, the instruction, or unused by this policy.
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

FILE = "names.json"  # in a bundle: the table for its clients
PROPRIO, INSTRUCTION = "proprio", "instruction"
PREFIX = "prefix"  # next to an observation: the robot's committed actions

# Optional keys of an observation. All are echoed in the answer; `mode` also takes effect, and
# `budget_ms` in mode adaptive.
EXTRAS = ("request_id", "timestamp", "executed_actions", "inference_delay", "mode", "budget_ms")

# Keys of well-known clients: cameras in the policy's order, parts of the state, the instruction,
# and keys that no policy here uses.
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
    """Maps the keys of one kind of client.

    Attributes:
      cameras: key -> camera of the policy.
      proprio: keys whose values, concatenated, are the state.
      instruction: key of the instruction.
      unused: keys that such a client sends and this policy does not use.
    """

    cameras: Mapping[str, str]
    proprio: tuple[str, ...]
    instruction: str
    unused: frozenset[str] = frozenset()

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that such a client has to send."""
        return (*self.cameras, *self.proprio, self.instruction)

    def to_json(self) -> dict[str, str]:
        """Returns key -> meaning."""
        out = dict(self.cameras) | dict.fromkeys(self.proprio, PROPRIO)
        return out | {self.instruction: INSTRUCTION} | dict.fromkeys(sorted(self.unused), "")


@dataclasses.dataclass(frozen=True)
class Names:
    """Converts messages to observations with the table that fits best.

    Attributes:
      tables: tables of the expected clients.
      default_instruction: for clients that send none; '' = the instruction is required.
      max_pixels: maximum number of pixels per picture.
    """

    tables: tuple[Table, ...]
    default_instruction: str = ""
    max_pixels: int = 2**22

    def __call__(self, message: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (one robot's observation for `LoadedPolicy`, the client's extras).

        Raises:
          BadObservation: keys are missing or unknown, or a picture is too large.
        """
        if not isinstance(message, Mapping):
            raise BadObservation(
                f"an observation must be a map of keys, not a {type(message).__name__}"
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
                raise BadObservation(f"{key} is {part.dtype} {part.shape}, it must be a row "
                                     "of numbers")  # fmt: skip
        text = values[table.instruction]
        if not isinstance(text, str) or len(text) > 4096:
            raise BadObservation(f"{table.instruction} must be a text of at most 4096 characters")
        return {"images": images, PROPRIO: np.concatenate(proprio), INSTRUCTION: text}, extras

    def _picture(self, key: str, value: Any) -> np.ndarray:
        """Returns the picture with channels last; ALOHA's clients send them first."""
        try:
            x = np.asarray(value)
        except ValueError:
            raise BadObservation(f"{key} is not an array: its rows differ in length") from None
        if x.ndim != 3:
            raise BadObservation(f"{key} is {x.dtype} {x.shape}, it must be one picture (H, W, 3)")
        if x.size > 3 * self.max_pixels:
            raise BadObservation(
                f"{key} is {x.shape}, a picture may have at most {self.max_pixels} pixels"
            )
        if x.dtype.kind in "iu" and x.dtype != np.uint8 and isinstance(value, list):
            if x.size and (x.min() < 0 or x.max() > 255):
                raise BadObservation(f"{key} has numbers from {x.min()} to {x.max()}, they must "
                                     "lie in [0, 255]")  # fmt: skip
            x = x.astype(np.uint8)  # JSON has no bytes
        if x.shape[0] == 3 and x.shape[2] != 3:
            x = np.ascontiguousarray(np.moveaxis(x, 0, -1))
        return x


def prefix_of(message: Mapping[str, Any]) -> np.ndarray | None:
    """Returns the committed actions (d, a) of a message; None if it has none.

    Raises:
      BadObservation: the prefix is not a matrix of numbers.
    """
    value = message.get(PREFIX)
    if value is None or (isinstance(value, list) and not value):  # an empty JSON list has no width
        return None
    try:
        actions = np.asarray(value)
    except ValueError:
        raise BadObservation("prefix is not an array: its rows differ in length") from None
    if actions.ndim != 2 or actions.dtype.kind not in "fiu":
        raise BadObservation(f"prefix is {actions.dtype} {actions.shape}, it must be numbers "
                             "(d, a), for d committed actions")  # fmt: skip
    return actions


def tables(chosen: Sequence[str], cameras: Sequence[str], bundle: str = "") -> tuple[Table, ...]:
    """Returns the tables of a server, the chosen ones first.

    It always includes the table of `load_policy` (``images/CAMERA``, ``proprio``, ``instruction``)
    and one in openpi's style (``observation/CAMERA``, ``observation/state``, ``prompt``).

    Args:
      chosen: names of `CLIENTS`, and pairs ``KEY=CAMERA``, ``KEY=proprio``, ``KEY=instruction``,
        ``KEY=`` (unused), which form one table together.
      cameras: cameras of the policy, in order.
      bundle: folder whose ``names.json``, if there is one, maps keys in the same way.

    Raises:
      ValueError: the client or a camera does not exist, or the policy has more cameras than the
      client.
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
    """Returns a table from pairs of key -> camera, ``proprio``, ``instruction`` or '' (unused).

    Raises:
      ValueError: a camera is unknown or missing, or state or instruction has no key.
    """
    kinds = set(pairs.values())
    unknown = sorted(kinds - {*cameras, PROPRIO, INSTRUCTION, ""})
    missing = [name for name in (*cameras, PROPRIO, INSTRUCTION) if name not in kinds]
    if unknown or missing:
        raise ValueError(f"{where} names {unknown or 'nothing'} that the policy does not have, and "
                         f"has no key for {missing or 'nothing'}; the policy takes cameras "
                         f"{list(cameras)}, proprio and instruction")  # fmt: skip
    keys_of = {kind: [key for key, x in pairs.items() if x == kind] for kind in kinds}
    for kind in (*cameras, INSTRUCTION):
        if len(keys_of[kind]) > 1:
            raise ValueError(f"{where}: only one of {keys_of[kind]} can be {kind}")
    pictures = {keys_of[name][0]: name for name in cameras}
    unused = frozenset(keys_of.get("", ()))
    return Table(pictures, tuple(keys_of[PROPRIO]), keys_of[INSTRUCTION][0], unused)


def _of_client(name: str, cameras: Sequence[str]) -> Table:
    keys, proprio, instruction, unused = CLIENTS[name]
    if len(cameras) > len(keys):
        raise ValueError(f"--names={name}: such clients have cameras {list(keys)}, the policy "
                         f"has {list(cameras)}: assign them by KEY=CAMERA")  # fmt: skip
    pairs = {key: camera for key, camera in zip(keys, cameras, strict=False)}
    return Table(pairs, proprio, instruction, frozenset((*keys[len(cameras) :], *unused)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in values.items():
        if not isinstance(key, str) or len(key) > 200:
            raise BadObservation(f"key {str(key)[:40]!r} must be a text of at most 200 characters")
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
    """Returns a client's extra if it can be sent back."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is not None and not isinstance(value, bool | int | float | str):
        raise BadObservation(f"{key} is a {type(value).__name__}, it must be a number or a text")
    if isinstance(value, str) and len(value) > 200:
        raise BadObservation(f"{key} is longer than 200 characters: shorten it")
    return value
