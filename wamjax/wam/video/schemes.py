"""Defines schemes of denoising a clip: which frames share a level, which are given, who sees whom.

`SCHEMES` names these:

  diffusion       every frame at one level, all see all; an image is a clip of one frame
  image_to_video  the same with the first frame given
  forcing         every frame at its own level (Diffusion Forcing, arXiv 2407.01392), all see all
  forcing_causal  the same, but no frame sees a later one: frames can be sampled one by one
  blocks          autoregressive over chunks of frames, diffusion within them: a chunk sees earlier
                  ones; in half of the examples a random number of chunks is given clean
"""

from __future__ import annotations

import dataclasses

import numpy as np

from wamjax.models.dit import DiT
from wamjax.models.visibility import bidirectional, causal
from wamjax.wam.slots import Role, Slot, factorization
from wamjax.wam.uses import Use, use


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Describes how a clip is split and trained.

    Attributes:
      chunk: latent frames of a group; 0 = the whole clip is one group.
      first: frames of a separate first group.
      given: leading groups that are always given.
      independent: whether every frame (of a group) has its own level; otherwise all share one.
      causal: whether a group sees only itself and the ones before it; otherwise all see all.
      history: share of examples in which a random number of leading groups is given.
    """

    chunk: int = 0
    first: int = 0
    given: int = 0
    independent: bool = False
    causal: bool = False
    history: float = 0.0


SCHEMES: dict[str, Scheme] = {
    "diffusion": Scheme(),
    "image_to_video": Scheme(first=1, given=1, causal=True),
    "forcing": Scheme(independent=True),
    "forcing_causal": Scheme(chunk=1, independent=True, causal=True),
    "blocks": Scheme(chunk=2, independent=True, causal=True, history=0.5),
}


def slots_of(scheme: Scheme, frames: int) -> tuple[Slot, ...]:
    """Returns the slots of a clip of `frames` latent frames, in groups g0, g1, ... in order of
    time.

    Raises:
      ValueError: the frames do not divide into groups.
    """
    sizes = [scheme.first] if scheme.first else []
    length = frames - scheme.first
    chunk = scheme.chunk or length
    if length <= 0 or length % chunk:
        raise ValueError(f"{frames} latent frames do not divide into groups: {scheme} takes "
                         f"{scheme.first} and a multiple of {chunk}")  # fmt: skip
    sizes += [chunk] * (length // chunk)
    group = np.repeat(np.arange(len(sizes)), sizes)
    return tuple(Slot("frame", f"g{g}", position=i) for i, g in enumerate(group))


def use_of(scheme: Scheme, network: DiT) -> Use:
    """Returns the use that a clip trains: the scheme's first groups given, the others predicted.

    Tokens of the condition and of text see everything, and everything sees them.

    Raises:
      ValueError: a causal scheme with such tokens.
    """
    names = [g.name for g in network.groups]
    roles = {g: Role.GIVEN if i < scheme.given else Role.PREDICTED for i, g in enumerate(names)}
    if not scheme.causal:
        table = bidirectional(*names, *network.own_tokens)
    elif network.own_tokens:
        raise ValueError(f"a causal scheme cannot have tokens of {list(network.own_tokens)}: use "
                         "objective.scheme='diffusion', or another model.conditioning and "
                         "model.text.route")  # fmt: skip
    else:
        table = causal(*names)
    roles |= dict.fromkeys(network.own_tokens, Role.GIVEN)
    return use(factorization("video", **roles), table)
