"""Applies published settings of Fast-WAM to a config.

Two versions differ in one number: the paper's code of April 2026 shifts the action schedule by 5,
the public repository of August 2026 by 1 (in training and sampling). A checkpoint must be sampled
with the shift with which it was trained.
"""

from __future__ import annotations

from wamjax import files
from wamjax.config import did_you_mean
from wamjax.wam.fast_wam.uses import USES

ACTION_SHIFT = {"paper": 5.0, "2026-08": 1.0}


def fast_wam(config, variant: str, preset: str) -> None:
    """Sets ``config.objective`` to a variant under a preset.

    Raises:
      ValueError: the variant or preset is unknown; makes a suggestion.
    """
    for name, value, choices in (("variant", variant, USES), ("preset", preset, ACTION_SHIFT)):
        if value not in choices:
            raise ValueError(
                f"{name} {value!r} does not exist{did_you_mean(value, choices)}; "
                f"there are {sorted(choices)}"
            )
    objective = config.objective
    objective.name = "fast_wam"
    objective.variant, objective.preset = variant, preset
    objective.action_shift, objective.video_shift = ACTION_SHIFT[preset], 5.0
    # Fast-WAM-IDM noises half of its conditioning videos; the public Optional-IDM noises none.
    objective.cond_noise_prob = 0.0 if variant == "optional_idm" else 0.5
    objective.idm_prob = 0.25 if variant == "ladder" else 0.5


def check(config) -> None:
    """Checks that ``config.objective`` follows the preset that it names.

    Raises:
      ValueError: no such preset, or the shift of the actions' noise differs from the preset's.
    """
    objective = config.objective
    name, choices = objective.preset, (*ACTION_SHIFT, "none")
    if name not in choices:
        raise ValueError(f"config.objective.preset = {name!r} must be one of {choices}"
                         f"{did_you_mean(name, choices)}")  # fmt: skip
    shift = ACTION_SHIFT.get(name, objective.action_shift)
    if objective.action_shift != shift:
        raise ValueError(
            f"config.objective.action_shift = {objective.action_shift}, and preset {name!r} has "
            f"{shift}: choose a preset by --config=FILE:preset={name}, or follow none by "
            "--config.objective.preset=none"
        )


def wan22_5b(config) -> None:
    """Sets ``config.model`` to the published sizes: Wan2.2-TI2V-5B and the 1 B action expert."""
    model = config.model
    model.layers, model.heads, model.head_dim = 30, 24, 128
    model.video.width, model.video.ffn = 3072, 14336
    model.action.width, model.action.ffn = 1024, 4096
    model.patch, model.context_width, model.freq_dim = 2, 4096, 256
    model.codec.kind = "cached"
    model.codec.channels, model.codec.spatial, model.codec.temporal = 48, 16, 4
    model.text.kind = "context"
    model.remat = "auto"
    model.residual = "compute"  # the public code uses bfloat16 throughout, unlike Wan itself


def wan22_training(config) -> None:
    """Sets optimiser and schedule of the released checkpoints (spec, section 5.2), with effective
    gradient clipping."""
    optim = config.optim
    optim.learning_rate, optim.b1, optim.b2, optim.weight_decay = 1e-4, 0.9, 0.95, 0.01
    optim.warmup_fraction, optim.final_fraction, optim.clip_norm = 0.05, 0.01, 1.0
    config.precision.compute = "bfloat16"
    config.objective.action_from_video = True


def wan22_windows(config) -> None:
    """Sets windows of both published data sets: 33 frames, of which every fourth is used, and 32
    actions."""
    data = config.data
    data.frames, data.frame_stride, data.chunk, data.instruction_length = 9, 4, 32, 128
    config.mesh.fsdp, config.mesh.data = 16, -1


def miniature(config) -> None:
    """Shrinks the published model for a laptop, with the same structure."""
    model = config.model
    model.layers, model.heads, model.head_dim, model.remat = 2, 3, 16, "none"
    model.video.width, model.video.ffn = 48, 96
    model.action.width, model.action.ffn = 16, 32
    model.context_width, model.freq_dim = 32, 32
    config.precision.compute = "float32"
    config.data.batch_size, config.mesh.fsdp, config.total_steps = 8, 1, 20
    config.data.declared.camera_size = (32, 32)


