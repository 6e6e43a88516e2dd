"""Held-out clips through a trained codec, and what its latents are like."""

from __future__ import annotations

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from wamjax import config as configs
from wamjax import files
from wamjax.console import say
from wamjax.models.vae.vae_codec import VAECodec
from wamjax.training.checkpoint import restore_params

COUNT = 256
BATCH, SHOWN = 32, 8  # clips of one program, and of the picture
REPORT = "codec.json"


def use(config: ConfigDict, folder: str | os.PathLike) -> None:
    """Makes a model of pictures work on the latents of a codec run, scaled to unit variance.

    The codec's weights come from the run at the start of training and are kept, in the checkpoints
    of the model too, so the run is not needed afterwards.

    Raises:
      FileNotFoundError: the folder is no finished run of a codec.
    """
    folder = files.path(folder)
    report = folder / "media" / REPORT
    if not report.exists():
        raise FileNotFoundError(f"{folder} is no finished run of a codec: there is no {report}")
    measured = json.loads(report.read_text())
    codec = config.model.codec
    codec.update(configs.load(folder / "config.json").model.codec)
    codec.mean, codec.std = tuple(measured["mean"]), tuple(measured["std"])
    config.init_from.path = f"codec={folder}"
    config.init_from.missing = ("(?!codec/).*",)
    config.optim.freeze = ("codec/.*",)


def run(
    workdir: str | os.PathLike,
    count: int = COUNT,
    step: int | None = None,
    ema: bool | None = None,
) -> dict[str, Any]:
    """Reconstructs and measures; see the top of this file.

    Args:
      step: which checkpoint; the newest by default.
      ema: the moving average, or not; by default if the run has one.

    Returns:
      What codec.json holds; in a process that is not the first {}.
    """
    from wamjax.models.vae.bottleneck import health
    from wamjax.runs import sampling
    from wamjax.scores import video as scores

    codec, config = load(workdir, step, ema)  # by all processes together
    if jax.process_index() > 0:
        return {}
    truth = sampling.test_data(config, count)[codec.key]
    parts = [np.arange(start, start + BATCH) % count for start in range(0, count, BATCH)]
    outputs = [through(codec, truth[rows]) for rows in parts]
    made, latents, ids = (np.concatenate(x)[:count] for x in zip(*outputs, strict=True))
    errors = scores.squared_error(made, truth).mean(axis=1)
    over = tuple(range(latents.ndim - 1))
    report = {
        "clips": count,
        "psnr": float(scores.psnr(errors.mean())),
        "mean": latents.mean(axis=over, dtype=np.float64).tolist(),
        "std": latents.std(axis=over, dtype=np.float64).tolist(),
    }
    if ids.size:
        report |= {k: float(v) for k, v in health(jnp.asarray(ids), codec.vocabulary).items()}
    media = files.path(workdir, "--workdir") / "media"
    (media / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    _draw(media / "reconstructions.png", truth, made, scores.psnr(errors))
    say(f"{count} clips reconstructed: {report['psnr']:.1f} dB")
    return report


def load(
    workdir: str | os.PathLike, step: int | None = None, ema: bool | None = None
) -> tuple[VAECodec, ConfigDict]:
    """The bound codec of a run, and its config; arguments as of `run`.

    Raises:
      ValueError: the run trained something else.
    """
    from wamjax import wam

    params, config, statistics, _ = restore_params(workdir, step, ema)
    if config.objective.name != "codec":
        raise ValueError(f"{workdir} trained {config.objective.name!r}, and no codec")
    objective = wam.build(config, wam.spec_of(statistics["spec"]))
    return objective.codec.bind(params), config


@jax.jit
def through(codec: VAECodec, video) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(reconstruction, latents, token ids; of a continuous codec none) of clips."""
    latents = codec.encode(video)
    discrete = hasattr(codec.bottleneck, "vocabulary")
    ids = codec.tokens(video) if discrete else jnp.zeros((len(video), 0), jnp.int32)
    return codec.decode(latents), latents, ids


def _draw(path: files.Path, truth: np.ndarray, made: np.ndarray, psnr: np.ndarray) -> None:
    from wamjax.viz import sheet

    rows = np.stack([truth[:SHOWN], made[:SHOWN]], axis=1).reshape(-1, *truth.shape[1:])
    titles = [text for x in psnr[:SHOWN] for text in ("held out", f"{x:.1f} dB")]
    sheet.save(rows, path, titles, columns=0 if truth.shape[1] > 1 else 2)
