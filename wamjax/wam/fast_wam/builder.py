"""Builds Fast-WAM from a config."""

from __future__ import annotations

from typing import Any

from wamjax.config import did_you_mean
from wamjax.diffusion.flow import RectifiedFlow
from wamjax.diffusion.solvers import SOLVERS
from wamjax.models import attention
from wamjax.models.blocks import ExpertSpec
from wamjax.models.mot import MixtureOfTransformers
from wamjax.training.sharding import constrain
from wamjax.wam.codecs import codec_of
from wamjax.wam.fast_wam import keys, presets
from wamjax.wam.fast_wam.judge import VALUE, JudgedFastWAM
from wamjax.wam.fast_wam.objective import FastWAM
from wamjax.wam.fast_wam.uses import MODES, slots, uses_of
from wamjax.wam.protocols import Method
from wamjax.wam.slots import Slot, groups_of


def build(config, spec) -> FastWAM:
    """Builds Fast-WAM and its variants from ``config.model`` and ``config.objective``."""
    return FastWAM(**_fields(config, spec))


def build_judged(config, spec) -> JudgedFastWAM:
    """Builds a variant that acts directly, with a judge, also from ``config.objective.judge``."""
    judge, variant = config.objective.judge, config.objective.variant
    rungs, modes = tuple(judge.rungs), tuple(judge.modes)
    direct = [v for v, ways in MODES.items() if ways[0] == "direct"]
    for key, value, valid, requirement in (
        ("variant", variant, variant in direct,
         f"one of {direct}: the others do not act on a cache of the first frame alone"),
        ("prefix_max", config.objective.prefix_max, not config.objective.prefix_max,
         "0: a judge takes no prefix"),
        ("judge.rungs", rungs, rungs and rungs[0] > 0 and list(rungs) == sorted(set(rungs)),
         "increasing numbers of proposals, each at least 1"),
        ("judge.modes", modes, len(modes) in (0, len(rungs)) and modes[:1] in ((), ("direct",)),
         f"the mode of each of the rungs {rungs}, the first of them 'direct', or ()"),
        ("judge.branches", judge.branches, rungs and judge.branches >= max(rungs[-1], 2),
         f"at least 2, and the proposals of the last rung, {rungs}"),
        ("judge.discount", judge.discount, 0 < judge.discount <= 1, "in (0, 1]"),
    ):  # fmt: skip
        if not valid:
            raise ValueError(f"config.objective.{key} = {value!r} must be {requirement}")
    fields = _fields(config, spec, (VALUE,))
    value_spec = ExpertSpec("value", judge.width, judge.ffn)
    network = fields["network"].clone(value_spec=value_spec)
    policy = JudgedFastWAM(
        **fields | {"network": network, "shares": (1.0,)},
        branches=judge.branches,
        rungs=rungs,
        rung_modes=modes,
        discount=judge.discount,
        ranking=judge.ranking,
    )
    steps = [count for way, count in map(policy.way, modes) if way == "imagine"]
    if steps != sorted(steps):
        raise ValueError(f"config.objective.judge.modes = {modes}: the steps of 'imagine' must not "
                         "decrease, because each rung continues from the future that the rung "
                         "below it imagined")  # fmt: skip
    return policy


def _fields(config, spec, extra: tuple[Slot, ...] = ()) -> dict[str, Any]:
    """Returns the fields of a `FastWAM`, with the slots `more` after its own."""
    model, objective = config.model, config.objective
    uses_of(objective.variant)  # raises for an unknown variant before anything is built
    for key, value, valid, requirement in (
        ("objective.solver", objective.solver, objective.solver in SOLVERS,
         f"one of {sorted(SOLVERS)}{did_you_mean(objective.solver, SOLVERS)}"),
        ("data.frames", spec.frames, spec.frames > 1, "at least 2, to have a future to predict"),
        ("model.head_dim", model.head_dim, model.head_dim % 2 == 0, "even, for rotary positions"),
        ("objective.prefix_max", objective.prefix_max, 0 <= objective.prefix_max < spec.chunk,
         f"0, or less than data.chunk = {spec.chunk}: training needs actions after the prefix"),
    ):  # fmt: skip
        if not valid:
            raise ValueError(f"config.{key} = {value!r} must be {requirement}")
    codec = codec_of(config)
    picture = spec.composite
    t, h, w, c = codec.shape(spec.frames, *picture)
    network = MixtureOfTransformers(
        video_spec=ExpertSpec("video", model.video.width, model.video.ffn),
        action_spec=ExpertSpec("action", model.action.width, model.action.ffn),
        groups=groups_of((*slots(objective.variant, t, spec.chunk), *extra)),
        layers=model.layers,
        heads=model.heads,
        head_dim=model.head_dim,
        latent=(h, w, c),
        action_dim=spec.action_dim,
        context_width=model.context_width,
        instruction_length=spec.instruction_length,
        patch=model.patch,
        freq_dim=model.freq_dim,
        vocabulary=spec.vocabulary.size if model.text.kind == "tokens" else 0,
        remat=model.remat,
        unroll=model.unroll,
        attention=attention.named(model.attention),
        residual=model.residual,
        pad_slots=model.pad_slots,
        constrain=constrain,
    )
    multi_use: dict[str, Any] = {}  # fields of variants with several uses
    if objective.variant == "optional_idm":
        multi_use["shares"] = objective.idm_prob, 1 - objective.idm_prob
    elif objective.variant == "ladder":
        idm_share, anticipation_share = objective.idm_prob, objective.anticipate_prob
        multi_use["shares"] = idm_share, anticipation_share, 1 - idm_share - anticipation_share
        multi_use["anticipation_weight"] = objective.anticipation_weight
    return dict(
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
        video_weight=objective.video_weight,
        action_weight=objective.action_weight,
        cond_noise_prob=objective.cond_noise_prob,
        action_from_video=objective.action_from_video,
        prefix_max=objective.prefix_max,
        prefix_noise=objective.prefix_noise if objective.prefix_max else 0.0,
        steps=objective.infer_steps,
        solver=objective.solver,
        **multi_use,
    )


METHOD = Method(build, keys.read, presets.check)
JUDGED = Method(build_judged, keys.read_judged, presets.check)
