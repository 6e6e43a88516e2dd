"""Encodes a data set into latents: every window through a frozen codec, once.

    python -m wamjax.data.precompute --config=experiments/configs/fast_wam_libero.py \\
        --data=DATASET --out=DIR --layout=image:224x224+wrist_image:224x224 --codec=wan2.2 \\
        --encode=MODULE:FUNCTION --weights=PATH

The config determines the length of windows and the shape of their latents. ``FUNCTION(weights)``
returns ``encode``, which maps uint8 video (b, f, H, W, 3) to latents (b, t, h, w, c).
`wamjax.data.latents` describes the result.

The data set is written to a hidden folder next to DIR and renamed when it is complete. After an
interruption, the same command continues after the last complete file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tqdm
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float, UInt8

from wamjax import cli, files
from wamjax.data import latents, layout, normalize, records
from wamjax.data.latents import LatentInfo
from wamjax.data.records import Episode, Reader
from wamjax.data.shards import OPTIONS, shard_name
from wamjax.named import resolve

Encode = Callable[[UInt8[np.ndarray, "b f H W 3"]], Float[np.ndarray, "b t h w c"]]


def precompute(
    reader: Reader,
    out: str | os.PathLike,
    info: LatentInfo,
    encode: Encode,
    batch_size: int = 8,
    shard_bytes: int = 2**28,
    progress: bool = True,
) -> int:
    """Encodes every window of a data set, and writes a data set of latents.

    Args:
      reader: data set with pictures.
      out: folder of the new data set; must not exist.
      info: describes the windows and their latents.
      encode: see the module; it receives `batch_size` windows per call, with the last ones repeated
        if necessary, so it compiles once.
      shard_bytes: size of a file; an interruption loses at most one.

    Returns:
      The number of windows that this call encoded.

    Raises:
      FileExistsError: `out` exists.
      ValueError: latents have another shape or are not finite; or an interrupted call wrote files
        there from other data or with other settings.
    """
    out = files.path(out, "--out")
    if files.is_there(out, records.SPEC):
        raise FileExistsError(f"{out} exists; remove it or write somewhere else")
    parts = _plan(reader.lengths, info, shard_bytes)
    folder = out.with_name(f".{out.name}.latents")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = records.lock(folder)
    except OSError as error:
        raise ValueError(f"{folder} is being written by another process") from error
    with held:
        _continue(folder, _job(reader, info, parts))
        windows = [sum(len(latents.starts(n, info.stride)) for n in reader.lengths[part])
                   for part in parts]  # fmt: skip
        bar = tqdm.tqdm(total=sum(windows), unit="window", desc="latents", disable=not progress)
        count = 0
        with bar:
            for i, part in enumerate(parts):
                stems = "episodes", "latents"
                places = [folder / shard_name(i, len(parts), stem) for stem in stems]
                if all(place.exists() for place in places):
                    bar.update(windows[i])
                    continue
                _write_part(reader, part, info, encode, batch_size, places, bar)
                count += windows[i]
        _complete(folder, reader, info, parts, windows)
        (folder / "lock").unlink(missing_ok=True)
        files.move(folder, out, last=records.SPEC)
    return count


def latent_info(config, cameras: str, codec: str, stride: int = 1) -> LatentInfo:
    """Returns the description of the latents that a config trains on.

    Args:
      config: the whole config, of a model with cached latents.
      cameras: layout of the picture, see `wamjax.data.layout`.
      codec: name of the codec and its weights.
      stride: control steps between window starts.

    Raises:
      ValueError: the config uses other cameras, or no cached latents.
    """
    from wamjax.models import codec as codecs

    if config.model.codec.kind != "cached":
        raise ValueError(f"config.model.codec.kind = {config.model.codec.kind!r} must be 'cached'")
    if stride < 1:
        raise ValueError(f"the stride {stride} between windows must be positive")
    data, picture = config.data, layout.parse(cameras)
    if data.layout and data.layout != str(picture):
        raise ValueError(f"layout {cameras!r} must be the same as config.data.layout = "
                         f"{data.layout!r}")  # fmt: skip
    if not data.layout and tuple(data.cameras) != tuple(picture.cameras):
        raise ValueError(
            f"layout {cameras!r} makes cameras {tuple(picture.cameras)}, config.data.cameras is "
            f"{tuple(data.cameras)}"
        )
    shape = codecs.build(config.model.codec).shape(data.frames, *picture.size)
    return LatentInfo(
        codec, str(picture), picture.cameras, data.frames, data.frame_stride, stride, shape
    )


def _plan(lengths: Sequence[int], info: LatentInfo, shard_bytes: int) -> list[slice]:
    """Assigns episodes to files: a new one starts beyond `shard_bytes` of latents."""
    window = int(np.prod(info.shape)) * latents.BFLOAT16.itemsize
    out, begin, size = [], 0, 0
    for i, length in enumerate(lengths):
        size += window * len(latents.starts(length, info.stride))
        if size > shard_bytes or i + 1 == len(lengths):
            out.append(slice(begin, i + 1))
            begin, size = i + 1, 0
    return out


def _job(reader: Reader, info: LatentInfo, parts: Sequence[slice]) -> dict[str, Any]:
    """Returns everything that determines the content of the files, so that only the same job
    continues."""
    source = json.dumps([reader.info.to_json(), reader.lengths.tolist(), reader.index["tasks"]])
    return {
        "source": hashlib.sha256(source.encode()).hexdigest(),
        "files": [part.stop for part in parts],
        **info.to_json(),
    }


def _continue(folder: files.Path, job: dict[str, Any]) -> None:
    """Checks that the files in `folder` belong to `job`; empties the folder if that is unknown."""
    job = json.loads(json.dumps(job))
    file = folder / "job.json"
    if not file.exists():
        for stray in files.glob(folder, "*"):
            if stray.name != "lock":
                stray.unlink()
        records.write_json(file, job)
    stored = records.read_json(file)
    if stored != job:
        differ = {k: (stored.get(k), v) for k, v in job.items() if stored.get(k) != v}
        raise ValueError(
            f"{folder} holds part of the latents of another job: {differ} (there, now). Remove it, "
            "or use the same settings again"
        )


def _write_part(reader, part: slice, info: LatentInfo, encode, batch_size, places, bar) -> None:
    """Writes both files of some episodes; they get their names when they are complete."""
    for place in places:
        for stray in files.glob(place.parent, f".*-{place.name}"):  # left by a killed process
            files.remove(stray)
    with contextlib.ExitStack() as drafts:
        writers = []
        for place in places:
            draft = drafts.enter_context(files.draft(place, replace=True))
            writers.append(ArrayRecordWriter(str(draft), OPTIONS))
        try:
            for i, episode, video in _episodes(reader, part, layout.parse(info.layout)):
                writers[0].write(records.pack(dataclasses.replace(episode, images={})))
                for start, x in _encoded(i, video, info, encode, batch_size):
                    writers[1].write(latents.pack(i, start, x))
                    bar.update()
        finally:
            for writer in writers:
                writer.close()


def _episodes(
    reader: Reader, part: slice, picture: layout.Layout
) -> Iterator[tuple[int, Episode, np.ndarray]]:
    """Yields episodes with decoded pictures; the next one is decoded while one is encoded."""

    def load(i: int) -> tuple[int, Episode, np.ndarray]:
        episode = reader[i]
        every = range(episode.length + 1)
        images = {camera: episode.frames(camera, every) for camera in episode.images}
        return i, episode, picture.compose(images)

    numbers = range(len(reader))[part]
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, numbers[0])
        for following in numbers[1:]:
            ready, ahead = ahead.result(), pool.submit(load, following)
            yield ready
        yield ahead.result()


def _encoded(
    number: int, video: np.ndarray, info: LatentInfo, encode: Encode, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (window start, latents) of an episode."""
    length = len(video) - 1
    every = list(latents.starts(length, info.stride))
    for begin in range(0, len(every), batch_size):
        chosen = every[begin : begin + batch_size]
        padded = chosen + chosen[-1:] * (batch_size - len(chosen))
        at = [latents.frames_of(s, length, info.frames, info.frame_stride) for s in padded]
        out = np.asarray(encode(video[np.stack(at)]))
        if out.shape != (batch_size, *info.shape):
            raise ValueError(
                f"the codec made latents {out.shape} of video {(batch_size, *at[0].shape)} x "
                f"{video.shape[1:]}; {info.codec!r} should make {(batch_size, *info.shape)}"
            )
        for start, x in zip(chosen, out, strict=False):
            if not np.isfinite(x.astype(np.float32)).all():
                raise ValueError(
                    f"the latents of episode {number}, step {start} hold non-finite numbers"
                )
            yield start, x


