"""Pictures and clips from a trained model; see `wamjax.sample` for the files."""

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
BATCH = 64  # samples of one program

Condition = dict[str, np.ndarray]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("params",), meta_fields=("objective",)
)
@dataclasses.dataclass(frozen=True)
class Sampler:
    """A model that is ready to sample: objective, and parameters in compute precision.

    A pytree, so that one compiled program samples from every checkpoint of a model.
    """

    objective: Any
    params: Any


def load(
    workdir: str | os.PathLike, step: int | None = None, ema: bool | None = None, **changes
):
    """Restores a run.

    Args:
      workdir: of the run.
      step: which checkpoint; the newest by default.
      ema: the moving average, or not; by default if the run has one.
      **changes: of the objective, such as guidance, steps, solver.

    Returns:
      (`Sampler`, the config it was trained with).
    """
    from wamjax import wam

    found = find(workdir, step)
    spec = wam.spec_of(found.statistics["spec"])
    objective = wam.build(found.config, spec)
    wam.check_kind(objective, found.config.objective.name, workdir, wanted="pictures")
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
    """Samples, `batch` at a time, by one compiled program.

    Args:
      condition: the keys of a batch that condition, (count, ...) each.
      count: n.
      given: clips (n, f, H, W, c), or latents of them, of which the first frames are given; all
        frames of it are.
      frames: f, if not that of training; for objectives that can go on, see `program`.

    Returns:
      uint8 (n, f, H, W, colours), or latents where the codec has no decoder.
    """
    rows = np.arange(-(-count // batch) * batch) % count  # the last batch is filled up
    parts = []
    for i, start in enumerate(range(0, len(rows), batch)):
        some = rows[start : start + batch]
        inputs = {k: v[some] for k, v in condition.items()}
        first = None if given is None else given[some]
        key = jax.random.fold_in(states.key(seed, "picture"), i)
        parts.append(np.asarray(program(sampler, inputs, first, key, batch, frames)))
    return np.concatenate(parts)[:count]


@functools.partial(jax.jit, static_argnames=("count", "frames"))
def program(sampler: Sampler, condition: Condition, given, key, count: int, frames: int = 0):
    """What `draw` compiles: `count` samples, from raw frames to raw frames.

    Args:
      frames: raw frames of the result; 0 is the length of training. Schemes that make chunk after
        chunk, and token after token, can go on beyond it: `wam.video.rolling`.
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
    """What samples are made from.

    Args:
      label: the class of all samples; by default they go round.
      caption: the text of all samples; by default those of the test data.
      given: raw frames (latent ones where there is no encoder) that are given; by default those
        that the scheme always gives.

    Returns:
      (condition, the given frames of clips of the test data or None).
    """
    objective = sampler.objective
    spec = objective.batch_spec(count)
    key = objective.codec.key
    wanted = [k for k in spec if k != key]
    asked: Condition = {}
    if label is not None:
        _wants(wanted, "label")
        asked["label"] = np.full(count, label, np.int32)
    if caption is not None:
        _wants(wanted, "instruction")
        words = encode(config, caption, spec["instruction"].shape[1])
        asked["instruction"] = np.tile(words, (count, 1))
    if given is None:
        given = objective.always_given
    if "label" in wanted and not given:
        classes = objective.network.classes
        asked.setdefault("label", np.arange(count, dtype=np.int32) % classes)
    rows = {}
    if given or set(wanted) - set(asked):
        rows = test_data(config, count)
    condition = {k: asked.get(k, rows.get(k)) for k in wanted}
    return condition, rows[key][:, :given] if given else None


def encode(config: ConfigDict, text: str, length: int) -> np.ndarray:
    """The ids (length,) of a caption in the vocabulary of the run's data."""
    name = config.data.arrays.partition(":")[0]
    if name != "scenes":
        raise ValueError(f"config.data.arrays={name!r} has no vocabulary to write captions in")
    from wamjax.data import scenes

    return scenes.encode(text, length)


def titles(config: ConfigDict, condition: Condition) -> list[str] | None:
    """What each sample was conditioned on, in words."""
    if "instruction" in condition and config.data.arrays.startswith("scenes"):
        from wamjax.data import scenes

        words = [[scenes.VOCABULARY[i] for i in ids if i] for ids in condition["instruction"]]
        return [" ".join(some) for some in words]
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
    """Samples from a run and writes them; see the top of this file.

    Args:
      output: folder; the run's media by default.
      frames: of each clip; 0 is the length of training, see `program`.
      **changes: see `load`.

    Returns:
      The sheet.
    """
    from wamjax.viz import sheet, video

    output = files.path(output or files.path(workdir, "--workdir") / "media", "--output")
    sampler, config = load(workdir, step, **changes)  # by all processes together
    path = output / "samples.png"
    if jax.process_index() > 0:
        return path
    condition, first = inputs(sampler, config, count, label, caption, given)
    made = draw(sampler, condition, count, seed, first, min(count, BATCH), frames)
    names = titles(config, condition)
    sheet.save(made, path, names, _columns(sampler.objective, condition, count))
    if made.shape[1] > 1 and made.dtype == np.uint8:
        clips = video.upscale(sheet.rgb(made), 2)
        whole = video.grid(sheet.captioned(list(clips), names))
        video.save_mp4(whole, path.with_suffix(".mp4"), fps=8)
    name = "video" if made.dtype == np.uint8 else "latents"
    np.savez_compressed(path.with_suffix(".npz"), **{name: made}, **condition)
    say(f"{count} samples: {path}")
    return path


def _columns(objective, condition: Condition, count: int) -> int:
    """A column for each class, if that is a handy sheet."""
    classes = objective.network.classes if "label" in condition else 0
    return classes if 4 <= classes <= min(count, 16) else 0


def test_data(config: ConfigDict, count: int) -> dict[str, np.ndarray]:
    """`count` examples of the test data of a run, over and over if it has less; of the training
    data if it has none."""
    from wamjax.data.arrays import open_table

    try:
        table = open_table(config.data, "test")
    except ValueError as error:
        say(f"sampling from training data: {error}")
        table = open_table(config.data, "train")
    return table.take(np.arange(count) % table.spec.count)


def _wants(wanted: list[str], key: str) -> None:
    if key not in wanted:
        raise ValueError(f"the model is not conditioned by {key!r}, but by {wanted}")
