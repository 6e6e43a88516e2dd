"""Writes random data in the formats of real data, to try a config without its data; it teaches
nothing.

A source with ``stand_in = 8`` whose folder does not exist gets eight random episodes; the code that
writes real latents and text embeddings writes those too, from stand-ins of the codec and of the
text encoder. `codec` and `text_encoder` can also be named in the commands of
`wamjax.data.precompute` and `wamjax.data.embeddings`.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Sequence

import numpy as np

from wamjax import files
from wamjax.data import embeddings, images, layout, precompute
from wamjax.data.embeddings import EmbeddingCache
from wamjax.data.records import SPEC, Episode, Reader, Writer, turn
from wamjax.data.sources import cells_of, data_root
from wamjax.data.spec import Info

TASKS = ("lift the block", "open the drawer", "put the bowl on the plate", "close the lid")


def ensure(config) -> None:
    """Writes what the sources with ``stand_in`` and their text embeddings lack.

    Raises:
      ValueError: the config has a source with ``stand_in`` but does not declare its sizes.
    """
    root = data_root(config.data.root)
    for name, entry in config.data.sources.items():
        if not entry.stand_in:
            continue
        if not (entry.path and config.data.declared.action_dim):
            raise ValueError(f"config.data.sources.{name}.stand_in needs a path, and the sizes in "
                             "config.data.declared")  # fmt: skip
        path = files.below(root, entry.path)
        if not files.is_there(path, SPEC):
            with turn(path):
                if not files.is_there(path, SPEC):  # another process may have been faster
                    print(f"making {entry.stand_in} random episodes in {path}: a stand-in",
                          flush=True)  # fmt: skip
                    _make(config, path, entry.stand_in, entry.action_free)
        if config.model.text.kind == "context" and config.data.embeddings:
            _embed(config, root, Reader(path).index["instructions"])


def _make(config, path: files.Path, count: int, action_free: bool) -> None:
    if config.model.codec.kind != "cached":
        _write(config, path, count, action_free)
        return
    cameras = config.data.layout or str(layout.beside(_sizes(config.data)))
    info = precompute.latent_info(config, cameras, "stand-in")
    sizes = config.model.codec
    encode = codec(f"{sizes.channels}x{sizes.spatial}x{sizes.temporal}")
    with tempfile.TemporaryDirectory() as folder:
        pictures = files.path(folder) / "pictures"
        _write(config, pictures, count, action_free)
        precompute.precompute(Reader(pictures), path, info, encode, progress=False)


def _sizes(data) -> dict[str, tuple[int, int]]:
    """Returns the declared (height, width) of each camera."""
    return cells_of(data) or dict.fromkeys(data.cameras, tuple(data.declared.camera_size))


def _write(config, path: files.Path, count: int, action_free: bool) -> None:
    """Writes random walks of the state, their differences as actions, and pictures of a moving
    square."""
    said, sizes = config.data.declared, _sizes(config.data)
    info = Info(
        cameras=sizes,
        proprio_dim=said.proprio_dim,
        action_dim=said.action_dim,
        control_hz=said.control_hz,
        robot="stand-in",
        action_free=action_free,
    )
    with Writer(path, info) as writer:
        for i in range(count):
            rng = np.random.default_rng(i)
            length = int(rng.integers(config.data.chunk // 2, 2 * config.data.chunk))
            steps = rng.normal(size=(length, max(said.action_dim, said.proprio_dim)))
            state = np.cumsum(np.pad(steps, ((1, 0), (0, 0))), axis=0)
            moves = steps[:, : 0 if action_free else said.action_dim]
            frames = {size: [_picture(size, t, i) for t in range(length + 1)]
                      for size in set(sizes.values())}  # fmt: skip
            task = TASKS[i % len(TASKS)]
            writer.write(
                Episode(
                    images={name: frames[size] for name, size in sizes.items()},
                    proprio=state[:, : said.proprio_dim].astype(np.float32),
                    actions=moves.astype(np.float32),
                    instruction=task,
                    success=True,
                    returns=np.ones(length, np.float32),
                    task=task,
                    seed=i,
                )
            )


def _picture(size: tuple[int, int], t: int, number: int) -> bytes:
    out = np.zeros((*size, 3), np.uint8)
    y, x = (number * 7 + t) % (size[0] - 4), (2 * t) % (size[1] - 4)
    out[y : y + 4, x : x + 4] = 255, 40 * number % 256, 128
    return images.encode(out)


def _embed(config, root: files.Path, instructions: Sequence[str]) -> None:
    path = files.below(root, config.data.embeddings)
    length, width = config.data.instruction_length, config.model.context_width
    settings = embeddings.Settings("stand-in", length, template=embeddings.FAST_WAM)
    if (path / "cache.json").exists():
        cache = EmbeddingCache(path)
        if cache.settings != settings:
            return  # a real one, or one of another length: the pipeline reports mismatches
        if not cache.missing(instructions):
            return
    with turn(path):
        cache = EmbeddingCache.create(path, settings)
        embeddings.fill(cache, instructions, text_encoder(str(width), length), progress=False)


def codec(sizes: str):
    """Returns a stand-in for a causal video codec; `sizes` is CHANNELSxSPATIALxTEMPORAL, e.g.
    48x16x4.

    Each latent is a random projection of the mean colour of its square, mixed with that of the
    frames before it.
    """
    parts = re.fullmatch(r"(\d+)x(\d+)x(\d+)", sizes)
    if not parts:
        raise ValueError(f"--weights={sizes!r} must have the form CHANNELSxSPATIALxTEMPORAL")

    channels, p, k = (int(x) for x in parts.groups())
    projection = np.random.default_rng(0).normal(size=(3, channels))

    def encode(video: np.ndarray) -> np.ndarray:
        b, f, height, width, _ = video.shape
        x = video.astype(np.float32) / 127.5 - 1
        x = x.reshape(b, f, height // p, p, width // p, p, 3).mean(axis=(3, 5))
        past = np.cumsum(x, axis=1) / np.arange(1, f + 1)[:, None, None, None]
        mixed = (0.7 * x + 0.3 * past)[:, ::k]  # frames 0, k, 2k: the last of each latent
        return (mixed @ projection).astype(np.float32)

    return encode


def text_encoder(width: str, length: int):
    """Returns a stand-in for a text encoder, `width` wide: a random row per word, and one at the
    end.

    Source of the rows: a hash of the word and its position.
    """

    def encode(prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        out = np.zeros((len(prompts), length, int(width)), np.float32)
        mask = np.zeros(out.shape[:2], bool)
        for i, prompt in enumerate(prompts):
            for j, word in enumerate([*prompt.split()[: length - 1], "</s>"]):
                digest = hashlib.sha256(f"{j} {word}".encode()).digest()
                rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
                out[i, j], mask[i, j] = rng.normal(size=int(width)), True
        return out, mask

    return encode