def _complete(folder: files.Path, reader: Reader, info: LatentInfo, parts, windows) -> None:
    """Writes the JSON files from the written episodes, which reads each of them once more."""
    lengths = reader.lengths.tolist()
    index = {
        "lengths": lengths,
        "tasks": reader.index["tasks"][: len(lengths)],
        "success": reader.index["success"][: len(lengths)],
        "shards": [part.stop - part.start for part in parts],
    }
    records.write_json(folder / "index.json", index)
    without = dataclasses.replace(reader.info, cameras={})
    records.write_json(folder / "spec.json", without.to_json())
    keys = normalize.KEYS[:1] if without.action_free else normalize.KEYS
    arrays: dict[str, list[np.ndarray]] = {key: [] for key in keys}
    digests: dict[str, list[str]] = {key: [] for key in keys}
    instructions = set()
    for episode in Reader(folder):
        instructions.add(episode.instruction)
        for key, kept in arrays.items():
            kept.append(getattr(episode, key))
            digests[key].append(normalize.digest(kept[-1]))
    index |= {"instructions": sorted(instructions), "digests": digests}
    records.write_json(folder / "index.json", index)
    records.write_json(folder / "statistics.json", normalize.statistics(arrays))
    records.write_json(folder / latents.FILE, info.to_json() | {"windows": windows})


def define_flags() -> None:
    """Defines the flags; not on import, because several entry points define flags of the same
    names."""
    cli.define_config()
    flags.DEFINE_string("data", None, "folder of the data set with pictures")
    flags.DEFINE_string("out", None, "folder of the data set with latents; must not exist")
    flags.DEFINE_string("layout", None, "picture: NAME:HEIGHTxWIDTH+..., rows joined by '/'")
    flags.DEFINE_string("codec", "", "name of codec and weights; --encode and --weights by default")
    flags.DEFINE_string("encode", None, "MODULE:FUNCTION; FUNCTION(weights) -> encode")
    flags.DEFINE_string("weights", "", "weights of the codec, passed to FUNCTION")
    flags.DEFINE_integer("stride", 1, "control steps between window starts")
    flags.DEFINE_integer("batch_size", 8, "windows per encoder call")
    flags.mark_flags_as_required(["config", "data", "out", "layout", "encode"])


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    options = flags.FLAGS
    codec = options.codec or f"{options.encode} {files.name(options.weights)}"
    info = latent_info(options.config, options.layout, codec, options.stride)
    encode = resolve(options.encode, "--encode")(options.weights)
    count = precompute(Reader(options.data), options.out, info, encode, options.batch_size)
    size = files.size(options.out)
    print(f"{options.out}: {count} windows encoded, latents {info.shape}, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    cli.run(main, define_flags)
