"""Samples pictures and clips from a trained model; see `wamjax.sample` for the files."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from wamjax import files
from wamjax.console import say
from wamjax.runs.trained import prepare
from wamjax.training import state as states
from wamjax.training.checkpoint import find, restore_params

COUNT = 64
BATCH = 64  # samples per call

Condition = dict[str, np.ndarray]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("params",), meta_fields=("objective",)
)
@dataclasses.dataclass(frozen=True)
class Sampler:
    """Holds a model that is ready to sample: objective, and parameters in compute precision.

    It is a pytree, so one compiled program samples from every checkpoint of a model.
    """

    objective: Any
    params: Any


def load(
    workdir: str | os.PathLike, step: int | None = None, ema: bool | None = None, **changes
):
    """Restores a run.

    Args:
      workdir: folder of the run.
      step: checkpoint to load; the newest by default.
      ema: whether to use the moving average; by default if the run has one.
      **changes: fields of the objective to change, such as guidance, steps, solver.

    Returns:
      (`Sampler`, the config of the run).
    """
    from wamjax import wam

    checkpoint = find(workdir, step)
    spec = wam.spec_of(checkpoint.statistics["spec"])
    objective = wam.build(checkpoint.config, spec)
    wam.check_kind(objective, checkpoint.config.objective.name, workdir, wanted="pictures")
    params, config, _, _ = restore_params(workdir, step, ema)
    fields = {field.name for field in dataclasses.fields(objective)}
    if unknown := set(changes) - fields:
        raise ValueError(f"objective {config.objective.name!r} has no {sorted(unknown)}")
    objective = dataclasses.replace(objective, **changes)
    return Sampler(objective, prepare(params, objective, config.precision.compute)), config


def draw(
    sampler: Sampler,
    condition: Condition,
    count: int,
    seed: int = 0,
    given: np.ndarray | None = None,
    batch: int = BATCH,
    frames: int = 0,
) -> np.ndarray:
    """Draws samples, `batch` at a time, with one compiled program.

    Args:
      condition: the conditioning keys of a batch, (count, ...) each.
      count: number of samples, n.
      given: clips (n, f, H, W, c), or their latents, whose frames are the given first frames of the
        samples.
      frames: length f if it differs from training; for objectives that can continue, see `program`.

    Returns:
      uint8 (n, f, H, W, colours), or latents where the codec has no decoder.
    """
    rows = np.arange(-(-count // batch) * batch) % count  # the last batch is padded
    parts = []
    for i, start in enumerate(range(0, len(rows), batch)):
        chosen = rows[start : start + batch]
        inputs = {k: v[chosen] for k, v in condition.items()}
        first = None if given is None else given[chosen]
        key = jax.random.fold_in(states.key(seed, "picture"), i)
        parts.append(np.asarray(program(sampler, inputs, first, key, batch, frames)))
    return np.concatenate(parts)[:count]


@functools.partial(jax.jit, static_argnames=("count", "frames"))
def program(sampler: Sampler, condition: Condition, given, key, count: int, frames: int = 0):
    """Draws `count` samples, from raw frames to raw frames; this is what `draw` compiles.

    Args:
      frames: raw frames of the result; 0 is the length of training. Schemes that generate chunk by
        chunk or token by token can continue beyond it: `wam.video.rolling`.
    """
    return sampler.objective.clips(sampler.params, condition, key, given, count, frames)


def inputs(
    sampler: Sampler,
    config: ConfigDict,
    count: int,
    label: int | None = None,
    caption: str | None = None,
    given: int | None = None,
) -> tuple[Condition, np.ndarray | None]:
    """Returns the inputs that samples are drawn from.

    Args:
      label: class of all samples; by default they cycle through the classes.
      caption: text of all samples; by default the texts of the test data.
      given: number of given raw frames (latent ones without an encoder); by default those that the
        scheme always needs.

    Returns:
      (condition, the given frames of clips of the test data or None).
    """
    objective = sampler.objective
    spec = objective.batch_spec(count)
    key = objective.codec.key
    keys = [k for k in spec if k != key]
    chosen: Condition = {}
    if label is not None:
        _check_condition(keys, "label")
        chosen["label"] = np.full(count, label, np.int32)
    if caption is not None:
        _check_condition(keys, "instruction")
        words = encode(config, caption, spec["instruction"].shape[1])
        chosen["instruction"] = np.tile(words, (count, 1))
    if given is None:
        given = objective.always_given
    if "label" in keys and not given:
        classes = objective.network.classes
        chosen.setdefault("label", np.arange(count, dtype=np.int32) % classes)
    rows = {}
    if given or set(keys) - set(chosen):
        rows = test_data(config, count)
    condition = {k: chosen.get(k, rows.get(k)) for k in keys}
    return condition, rows[key][:, :given] if given else None


def encode(config: ConfigDict, text: str, length: int) -> np.ndarray:
    """Returns the ids (length,) of a caption in the vocabulary of the run's data."""
    name = config.data.arrays.partition(":")[0]
    if name != "scenes":
        raise ValueError(f"config.data.arrays={name!r} has no vocabulary to write captions in")
    from wamjax.data import scenes

    return scenes.encode(text, length)


