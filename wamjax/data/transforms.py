"""Pairs of transforms between what robots speak and what models read.

`sample_transforms` is the one chain that training, evaluation and serving share. Each transform
touches only the keys that it knows and that are present, so the same chain takes a whole window
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
    """forward: robot to model; inverse: model to robot. Neither changes its argument."""

    def forward(self, sample: Sample) -> Sample: ...

    def inverse(self, sample: Sample) -> Sample: ...


@dataclasses.dataclass(frozen=True)
class Chain:
    """Transforms one after the other, and backwards."""

    transforms: tuple[Transform, ...]

    def forward(self, sample: Sample) -> Sample:
        """Robot to model."""
        for transform in self.transforms:
            sample = transform.forward(sample)
        return sample

    def inverse(self, sample: Sample) -> Sample:
        """Model to robot."""
        for transform in reversed(self.transforms):
            sample = transform.inverse(sample)
        return sample


@dataclasses.dataclass(frozen=True)
class Resize:
    """images {camera: (..., _, _, 3)} of any size -> of the sizes that the model sees.

    What was lost cannot be turned back: pictures of the model stay as they are.

    Attributes:
      cameras: name -> (height, width).
      how: one of `images.RESIZES`.
    """

    cameras: Mapping[str, tuple[int, int]]
    how: str

    def forward(self, sample: Sample) -> Sample:
        """Resizes what is not of its size yet."""
        if "images" not in sample:
            return sample
        resized = {name: pictures.resize(x, self.cameras[name], self.how)
                   for name, x in sample["images"].items() if name in self.cameras}  # fmt: skip
        return sample | {"images": sample["images"] | resized}

    def inverse(self, sample: Sample) -> Sample:
        """Nothing to do."""
        return sample


@dataclasses.dataclass(frozen=True)
class Composite:
    """images {camera: (..., h, w, 3)} <-> video (..., H, W, 3), cameras as a layout puts them."""

    layout: Layout

    def forward(self, sample: Sample) -> Sample:
        """Joins the cameras; a missing or differently sized one is a ValueError."""
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
    """Actions and proprio in robot units <-> normalised.

    Attributes:
      padded: what stands in the place of invalid actions is normalised like the others; otherwise
        it becomes 0. Where no action of a window is valid, all are 0.
    """

    normalizers: Mapping[str, Normalizer]
    padded: bool = False

    def forward(self, sample: Sample) -> Sample:
        """To normalised units."""
        out = {k: n.forward(sample[k]) for k, n in self.normalizers.items() if k in sample}
        if "actions" in out and "action_valid" in sample:
            keep = sample["action_valid"]
            keep = keep.any(axis=-1, keepdims=True) if self.padded else keep
            out["actions"] = out["actions"] * keep[..., None]
        return sample | out

    def inverse(self, sample: Sample) -> Sample:
        """To robot units."""
        return sample | {
            k: n.inverse(sample[k]) for k, n in self.normalizers.items() if k in sample
        }


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """The instruction's words to ids. Ids cannot be turned back: they stay as they are."""

    length: int
    vocabulary: Vocabulary

    def forward(self, sample: Sample) -> Sample:
        """Text to int32 (n,)."""
        if not isinstance(sample.get("instruction"), str):
            return sample
        ids = self.vocabulary.tokenize(sample["instruction"], self.length)
        return sample | {"instruction": ids}

    def inverse(self, sample: Sample) -> Sample:
        """Nothing to do."""
        return sample


@dataclasses.dataclass(frozen=True)
class Embed:
    """The instruction to the text embedding that was computed for it ahead of time."""

    cache: EmbeddingCache

    def forward(self, sample: Sample) -> Sample:
        """Text to context bfloat16 (s, width)."""
        if not isinstance(sample.get("instruction"), str):
            return sample
        rest = {k: v for k, v in sample.items() if k != "instruction"}
        return rest | {"context": self.cache.lookup(sample["instruction"])}

    def inverse(self, sample: Sample) -> Sample:
        """Nothing to do."""
        return sample


def sample_transforms(
    spec: DataSpec,
    normalizers: Mapping[str, Normalizer],
    cache: EmbeddingCache | None = None,
    padded: bool = False,
) -> Chain:
    """The chain from a window or an observation in robot units to what the model reads.

    Args:
      spec: of the data.
      normalizers: of actions and proprio.
      cache: of text embeddings, for models that read those; else instructions become word ids.
      padded: see `Normalize`.
    """
    words = Tokenize(spec.instruction_length, spec.vocabulary)
    text = words if cache is None else Embed(cache)
    proprio = {"future_proprio": normalizers["proprio"]} if "proprio" in normalizers else {}
    seen = (*views(spec).transforms, Normalize(dict(normalizers) | proprio, padded), text)
    return Chain(seen)


def views(spec: DataSpec) -> Chain:
    """The part of the chain that makes the picture of the cameras' pictures."""
    resize = (Resize(spec.cameras, spec.resize),) if spec.resize else ()
    return Chain((*resize, Composite(spec.picture)))
