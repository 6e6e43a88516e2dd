"""A small Fast-WAM on the turntable whose action chunks start with already committed actions.

    python -m wamjax.train --config=experiments/configs/realtime_tabletop.py --workdir=runs/realtime

The policy reaches for and picks up a block on a rotating table. Collects 1,000 demonstrations,
trains 1.8 M parameters for 2,000 steps with 0 to 6 of the 12 actions of a chunk given, and acts
with a delay of 4 control steps, which the prefix bridges. Two CPU cores: 1 to 2 s a step; no full
run yet. `variant=no_cotrain,small` (1.0 M parameters, 0.2 s a step on one core) succeeds after
2,000 steps in 50 % of 300 episodes without a delay, planning every two steps, and in 9 % with a
delay of 4 (the same actions in another scene: 4 %). `experiments/realtime_tabletop.py` compares
other ways to join chunks.

Arguments: prefix=N (0: as Fast-WAM was published), prefix_noise=SD (on given actions in training),
variant=..., steps=N, small (half the layers and half the batch, for one core), debug.
"""

from wamjax import config as configs
from wamjax.wam.fast_wam import presets


def get_config(arg=None):
    args = configs.parse_arg(
        arg, variant="fast", prefix=6, prefix_noise=0.0, steps=2000, small=False, debug=False
    )
    config = configs.base_config()
    presets.fast_wam(config, args.variant, "2026-08")
    presets.tabletop(config)
    config.objective.prefix_max, config.objective.prefix_noise = args.prefix, args.prefix_noise
    config.data.chunk = 12
    config.total_steps = args.steps
    config.optim.name, config.optim.learning_rate = "muon", 3e-3
    config.data.sources.demos = configs.source(
        collect={"env": "turntable", "episodes": 1000, "noise": 0.1, "intended": True}
    )
    if args.small:
        config.model.layers = config.model.unroll = 2
        config.data.batch_size, config.objective.infer_steps = 32, 5
    config.eval.env = "turntable"
    config.eval.episodes, config.eval.execute = 256, 6
    if args.prefix:
        config.eval.join, config.eval.delay = "prefix", 4
    if args.debug:
        presets.tabletop_debug(config)
    return config
