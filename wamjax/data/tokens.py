"""Maps instructions to token ids: one id per word of the data, and a stable hash for other
words."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

SIZE = 1024  # ids of a vocabulary, at least; 0 is padding
UNKNOWN = 64  # of these, at least, behind those of its words


def words(text: str) -> list[str]:
    """Splits a text into lower-case words; punctuation separates."""
    return re.findall(r"[a-z0-9']+", text.lower())


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Maps words to ids: those of `words` are 1 to n, all others share the ids after them.

    An unknown word is never mistaken for one of `words`; two unknown ones may share an id. Without
    `words` every word is hashed, as in older data.

    Attributes:
      words: words of the training instructions, in the order of their ids.
    """

    words: tuple[str, ...] = ()

    @staticmethod
    def of(texts: Iterable[str], first: Sequence[str] = ()) -> Vocabulary:
        """Numbers the words of texts, sorted, after those of the run to continue."""
        more = {word for text in texts for word in words(text)} - set(first)
        return Vocabulary((*first, *sorted(more)))

    @property
    def size(self) -> int:
        """Number of ids including padding: rows of an embedding."""
        return max(SIZE, len(self.words) + UNKNOWN)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words, 1)}

    def token(self, word: str) -> int:
        """Returns the id of a lower-case word."""
        if (known := self._ids.get(word)) is not None:
            return known
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        first = len(self.words) + 1
        return int.from_bytes(digest, "big") % (self.size - first) + first

    def tokenize(self, text: str, length: int) -> Int[np.ndarray, " n"]:
        """Returns the ids of the words of a text, int32, padded with 0 to `length`.

        Raises:
          ValueError: the text has more than `length` words.
        """
        ids = [self.token(word) for word in words(text)]
        if len(ids) > length:
            raise ValueError(
                f"instruction {text!r} has {len(ids)} words, more than "
                f"config.data.instruction_length = {length}: raise it"
            )
        return np.array([*ids, *[0] * (length - len(ids))], np.int32)


def check_same(ours: Sequence[str], theirs: Sequence[str], who: str) -> None:
    """Checks that two policies map words to the same ids.

    Args:
      who: name of the second policy, for the message.

    Raises:
      ValueError: they differ.
    """
    if tuple(ours) != tuple(theirs):
        odd = sorted(set(ours) ^ set(theirs))[:5]
        raise ValueError(f"{who} gives words other ids (only one of the two has {odd}): train "
                         "both on the same instructions, or one from the other (init_from.path), "
                         "or both with config.data.vocabulary = 'hash'")  # fmt: skip