def tabletop(config) -> None:
    """Sets a small model and its training on the embedded world, sized for two CPU cores."""
    data, model, optim = config.data, config.model, config.optim
    data.cameras, data.frames, data.frame_stride, data.chunk = ("overhead", "gripper"), 3, 4, 8
    data.batch_size, data.instruction_length = 64, 12
    model.layers, model.heads, model.head_dim, model.unroll = 4, 4, 32, 4
    model.video.width, model.video.ffn = 128, 512
    if config.objective.name == "fast_wam":
        model.action.width, model.action.ffn, model.freq_dim = 64, 256, 128
    model.codec.kind, model.codec.patch, model.codec.channels, model.patch = "cosine", 8, 24, 2
    model.context_width, model.text.kind = 64, "tokens"
    optim.learning_rate, optim.b2, optim.weight_decay = 1e-3, 0.95, 0.01
    optim.warmup_fraction, optim.final_fraction, optim.ema_decay = 0.05, 0.02, 0.99
    config.log_every, config.checkpoint.every = 25, 250
    config.objective.infer_steps = 8
    config.eval.execute, config.eval.max_steps, config.eval.batch_size = 4, 40, 128


def judge(config, run: str, branches: str) -> None:
    """Turns the config of a run of the `fast` variant into that of a judge for it.

    Args:
      run: folder of the run; only judge and gate are trained.
      branches: output of `wamjax.branches` for that run.
    """
    config.objective.name = "fast_wam_judge"
    config.data.kind, config.data.batch_size = "branches", 64
    config.data.branches = str(files.absolute(branches)) if branches else ""
    config.init_from.path = str(files.absolute(run)) if run else ""
    paths = ("value/", "gate/", "blocks/value/")
    if run:
        config.init_from.missing = tuple(rf"{path}.*" for path in paths)
    config.optim.freeze = (rf"(?!{'|'.join(paths)}).*",)
    config.optim.name, config.optim.learning_rate, config.optim.weight_decay = "adamw", 1e-3, 0.05


def simulator(config, env: str, tasks: tuple[str, ...], demos: int, noise: float) -> None:
    """Sets data and evaluation to a world of host environments; the model stays small.

    Args:
      env: see `wamjax.envs.world.open_world`.
      demos: episodes of the world's expert, over all tasks.
      noise: noise on its actions, in their units; steps are labelled with the intended actions.
    """
    from wamjax.config import source

    collect = {"env": env, "tasks": tasks, "episodes": demos, "noise": noise, "intended": True}
    config.data.sources.demos = source(collect=collect)
    config.data.batch_size, config.total_steps = 32, 3000
    config.optim.name, config.optim.learning_rate = "muon", 3e-3
    config.eval.env, config.eval.tasks = env, tasks
    config.eval.episodes, config.eval.batch_size = 100, 50


def simulator_debug(config) -> None:
    """Sets a config like `tabletop_debug`, with as little simulation as a laptop does in a
    minute."""
    tabletop_debug(config)
    config.data.sources.demos.collect.episodes = 2
    config.eval.update({"episodes": 2, "max_steps": 20, "batch_size": 2, "blind": False})


def tabletop_debug(config) -> None:
    """Sets everything to run in under a minute, as a smoke test; the model learns nothing."""
    config.total_steps, config.log_every, config.checkpoint.every = 6, 2, 3
    config.data.batch_size = 8
    for source in config.data.sources.values():
        source.collect.episodes = min(source.collect.episodes, 16)  # 0 if nothing is collected
    model = config.model
    model.layers, model.heads, model.head_dim, model.unroll = 2, 2, 16, 1
    model.video.width, model.video.ffn = 32, 64
    if config.objective.name == "fast_wam":
        model.action.width, model.action.ffn = 16, 32
    config.objective.infer_steps = 2
    config.eval.episodes, config.eval.batch_size = 8, 8
    config.eval.untrained = False  # another initialization to compile
