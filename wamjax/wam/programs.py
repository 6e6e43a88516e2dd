"""Fast-WAM's visibility tables and the programs of its variants (spec: Fast-WAM, section 3.2).

Groups: `first` is the clean first latent frame, `future` the later frames, `action` the chunk, and
`cond` the conditioning copy of the later frames in imagine-then-act training.
"""

from __future__ import annotations

from wamjax.models.visibility import Visibility, table
from wamjax.wam.slots import Program, Role, factorization

GIVEN, PREDICTED, ABSENT = Role.GIVEN, Role.PREDICTED, Role.ABSENT

# Actions see the clean first frame and never the future, in training or at test time; so the
# future can be left out at test time without changing the actions.
FAST = table("fast_wam", {"first": "first", "future": "first future", "action": "first action"})

# One-way in the public code (video never attends to actions), although notes on the paper say
# bidirectional.
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

CO_TRAIN = factorization("co_train", first=GIVEN, future=PREDICTED, action=PREDICTED)
ACT_ONLY = factorization("act_only", first=GIVEN, future=ABSENT, action=PREDICTED)
TEACHER = factorization("teacher", first=GIVEN, future=PREDICTED, cond=GIVEN, action=PREDICTED)

# variant -> programs that share a training batch. Shares of several programs come from the config.
# Without co-training nothing that has a loss sees the future frames, so they are absent: the same
# gradient as a video loss of weight zero, without computing it.
TRAINING: dict[str, tuple[Program, ...]] = {
    "fast": (Program(CO_TRAIN, FAST),),
    "joint": (Program(CO_TRAIN, JOINT),),
    "idm": (Program(TEACHER, IDM),),
    "no_cotrain": (Program(ACT_ONLY, FAST),),
    "optional_idm": (Program(TEACHER, IDM), Program(CO_TRAIN, FAST)),
}

# variant -> the ways it can act, the default first.
MODES: dict[str, tuple[str, ...]] = {
    "fast": ("direct",),
    "joint": ("joint",),
    "idm": ("imagine",),
    "no_cotrain": ("direct",),
    "optional_idm": ("direct", "imagine"),
}


def tables(variant: str) -> tuple[Visibility, ...]:
    """The tables that a variant trains under, over the groups it computes."""
    try:
        return tuple(p.table for p in TRAINING[variant])
    except KeyError:
        raise ValueError(f"unknown variant {variant!r}; there are {sorted(TRAINING)}") from None
