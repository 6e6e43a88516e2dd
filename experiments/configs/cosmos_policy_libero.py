"""Cosmos Policy on LIBERO at the published size: 1.96 B parameters, 9 slots of 196 tokens.

    python -m wamjax.doctor --config=experiments/configs/cosmos_policy_libero.py
    python tpu/aot.py --config=experiments/configs/cosmos_policy_libero.py --topology=v5p:4x4x4
    python -m wamjax.train --config=experiments/configs/cosmos_policy_libero.py:debug \
        --workdir=runs/try

Arguments: debug.

Two 224x224 cameras, 16 actions of 7, global batch 1920, 40,000 steps: 48 hours on 64 H100 in the
public code. Published: 98.5 % success over the four suites; action L1 0.010 to 0.012 in x0.

Half of a batch are demonstrations, which train the policy; a quarter each are replays that succeed
and that fail, which train world model and value. Pictures are augmented and encoded within the
step, by the frozen codec below ``params["codec"]``. Data sets DATA/libero-demos and
DATA/libero-replays have cameras `wrist` and `agentview`; text embeddings are computed once:

    python -m wamjax.data.embeddings --cache=DATA/libero-t5 --data=DATA/libero-demos \
        --encoder=t5-11b --length=64 --encode=MODULE:FUNCTION --weights=PATH
    python -m wamjax.train --config=experiments/configs/cosmos_policy_libero.py \
        --config.data.root=DATA --config.init_from.path=CONVERTED --workdir=runs/cosmos-libero

`debug` makes random stand-ins and trains a miniature for 10 steps, in under a minute.
"""

from wamjax import config as configs
from wamjax.wam import cosmos_builder as presets


def get_config(arg=None):
    args = configs.parse_arg(arg, debug=False)
    config = configs.base_config()
    presets.objective(config, "libero")
    presets.predict2_2b(config)
    presets.training(config, (1000, 30_000))
    presets.declare(config, "libero", control_hz=20.0)
    config.total_steps, config.data.batch_size = 40_000, 1920
    sources, replays = config.data.sources, dict(path="libero-replays", rollout=True)
    sources.demos = configs.source(path="libero-demos", weight=2.0)
    sources.successes = configs.source(**replays, ended="success")
    sources.failures = configs.source(**replays, ended="failure")
    config.data.embeddings = "libero-t5"
    config.eval.execute = 16
    if args.debug:
        presets.miniature(config)
        presets.stand_ins(config, "stand-in-cosmos-libero")
    return config
