"""Converts pictures to PNG or JPEG bytes and back (PIL)."""

from __future__ import annotations

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image


def encode(picture: UInt8[np.ndarray, "h w 3"], kind: str = "png", quality: int = 95) -> bytes:
    """Encodes a picture; PNG is lossless, at its fastest setting, which costs a few percent of
    size."""
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"a picture must be uint8 (h, w, 3), not {picture.dtype} {picture.shape}")
    options = {"png": {"compress_level": 1}, "jpeg": {"quality": quality, "subsampling": 0}}
    if kind not in options:
        raise ValueError(f"pictures are stored as {' or '.join(options)}, not {kind!r}")
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options[kind])
    return buffer.getvalue()


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes the output of `encode` (any format that PIL knows, 8 bits per colour).

    Raises:
      ValueError: the bytes are not a picture, or PIL takes it for a decompression bomb.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"its mode is {image.mode}, it must have 8 bits per colour")
            return np.asarray(image.convert("RGB") if image.mode != "RGB" else image)
    except Exception as error:  # PIL's decoders raise anything on damaged bytes
        raise ValueError(f"cannot decode a picture of {len(data)} bytes: {error}") from error


def size(data: bytes) -> tuple[int, int]:
    """Returns (h, w) from the header, without decoding.

    Raises:
      ValueError: the bytes are not a picture.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except Exception as error:
        raise ValueError(f"cannot decode a picture of {len(data)} bytes: {error}") from error


RESIZES = ("pad", "stretch")


def resize(pictures, size: tuple[int, int], how: str = "stretch"):
    """Resizes pictures, numpy or jax: uint8 (..., h, w, 3) to (..., *size, 3).

    It uses PIL's bilinear filter, which smooths when it shrinks; under jax matrices compute it,
    which differ by at most one grey level.

    Args:
      size: (height, width).
      how: "stretch" both sides, or "pad": the whole picture as large as fits, with black borders.
    """
    if pictures.shape[-3:-1] == tuple(size):
        return pictures
    inner = _fit(pictures.shape[-3:-1], size) if how == "pad" else tuple(size)
    if isinstance(pictures, jax.Array):
        out = _by_matrices(pictures, inner)
    else:
        out = _by_pil(np.asarray(pictures), inner)
    before = [(n - m) // 2 for n, m in zip(size, inner, strict=True)]
    around = [(b, n - m - b) for b, n, m in zip(before, size, inner, strict=True)]
    stack = jnp if isinstance(out, jax.Array) else np
    return stack.pad(out, [(0, 0)] * (out.ndim - 3) + around + [(0, 0)])


def _fit(has: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Returns the largest size of the same proportions that fits."""
    scale = min(n / m for n, m in zip(size, has, strict=True))
    return tuple(max(1, min(n, round(m * scale))) for n, m in zip(size, has, strict=True))


def _by_pil(pictures: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    flat = pictures.reshape(-1, *pictures.shape[-3:])
    bilinear = Image.Resampling.BILINEAR
    out = [np.asarray(Image.fromarray(x).resize(size[::-1], bilinear)) for x in flat]
    return np.stack(out).reshape(*pictures.shape[:-3], *size, 3)


def _by_matrices(pictures: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes as PIL does: first along the rows, rounded to whole grey levels, then along the
    columns."""
    height, width = (_matrix(m, n) for m, n in zip(pictures.shape[-3:-1], size, strict=True))
    highest = jax.lax.Precision.HIGHEST
    x = pictures.astype(jnp.float32)
    x = _grey(jnp.einsum("...hwc,Ww->...hWc", x, width, precision=highest))
    x = _grey(jnp.einsum("...hwc,Hh->...Hwc", x, height, precision=highest))
    return x.astype(jnp.uint8)


def _grey(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.floor(x + 0.5), 0, 255)


@functools.lru_cache(maxsize=64)
def _matrix(has: int, output: int) -> np.ndarray:
    """Returns (output, input): the weights of the triangle filter along one side."""
    scale = has / output
    wide = max(scale, 1.0)
    centre = (np.arange(output) + 0.5)[:, None] * scale
    at = np.arange(has) + 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(at - centre) / wide)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
