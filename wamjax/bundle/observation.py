"""What a robot sees, checked, as the arrays that a policy takes."""

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
    """An observation is not what a policy takes; the message names key, shape and fix."""


@dataclasses.dataclass(frozen=True)
class Observer:
    """Observations of one robot, or of b robots, to arrays with a batch axis.

        {"images": {camera: uint8 (H, W, 3)}, "proprio": (p,), "instruction": "text"}
        {"images": {camera: uint8 (b, H, W, 3)}, "proprio": (b, p), "instruction": ["text", ...]}

    Pictures are RGB in the sizes of the spec, proprio is in the units of the robot. One
    instruction may stand for all robots.

    Attributes:
      spec: sizes.
      cache: of text embeddings; None: the words become ids.
    """

    spec: DataSpec
    cache: EmbeddingCache | None = None

    def __call__(self, observation: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], bool]:
        """(video (b, 1, H, W, 3), proprio (b, p), instruction or context; whether it had a batch).

        Raises:
          BadObservation: see there.
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
        made = {text: self._text(text) for text in dict.fromkeys(texts)}
        for key in made[texts[0]]:
            out[key] = np.stack([made[text][key] for text in texts])
        return out, bool(batch)

    def example(self, count: int = 0) -> dict[str, Any]:
        """A blank observation; of `count` robots if that is not 0. Its text is in the cache."""
        batch = (count,) if count else ()
        known = instructions(self.cache) if self.cache is not None else [""]
        return {
            "images": {name: np.zeros((*batch, *size, 3), np.uint8)
                       for name, size in self.spec.cameras.items()},
            "proprio": np.zeros((*batch, self.spec.proprio_dim), np.float32),
            "instruction": known[0],
        }  # fmt: skip

    def _proprio(self, value: Any) -> np.ndarray:
        x, size = np.asarray(value), self.spec.proprio_dim
        if x.dtype.kind not in "fiu" or x.ndim not in (1, 2) or x.shape[-1] != size:
            raise BadObservation(
                f"proprio is {x.dtype} {x.shape}, the policy takes numbers ({size},), or "
                f"(b, {size}) of b robots: give the state that it was trained on, in its order"
            )
        with np.errstate(over="ignore"):  # said below
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
            x, want = np.asarray(images[name]), (*batch, *size, 3)
            if x.dtype != np.uint8:
                raise BadObservation(
                    f"images[{name!r}] is {x.dtype}, not uint8: give RGB in [0, 255]; numbers in "
                    "[0, 1] become it by (255 * x).round().astype('uint8')"
                )
            if self.spec.resize and x.ndim == len(want) and x.size:  # of any size
                want = (*batch, *x.shape[-3:-1], 3)
            if x.shape != want:
                raise BadObservation(
                    f"images[{name!r}] is {x.shape}, the policy takes {want}"
                    + (f" beside proprio of {batch[0]} robots" if batch else "")
                    + f": resize pictures to {size[0]}x{size[1]}, channels last"
                )
            out[name] = x
        return out

    def _texts(self, given: Any, batch: tuple[int, ...], count: int) -> list[str]:
        texts = [given] * count if isinstance(given, str) else given
        fits = isinstance(texts, Sequence) and all(isinstance(t, str) for t in texts)
        if not fits or len(texts) != count or (not batch and texts is given):
            of = f"a text, or a list of {count} of them" if batch else "a text"
            raise BadObservation(f"instruction is {given!r}, the policy takes {of}")
        return list(texts)

    def _text(self, text: str) -> dict[str, np.ndarray]:
        if self.cache is None:
            room, count = self.spec.instruction_length, len(tokens.words(text))
            if count > room:
                raise BadObservation(f"instruction {text!r} has {count} words, the policy reads at "
                                     f"most {room}: say it in fewer")  # fmt: skip
            return Tokenize(room, self.spec.vocabulary).forward({"instruction": text})
        if text not in self.cache:
            known = instructions(self.cache)
            raise BadObservation(
                f"instruction {text!r} is not among the {len(known)} that the policy has text "
                f"embeddings of{close(text, known)}; add it by\n  "
                f"{embeddings.command(self.cache.path, '--instructions=FILE')}\nand load the "
                "policy again"
            )
        return Embed(self.cache).forward({"instruction": text})


def instructions(cache: EmbeddingCache) -> list[str]:
    """Those that a cache has embeddings of, sorted; the files name them for people."""
    before, after = cache.settings.template.split("{instruction}")
    prompts = {
        prompt
        for file in files.glob(cache.path, "embeddings-*.safetensors")
        for prompt in tensors.read(file)[1].values()
    }
    texts = {p.removeprefix(before).removesuffix(after) for p in prompts}
    return sorted(text for text in texts if text in cache)


def close(text: str, known: Sequence[str]) -> str:
    """", such as ..." of what is known: what is close to a text, else the first of it."""
    close = difflib.get_close_matches(text, known, 3)
    return f", such as {', '.join(map(repr, close or known[:3]))}"


def _check_keys(given: Any, wanted: tuple[str, ...], what: str, kind: str) -> None:
    if not isinstance(given, Mapping):
        raise BadObservation(
            f"{what}: a dict with {kind} {list(wanted)} is wanted, not a {type(given).__name__}"
        )
    missing = [key for key in wanted if key not in given]
    unknown = [key for key in given if key not in wanted]
    if missing or unknown:
        hint = did_you_mean(str(unknown[0]), missing) if unknown and missing else ""
        raise BadObservation(
            f"{what}: {kind} {missing} are missing and {unknown} are unknown{hint}; the policy "
            f"takes {list(wanted)}"
        )
