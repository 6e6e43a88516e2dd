"""A small Fast-WAM on PushT, from a planning expert.

    pip install -e ".[pusht]"
    python -m wamjax.train --config=experiments/configs/pusht.py --workdir=runs/pusht

Collects demonstrations (half a second each), trains, and evaluates over 100 episodes and a blind
replay. Not trained yet.

Arguments: variant=fast|joint|idm|no_cotrain|optional_idm|ladder, preset=2026-08|paper,
demos=N, debug.
"""

from wamjax import config as configs
from wamjax.wam.fast_wam import presets


def get_config(arg=None):
    args = configs.parse_arg(arg, variant="fast", preset="2026-08", demos=200, debug=False)
    config = configs.base_config()
    presets.fast_wam(config, args.variant, args.preset)
    presets.tabletop(config)
    presets.simulator(config, "pusht", ("push",), args.demos, noise=4.0)
    data = config.data
    data.cameras, data.chunk, data.frame_stride = ("top",), 16, 8
    data.padding = "hold:.*"  # an action is a target position, which stays when the finger rests
    config.eval.execute, config.eval.max_steps = 8, 300
    if args.debug:
        presets.simulator_debug(config)
    return config
