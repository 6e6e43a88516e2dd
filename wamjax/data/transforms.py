"""Defines pairs of transforms between robot units and model inputs.

Training, evaluation and serving share the one chain `sample_transforms`. Each transform touches
only the keys that it knows and that are present, so the same chain takes a whole window
(training), an observation (acting), or, backwards, a plan of actions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from wamjax.data import images as pictures
from wamjax.data.embeddings import EmbeddingCache
from wamjax.data.layout import Layout
from wamjax.data.normalize import Normalizer
from wamjax.data.spec import DataSpec
from wamjax.data.tokens import Vocabulary

Sample = dict[str, Any]


class Transform(Protocol):
    """Maps robot to model (forward) and model to robot (inverse); neither changes its argument."""

    def forward(self, sample: Sample) -> Sample: ...

    def inverse(self, sample: Sample) -> Sample: ...


@dataclasses.dataclass(frozen=True)
class Chain:
    """Applies transforms one after the other, and in reverse for the inverse."""

    transforms: tuple[Transform, ...]

    def forward(self, sample: Sample) -> Sample:
        """Maps robot to model."""
        for transform in self.transforms:
            sample = transform.forward(sample)
        return sample

    def inverse(self, sample: Sample) -> Sample:
        """Maps model to robot."""
        for transform in reversed(self.transforms):
            sample = transform.inverse(sample)
        return sample


@dataclasses.dataclass(frozen=True)
class Resize:
    """Resizes images {camera: (..., _, _, 3)} of any size to the model's sizes.

    The inverse leaves pictures as they are, because resizing loses information.

    Attributes:
      cameras: name -> (height, width).
      how: one of `images.RESIZES`.
    """

    cameras: Mapping[str, tuple[int, int]]
    how: str

    def forward(self, sample: Sample) -> Sample:
        """Resizes pictures that have other sizes."""
        if "images" not in sample:
            return sample
        resized = {name: pictures.resize(x, self.cameras[name], self.how)
                   for name, x in sample["images"].items() if name in self.cameras}  # fmt: skip
        return sample | {"images": sample["images"] | resized}

    def inverse(self, sample: Sample) -> Sample:
        """Returns its argument unchanged."""
        return sample


@dataclasses.dataclass(frozen=True)
class Composite:
    """Maps images {camera: (..., h, w, 3)} <-> video (..., H, W, 3) by a layout of the cameras."""

    layout: Layout

    def forward(self, sample: Sample) -> Sample:
        """Joins the cameras; raises ValueError if one is missing or has another size."""
        if "images" not in sample:
            return sample
        rest = {k: v for k, v in sample.items() if k != "images"}
        return {"video": self.layout.join(sample["images"]), **rest}

    def inverse(self, sample: Sample) -> Sample:
        """Cuts the cameras apart."""
        if "video" not in sample:
            return sample
        images = self.layout.cut(sample["video"])
        return {"images": images, **{k: v for k, v in sample.items() if k != "video"}}


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Maps actions and proprio between robot units and normalized units.

    Attributes:
      padded: whether the values of invalid actions are normalized like the others; otherwise they
        become 0. If no action of a window is valid, all are 0.
    """

    normalizers: Mapping[str, Normalizer]
    padded: bool = False

    def forward(self, sample: Sample) -> Sample:
        """Maps to normalized units."""
        out = {k: n.forward(sample[k]) for k, n in self.normalizers.items() if k in sample}
        if "actions" in out and "action_valid" in sample:
            keep = sample["action_valid"]
            keep = keep.any(axis=-1, keepdims=True) if self.padded else keep
            out["actions"] = out["actions"] * keep[..., None]
        return sample | out

    def inverse(self, sample: Sample) -> Sample:
        """Maps to robot units."""
        return sample | {
            k: n.inverse(sample[k]) for k, n in self.normalizers.items() if k in sample
        }


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Maps the instruction's words to ids; the inverse leaves the ids as they are."""

    length: int
    vocabulary: Vocabulary

    def forward(self, sample: Sample) -> Sample:
        """Maps text to int32 (n,)."""
        if not isinstance(sample.get("instruction"), str):
            return sample
        ids = self.vocabulary.tokenize(sample["instruction"], self.length)
        return sample | {"instruction": ids}

    def inverse(self, sample: Sample) -> Sample:
        """Returns its argument unchanged."""
        return sample


@dataclasses.dataclass(frozen=True)
class Embed:
    """Maps the instruction to its precomputed text embedding."""

    cache: EmbeddingCache

    def forward(self, sample: Sample) -> Sample:
        """Maps text to context bfloat16 (s, width)."""
        if not isinstance(sample.get("instruction"), str):
            return sample
        rest = {k: v for k, v in sample.items() if k != "instruction"}
        return rest | {"context": self.cache.lookup(sample["instruction"])}

    def inverse(self, sample: Sample) -> Sample:
        """Returns its argument unchanged."""
        return sample


def sample_transforms(
    spec: DataSpec,
    normalizers: Mapping[str, Normalizer],
    cache: EmbeddingCache | None = None,
    padded: bool = False,
) -> Chain:
    """Returns the chain from a window or an observation in robot units to the model's inputs.

    Args:
      spec: sizes of the data.
      normalizers: normalizers of actions and proprio.
      cache: text embeddings, for models that read them; otherwise instructions become word ids.
      padded: see `Normalize`.
    """
    words = Tokenize(spec.instruction_length, spec.vocabulary)
    text = words if cache is None else Embed(cache)
    proprio = {"future_proprio": normalizers["proprio"]} if "proprio" in normalizers else {}
    chain = (*views(spec).transforms, Normalize(dict(normalizers) | proprio, padded), text)
    return Chain(chain)


def views(spec: DataSpec) -> Chain:
    """Returns the part of the chain that composes the cameras' pictures."""
    resize = (Resize(spec.cameras, spec.resize),) if spec.resize else ()
    return Chain((*resize, Composite(spec.picture)))
