"""Fast-WAM and its variants on all eight tabletop tasks, as trained in the ablation study.

    python -m wamjax.train --config=experiments/configs/fast_wam_tabletop.py:variant=idm \
        --workdir=runs/tabletop-idm
    python experiments/ablation_tabletop.py --workdir=runs/ablation

Combines few demonstrations with many action-free videos, 12 and 4 examples per batch. This is the
regime in which video co-training should matter; `labelled` and `videos` set the amounts. Muon
achieves in one step about what AdamW achieves in two, and a batch of 16 about as much as one of 64.
The default of 3,000 steps takes eight (no_cotrain) to twenty minutes (idm) on one CPU core. The
ablation study starts from a pretrained video model.

Arguments: variant=fast|joint|idm|no_cotrain|optional_idm|ladder, preset=2026-08|paper,
labelled=N (demonstrations with actions, over all tasks), videos=N (without), steps=N, debug.
"""

from wamjax import config as configs
from wamjax.wam.fast_wam import presets


def get_config(arg=None):
    args = configs.parse_arg(
        arg, variant="fast", preset="2026-08", labelled=800, videos=1600, steps=3000, debug=False
    )
    config = configs.base_config()
    presets.fast_wam(config, args.variant, args.preset)
    presets.tabletop(config)
    config.total_steps, config.data.batch_size = args.steps, 16
    config.optim.name, config.optim.learning_rate = "muon", 3e-3
    config.data.frames, config.data.frame_stride = 2, 8  # now, and at the end of the chunk
    config.data.sources.demos = configs.source(
        weight=3.0, collect={"episodes": args.labelled, "noise": 0.1, "intended": True}
    )
    if args.videos:
        config.data.sources.videos = configs.source(
            action_free=True, collect={"episodes": args.videos, "noise": 0.1, "seed": 1}
        )
    config.eval.episodes, config.eval.execute, config.eval.untrained = 800, 2, True
    if args.debug:
        presets.tabletop_debug(config)
    return config
