"""Pictures to PNG or JPEG bytes and back (PIL)."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def encode(picture: UInt8[np.ndarray, "h w 3"], kind: str = "png", quality: int = 95) -> bytes:
    """Encodes; PNG is lossless, and at its fastest setting, which costs a few percent of size."""
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"a picture is uint8 (h, w, 3), not {picture.dtype} {picture.shape}")
    options = {"png": {"compress_level": 1}, "jpeg": {"quality": quality, "subsampling": 0}}
    if kind not in options:
        raise ValueError(f"pictures are stored as {' or '.join(options)}, not {kind!r}")
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options[kind])
    return buffer.getvalue()


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes what `encode` wrote (any format PIL knows, 8 bits a colour).

    Raises:
      ValueError: the bytes are no picture, or one that PIL takes for a bomb.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"its mode is {image.mode}, 8 bits a colour are wanted")
            return np.asarray(image.convert("RGB") if image.mode != "RGB" else image)
    except Exception as error:  # of damaged bytes PIL raises whatever its decoders happen to
        raise ValueError(f"cannot decode a picture of {len(data)} bytes: {error}") from error


def size(data: bytes) -> tuple[int, int]:
    """(h, w) as the header says it: nothing is unpacked.

    Raises:
      ValueError: the bytes are no picture.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except Exception as error:
        raise ValueError(f"cannot decode a picture of {len(data)} bytes: {error}") from error
