"""Lists every evaluation of the network that a clip takes, for each scheme."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from wamjax.models.visibility import Visibility, bidirectional, cacheable, causal
from wamjax.viz.explore.tables import runs
from wamjax.wam.slots import groups_of
from wamjax.wam.video.schemes import SCHEMES, Scheme, slots_of

TEXT = {
    "diffusion": "All frames share one level, and every frame sees all frames.",
    "image_to_video": "The first frame is given; the others share a level.",
    "forcing": "Each frame has its own level and sees all frames; all are sampled together.",
    "forcing_causal": "No frame sees a later one; frames are sampled one by one, each from noise.",
    "blocks": "Autoregressive over chunks of frames, diffusion within a chunk.",
    "autoregressive": "Tokens are sampled one by one, each given those before it; no noise.",
}


@dataclasses.dataclass(frozen=True)
class Pass:
    """Describes one evaluation of a network.

    Attributes:
      text: what it does.
      now: latent frames that are computed.
      cache: latent frames that are read from the cache.
      noise: share of noise in every frame, sigma / (alpha + sigma); None if the frame does not
        exist yet.
    """

    text: str
    now: tuple[int, ...]
    cache: tuple[int, ...]
    noise: tuple[float | None, ...]


def table_of(scheme: Scheme, frames: int) -> tuple[Visibility, dict[str, tuple[int, ...]]]:
    """Returns the visibility table of a scheme's groups, and the frames of each group."""
    groups = {g.name: g.positions for g in groups_of(slots_of(scheme, frames))}
    return (causal if scheme.causal else bidirectional)(*groups), groups


def fitted(scheme: Scheme, frames: int) -> Scheme:
    """Returns the scheme with a first group that holds the frames left over by its chunks."""
    over = frames % scheme.chunk if scheme.chunk else 0
    return dataclasses.replace(scheme, first=over) if over else scheme


def passes(scheme: Scheme, frames: int, shares: np.ndarray) -> list[Pass]:
    """Returns the evaluations that sample a clip, see `Denoising.sample`.

    Args:
      shares: (steps + 1,) shares of noise at the levels of the schedule.
    """
    table, groups = table_of(scheme, frames)
    names = list(groups)
    done, cached, out = names[: scheme.given], [], []
    rest = names[scheme.given :]
    parts = [[g] for g in rest] if scheme.causal and scheme.independent else [rest]

    def state(text, now, part=(), share=0.0):
        noise = [None] * frames
        for g in done:
            for i in groups[g]:
                noise[i] = 0.0
        for i in (i for g in part for i in groups[g]):
            noise[i] = share
        at = [tuple(i for g in sorted(gs, key=names.index) for i in groups[g])
              for gs in (now, cached)]  # fmt: skip
        return Pass(text, at[0], at[1], tuple(noise))

    for part in parts:
        constant = cacheable(table.restrict([*done, *part]), done)
        if new := [g for g in constant if g not in cached]:
            out.append(state(f"prefill {' + '.join(new)}", new, part, float(shares[0])))
            cached += new
        every = [g for g in [*done, *part] if g not in cached]
        for k, share in enumerate(shares[:-1]):
            text = f"denoise {' + '.join(part)}, step {k + 1} of {len(shares) - 1}"
            out.append(state(text, every, part, float(share)))
        done = [*done, *part]
    return out


def all_of(frames: int, shares: np.ndarray, tokens: int) -> list[dict[str, Any]]:
    """Returns every scheme for a clip, as JSON values for the page.

    Args:
      tokens: tokens per latent frame, for the autoregressive scheme.
    """
    out = [{
        "name": "autoregressive", "text": TEXT["autoregressive"], "frames": frames,
        "tokens": tokens, "mask": runs(np.tri(frames, dtype=bool)),
    }]  # fmt: skip
    for name, scheme in SCHEMES.items():
        scheme = fitted(scheme, frames)
        if scheme.first >= frames:  # a clip of one frame has no other to generate
            continue
        table, groups = table_of(scheme, frames)
        mask = table.mask({g: len(at) for g, at in groups.items()})
        steps = [dataclasses.asdict(p) for p in passes(scheme, frames, shares)]
        out.append({
            "name": name, "text": TEXT[name], "frames": frames, "tokens": 0,
            "mask": runs(mask), "passes": steps,
        })  # fmt: skip
    return out
