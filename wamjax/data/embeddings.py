"""Computes text embeddings ahead of time, so that training needs no text encoder.

    python -m wamjax.data.embeddings --cache=DIR --data=DATASET[,DATASET] \\
        --encode=MODULE:FUNCTION --weights=PATH --encoder=umt5-xxl --length=128
    python -m wamjax.data.embeddings --cache=DIR --pickle=libero_t5_embeddings.pkl \\
        --encoder=t5-11b --length=64

The second command reads the file that Cosmos Policy publishes, see `wamjax.data.embedding_pickle`.
A cache is a folder:

    cache.json                      the encoder, the length, the padding and the prompt template
    embeddings-<hash>.safetensors   one array per instruction, named by the hash of its content

The name of an array hashes the prompt and all of ``cache.json``, so an embedding is never mistaken
for that of another encoder. Files are written atomically and never changed. Filling can be
interrupted; a restart encodes only what is missing.

``FUNCTION(weights, length)`` returns ``encode``, which maps b prompts to (embeddings (b, length,
width), mask (b, length)): the encoder's output at every position, and which positions hold a token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tqdm
from absl import app, flags
from jaxtyping import Bool, Float

from wamjax import cli, files
from wamjax.data import tensors
from wamjax.data.records import Reader
from wamjax.named import resolve

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PADDINGS = ("zero", "keep")
FAST_WAM = (
    "A video recorded from a robot's point of view executing the following instruction: "
    "{instruction}"
)
SHARD = 256  # embeddings in a file

Encode = Callable[
    [Sequence[str]], tuple[Float[np.ndarray, "b s width"], Bool[np.ndarray, "b s"]]
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """Holds what determines an embedding, in addition to the instruction.

    Attributes:
      encoder: identity of the text encoder and its weights, e.g. "umt5-xxl".
      length: rows of an embedding (s); the encoder's tokenizer truncates longer text.
      padding: "zero" sets the rows after the tokens to zero (Wan, Fast-WAM, Cosmos) and stores only
        the others, "keep" leaves the encoder's output there.
      template: template of the prompt; contains ``{instruction}``.
    """

    encoder: str
    length: int
    padding: str = "zero"
    template: str = "{instruction}"

    def __post_init__(self):
        if self.padding not in PADDINGS:
            raise ValueError(f"padding {self.padding!r} is not one of {', '.join(PADDINGS)}")
        if self.template.count("{instruction}") != 1 or self.length < 1:
            raise ValueError(f"{self}: length must be positive, and template must contain "
                             "{instruction} exactly once")  # fmt: skip


class EmbeddingCache:
    """Reads the embeddings of a folder by instruction; safe to read from several threads.

    Args:
      path: the cache folder.

    Raises:
      FileNotFoundError: the cache does not exist; says how to fill one.
      ValueError: one of its files cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = files.path(path)
        file = self.path / "cache.json"
        if not file.exists():
            raise FileNotFoundError(
                f"there is no cache of text embeddings in {self.path} (no cache.json); make it "
                f"by\n  {command(self.path)} --encoder=NAME --length=N\nor correct "
                "config.data.embeddings"
            )
        try:
            self.settings = Settings(**json.loads(file.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file} cannot be read ({error}); fill the cache again") from error
        self._rows: dict[str, np.ndarray] = {}
        for shard in files.glob(self.path, "embeddings-*.safetensors"):
            self._rows |= tensors.read(shard)[0]

    @classmethod
    def create(cls, path: str | os.PathLike, settings: Settings) -> EmbeddingCache:
        """Opens the cache and creates it first if it does not exist.

        Raises:
          ValueError: the cache exists with other settings.
        """
        path = files.path(path)
        if not (path / "cache.json").exists():
            path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(dataclasses.asdict(settings), indent=2) + "\n"
            files.write_text(path / "cache.json", text)
        cache = cls(path)
        actual, expected = dataclasses.asdict(cache.settings), dataclasses.asdict(settings)
        if actual != expected:
            differ = {k: (actual[k], expected[k]) for k in expected if actual[k] != expected[k]}
            raise ValueError(
                f"{path} is a cache with other settings: {differ} (cached, requested); use another "
                "folder"
            )
        return cache

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, instruction: str) -> bool:
        return self._key(instruction) in self._rows

    def __repr__(self) -> str:
        return f"EmbeddingCache({str(self.path)!r}, {self.settings})"

    @property
    def width(self) -> int:
        """Width of an embedding; 0 while the cache is empty."""
        return next(iter(self._rows.values())).shape[1] if self._rows else 0

    def lookup(self, instruction: str) -> Float[np.ndarray, "s width"]:
        """Returns the embedding of an instruction, bfloat16.

        Raises:
          ValueError: the cache has none.
        """
        rows = self._rows.get(self._key(instruction))
        if rows is None:
            raise ValueError(self._lacks([instruction], "--instructions=FILE"))
        out = np.zeros((self.settings.length, rows.shape[1]), BFLOAT16)
        out[: len(rows)] = rows
        return out

    def missing(self, instructions: Iterable[str]) -> list[str]:
        """Returns the instructions without an embedding, each once, in order."""
        return [text for text in dict.fromkeys(instructions) if text not in self]

    def require(self, instructions: Iterable[str], data: str | os.PathLike) -> None:
        """Raises ValueError unless the cache has all instructions of the data set in `data`."""
        missing = self.missing(instructions)
        if missing:
            raise ValueError(self._lacks(missing, f"--data={data}"))

    def doubts(self, instructions: Iterable[str]) -> list[str]:
        """Returns warnings about instructions that were truncated, where this shows, or all equal.

        With padding="keep" only equality can be detected.
        """
        same: dict[str, list[str]] = {}
        full = []
        for text in dict.fromkeys(instructions):
            rows = self._rows.get(self._key(text))
            if rows is None:
                continue
            digest = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
            same.setdefault(digest, []).append(text)
            if self.settings.padding == "zero" and len(rows) == self.settings.length:
                full.append(text)
        length = self.settings.length
        out = []
        if full:
            out.append(f"{self.path}: {len(full)} instructions fill all {length} rows and were "
                       f"probably cut: {_some(full)}; raise --length")  # fmt: skip
        return out + [f"{self.path}: the instructions {_some(group)} have the same embedding: the "
                      "policy cannot tell them apart"
                      for group in same.values() if len(group) > 1]  # fmt: skip

    def add(self, embeddings: Mapping[str, np.ndarray]) -> None:
        """Stores embeddings (rows, width) by instruction, all in one new file."""
        rows = {self._key(text): np.asarray(x).astype(BFLOAT16) for text, x in embeddings.items()}
        names = hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()[:16]
        file = self.path / f"embeddings-{names}.safetensors"
        prompts = {self._key(text): self.prompt(text) for text in embeddings}  # stored for humans
        tensors.write(file, rows, prompts)
        self._rows |= tensors.read(file)[0]

    def prompt(self, instruction: str) -> str:
        """Returns the encoder's input."""
        return self.settings.template.replace("{instruction}", instruction)

    def _key(self, instruction: str) -> str:
        s = self.settings
        content = json.dumps([self.prompt(instruction), s.encoder, s.length, s.padding])
        return hashlib.sha256(content.encode()).hexdigest()

    def _lacks(self, missing: Sequence[str], source: str) -> str:
        shown = "".join(f"\n  {text!r}" for text in missing[:10])
        more = f"\n  ... and {len(missing) - 10} more" if len(missing) > 10 else ""
        return (
            f"the text embeddings in {self.path} lack {len(missing)} instructions:{shown}{more}\n"
            f"fill them in by\n  {command(self.path, source)}"
        )


