"""Draws the first examples of a batch, exactly as the model receives them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import numpy as np

from wamjax import files
from wamjax.viz import figures, sheet, video

_DIMMED = 0.35
_IMAGES, _CLIPS = 64, 12  # maximum numbers for a batch without actions


def save(
    batch: Mapping[str, np.ndarray],
    path: str | os.PathLike,
    examples: int = 4,
    decode: Callable[[np.ndarray], str] | None = None,
) -> files.Path:
    """Draws each example as a strip of frames over its instruction, actions and proprio.

    Frames and actions marked invalid (padding past the end of the episode) are drawn dimmed. A
    batch without windows of actions is a sheet of pictures or clips under their classes or
    instructions.

    Args:
      batch: as the data pipeline makes it (interfaces: "video" or "latents", "proprio", "actions",
        "instruction", "frame_valid", "action_valid", "episode"); arrays have a leading batch axis.
      path: a PNG.
      examples: maximum number of examples, if the batch has actions.
      decode: token ids (n,) -> text; without it the ids are printed.
    """
    if "action_valid" not in batch:
        return _sheet(batch, path, decode)
    batch = {k: np.asarray(v)[:examples] for k, v in batch.items()}
    pictures, what = _pictures(batch)
    count, frames, h, w, _ = pictures.shape
    strip = min(max(frames * w / h * 1.1, 5), 13)  # inches
    figure = figures.figure(strip + 5.2, 1.6 * count + 0.5)
    actions = np.where(batch["action_valid"][..., None], batch["actions"], np.nan)
    grid = figure.add_gridspec(count, 3, width_ratios=[strip, 3.2, 2])
    for i in range(count):
        example = {k: v[i] for k, v in batch.items()}
        row = [figure.add_subplot(grid[i, column]) for column in range(3)]
        _strip(row[0], pictures[i], example["frame_valid"], _title(example, decode))
        _actions(row[1], actions[i], example["action_valid"], _reach(actions))
        _proprio(row[2], example["proprio"], _reach(batch["proprio"]))
        if i == 0:
            row[1].set_title("actions, normalised", fontsize=9)
            row[2].set_title("proprio, normalised", fontsize=9)
        if i == count - 1:
            row[1].set_xlabel("step of the chunk", fontsize=8)
            row[2].set_xlabel("dimension", fontsize=8)
    note = f"{what}; dimmed = padding past the end of the episode"
    figure.supxlabel(note, fontsize=8, color=figures.MUTED)
    return figures.write(figure, path, dpi=100)


def _sheet(batch: Mapping[str, np.ndarray], path: str | os.PathLike, decode) -> files.Path:
    key = "video" if "video" in batch else "latents"
    examples = _IMAGES if batch[key].shape[1] == 1 else _CLIPS
    batch = {k: np.asarray(v)[:examples] for k, v in batch.items()}
    rows = ({k: v[i] for k, v in batch.items()} for i in range(len(batch[key])))
    return sheet.save(batch[key], path, [_title(row, decode) for row in rows])


def _pictures(batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """Returns the frames as uint8 (b, f, h, w, 3), and a description of them."""
    if "video" in batch:
        return batch["video"], "frames of the window, cameras side by side"
    if "latents" in batch:
        latents = batch["latents"][..., :3].astype(np.float32)
        low, high = latents.min(), latents.max()
        scaled = 255 * (latents - low) / max(high - low, 1e-6)
        return scaled.astype(np.uint8), "latent channels 0-2 as red, green, blue"
    raise KeyError(f"a batch picture needs 'video' or 'latents'; the batch has {sorted(batch)}")


def _title(example: Mapping[str, np.ndarray], decode) -> str:
    parts = [f"{k} {int(example[k])}" for k in ("episode", "label") if k in example]
    if "instruction" in example:
        ids = example["instruction"]
        parts.append(decode(ids) if decode else "ids " + " ".join(map(str, ids[ids != 0])))
    return "   ".join(parts)


def _strip(axes, frames: np.ndarray, valid: np.ndarray, title: str) -> None:
    # One latent frame may stand for several raw ones: then it is valid if any of them is.
    if len(valid) != len(frames):
        later = np.array_split(valid[1:], len(frames) - 1)
        valid = np.array([valid[0], *(part.any() for part in later)])
    shown = [
        f if ok else (f * _DIMMED + 255 * (1 - _DIMMED)).astype(np.uint8)
        for f, ok in zip(frames, valid, strict=True)
    ]
    h, w = frames.shape[1:3]
    gap = 1 + w // 64
    axes.imshow(video.grid([f[None] for f in shown], columns=len(shown), gap=gap)[0])
    axes.set_title(title, fontsize=9, loc="left")
    for i, ok in enumerate(valid):
        if not ok:
            x, y = i * (w + gap) + w / 2, h / 2
            axes.text(x, y, "pad", ha="center", va="center", color=figures.BAD)
    axes.set_axis_off()


def _actions(axes, actions: np.ndarray, valid: np.ndarray, reach: float) -> None:
    steps = np.arange(len(actions))
    for i, values in enumerate(actions.T):
        colour = figures.COLORS[i % len(figures.COLORS)]
        axes.plot(steps, values, color=colour, lw=1, marker=".", ms=3, label=str(i))
    for step in steps[~valid]:
        axes.axvspan(step - 0.5, step + 0.5, color="#E4E4E4", lw=0)
    if not valid.any():
        axes.text(
            0.5, 0.5, "no actions", transform=axes.transAxes, ha="center", va="center",
            color=figures.BAD,
        )  # fmt: skip
    elif actions.shape[1] <= 8:
        axes.legend(fontsize=6, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _normalised(axes, reach)
    axes.set_xlim(-0.5, len(actions) - 0.5)


def _proprio(axes, proprio: np.ndarray, reach: float) -> None:
    axes.bar(np.arange(len(proprio)), proprio, color=figures.COLORS[0], width=0.7)
    axes.set_xticks(np.arange(len(proprio)) if len(proprio) <= 16 else [0, len(proprio) - 1])
    _normalised(axes, reach)


def _reach(values: np.ndarray) -> float:
    """Returns half of the axis, the same for all examples: at least the target range of
    normalization."""
    return max(1.1, 1.1 * float(np.nanmax(np.abs(values), initial=0)))


def _normalised(axes, reach: float) -> None:
    axes.set_ylim(-reach, reach)
    axes.axhline(0, color=figures.MUTED, lw=0.5)
    axes.tick_params(labelsize=7)
    figures.plain(axes)
