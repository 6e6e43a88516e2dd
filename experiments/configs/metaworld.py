"""A small Fast-WAM on five tasks of Meta-World, from the simulator's own experts.

    pip install -e ".[metaworld]"
    python -m wamjax.train --config=experiments/configs/metaworld.py --workdir=runs/metaworld

Two CPU cores: an hour at most. Collects 500 demonstrations of five tasks, trains 1.8 M parameters
for 4,000 steps, and evaluates over 100 episodes and a blind replay. Expected: 68 % success, 30 %
blind; buttons, drawers and windows nearly always, push less than half the time, reach (a target of
two pixels) one time in five.

Arguments: variant=fast|joint|idm|no_cotrain|optional_idm|ladder, preset=2026-08|paper,
demos=N, debug.
"""

from wamjax import config as configs
from wamjax.wam.fast_wam import presets

ENV = "metaworld"
TASKS = ("button-press-topdown", "drawer-open", "window-open", "reach", "push")


def get_config(arg=None):
    args = configs.parse_arg(arg, variant="fast", preset="2026-08", demos=500, debug=False)
    config = configs.base_config()
    presets.fast_wam(config, args.variant, args.preset)
    presets.tabletop(config)
    presets.simulator(config, ENV, TASKS, args.demos, noise=0.1)
    config.data.cameras, config.data.chunk = ("corner2", "gripperPOV"), 8
    config.data.frames, config.data.frame_stride = 2, 8  # now, and at the end of the chunk
    config.total_steps = 4000
    config.eval.execute, config.eval.max_steps = 8, 150
    if args.debug:
        presets.simulator_debug(config)
    return config
