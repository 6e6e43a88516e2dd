"""Cosmos Policy on ALOHA at the published size, and fine-tuning of its planner.

    python -m wamjax.doctor --config=experiments/configs/cosmos_policy_aloha.py
    python -m wamjax.train --config=experiments/configs/cosmos_policy_aloha.py:debug \
        --workdir=runs/try

Arguments: planner, debug.

Three 224x224 cameras, 50 actions of 14 at 25 Hz, all executed; global batch 200, 50,000 steps: 48
hours on 8 H100 in the public code. The 185 demonstrations train all three uses. Published: score
93.6 over four tasks; L1 of the action in x0 about 0.01.

`planner` continues from such a checkpoint (--config.init_from.path=RUN) for 18,000 steps on policy
rollouts in DATA/aloha-rollouts: a tenth demonstrations, the rest half successes and half failures,
with a value function V(s') that depends on the future only. Published: 72.0 with planning instead
of 59.5 on the two hard tasks.

Data, conversion and training are as in cosmos_policy_libero, with DATA/aloha-demos and the cameras
`left_wrist`, `right_wrist` and `high`. To convert the released policy and its planner:

    python -m wamjax.convert --family=cosmos_policy --source=POLICY.pt \\
        --output=weights/cosmos_aloha
    python -m wamjax.convert --family=cosmos_policy --source=PLANNER.pt \\
        --output=weights/cosmos_aloha_planner
    python -m wamjax.data.embeddings --cache=DATA/aloha-t5 --pickle=EMBEDDINGS.pkl \\
        --encoder=t5-11b --length=64
    python -m wamjax.export_policy --config=experiments/configs/cosmos_policy_aloha.py \\
        --weights=weights/cosmos_aloha --codec=weights/wan21_vae --statistics=STATISTICS.json \\
        --embeddings=DATA/aloha-t5 --output=bundles/cosmos-aloha \\
        --planner=weights/cosmos_aloha_planner \\
        --planner_config=experiments/configs/cosmos_policy_aloha.py:planner

Without the last two flags the policy acts directly.

`debug` generates random data and trains a miniature for 10 steps.
"""

from wamjax import config as configs
from wamjax.wam.cosmos_policy import presets


def get_config(arg=None):
    args = configs.parse_arg(arg, planner=False, debug=False)
    config = configs.base_config()
    presets.objective(config, "aloha")
    presets.predict2_2b(config)
    presets.training(config, (1500, 15_000) if args.planner else (2000, 20_000))
    presets.declare(config, control_hz=25.0)
    config.total_steps, config.data.batch_size = 18_000 if args.planner else 50_000, 200
    config.objective.discount, config.objective.infer_steps = 0.998, 10
    config.data.sources.demos = configs.source(path="aloha-demos", weight=2.0)
    if args.planner:
        presets.planner(config, "aloha-rollouts")
    config.data.embeddings = "aloha-t5"
    config.eval.execute = 50
    if args.debug:
        presets.miniature(config)
        presets.stand_ins(config, "stand-in-cosmos-aloha")
    return config