def _some(texts: Sequence[str]) -> str:
    """Formats a list for a message."""
    more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
    return ", ".join(map(repr, texts[:4])) + more


def fill(
    cache: EmbeddingCache,
    instructions: Iterable[str],
    encode: Encode,
    batch_size: int = 16,
    progress: bool = True,
) -> int:
    """Encodes the instructions that the cache lacks and stores them.

    Embeddings encoded before an interruption are kept.

    Args:
      encode: see the module; it receives `batch_size` prompts per call, with the last ones repeated
        if necessary, so it compiles once.

    Returns:
      The number of encoded instructions.

    Raises:
      ValueError: an embedding is not finite or has another shape.
    """
    missing = cache.missing(instructions)
    bar = tqdm.tqdm(total=len(missing), unit="text", desc="embed", disable=not progress)
    rows: dict[str, np.ndarray] = {}
    try:
        with bar:
            for start in range(0, len(missing), batch_size):
                texts = missing[start : start + batch_size]
                padded = texts + texts[-1:] * (batch_size - len(texts))
                rows |= _encoded(cache, texts, encode([cache.prompt(text) for text in padded]))
                bar.update(len(texts))
                if len(rows) >= SHARD:
                    cache.add(rows)
                    rows = {}
    finally:
        if rows:
            cache.add(rows)
    return len(missing)


