"""Checks a robot's observation and converts it to a policy's arrays."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wamjax import files
from wamjax.config import did_you_mean
from wamjax.data import embeddings, tensors, tokens
from wamjax.data.embeddings import EmbeddingCache
from wamjax.data.spec import DataSpec
from wamjax.data.transforms import Embed, Tokenize, views

KEYS = ("images", "proprio", "instruction")


class BadObservation(ValueError):
    """An observation does not fit a policy; the message names key, shape and fix."""


@dataclasses.dataclass(frozen=True)
class Observer:
    """Converts observations of one robot, or of b robots, to arrays with a batch axis.

        {"images": {camera: uint8 (H, W, 3)}, "proprio": (p,), "instruction": "text"}
        {"images": {camera: uint8 (b, H, W, 3)}, "proprio": (b, p), "instruction": ["text", ...]}

    Pictures are RGB in the sizes of the spec; proprio is in the robot's units. One instruction may
    serve all robots.

    Attributes:
      spec: sizes of the data.
      cache: text embeddings; None: the words become ids.
    """

    spec: DataSpec
    cache: EmbeddingCache | None = None

    def __call__(self, observation: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], bool]:
        """Returns the arrays video (b, 1, H, W, 3), proprio (b, p) and instruction or context, and
        whether the observation had a batch axis.

        Raises:
          BadObservation: the observation does not fit the policy.
        """
        _check_keys(observation, KEYS, "the observation", "keys")
        proprio = self._proprio(observation["proprio"])
        batch = proprio.shape[:-1]
        images = self._images(observation["images"], batch)
        count = batch[0] if batch else 1
        texts = self._texts(observation["instruction"], batch, count)
        video = views(self.spec).forward({"images": images})["video"]
        out = {
            "video": video.reshape(count, 1, *video.shape[-3:]),
            "proprio": proprio.reshape(count, -1),
        }
        encoded = {text: self._text(text) for text in dict.fromkeys(texts)}
        for key in encoded[texts[0]]:
            out[key] = np.stack([encoded[text][key] for text in texts])
        return out, bool(batch)

    def example(self, count: int = 0) -> dict[str, Any]:
        """Returns a blank observation, of `count` robots if that is not 0; its text is in the
        cache."""
        batch = (count,) if count else ()
        texts = instructions(self.cache) if self.cache is not None else [""]
        return {
            "images": {name: np.zeros((*batch, *size, 3), np.uint8)
                       for name, size in self.spec.cameras.items()},
            "proprio": np.zeros((*batch, self.spec.proprio_dim), np.float32),
            "instruction": texts[0],
        }  # fmt: skip

    def _proprio(self, value: Any) -> np.ndarray:
        x, size = np.asarray(value), self.spec.proprio_dim
        if x.dtype.kind not in "fiu" or x.ndim not in (1, 2) or x.shape[-1] != size:
            raise BadObservation(
                f"proprio is {x.dtype} {x.shape}, the policy takes numbers ({size},), or "
                f"(b, {size}) of b robots: give the state that it was trained on, in its order"
            )
        with np.errstate(over="ignore"):  # reported below
            out = x.astype(np.float32)
        if not np.isfinite(out).all():
            at = np.argwhere(~np.isfinite(out))[0].tolist()
            raise BadObservation(f"proprio{at} is {x[tuple(at)]}: every number must be finite")
        return out

    def _images(self, images: Any, batch: tuple[int, ...]) -> dict[str, np.ndarray]:
        cameras = self.spec.cameras
        _check_keys(images, tuple(cameras), "images", "cameras")
        out = {}
        for name, size in cameras.items():
            x, expected = np.asarray(images[name]), (*batch, *size, 3)
            if x.dtype != np.uint8:
                raise BadObservation(
                    f"images[{name!r}] is {x.dtype}, not uint8: give RGB in [0, 255]; convert "
                    "numbers in [0, 1] by (255 * x).round().astype('uint8')"
                )
            if self.spec.resize and x.ndim == len(expected) and x.size:  # any size is accepted
                expected = (*batch, *x.shape[-3:-1], 3)
            if x.shape != expected:
                raise BadObservation(
                    f"images[{name!r}] is {x.shape}, the policy takes {expected}"
                    + (f" beside proprio of {batch[0]} robots" if batch else "")
                    + f": resize pictures to {size[0]}x{size[1]}, channels last"
                )
            out[name] = x
        return out

    def _texts(self, value: Any, batch: tuple[int, ...], count: int) -> list[str]:
        texts = [value] * count if isinstance(value, str) else value
        fits = isinstance(texts, Sequence) and all(isinstance(t, str) for t in texts)
        if not fits or len(texts) != count or (not batch and texts is value):
            of = f"a text, or a list of {count} of them" if batch else "a text"
            raise BadObservation(f"instruction is {value!r}, the policy takes {of}")
        return list(texts)

    def _text(self, text: str) -> dict[str, np.ndarray]:
        if self.cache is None:
            room, count = self.spec.instruction_length, len(tokens.words(text))
            if count > room:
                raise BadObservation(f"instruction {text!r} has {count} words, the policy reads at "
                                     f"most {room}: say it in fewer")  # fmt: skip
            return Tokenize(room, self.spec.vocabulary).forward({"instruction": text})
        if text not in self.cache:
            texts = instructions(self.cache)
            raise BadObservation(
                f"instruction {text!r} is not among the {len(texts)} that the policy has text "
                f"embeddings of{close(text, texts)}; add it by\n  "
                f"{embeddings.command(self.cache.path, '--instructions=FILE')}\nand load the "
                "policy again"
            )
        return Embed(self.cache).forward({"instruction": text})


def instructions(cache: EmbeddingCache) -> list[str]:
    """Returns the instructions that a cache has embeddings of, sorted; the files store their
    texts."""
    before, after = cache.settings.template.split("{instruction}")
    prompts = {
        prompt
        for file in files.glob(cache.path, "embeddings-*.safetensors")
        for prompt in tensors.read(file)[1].values()
    }
    texts = {p.removeprefix(before).removesuffix(after) for p in prompts}
    return sorted(text for text in texts if text in cache)


def close(text: str, known: Sequence[str]) -> str:
    """Returns ", such as ...": the known texts closest to `text`, else the first ones."""
    close = difflib.get_close_matches(text, known, 3)
    return f", such as {', '.join(map(repr, close or known[:3]))}"


def _check_keys(mapping: Any, expected: tuple[str, ...], what: str, kind: str) -> None:
    if not isinstance(mapping, Mapping):
        raise BadObservation(
            f"{what} must be a dict with {kind} {list(expected)}, not a {type(mapping).__name__}"
        )
    missing = [key for key in expected if key not in mapping]
    unknown = [key for key in mapping if key not in expected]
    if missing or unknown:
        hint = did_you_mean(str(unknown[0]), missing) if unknown and missing else ""
        raise BadObservation(
            f"{what}: {kind} {missing} are missing and {unknown} are unknown{hint}; the policy "
            f"takes {list(expected)}"
        )
