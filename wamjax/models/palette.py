"""Defines a discrete codec without training: each patch of pixels becomes the nearest of a fixed
set.

The set is fitted once by k-means and stored as an .npy file. It replaces a trained tokeniser
(`models.vae`) in short runs: tests, and pictures of simple worlds.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from wamjax.models.codec import PixelCodec
from wamjax.models.vae.pixels import to_unit

SAMPLES = 2**18  # most patches that k-means uses


@dataclasses.dataclass(frozen=True)
class Palette(PixelCodec):
    """Quantises the latents of `PixelCodec` to `vocabulary` different ones.

    Attributes:
      codes: uint8 (vocabulary, patch * patch * colours) as bytes, which can be compared and hashed.
    """

    codes: bytes = dataclasses.field(default=b"", kw_only=True, repr=False)

    @property
    def vocabulary(self) -> int:
        """Returns the number of token ids."""
        return len(self.codes) // (self.colours * self.patch**2)

    def tokens(self, video: UInt8[Array, "b f H W 3"]) -> Int[Array, "b t h w"]:
        """Returns the id of the nearest code of each patch."""
        table = self._table()
        products = super().encode(video) @ table.T
        return jnp.argmin(jnp.sum(table * table, axis=-1) - 2 * products, axis=-1)

    def from_tokens(self, ids: Int[Array, "b t h w"]) -> Float[Array, "b t h w c"]:
        """Returns the latents of token ids, as `decode` expects them."""
        return self._table()[ids]

    def encode(self, video: UInt8[Array, "b f H W 3"]) -> Float[Array, "b t h w c"]:
        return self.from_tokens(self.tokens(video))

    def _table(self) -> Float[Array, "v c"]:
        table = np.frombuffer(self.codes, np.uint8).reshape(self.vocabulary, -1)
        return to_unit(jnp.asarray(table))


def fit(
    video: UInt8[np.ndarray, "n f H W c"], patch: int, vocabulary: int, rounds: int = 15
) -> UInt8[np.ndarray, "v c"]:
    """Fits a palette to the patches of `video` by k-means.

    Raises:
      ValueError: there are not more distinct patches than codes.
    """
    n, f, height, width, c = video.shape
    patches = video.reshape(n * f, height // patch, patch, width // patch, patch, c)
    patches = patches.swapaxes(2, 3).reshape(-1, patch * patch * c)
    rng = np.random.default_rng(0)
    if len(patches) > SAMPLES:
        patches = patches[np.sort(rng.choice(len(patches), SAMPLES, replace=False))]
    patches, weight = np.unique(patches, axis=0, return_counts=True)  # plain background is common
    if len(patches) <= vocabulary:
        raise ValueError(f"the video has only {len(patches)} distinct patches, too few for "
                         f"{vocabulary} codes: ask for fewer codes")  # fmt: skip
    x = patches.astype(np.float32)
    codes = _spread(x, weight, vocabulary, rng)
    for _ in range(rounds):
        nearest = _nearest(x, codes)
        total = np.bincount(nearest, weight, vocabulary)[:, None]
        sums = [np.bincount(nearest, weight * column, vocabulary) for column in x.T]
        means = np.stack(sums, axis=1) / np.maximum(total, 1)
        codes = np.where(total > 0, means, codes).astype(np.float32)
    return np.unique(np.round(codes).astype(np.uint8), axis=0)


def ensure(
    path: str | os.PathLike,
    video: Callable[[], UInt8[np.ndarray, "n f H W c"]],
    patch: int,
    vocabulary: int,
) -> Palette:
    """Returns the palette in the .npy file `path`, after fitting it to ``video()`` if the file is
    missing.

    Codes that coincide after rounding are merged, so the vocabulary may be slightly smaller than
    requested. Another palette gives token ids another meaning: the file belongs to every checkpoint
    that was trained with it.

    Raises:
      ValueError: the file does not hold a palette of this patch.
    """
    path = pathlib.Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.npy")
        np.save(draft, fit(video(), patch, vocabulary))
        draft.replace(path)
    codes = np.load(path)
    colours = codes.shape[-1] // patch**2
    if codes.dtype != np.uint8 or codes.ndim != 2 or codes.shape[1] not in (patch**2, 3 * patch**2):
        raise ValueError(
            f"{path} holds {codes.dtype} of shape {codes.shape}, not a palette: with patch {patch} "
            f"that is uint8 of shape (codes, {patch**2}) or (codes, {3 * patch**2})"
        )
    return Palette(patch, colours=colours, codes=codes.tobytes())


def _spread(x: np.ndarray, weight: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """Returns rows of `x` that lie far apart: k-means++ (Arthur and Vassilvitskii, 2007)."""
    indices = [int(weight.argmax())]
    distance = np.full(len(x), np.inf)
    for _ in range(number - 1):
        distance = np.minimum(distance, np.square(x - x[indices[-1]]).sum(axis=1))
        p = distance * weight
        indices.append(int(rng.choice(len(x), p=p / p.sum())))
    return x[indices]


def _nearest(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Returns the index of the nearest code of every row."""
    return (np.square(codes).sum(axis=1) - 2 * x @ codes.T).argmin(axis=1)
