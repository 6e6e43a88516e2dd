"""Reconstructs held-out clips with a trained codec and measures its latents."""

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
BATCH, SHOWN = 32, 8  # clips per call, and in the picture
REPORT = "codec.json"


def use(config: ConfigDict, folder: str | os.PathLike) -> None:
    """Configures a model to work on the latents of a codec run, scaled to unit variance.

    The codec's weights come from that run at the start of training and are stored in the model's
    checkpoints too, so the run is not needed afterwards.

    Raises:
      FileNotFoundError: the folder is not a finished run of a codec.
    """
    folder = files.path(folder)
    report = folder / "media" / REPORT
    if not report.exists():
        raise FileNotFoundError(f"{folder} is no finished run of a codec: there is no {report}")
    statistics = json.loads(report.read_text())
    codec = config.model.codec
    codec.update(configs.load(folder / "config.json").model.codec)
    codec.mean, codec.std = tuple(statistics["mean"]), tuple(statistics["std"])
    config.init_from.path = f"codec={folder}"
    config.init_from.missing = ("(?!codec/).*",)
    config.optim.freeze = ("codec/.*",)


def run(
    workdir: str | os.PathLike,
    count: int = COUNT,
    step: int | None = None,
    ema: bool | None = None,
) -> dict[str, Any]:
    """Reconstructs held-out clips and returns their measurements; see the top of this file.

    Args:
      step: checkpoint to use; the newest by default.
      ema: whether to use the moving average; by default if the run has one.

    Returns:
      the contents of codec.json; {} in processes other than the first.
    """
    from wamjax.models.vae.bottleneck import health
    from wamjax.runs import sampling
    from wamjax.scores import video as scores

    codec, config = load(workdir, step, ema)  # all processes take part
    if jax.process_index() > 0:
        return {}
    truth = sampling.test_data(config, count)[codec.key]
    parts = [np.arange(start, start + BATCH) % count for start in range(0, count, BATCH)]
    outputs = [through(codec, truth[rows]) for rows in parts]
    reconstructions, latents, ids = (np.concatenate(x)[:count] for x in zip(*outputs, strict=True))
    errors = scores.squared_error(reconstructions, truth).mean(axis=1)
    axes = tuple(range(latents.ndim - 1))
    report = {
        "clips": count,
        "psnr": float(scores.psnr(errors.mean())),
        "mean": latents.mean(axis=axes, dtype=np.float64).tolist(),
        "std": latents.std(axis=axes, dtype=np.float64).tolist(),
    }
    if ids.size:
        report |= {k: float(v) for k, v in health(jnp.asarray(ids), codec.vocabulary).items()}
    media = files.path(workdir, "--workdir") / "media"
    (media / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    _draw(media / "reconstructions.png", truth, reconstructions, scores.psnr(errors))
    say(f"{count} clips reconstructed: {report['psnr']:.1f} dB")
    return report


def load(
    workdir: str | os.PathLike, step: int | None = None, ema: bool | None = None
) -> tuple[VAECodec, ConfigDict]:
    """Returns the bound codec of a run and its config; arguments as for `run`.

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
    """Returns (reconstruction, latents, token ids) of clips; a continuous codec has no ids."""
    latents = codec.encode(video)
    discrete = hasattr(codec.bottleneck, "vocabulary")
    ids = codec.tokens(video) if discrete else jnp.zeros((len(video), 0), jnp.int32)
    return codec.decode(latents), latents, ids


def _draw(
    path: files.Path, truth: np.ndarray, reconstructions: np.ndarray, psnr: np.ndarray
) -> None:
    from wamjax.viz import sheet

    rows = np.stack([truth[:SHOWN], reconstructions[:SHOWN]], axis=1).reshape(-1, *truth.shape[1:])
    titles = [text for x in psnr[:SHOWN] for text in ("held out", f"{x:.1f} dB")]
    sheet.save(rows, path, titles, columns=0 if truth.shape[1] > 1 else 2)