def titles(config: ConfigDict, condition: Condition) -> list[str] | None:
    """Returns the condition of each sample in words."""
    if "instruction" in condition and config.data.arrays.startswith("scenes"):
        from wamjax.data import scenes

        words = [[scenes.VOCABULARY[i] for i in ids if i] for ids in condition["instruction"]]
        return [" ".join(caption) for caption in words]
    if "label" in condition:
        return [str(label) for label in condition["label"]]
    return None


def run(
    workdir: str | os.PathLike,
    count: int = COUNT,
    output: str | os.PathLike | None = None,
    seed: int = 0,
    step: int | None = None,
    label: int | None = None,
    caption: str | None = None,
    given: int | None = None,
    frames: int = 0,
    **changes,
) -> files.Path:
    """Samples from a run and writes the files; see the top of this file.

    Args:
      output: folder for the files; the run's media folder by default.
      frames: length of each clip; 0 is the length of training, see `program`.
      **changes: see `load`.

    Returns:
      the path of the sheet.
    """
    from wamjax.viz import sheet, video

    output = files.path(output or files.path(workdir, "--workdir") / "media", "--output")
    sampler, config = load(workdir, step, **changes)  # all processes take part
    path = output / "samples.png"
    if jax.process_index() > 0:
        return path
    condition, given_frames = inputs(sampler, config, count, label, caption, given)
    samples = draw(sampler, condition, count, seed, given_frames, min(count, BATCH), frames)
    names = titles(config, condition)
    sheet.save(samples, path, names, _columns(sampler.objective, condition, count))
    if samples.shape[1] > 1 and samples.dtype == np.uint8:
        clips = video.upscale(sheet.rgb(samples), 2)
        picture = video.grid(sheet.captioned(list(clips), names))
        video.save_mp4(picture, path.with_suffix(".mp4"), fps=8)
    name = "video" if samples.dtype == np.uint8 else "latents"
    np.savez_compressed(path.with_suffix(".npz"), **{name: samples}, **condition)
    say(f"{count} samples: {path}")
    return path


def _columns(objective, condition: Condition, count: int) -> int:
    """Returns one column per class if the sheet stays small, else 0."""
    classes = objective.network.classes if "label" in condition else 0
    return classes if 4 <= classes <= min(count, 16) else 0


def test_data(config: ConfigDict, count: int) -> dict[str, np.ndarray]:
    """Returns `count` examples of a run's test data, or of its training data if it has none;
    repeats them if there are fewer."""
    from wamjax.data.arrays import open_table

    try:
        table = open_table(config.data, "test")
    except ValueError as error:
        say(f"sampling from training data: {error}")
        table = open_table(config.data, "train")
    return table.take(np.arange(count) % table.spec.count)


def _check_condition(keys: list[str], key: str) -> None:
    if key not in keys:
        raise ValueError(f"the model is not conditioned by {key!r}, but by {keys}")
