"""How good generated video is: per-frame errors, and a Frechet distance of clip features.

Errors of the future frames say how well a model predicts; they punish a sharp but different future
more than a blurred one, so the Frechet distance stands beside them, and beside both what copying
the last given frame scores.

The clip network is trained in the same run on clips of the data, to tell two things: which class
a clip has (the task), and what was done to the order of its frames: nothing, reversed, shuffled,
or frozen from some frame on. The second makes its features see motion.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, UInt8

from wamjax.scores import classifier, frechet
from wamjax.scores.classifier import Classifier, Outputs, Params
from wamjax.viz.intervals import Interval

ORDERS = ("as it is", "reversed", "shuffled", "frozen")


class Curve(NamedTuple):
    """Errors of each predicted frame, beside those of copying the last given frame."""

    mse: Float[np.ndarray, " f"]  # mean over clips and pixels; white is 1
    psnr: Float[np.ndarray, " f"]  # dB, of that mean: one perfect clip does not make it infinite
    copy_mse: Float[np.ndarray, " f"]
    copy_psnr: Float[np.ndarray, " f"]


def squared_error(
    video: UInt8[np.ndarray, "b f h w 3"], truth: UInt8[np.ndarray, "b f h w 3"]
) -> Float[np.ndarray, "b f"]:
    """Mean squared error of each frame of each clip; white is 1.

    Raises:
      ValueError: the shapes differ, or the videos are not uint8.
    """
    if video.shape != truth.shape or video.ndim != 5:
        raise ValueError(
            f"video {video.shape} against {truth.shape}, expected equal (b, f, h, w, 3)"
        )
    if not video.dtype == truth.dtype == np.uint8:
        raise ValueError(
            f"videos are uint8, not {video.dtype} and {truth.dtype}: decode them first"
        )
    out = np.empty(video.shape[:2])
    for i, (a, b) in enumerate(zip(video, truth, strict=True)):  # clip by clip: little memory
        out[i] = np.mean(np.square((a.astype(np.float32) - b) / 255.0), axis=(1, 2, 3))
    return out


def psnr(mse: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Peak signal-to-noise ratio in dB of a mean squared error where white is 1; inf for 0."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(mse)


def error_curve(
    video: UInt8[np.ndarray, "b f h w 3"], truth: UInt8[np.ndarray, "b f h w 3"], given: int
) -> Curve:
    """Errors of the frames after the first `given` ones, which the model was shown.

    Raises:
      ValueError: `given` leaves no frame before or after; shapes as in `squared_error`.
    """
    if not 0 < given < truth.shape[1]:
        raise ValueError(f"given must be in 1..{truth.shape[1] - 1}, not {given}")
    mse = squared_error(video[:, given:], truth[:, given:]).mean(0)
    copied = squared_error(copy_last(truth, given)[:, given:], truth[:, given:]).mean(0)
    return Curve(mse, psnr(mse), copied, psnr(copied))


def copy_last(video: UInt8[np.ndarray, "b f h w 3"], given: int) -> UInt8[np.ndarray, "b f h w 3"]:
    """The baseline: the first `given` frames, then the last of them over and over."""
    return video[:, np.minimum(np.arange(video.shape[1]), given - 1)]


def clip_network(classes: int, size: int) -> Classifier:
    """A network for `fit_clips`: for pictures of `size` x `size`, a multiple of 16.

    Raises:
      ValueError: it is not.
    """
    if size < 16 or size % 16:
        raise ValueError(f"clips of {size}x{size} pixels: the size must be a multiple of 16")
    return Classifier(heads=(classes, len(ORDERS)), patch=size // 16, widths=(32, 64, 128))


def fit_clips(
    network: Classifier,
    video: UInt8[np.ndarray, "n f h w 3"],
    classes: Int[np.ndarray, " n"],
    steps: int,
    rng: Array,
    batch_size: int = 64,
) -> Params:
    """Trains a clip network; it then takes clips of f frames."""
    return classifier.train(
        network, _reordered, (np.asarray(video), np.asarray(classes)), steps, rng, batch_size
    )


def _reordered(data, rng: Array, size: int) -> tuple[Array, Array]:
    """A batch of stacked clips whose frames have been reordered, and (class, order) of each."""
    video, classes = data
    f = video.shape[1]
    keys = jax.random.split(rng, 4)
    rows = jax.random.randint(keys[0], (size,), 0, len(video))
    order = jax.random.randint(keys[1], (size,), 0, len(ORDERS))
    shuffled = jnp.argsort(jax.random.uniform(keys[2], (size, f)), axis=1)
    last = jax.random.randint(keys[3], (size, 1), 0, max(f - 1, 1))
    ahead = jnp.broadcast_to(jnp.arange(f), (size, f))
    choices = jnp.stack([ahead, ahead[:, ::-1], shuffled, jnp.minimum(ahead, last)])
    at = choices[order, jnp.arange(size)]
    return stack_frames(video[rows[:, None], at]), jnp.stack([classes[rows], order], axis=1)


def stack_frames(video: UInt8[Array, "n f h w c"]) -> UInt8[Array, "n h w f*c"]:
    """Clips as pictures of f c channels: the form in which the network sees them."""
    return rearrange(video, "n f h w c -> n h w (f c)")


def clip_outputs(
    network: Classifier, params: Params, video: UInt8[np.ndarray, "n f h w 3"]
) -> Outputs:
    """Logits (classes, orders) and features of clips.

    Raises:
      ValueError: the network was trained on clips of another number of frames.
    """
    frames = params["patch_embed"]["kernel"].shape[0] // (3 * network.patch**2)
    if video.ndim != 5 or video.shape[1] != frames:
        raise ValueError(
            f"video has shape {video.shape}, the network takes clips of {frames} frames: cut "
            "windows of that length"
        )
    return classifier.outputs(network, params, stack_frames(np.asarray(video)))


def frechet_video(
    network: Classifier,
    params: Params,
    video: UInt8[np.ndarray, "n f h w 3"],
    truth: UInt8[np.ndarray, "m f h w 3"],
) -> Interval:
    """Frechet distance of clip features, with its interval.

    Compare only distances between sets of these sizes, made with these parameters. The floor is
    what two sets of true clips score.
    """
    a, b = (clip_outputs(network, params, x).features for x in (video, truth))
    return frechet.interval(a, b)
