"""From config to objective. Config is data; this is the code that builds."""

from __future__ import annotations

from wamjax.data.tokens import VOCAB
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.models import codec as codecs
from wamjax.models.blocks import ExpertSpec
from wamjax.models.mot import GroupSpec, MixtureOfTransformers
from wamjax.sharding import constrain
from wamjax.wam.fast_wam import FastWAM
from wamjax.wam.programs import tables


def fast_wam(config, spec) -> FastWAM:
    """Fast-WAM and its variants from ``config.model`` and ``config.objective``."""
    model, objective = config.model, config.objective
    tables(objective.variant)  # an unknown variant is an error before anything is built
    codec = codecs.build(model.codec)
    picture = spec.composite
    t, h, w, c = codec.shape(spec.frames, *picture)
    future = tuple(range(1, t))
    groups = [GroupSpec("first", "video", (0,)), GroupSpec("future", "video", future)]
    if objective.variant in ("idm", "optional_idm"):
        groups.append(GroupSpec("cond", "video", future))
    groups.append(GroupSpec("action", "action", tuple(range(spec.chunk))))
    network = MixtureOfTransformers(
        video_spec=ExpertSpec("video", model.video.width, model.video.ffn),
        action_spec=ExpertSpec("action", model.action.width, model.action.ffn),
        groups=tuple(groups),
        layers=model.layers,
        heads=model.heads,
        head_dim=model.head_dim,
        latent=(h, w, c),
        action_dim=spec.action_dim,
        context_width=model.context_width,
        instruction_length=spec.instruction_length,
        patch=model.patch,
        freq_dim=model.freq_dim,
        vocabulary=VOCAB if model.text.kind == "tokens" else 0,
        remat=model.remat,
        unroll=model.unroll,
        constrain=constrain,
    )
    optional = objective.variant == "optional_idm"
    return FastWAM(
        variant=objective.variant,
        network=network,
        codec=codec,
        frames=spec.frames,
        picture=picture,
        chunk=spec.chunk,
        action_dim=spec.action_dim,
        proprio_dim=spec.proprio_dim,
        video_flow=RectifiedFlow(objective.video_shift, objective.weighting),
        action_flow=RectifiedFlow(objective.action_shift, objective.weighting),
        lambda_video=objective.lambda_video,
        lambda_action=objective.lambda_action,
        shares=(objective.idm_prob, 1 - objective.idm_prob) if optional else (1.0,),
        cond_noise_prob=objective.cond_noise_prob,
        action_from_video=objective.action_from_video,
        steps=objective.infer_steps,
        solver=objective.solver,
    )


OBJECTIVES = {"fast_wam": fast_wam}
