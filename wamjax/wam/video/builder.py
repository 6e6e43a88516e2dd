"""Builds models of pictures from a config: denoising, Wan, autoregressive, and custom codecs."""

from __future__ import annotations

import dataclasses
import inspect

from wamjax.config import did_you_mean, parse_arg
from wamjax.diffusion.ddpm import DDPM
from wamjax.diffusion.edm import EDM
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.diffusion.noise import NoiseLaw
from wamjax.diffusion.process import Process
from wamjax.diffusion.solvers import SOLVERS
from wamjax.models import attention, blocks, dit
from wamjax.models import codec as codecs
from wamjax.models.autoregressive import AutoregressiveTransformer
from wamjax.models.blocks import ExpertSpec
from wamjax.models.vae.training import CodecObjective
from wamjax.models.vae.vae_codec import VAECodec
from wamjax.training.sharding import constrain
from wamjax.wam.protocols import Method
from wamjax.wam.slots import groups_of
from wamjax.wam.video import keys
from wamjax.wam.video.autoregressive import Autoregressive
from wamjax.wam.video.inputs import inputs_of, pictures_of, tokenizer
from wamjax.wam.video.objective import Denoising
from wamjax.wam.video.schemes import SCHEMES, slots_of


def denoising(config, spec) -> Denoising:
    """Builds image and video diffusion from ``config.model``, ``config.objective`` and
    `ArraySpec`."""
    model, objective = config.model, config.objective
    for key, value, choices in (
        ("objective.scheme", objective.scheme, SCHEMES),
        ("objective.solver", objective.solver, (*SOLVERS, "ancestral")),
    ):
        if value not in choices:
            raise ValueError(
                f"config.{key} {value!r} does not exist{did_you_mean(value, choices)}; there are "
                f"{sorted(choices)}"
            )
    process = process_of(config)
    inputs = inputs_of(config, spec)
    scheme, route = SCHEMES[objective.scheme], model.text.route
    frames, *latent = inputs.latents
    text_spec = None
    if route == "joint":
        text_spec = ExpertSpec("text", model.video.width, model.video.ffn, **blocks.MMDIT)
    network = dit.DiT(
        video_spec=dit.expert(model.video.width, model.video.ffn, model.conditioning, route),
        groups=groups_of(slots_of(scheme, frames)),
        latent=tuple(latent),
        layers=model.layers,
        heads=model.heads,
        head_dim=model.head_dim,
        patch=model.patch,
        outputs=process.outputs * latent[-1],
        conditioning=model.conditioning,
        classes=inputs.classes,
        text=route,
        text_spec=text_spec,
        context_width=model.context_width if route != "none" else 0,
        pooled_width=inputs.pooled,
        vocabulary=inputs.vocabulary,
        instruction_length=inputs.length,
        text_layers=model.text.layers,
        positions=model.positions,
        position_table=tuple(model.position_table),
        freq_dim=model.freq_dim,
        time_scale=1.0 if isinstance(process, DDPM) else 1000.0,
        remat=model.remat,
        unroll=model.unroll,
        attention=attention.named(model.attention),
        residual=model.residual,
        pad_slots=model.pad_slots,
        constrain=constrain,
    )
    interval = {}
    if objective.guidance_interval:
        interval["guidance_interval"] = tuple(objective.guidance_interval)
    return Denoising(
        network=network,
        codec=inputs.codec,
        process=process,
        scheme=scheme,
        frames=inputs.video[0],
        picture=inputs.video[1:],
        drop=objective.drop,
        instruction_length=inputs.length,
        steps=objective.infer_steps,
        solver=objective.solver,
        guidance=objective.guidance,
        guidance_channels=objective.guidance_channels,
        **interval,
    )


def wan(config, spec) -> Denoising:
    """Builds `denoising` with the blocks of Wan 2.1 and 2.2, which read text by cross-attention."""
    if config.model.text.route != "cross":
        raise ValueError(
            f"objective.name='wan' needs model.text.route='cross', not {config.model.text.route!r}"
        )
    objective = denoising(config, spec)
    video = ExpertSpec("video", config.model.video.width, config.model.video.ffn, **blocks.WAN)
    return dataclasses.replace(
        objective, network=objective.network.clone(video_spec=video, text_net="mlp")
    )


