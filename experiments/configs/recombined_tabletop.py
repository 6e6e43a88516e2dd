"""Fast-WAM and its variants with videos of eight tabletop tasks and actions of only five.

    python -m wamjax.train --config=experiments/configs/recombined_tabletop.py:variant=idm \
        --workdir=runs/recombined-idm
    python experiments/video_only_tabletop.py --workdir=runs/video-only

The instructions of the other three tasks recombine words of the five: "pick up the blue block" has
no actions, "pick up the red block" and "put the blue block on the right zone" have. Evaluates on
the three. Videos are action-free demonstrations of the same expert.

Arguments: variant=fast|joint|idm|no_cotrain|optional_idm|ladder, preset=2026-08|paper,
labelled=N (demonstrations with actions, over five tasks), videos=N (without, over all eight; 0:
none), known (videos of the five tasks only), steps=N, small (half the layers, for one core), debug.
"""

from wamjax import config as configs
from wamjax.envs.tabletop.tasks import LABELLED, VIDEO_ONLY
from wamjax.wam.fast_wam import presets


def get_config(arg=None):
    args = configs.parse_arg(
        arg, variant="fast", preset="2026-08", labelled=1000, videos=1600, known=False,
        steps=3000, small=False, debug=False,
    )  # fmt: skip
    config = configs.base_config()
    presets.fast_wam(config, args.variant, args.preset)
    presets.tabletop(config)
    config.total_steps, config.data.batch_size = args.steps, 16
    config.optim.name, config.optim.learning_rate = "muon", 3e-3
    config.data.frames, config.data.frame_stride = 2, 8  # now, and at the end of the chunk
    common = {"env": "recombined", "noise": 0.1}
    config.data.sources.demos = configs.source(
        collect=common | {"tasks": LABELLED, "episodes": args.labelled, "intended": True}
    )
    if args.videos:
        tasks = LABELLED if args.known else (*LABELLED, *VIDEO_ONLY)
        config.data.sources.videos = configs.source(
            action_free=True,
            collect=common | {"tasks": tasks, "episodes": args.videos, "seed": 1},
        )
    if args.small:
        config.model.layers = config.model.unroll = 2
        config.objective.infer_steps = 5
    config.eval.env, config.eval.tasks = "recombined", VIDEO_ONLY
    config.eval.episodes, config.eval.execute, config.eval.untrained = 600, 4, True
    if args.debug:
        presets.tabletop_debug(config)
    return config
