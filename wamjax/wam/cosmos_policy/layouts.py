"""Defines layouts: the meaning of each latent frame in Cosmos Policy's clip.

Cosmos Policy (arXiv 2601.16163) changes no layer of a video model. Everything that a robot senses
and does becomes a latent frame, a *slot*, of one clip in the order (s, a, s', V). A layout is the
list of its slots, and everything else follows from it: indices, groups, roles, the statistics and
cameras that it needs, the slots to decode. A slot is one word:

    blank              a black picture; the first slot, which a causal video codec encodes alone
    proprio:9          the state now, p numbers
    camera:wrist       a picture now, from the named camera
    action:16x7        a chunk of j actions of a numbers
    future_proprio:9   the state at the end of the chunk
    future_camera:NAME a picture at the end of the chunk
    value              the return from there on

A new robot is a new tuple of words in its config. Source of the published ones: the public
``cosmos_policy_experiment_configs.py`` and the ``*_dataset.py`` of each benchmark.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from wamjax.config import did_you_mean
from wamjax.wam.cosmos_policy.uses import GROUPS
from wamjax.wam.slots import Slot

# kind of slot -> its group. Slots of a group always have the same role, see `uses`.
GROUP_OF = {
    "blank": "blank",
    "proprio": "current",
    "camera": "current",
    "action": "action",
    "future_proprio": "future",
    "future_camera": "future",
    "value": "value",
}
PICTURES = ("camera", "future_camera")
# kind that holds numbers -> how many sizes follow the colon.
_RANK = {"proprio": 1, "action": 2, "future_proprio": 1, "value": 0}

LAYOUTS: dict[str, tuple[str, ...]] = {
    "libero": (
        "blank", "proprio:9", "camera:wrist", "camera:agentview",
        "action:16x7",
        "future_proprio:9", "future_camera:wrist", "future_camera:agentview",
        "value",
    ),
    "robocasa": (
        "blank", "proprio:9", "camera:wrist", "camera:left", "camera:right",
        "action:32x7",
        "future_proprio:9", "future_camera:wrist", "future_camera:left", "future_camera:right",
        "value",
    ),
    "aloha": (
        "blank", "proprio:14", "camera:left_wrist", "camera:right_wrist", "camera:high",
        "action:50x14",
        "future_proprio:14", "future_camera:left_wrist", "future_camera:right_wrist",
        "future_camera:high",
        "value",
    ),
    "tabletop": (
        "blank", "proprio:5", "camera:overhead", "camera:gripper",
        "action:8x4",
        "future_proprio:5", "future_camera:overhead", "future_camera:gripper",
        "value",
    ),
}  # fmt: skip


def name_of(slot: Slot) -> str:
    """Returns a slot's name, unique in its layout: its kind or its camera, such as
    ``future_wrist``."""
    if slot.kind in PICTURES:
        return f"future_{slot.camera}" if slot.kind == "future_camera" else slot.camera
    return slot.kind


def word_of(slot: Slot) -> str:
    """Returns the word of a slot, the reverse of parsing it."""
    suffix = slot.camera or "x".join(map(str, slot.shape))
    return f"{slot.kind}:{suffix}" if suffix else slot.kind


def holds_numbers(slot: Slot) -> bool:
    """Returns whether a slot's latent frame is written by `injection` rather than by a codec."""
    return slot.kind in _RANK