def autoregressive(config, spec) -> Autoregressive:
    """Builds autoregressive video over the tokens of a discrete codec."""
    model, objective = config.model, config.objective
    codec, video, route = tokenizer(config), spec.shapes["video"], model.text.route
    if route not in ("none", "prefix"):
        raise ValueError("objective.name='autoregressive' needs model.text.route to be 'prefix' or "
                         f"'none', not {route!r}")  # fmt: skip
    network = AutoregressiveTransformer(
        spec=ExpertSpec("video", model.video.width, model.video.ffn, **blocks.GPT),
        codes=codec.vocabulary,
        grid=codec.shape(*video[:3])[:3],
        layers=model.layers,
        heads=model.heads,
        head_dim=model.head_dim,
        positions=model.positions,
        classes=spec.sizes["label"] if model.label else 0,
        vocabulary=spec.sizes["instruction"] if route == "prefix" else 0,
        instruction_length=spec.shapes["instruction"][0] if route == "prefix" else 0,
        remat=model.remat,
        unroll=model.unroll,
        attention=attention.named(model.attention),
        residual=model.residual,
        constrain=constrain,
    )
    draw = objective.temperature, objective.top_k, objective.top_p
    return Autoregressive(network, codec, video[0], tuple(video[1:]), *draw)


def codec(config, spec) -> CodecObjective:
    """Builds the training of the codec that ``config.model.codec`` names, on pictures alone.

    Raises:
      ValueError: the codec has nothing to train, or the data has no pictures for it.
    """
    vae = codecs.build(config.model.codec)
    if not isinstance(vae, VAECodec):
        raise ValueError(
            f"objective.name='codec' needs config.model.codec.kind to be one of "
            f"{sorted(codecs.TRAINED)}, not {config.model.codec.kind!r}"
        )
    frames, height, width = pictures_of(spec, vae, config)[:3]
    return CodecObjective(vae, frames, (height, width))


def process_of(config) -> Process:
    """Returns the process that ``objective.process`` names, with the options after its name.

    Raises:
      ValueError: an unknown process or option; makes a suggestion.
    """
    text = config.objective.process
    name, _, options = text.partition(":")
    if name not in PROCESSES:
        raise ValueError(
            f"config.objective.process {text!r}: there is no {name!r}"
            f"{did_you_mean(name, PROCESSES)}; there are {sorted(PROCESSES)}"
        )
    parameters = inspect.signature(PROCESSES[name]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
    try:
        values = parse_arg(options, **defaults)
    except ValueError as error:
        raise ValueError(f"config.objective.process {text!r}: {error}") from error
    return PROCESSES[name](config.objective, **values)


def flow(objective, *, law: str = "uniform", predicts: str = "velocity") -> RectifiedFlow:
    """Returns a rectified flow; `law` of training levels is uniform or logit_normal (SD3).

    A network that is narrower than a token can predict x0, which has structure, but not velocity.
    """
    if law not in (laws := {"uniform": None, "logit_normal": NoiseLaw(0.0, 1.0)}):
        raise ValueError(f"config.objective.process: law {law!r} is not one of {sorted(laws)}")
    shift, weighting = objective.video_shift, objective.weighting
    return RectifiedFlow(shift, weighting, laws[law], predicts=predicts)


def ddpm(
    objective, *, noising: str = "linear", variance: str = "small", predicts: str = "eps"
) -> DDPM:
    """Returns a DDPM; see `DDPM` for the options."""
    return DDPM(noising, variance=variance, predicts=predicts, weighting=objective.weighting)


def edm(objective, *, sigma_data: float = 0.5) -> EDM:
    """Returns EDM; `sigma_data` is the standard deviation of the data."""
    return EDM(sigma_data, weighting=objective.weighting)


PROCESSES = {"flow": flow, "ddpm": ddpm, "edm": edm}

DENOISING = Method(denoising, keys.denoising)
WAN = Method(wan, keys.denoising)
AUTOREGRESSIVE = Method(autoregressive, keys.autoregressive)
CODEC = Method(codec, keys.codec)
