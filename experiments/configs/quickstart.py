"""A small Fast-WAM in the built-in tabletop simulator, from nothing to a video of rollouts.

    python -m wamjax.train --config=experiments/configs/quickstart.py --workdir=runs/quickstart

Two CPU cores: five to ten minutes, installation included. Collects 1,500 demonstrations of three
tasks (reach a block, reach a zone, pick a block up), trains 1.8 M parameters for 600 steps and
evaluates the policy over 510 episodes. Expected: about 94 % success (about 1 % untrained).

Arguments: variant=fast|joint|idm|no_cotrain|optional_idm|ladder, preset=2026-08|paper, debug.
"""

from wamjax import config as configs
from wamjax.wam.fast_wam import presets

TASKS = ("reach_red", "reach_left_zone", "pick_red")


def get_config(arg=None):
    args = configs.parse_arg(arg, variant="fast", preset="2026-08", debug=False)
    config = configs.base_config()
    presets.fast_wam(config, args.variant, args.preset)
    presets.tabletop(config)
    config.total_steps = 600
    config.optim.name, config.optim.learning_rate = "muon", 3e-3
    config.data.sources.demos = configs.source(
        collect={"tasks": TASKS, "episodes": 1500, "noise": 0.1, "intended": True}
    )
    config.eval.episodes, config.eval.execute, config.eval.untrained = 510, 2, True
    if args.debug:
        presets.tabletop_debug(config)
        config.eval.untrained = True  # as without debug
    return config
