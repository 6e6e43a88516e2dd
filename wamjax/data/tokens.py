"""Instructions to token ids without a vocabulary file: one stable hash per lower-case word."""

from __future__ import annotations

import functools
import hashlib
import re

import numpy as np
from jaxtyping import Int

VOCAB = 1024  # ids are in [1, VOCAB); 0 is padding


def words(text: str) -> list[str]:
    """Lower-case words; punctuation separates."""
    return re.findall(r"[a-z0-9']+", text.lower())


def token(word: str) -> int:
    """The id of a word. Two words may share one: `wamjax.data.checks` looks for that."""
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (VOCAB - 1) + 1


def tokenize(text: str, length: int) -> Int[np.ndarray, " n"]:
    """The ids of the words of `text`, padded with 0 to `length`.

    Raises:
      ValueError: more than `length` words.
    """
    return np.array(_ids(text, length), np.int32)


@functools.lru_cache(maxsize=4096)
def _ids(text: str, length: int) -> tuple[int, ...]:
    ids = [token(word) for word in words(text)]
    if len(ids) > length:
        raise ValueError(
            f"instruction {text!r} has {len(ids)} words, room is for {length}; raise "
            "config.data.instruction_length"
        )
    return (*ids, *[0] * (length - len(ids)))