@dataclasses.dataclass(frozen=True)
class Layout:
    """Holds an ordered list of slots; build it with `parse`, which checks it."""

    slots: tuple[Slot, ...]

    def __len__(self) -> int:
        return len(self.slots)

    def __str__(self) -> str:
        return "\n".join(f"{i:>3}  {s.group:<8}{word_of(s)}" for i, s in enumerate(self.slots))

    @property
    def words(self) -> tuple[str, ...]:
        """Returns the words of all slots, the reverse of `parse`."""
        return tuple(map(word_of, self.slots))

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of the slots."""
        return tuple(map(name_of, self.slots))

    def index(self, name: str) -> int:
        """Returns the position of a slot by name.

        Raises:
          KeyError: there is no such slot; makes a suggestion.
        """
        if name not in self.names:
            raise KeyError(f"the layout has no slot {name!r}{did_you_mean(name, self.names)}; "
                           f"it has {self.names}")  # fmt: skip
        return self.names.index(name)

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """Returns group -> positions of its slots, in order."""
        by_group = {g: tuple(i for i, s in enumerate(self.slots) if s.group == g) for g in GROUPS}
        return {g: positions for g, positions in by_group.items() if positions}

    @property
    def sizes(self) -> dict[str, int]:
        """Returns group -> number of slots."""
        return {g: len(positions) for g, positions in self.groups.items()}

    @property
    def numbers(self) -> dict[str, Slot]:
        """Returns the slots that `injection` writes, by name."""
        return {name_of(s): s for s in self.slots if holds_numbers(s)}

    @property
    def cameras(self) -> tuple[str, ...]:
        """Returns the cameras of the present pictures, in the order of their slots."""
        return tuple(s.camera for s in self.slots if s.kind == "camera")

    @property
    def decoded(self) -> dict[str, int]:
        """Returns camera -> slot, for the pictures of an imagined future."""
        return {s.camera: i for i, s in enumerate(self.slots) if s.kind == "future_camera"}

    @property
    def conditional(self) -> int:
        """Returns the number of leading slots that a policy is given; acting encodes only these."""
        return self.groups["action"][0]

    @property
    def pictures(self) -> int:
        """Returns the number of leading slots up to the last one that numbers do not overwrite; a
        codec has to encode only these."""
        return 1 + max(i for i, s in enumerate(self.slots) if not holds_numbers(s))

    @property
    def chunk(self) -> int:
        """Returns the number of actions in a chunk (j)."""
        return self.numbers["action"].shape[0]

    @property
    def statistics(self) -> dict[str, int]:
        """Returns key of the normalisers -> number of dimensions that this layout needs."""
        sizes = {"actions": self.numbers["action"].shape[1]}
        if "proprio" in self.numbers:
            sizes["proprio"] = self.numbers["proprio"].shape[0]
        return sizes

    def check_data(self, spec) -> None:
        """Compares the layout with the data (`wamjax.data.spec.DataSpec`).

        Raises:
          ValueError: dimensions differ, or the data lacks a camera.
        """
        data = {"chunk": spec.chunk, "actions": spec.action_dim, "proprio": spec.proprio_dim}
        for key, size in {"chunk": self.chunk, **self.statistics}.items():
            if data[key] != size:
                raise ValueError(
                    f"objective.slots {self.words} need {key} of size {size}, the data has "
                    f"{data[key]}: correct config.objective.slots or config.data"
                )
        if spec.layout:
            raise ValueError(f"config.data.layout = {spec.layout!r} must be '' for Cosmos Policy: "
                             "objective.slots has a slot for each camera")  # fmt: skip
        for camera in self.cameras:
            if camera not in spec.cameras:
                raise ValueError(
                    f"objective.slots needs camera {camera!r}"
                    f"{did_you_mean(camera, spec.cameras)}; config.data.cameras are "
                    f"{tuple(spec.cameras)}"
                )
        if len({spec.cameras[c] for c in self.cameras}) > 1:
            raise ValueError(f"the cameras {dict(spec.cameras)} must have equal sizes: set "
                             "config.data.image_size = (HEIGHT, WIDTH)")  # fmt: skip


def named(layout: str | Sequence[str]) -> Layout:
    """Returns a layout by its name in `LAYOUTS`, or from custom words.

    Raises:
      ValueError: no such name, with a suggestion; otherwise as `parse`.
    """
    if not isinstance(layout, str):
        return parse(layout)
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout!r}{did_you_mean(layout, LAYOUTS)}; there are "
                         f"{sorted(LAYOUTS)}, or pass a list of slots")  # fmt: skip
    return parse(LAYOUTS[layout])


def parse(words: Sequence[str]) -> Layout:
    """Builds a layout from its words.

    Raises:
      ValueError: a word is unknown, or the order is invalid; names the word and the reason.
    """
    layout = Layout(tuple(_slot(word, i) for i, word in enumerate(words)))
    names, groups = layout.names, [s.group for s in layout.slots]
    if duplicates := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"objective.slots {tuple(words)} contains {duplicates} more than once")
    if missing := [g for g in GROUPS if g not in groups]:
        raise ValueError(f"objective.slots {tuple(words)} needs slots of the groups {missing}")
    if groups != sorted(groups, key=GROUPS.index) or groups.count("blank") != 1:
        raise ValueError(f"objective.slots {tuple(words)} must be in the order {GROUPS}, with one "
                         "blank")  # fmt: skip
    for camera in layout.decoded:
        if camera not in layout.cameras:
            raise ValueError(
                f"slot 'future_camera:{camera}' needs a slot 'camera:{camera}' in objective.slots"
            )
    proprio, future = (layout.numbers.get(k) for k in ("proprio", "future_proprio"))
    if future and (proprio is None or proprio.shape != future.shape):
        raise ValueError(
            f"slot '{word_of(future)}' needs a slot 'proprio' of the same size in objective.slots"
        )
    return layout


def _slot(word: str, position: int) -> Slot:
    kind, _, suffix = word.partition(":")
    if kind not in GROUP_OF:
        raise ValueError(f"slot {word!r}: there is no kind {kind!r}{did_you_mean(kind, GROUP_OF)}; "
                         f"there are {tuple(GROUP_OF)}")  # fmt: skip
    if kind in PICTURES:
        if not suffix:
            raise ValueError(f"slot {word!r} names no camera; write {kind}:NAME")
        return Slot(kind, GROUP_OF[kind], position=position, camera=suffix)
    rank = _RANK.get(kind, 0)
    if not re.fullmatch("x".join([r"[1-9]\d*"] * rank), suffix):
        form = f"{kind}:{'x'.join(['N'] * rank)}" if rank else kind
        raise ValueError(f"slot {word!r} must have the form {form}")
    shape = tuple(int(n) for n in suffix.split("x") if n)
    return Slot(kind, GROUP_OF[kind], position=position, shape=shape)
