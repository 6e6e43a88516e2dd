"""Cosmos Policy on LIBERO at the published size: 1.96 B parameters, 9 slots of 196 tokens.

    python -m wamjax.doctor --config=experiments/configs/cosmos_policy_libero.py
    python tpu/aot.py --config=experiments/configs/cosmos_policy_libero.py --topology=v5p:4x4x4
    python -m wamjax.train --config=experiments/configs/cosmos_policy_libero.py:debug \\
        --workdir=runs/try

Arguments: debug.

Two 224x224 cameras, 16 actions of 7, global batch 1920, 40,000 steps: 48 hours on 64 H100 in the
public code. Published: 98.5 % success over the four suites; action L1 0.010 to 0.012 in x0.

From public files to a running policy. You need tokenizer/tokenizer.pth from
nvidia/Cosmos-Predict2-2B-Video2World and, from nvidia/Cosmos-Policy-LIBERO-Predict2-2B, the weights
(here POLICY.pt), the statistics (STATISTICS.json) and the text embeddings (EMBEDDINGS.pkl), each
under its published name:

    python -m wamjax.convert --family=wan21_vae --source=tokenizer/tokenizer.pth \\
        --output=weights/wan21_vae
    python -m wamjax.convert --family=cosmos_policy --source=POLICY.pt \\
        --output=weights/cosmos_libero
    python -m wamjax.data.embeddings --cache=DATA/libero-t5 --pickle=EMBEDDINGS.pkl \\
        --encoder=t5-11b --length=64
    python -m wamjax.export_policy --config=experiments/configs/cosmos_policy_libero.py \\
        --weights=weights/cosmos_libero --codec=weights/wan21_vae --statistics=STATISTICS.json \\
        --embeddings=DATA/libero-t5 --output=bundles/cosmos-libero

Then ``wamjax.load_policy("bundles/cosmos-libero")`` acts. For instructions beyond the published
ones you also need the folder google-t5/t5-11b; add them to the cache before you export:

    python -m wamjax.convert --family=t5 --source=t5-11b --tokenizer=t5-11b --dtype=bfloat16 \\
        --output=weights/t5
    python -m wamjax.data.embeddings --cache=DATA/libero-t5 --instructions=TASKS.txt \\
        --encode=wamjax.weights.encoders:text --weights=weights/t5

Training from the public video model. Half of a batch are demonstrations, which train the policy; a
quarter each are successful and failed replays, which train world model and value. Pictures are
augmented and encoded inside the training step, by the frozen codec in ``params["codec"]``. The data
sets DATA/libero-demos and DATA/libero-replays need the cameras `wrist` and `agentview`, and their
instructions must be in the cache:

    python -m wamjax.convert --family=cosmos_predict2 --source=model-480p-16fps.pt \\
        --output=weights/predict2
    python -m wamjax.train --config=experiments/configs/cosmos_policy_libero.py \\
        --config.data.root=DATA --workdir=runs/cosmos-libero \\
        --config.init_from.path=weights/predict2,codec=weights/wan21_vae
    python -m wamjax.export_policy --workdir=runs/cosmos-libero --output=bundles/mine

`debug` generates random data and trains a miniature for 10 steps, in under a minute.
"""

from wamjax import config as configs
from wamjax.wam.cosmos_policy import presets


def get_config(arg=None):
    args = configs.parse_arg(arg, debug=False)
    config = configs.base_config()
    presets.objective(config, "libero")
    presets.predict2_2b(config)
    presets.training(config, (1000, 30_000))
    presets.declare(config, control_hz=20.0)
    config.total_steps, config.data.batch_size = 40_000, 1920
    sources, replays = config.data.sources, dict(path="libero-replays", rollout=True)
    sources.demos = configs.source(path="libero-demos", weight=2.0)
    sources.successes = configs.source(**replays, ended="success")
    sources.failures = configs.source(**replays, ended="failure")
    config.data.embeddings = "libero-t5"
    config.eval.env, config.eval.execute = "libero:convention=cosmos_policy", 16
    config.eval.max_steps = 520  # of the longest suite; 220, 280 and 300 of the others
    if args.debug:
        presets.miniature(config)
        presets.stand_ins(config, "stand-in-cosmos-libero")
    return config
