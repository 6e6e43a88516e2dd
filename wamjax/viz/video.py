"""Composes videos, uint8 arrays (t, h, w, 3), and writes them as MP4 (or GIF without ffmpeg)."""

from __future__ import annotations

import math
import os
import pathlib
import subprocess
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from wamjax import files
from wamjax.viz.figures import BAD, GOOD

_WATCHABLE = 192  # pixels: what the shorter side of a smaller picture is brought up to


def save_mp4(frames: np.ndarray, path: str | os.PathLike, fps: float, scale: int = 0) -> files.Path:
    """Writes an H.264 video that browsers play.

    Args:
      frames: uint8 (t, h, w, 3).
      path: path of the file; parent folders are made.
      fps: frames per second.
      scale: enlarges by this whole factor, pixels kept square; 0 chooses one that brings the
        shorter side to at least 192 pixels.

    Returns:
      The path written: `path`, or the same name with ``.gif`` if there is no ffmpeg.

    Raises:
      OSError: ffmpeg could not write it.
    """
    frames = upscale(_checked(frames), scale or _factor(frames))
    _, h, w, _ = frames.shape
    # The codec halves the colour planes, so both sides must be even.
    frames = np.pad(frames, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), "edge")
    path = files.path(path)
    try:
        import imageio_ffmpeg

        program = imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return save_gif(frames, path.with_suffix(".gif"), fps)
    with files.draft(path, replace=True) as draft:
        _encode(program, frames, draft, fps, path)
    return path


def _encode(
    program: str, frames: np.ndarray, draft: pathlib.Path, fps: float, path: files.Path
) -> None:
    """Runs ffmpeg to write `frames` into `draft`, which becomes `path`.

    It does not use `imageio_ffmpeg.write_frames`, which runs Python between fork and exec and may
    deadlock a process with the threads of JAX. A process group of its own, which needs no such
    code, keeps an interrupt of the terminal from ending ffmpeg in the middle of a file.
    """
    _, h, w, _ = frames.shape
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w}x{h}", "-r", f"{fps:.6g}", "-i", "-"]
    pixels = np.ascontiguousarray(frames).data.cast("B")
    for codec in (["-vcodec", "libx264", "-crf", "10"], ["-q:v", "2"]):  # not every ffmpeg has x264
        command = [program, "-y", "-v", "error", *raw, *codec, "-pix_fmt", "yuv420p", str(draft)]
        process = subprocess.run(command, input=pixels, capture_output=True, process_group=0)
        if not process.returncode:
            return
    why = (process.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
    raise OSError(f"{path}: ffmpeg ended with {process.returncode}: {why}")


def save_gif(frames: np.ndarray, path: str | os.PathLike, fps: float) -> files.Path:
    """Writes a looping GIF (256 colours for each frame, time in steps of 10 ms)."""
    images = [Image.fromarray(f) for f in _checked(frames)]
    options = {"duration": max(20, round(1000 / fps)), "loop": 0}
    with files.draft(path, replace=True) as draft:
        images[0].save(draft, save_all=True, append_images=images[1:], **options)
    return files.path(path)


def upscale(frames: np.ndarray, factor: int) -> np.ndarray:
    """Enlarges by repeating pixels (nearest neighbour): (..., h, w, 3) -> (..., f*h, f*w, 3)."""
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def border(frames: np.ndarray, success: bool | None, width: int = 2) -> np.ndarray:
    """Surrounds every frame: green for success, red for failure, grey for unknown."""
    colour = ImageColor.getrgb("#9A9A9A" if success is None else GOOD if success else BAD)
    t, h, w, _ = _checked(frames).shape
    out = np.empty((t, h + 2 * width, w + 2 * width, 3), np.uint8)
    out[:] = colour
    out[:, width:-width, width:-width] = frames
    return out


def caption(frames: np.ndarray, text: str, size: int = 12) -> np.ndarray:
    """Adds a strip with `text` above every frame."""
    t, _, w, _ = _checked(frames).shape
    strip = Image.new("RGB", (w, size + 6), "white")
    ImageDraw.Draw(strip).text((3, 2), text, "black", ImageFont.load_default(size))
    top = np.broadcast_to(np.asarray(strip), (t, size + 6, w, 3))
    return np.concatenate([top, frames], axis=1)


def side_by_side(
    predicted: np.ndarray, real: np.ndarray, labels: tuple[str, str] = ("predicted", "real")
) -> np.ndarray:
    """Puts predicted next to real frames, enlarged so that the labels are readable.

    The shorter one holds its last frame. Both must have the same height and width.
    """
    pair = [_checked(predicted), _checked(real)]
    if pair[0].shape[1:] != pair[1].shape[1:]:
        raise ValueError(f"predicted {predicted.shape} and real {real.shape} must have equal "
                         "picture sizes")
    large = [upscale(v, _factor(v)) for v in pair]
    pair = [caption(v, name, 14) for v, name in zip(large, labels, strict=True)]
    return grid(pair, columns=2, gap=8)


def grid(
    videos: Sequence[np.ndarray],
    success: Sequence[bool | None] | None = None,
    titles: Sequence[str] | None = None,
    columns: int = 0,
    gap: int = 4,
) -> np.ndarray:
    """Tiles videos of one picture size into one, row by row; shorter ones hold their last frame.

    Args:
      videos: uint8 (t_i, h, w, 3) each.
      success: outcome of each video, drawn as a green or red border.
      titles: a caption above each video.
      columns: 0 makes the grid about square.
      gap: pixels of white between tiles.
    """
    if success is not None:
        videos = [border(v, s) for v, s in zip(videos, success, strict=True)]
    if titles is not None:
        videos = [caption(v, t) for v, t in zip(videos, titles, strict=True)]
    sizes = {_checked(v).shape[1:] for v in videos}
    if len(sizes) != 1:
        raise ValueError(f"a grid needs videos of one picture size, got {sorted(sizes)}")
    h, w, _ = sizes.pop()
    columns = columns or math.ceil(math.sqrt(len(videos)))
    rows = math.ceil(len(videos) / columns)
    length = max(len(v) for v in videos)
    out = np.full((length, rows * (h + gap) - gap, columns * (w + gap) - gap, 3), 255, np.uint8)
    for i, video in enumerate(videos):
        y, x = (i // columns) * (h + gap), (i % columns) * (w + gap)
        held = np.minimum(np.arange(length), len(video) - 1)
        out[:, y : y + h, x : x + w] = video[held]
    return out


def _factor(frames: np.ndarray) -> int:
    """Returns the integer enlargement that makes a picture watchable."""
    return math.ceil(_WATCHABLE / min(frames.shape[1:3]))


def _checked(frames: np.ndarray) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(
            f"a video is uint8 (t, h, w, 3) with t > 0, got {frames.dtype} {frames.shape}; "
            "convert pictures in [0, 1] by np.uint8(255 * x)"
        )
    return frames
