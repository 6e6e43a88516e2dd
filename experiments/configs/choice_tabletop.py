"""A Fast-WAM with two modes, for choosing among proposals: half of its demonstrations are wrong.

    python -m wamjax.train --config=experiments/configs/choice_tabletop.py --workdir=runs/choice
    python -m wamjax.branches --workdir=runs/choice --out=runs/choice-branches
    python -m wamjax.train --workdir=runs/judge \
        --config=experiments/configs/judge.py:run=runs/choice,branches=runs/choice-branches
    python -m wamjax.evaluate --workdir=runs/judge --mode=plan:8

In half of the demonstrations the expert confuses red with blue and left with right. The policy
imitates all of them, like a policy trained on demonstrations of mixed quality. From branches a
judge then learns which of the policy's proposals lead to success. See docs/adaptive.md.

With variant=ladder the same checkpoint also acts on an anticipated and on an imagined future
(`--mode=anticipate`, `--mode=imagine:2`, `--mode=imagine`), and a ladder may have such rungs:

    python -m wamjax.branches --workdir=runs/ladder --out=runs/ladder-branches --proposals=8 \
        --rungs=1,2,3,4,8 --modes=direct,anticipate,imagine:2,imagine,direct

Arguments: variant=fast|ladder, confusion=SHARE, debug.
"""

from wamjax import config as configs
from wamjax.wam.fast_wam import presets

TASKS = ("reach_red", "reach_left_zone", "pick_red")


def get_config(arg=None):
    args = configs.parse_arg(arg, variant="fast", confusion=0.5, debug=False)
    config = configs.base_config()
    presets.fast_wam(config, args.variant, "2026-08")
    presets.tabletop(config)
    config.data.frames, config.data.frame_stride = 2, 8  # now, and at the end of the chunk
    config.total_steps = 800
    config.optim.name, config.optim.learning_rate = "muon", 3e-3
    config.data.sources.demos = configs.source(
        collect={
            "tasks": TASKS, "episodes": 1500, "noise": 0.1, "intended": True,
            "confusion": args.confusion, "keep_failures": True,
        }
    )  # fmt: skip
    config.eval.episodes, config.eval.execute, config.eval.untrained = 510, 4, True
    if args.debug:
        presets.tabletop_debug(config)
    return config