def _encoded(cache: EmbeddingCache, texts: Sequence[str], output) -> dict[str, np.ndarray]:
    """Checks the encoder's output and returns the rows to store for each text."""
    values, mask = (np.asarray(x) for x in output)
    length = cache.settings.length
    fits = values.ndim == 3 and values.shape[1] == length and mask.shape == values.shape[:2]
    if not fits or len(values) < len(texts):
        raise ValueError(
            f"the encoder returned embeddings {values.shape} and a mask {mask.shape}, the cache in "
            f"{cache.path} takes (texts, {length}, width) and (texts, {length}), for at least "
            f"{len(texts)} texts"
        )
    if cache.width not in (0, values.shape[2]):
        raise ValueError(
            f"the encoder has width {values.shape[2]}, the cache in {cache.path} has "
            f"{cache.width}: use the encoder {cache.settings.encoder!r}, or another folder"
        )
    counts = mask.astype(bool).sum(axis=1)
    if not np.array_equal(mask.astype(bool), np.arange(length) < counts[:, None]):
        raise ValueError("the encoder's mask must be True for the first tokens, then False")
    out = {}
    for text, value, count in zip(texts, values, counts, strict=False):
        rows = value[:count] if cache.settings.padding == "zero" else value
        if not np.isfinite(rows.astype(np.float32)).all():
            raise ValueError(f"the embedding of {text!r} holds non-finite numbers")
        out[text] = rows
    return out


def command(path: str | os.PathLike, source: str = "--data=DATASET") -> str:
    """Returns the command that fills the cache in `path` from `source`."""
    return (
        f"python -m wamjax.data.embeddings --cache={path} {source} --encode=MODULE:FUNCTION "
        "--weights=PATH"
    )


def define_flags() -> None:
    """Defines the flags; not on import, because several entry points define flags of the same
    names."""
    flags.DEFINE_string("cache", None, "folder of the cache; created, or extended")
    flags.DEFINE_list("data", [], "folders of data sets whose instructions to embed")
    flags.DEFINE_string("instructions", None, "text file with one instruction per line")
    flags.DEFINE_string("pickle", None, "file of embeddings published with Cosmos Policy")
    flags.DEFINE_string("encode", None, "MODULE:FUNCTION; FUNCTION(weights, length) -> encode")
    flags.DEFINE_string("weights", "", "weights of the encoder, passed to FUNCTION")
    flags.DEFINE_string(
        "encoder", None, "name of the encoder; that of an existing cache by default"
    )
    flags.DEFINE_integer(
        "length", None, "tokens per embedding; that of an existing cache by default"
    )
    flags.DEFINE_enum("padding", "zero", PADDINGS, "content after the last token, in a new cache")
    flags.DEFINE_string("template", "{instruction}", "prompt template of a new cache, or fast_wam")
    flags.DEFINE_integer("batch_size", 16, "prompts per encoder call")
    flags.mark_flag_as_required("cache")


def open_from_flags(values: Any) -> EmbeddingCache:
    """Opens the cache that the flags name, or creates it if they give all settings."""
    if (files.path(values.cache, "--cache") / "cache.json").exists():
        cache = EmbeddingCache(values.cache)
        given = {"encoder": values.encoder, "length": values.length}
        settings = {k: v for k, v in given.items() if v is not None}
        return EmbeddingCache.create(values.cache, dataclasses.replace(cache.settings, **settings))
    if not values.encoder or not values.length:
        raise app.UsageError(f"{values.cache} is a new cache: give --encoder and --length")
    template = FAST_WAM if values.template == "fast_wam" else values.template
    settings = Settings(values.encoder, values.length, values.padding, template)
    return EmbeddingCache.create(values.cache, settings)


def _take_pickle(values: Any) -> None:
    from wamjax.data import embedding_pickle

    rows = embedding_pickle.read(
        values.pickle
    )  # read first, so that an error leaves no empty cache
    if values.length:
        rows = embedding_pickle.cut(rows, values.length)
    cache = open_from_flags(values)
    new = embedding_pickle.cut({t: rows[t] for t in cache.missing(rows)}, cache.settings.length)
    width = next(iter(rows.values())).shape[1]
    if cache.width not in (0, width):
        raise ValueError(f"{values.pickle} has width {width}, the cache in {cache.path} has "
                         f"{cache.width}: use another folder")  # fmt: skip
    if new:
        cache.add(new)
    for line in cache.doubts(rows):
        print(f"warning: {line}")
    print(f"{cache.path}: {len(new)} taken, {len(cache)} in all, {cache.width} wide")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    values = flags.FLAGS
    if bool(values.pickle) == bool(values.encode):
        raise app.UsageError("give one of --encode and --pickle")
    if values.pickle:
        _take_pickle(values)
        return
    texts = [text for path in values.data for text in Reader(path).index["instructions"]]
    if values.instructions:
        lines = files.path(values.instructions, "--instructions").read_text().splitlines()
        texts += [line.strip() for line in lines if line.strip()]
    if not texts:
        raise app.UsageError("give instructions by --data=DATASET or --instructions=FILE")
    factory = resolve(values.encode, "--encode")
    cache = open_from_flags(values)
    count = fill(cache, texts, factory(values.weights, cache.settings.length), values.batch_size)
    for line in cache.doubts(texts):
        print(f"warning: {line}")
    print(f"{cache.path}: {count} encoded, {len(cache)} in all, {cache.width} wide")


if __name__ == "__main__":
    cli.run(main, define_flags)
