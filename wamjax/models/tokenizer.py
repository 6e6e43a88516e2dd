"""Turns text into the token ids of T5 and umT5, with the tokenizer file published with them.

    tokenizer = load("google/umt5-xxl/spiece.model", clean=True)
    ids, mask = tokenizer(["put the red block on the left zone"], length=128)

It reads two formats: a sentencepiece model (``spiece.model``) and the ``tokenizer.json`` derived
from it. Both give the same ids as transformers: pieces, then the end of sentence, then padding.
Text that contains a special token literally is rejected, since the two formats would read it
differently.
"""

from __future__ import annotations

import dataclasses
import html
import importlib
import os
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from wamjax import files

EXTRA = "pip install 'wamjax[text]'"
FILES = ("spiece.model", "tokenizer.json")
PAD, EOS = "<pad>", "</s>"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Turns text into ids.

    Attributes:
      pieces: text -> ids, without the end of sentence.
      size: ids are below this; a network's embedding table may be longer.
      pad, eos: ids of padding and of the end of sentence.
      special: pattern of the texts that are tokens themselves.
      clean: whether text goes through `clean_text` first, as Wan's does.
    """

    pieces: Callable[[str], list[int]]
    size: int
    pad: int
    eos: int
    special: re.Pattern[str]
    clean: bool = False

    def __call__(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int[np.ndarray, "b s"], Bool[np.ndarray, "b s"]]:
        """Returns the ids of each text, its end of sentence, and padding up to `length`; longer
        texts are cut.

        Args:
          texts: b texts.
          length: s, at least 1; a text that is cut keeps its end of sentence.

        Returns:
          (ids int32, mask): True where there is a token, including the end of sentence.

        Raises:
          TypeError: `texts` is a single string instead of a sequence.
          ValueError: a text contains a special token.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts must be a list of strings, not the text {texts!r}: pass a list")
        if length < 1:
            raise ValueError(f"length {length} must be at least 1, for the end-of-sentence token")
        rows = [[*self._ids(text)[: length - 1], self.eos] for text in texts]
        ids = np.full((len(rows), length), self.pad, np.int32)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        counts = np.array([len(row) for row in rows], int)
        return ids, np.arange(length) < counts[:, None]

    def _ids(self, text: str) -> list[int]:
        text = clean_text(text) if self.clean else text
        match = self.special.search(text)
        if match:
            raise ValueError(
                f"text {text!r} contains {match.group()!r}, the name of a special token: remove it "
                "from the text"
            )
        return self.pieces(text)


def load(path: str | os.PathLike, clean: bool = False) -> Tokenizer:
    """Reads a published tokenizer.

    Args:
      path: ``spiece.model``, ``tokenizer.json``, or a folder that holds one of them; if it holds
        both, the first is read.
      clean: whether text goes through `clean_text` first (Wan and Fast-WAM: yes; Cosmos: no).

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: the library that reads the file is missing; says how to install it.
      ValueError: the file is not a tokenizer of this family.
    """
    path = files.path(path)
    if path.is_dir():
        candidates = [path / name for name in FILES if (path / name).exists()]
        if not candidates:
            raise FileNotFoundError(f"{path} contains no tokenizer file ({' or '.join(FILES)})")
        path = candidates[0]
    if not path.exists():
        raise FileNotFoundError(f"tokenizer file {path} does not exist: correct the path")
    read = _from_json if path.suffix == ".json" else _from_model
    return dataclasses.replace(read(files.fetch(path)), clean=clean)


def clean_text(text: str) -> str:
    """Cleans text like Wan: repairs broken unicode, resolves HTML entities, collapses white space.

    Source: ``basic_clean`` and ``whitespace_clean`` of Wan's public ``wan/modules/tokenizers.py``.
    Unicode is repaired by ftfy, which is not needed for printable ASCII without entities.

    Raises:
      ImportError: the text needs ftfy, which is not installed.
    """
    if re.search(r"[^\t\n\r\x20-\x7e]|&[#\w]", text):
        text = _library("ftfy", f"the cleaning of {text!r}").fix_text(text)
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", text).strip()


def _from_model(path: pathlib.Path) -> Tokenizer:
    library = _library("sentencepiece", str(path))
    try:
        model = library.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a sentencepiece model: {error}") from error
    size = model.get_piece_size()
    names = [model.id_to_piece(i) for i in range(size) if model.is_control(i)]
    names.append(model.id_to_piece(model.unk_id()))
    if model.pad_id() < 0 or model.eos_id() < 0:
        raise ValueError(f"{path} lacks a padding or an end-of-sentence token: take a tokenizer "
                         "of T5, which has both")  # fmt: skip
    return Tokenizer(model.encode, size, model.pad_id(), model.eos_id(), _any_of(names))


def _from_json(path: pathlib.Path) -> Tokenizer:
    library = _library("tokenizers", str(path))
    try:
        model = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path} cannot be read as a tokenizer.json: {error}") from error
    model.no_padding()  # a file may configure both, but `Tokenizer` pads and cuts itself
    model.no_truncation()
    ids = [model.token_to_id(name) for name in (PAD, EOS)]
    if None in ids:
        raise ValueError(f"{path} lacks {PAD} or {EOS}: take a tokenizer of T5, which has both")

    def pieces(text: str) -> list[int]:
        return model.encode(text, add_special_tokens=False).ids

    names = [token.content for token in model.get_added_tokens_decoder().values()]
    return Tokenizer(pieces, model.get_vocab_size(), *ids, _any_of(names))


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """Returns a pattern for the special tokens of a file, and those that transformers adds to every
    T5."""
    return re.compile("|".join([*map(re.escape, names), r"<extra_id_\d+>"]))


def _library(name: str, purpose: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {name}: {EXTRA} (or pip install {name})") from error
