"""A small Fast-WAM on two ALOHA arms that hand over a cube, from an inverse-kinematics expert.

    pip install -e ".[aloha]"
    python -m wamjax.train --config=experiments/configs/aloha.py --workdir=runs/aloha

Two CPU cores, beside other work: 40 minutes. Collects 300 demonstrations in ten of them, trains
1.8 M parameters for 2,000 steps, and evaluates over 100 episodes and a blind replay. Expected from
one run with these settings (see BUILD_NOTES.md): 93 % success, 3 % blind.

Arguments: variant=fast|joint|idm|no_cotrain|optional_idm|ladder, preset=2026-08|paper,
demos=N, debug.
"""

from wamjax import config as configs
from wamjax.wam.fast_wam import presets


def get_config(arg=None):
    args = configs.parse_arg(arg, variant="fast", preset="2026-08", demos=300, debug=False)
    config = configs.base_config()
    presets.fast_wam(config, args.variant, args.preset)
    presets.tabletop(config)
    presets.simulator(config, "aloha", ("transfer_cube",), args.demos, noise=0.01)
    data = config.data
    data.cameras, data.chunk = ("top", "angle"), 40
    data.frames, data.frame_stride = 2, 40  # now, and at the end of the chunk
    data.instruction_length = 16
    data.padding = "hold:.*"  # actions are joint angles, which stay when an arm rests
    config.total_steps = 2000
    config.eval.execute, config.eval.max_steps = 20, 300
    if args.debug:
        presets.simulator_debug(config)
    return config
