"""Defines Fast-WAM's slots, its visibility tables and the uses of its variants (spec: Fast-WAM,
3.2).

Groups: `first` is the clean first latent frame, `future` the later frames, `action` the chunk,
`cond` the conditioning copy of the later frames in imagine-then-act training, and `anticipation`
the later frames as predicted by one pass over learned tokens.
"""

from __future__ import annotations

from wamjax.config import did_you_mean
from wamjax.models.shell import ANTICIPATION
from wamjax.models.visibility import table
from wamjax.wam.slots import Role, Slot, factorization
from wamjax.wam.uses import Use, use

GIVEN, PREDICTED, ABSENT = Role.GIVEN, Role.PREDICTED, Role.ABSENT

# Actions see the clean first frame and never the future, in training and at test time, so the
# future can be left out at test time without changing the actions.
FAST = table("fast_wam", {"first": "first", "future": "first future", "action": "first action"})

# One-way in the public code (video never attends to actions), although notes on the paper say
# that it is bidirectional.
JOINT = table(
    "fast_wam_joint",
    {"first": "first", "future": "first future", "action": "first future action"},
)

# Imagine, then act. The public code carries the first frame twice, once for the noisy video and
# once for the conditioning video. Both copies are clean, at level 0, and see only themselves, so
# they are equal in every layer and one serves both; `IDM_PUBLISHED` is the original.
IDM = table(
    "fast_wam_idm",
    {
        "first": "first",
        "future": "first future",
        "cond": "first cond",
        "action": "first cond action",
    },
)
IDM_PUBLISHED = table(
    "fast_wam_idm_published",
    {
        "first": "first",
        "future": "first future",
        "cond_first": "cond_first",
        "cond": "cond_first cond",
        "action": "cond_first cond action",
    },
)

# Three ways to act with one checkpoint: on the first frame, on one pass over learned tokens, on an
# imagined video. Each uses the table over the groups that are present.
LADDER = table(
    "fast_wam_ladder",
    {
        "first": "first",
        "future": "first future",
        "cond": "first cond",
        "anticipation": "first anticipation",
        "action": "first cond anticipation action",
    },
)

CO_TRAIN = factorization("co_train", first=GIVEN, future=PREDICTED, action=PREDICTED)
ACT_ONLY = factorization("act_only", first=GIVEN, future=ABSENT, action=PREDICTED)
TEACHER = factorization("teacher", first=GIVEN, future=PREDICTED, cond=GIVEN, action=PREDICTED)
ANTICIPATE = factorization(
    "anticipate", first=GIVEN, future=ABSENT, anticipation=PREDICTED, action=PREDICTED
)

# variant -> uses that share a training batch. If there are several, their shares come from the
# config. Without co-training no group with a loss sees the future frames, so they are absent: the
# same gradient as a video loss of weight zero, without computing it.
USES: dict[str, tuple[Use, ...]] = {
    "fast": (use(CO_TRAIN, FAST),),
    "joint": (use(CO_TRAIN, JOINT),),
    "idm": (use(TEACHER, IDM),),
    "no_cotrain": (use(ACT_ONLY, FAST),),
    "optional_idm": (use(TEACHER, IDM), use(CO_TRAIN, FAST)),
    "ladder": (use(TEACHER, LADDER), use(ANTICIPATE, LADDER), use(CO_TRAIN, LADDER)),
}

# variant -> its ways of acting, the default first. "imagine:K" stops after K steps of the video.
MODES: dict[str, tuple[str, ...]] = {
    "fast": ("direct",),
    "joint": ("joint",),
    "idm": ("imagine",),
    "no_cotrain": ("direct",),
    "optional_idm": ("direct", "imagine"),
    "ladder": ("direct", "anticipate", "imagine"),
}

# way of acting -> the group that actions see in training, besides the first frame.
SEEN = {"anticipate": "anticipation", "imagine": "cond"}


def uses_of(variant: str) -> tuple[Use, ...]:
    """Returns the uses that a variant trains.

    Raises:
      ValueError: there is no such variant; makes a suggestion.
    """
    if variant not in USES:
        raise ValueError(f"unknown variant {variant!r}{did_you_mean(variant, USES)}; there are "
                         f"{sorted(USES)}")  # fmt: skip
    return USES[variant]


def slots(variant: str, frames: int, chunk: int) -> tuple[Slot, ...]:
    """Returns all slots of a variant: latent frames of the video, and steps of actions.

    Args:
      frames: latent frames of a clip.
      chunk: steps of actions.
    """
    groups = {"first": (0,), "future": range(1, frames)}
    groups |= {
        group: range(1, frames)
        for group in ("cond", ANTICIPATION)
        if any(group in u.present for u in uses_of(variant))
    }
    video = (Slot("frame", g, position=i) for g, places in groups.items() for i in places)
    actions = (Slot("action", "action", "action", i) for i in range(chunk))
    return (*video, *actions)
