"""Cosmos Policy on RoboCasa at the published size: 1.96 B parameters, 11 slots of 196 tokens.

    python -m wamjax.doctor --config=experiments/configs/cosmos_policy_robocasa.py
    python -m wamjax.train --config=experiments/configs/cosmos_policy_robocasa.py:debug \
        --workdir=runs/try

Arguments: debug.

Three 224x224 cameras, 32 actions of 7 of which 16 are executed, global batch 800, 45,000 steps: 48
hours on 32 H100 in the public code. Published: 67.1 % success over 24 tasks with 50 demonstrations
each; L1 in x0: action 0.016, future state 0.007, wrist 0.084, other cameras 0.048, value 0.007.
The first step from the weights of Cosmos-Predict2 has a loss of about 2.8, step 100 about 0.63.

Data, conversion and training are as in cosmos_policy_libero, with DATA/robocasa-demos and
DATA/robocasa-replays, with cameras `wrist`, `left` and `right`. To convert the released policy:

    python -m wamjax.convert --family=cosmos_policy --source=POLICY.pt \\
        --output=weights/cosmos_robocasa
    python -m wamjax.data.embeddings --cache=DATA/robocasa-t5 --pickle=EMBEDDINGS.pkl \\
        --encoder=t5-11b --length=64
    python -m wamjax.export_policy --config=experiments/configs/cosmos_policy_robocasa.py \\
        --weights=weights/cosmos_robocasa --codec=weights/wan21_vae --statistics=STATISTICS.json \\
        --embeddings=DATA/robocasa-t5 --output=bundles/cosmos-robocasa

`debug` generates random data and trains a miniature for 10 steps.
"""

from wamjax import config as configs
from wamjax.wam.cosmos_policy import presets


def get_config(arg=None):
    args = configs.parse_arg(arg, debug=False)
    config = configs.base_config()
    presets.objective(config, "robocasa")
    presets.predict2_2b(config)
    presets.training(config, (1000, 30_000))
    presets.declare(config, control_hz=20.0)
    config.total_steps, config.data.batch_size = 45_000, 800
    sources, replays = config.data.sources, dict(path="robocasa-replays", rollout=True)
    sources.demos = configs.source(path="robocasa-demos", weight=2.0)
    sources.successes = configs.source(**replays, ended="success")
    sources.failures = configs.source(**replays, ended="failure")
    config.data.embeddings = "robocasa-t5"
    config.eval.execute = 16
    if args.debug:
        presets.miniature(config)
        presets.stand_ins(config, "stand-in-cosmos-robocasa")
    return config
