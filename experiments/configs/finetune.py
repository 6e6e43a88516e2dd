"""Fine-tuning of a published model on a data set of your own, in one command.

    python -m wamjax.train \\
        --config=experiments/configs/finetune.py:base=fast_wam,data=DATA/mine,weights=WAN22 \\
        --workdir=runs/mine
    python -m wamjax.train \\
        --config=experiments/configs/finetune.py:base=cosmos_policy,data=DATA/mine,weights=PRED2 \\
        --workdir=runs/mine-cosmos
    python -m wamjax.train \\
        --config=experiments/configs/finetune.py:base=fast_wam,data=DATA/mine,debug \\
        --workdir=runs/try
    python -m wamjax.export_policy --workdir=runs/mine --output=bundles/mine

Arguments: base=fast_wam|cosmos_policy, data=DIR, weights=DIR, lora=RANK, cameras=NAME+NAME,
layout=TEXT, hold=NUMBER+NUMBER, successes, chunk=N, steps=N, batch=N, debug.

The data set is one of wamjax.ingest or wamjax.data.write_episodes; `weights` is the folder of the
published files, as downloaded: of Fast-WAM that of Wan-AI/Wan2.2-TI2V-5B, with Fast-WAM's own
libero_uncond_2cam224.pt if its policy is to be started from; of Cosmos Policy that of
nvidia/Cosmos-Predict2-2B-Video2World, with google-t5/t5-11b in t5-11b. See
`wamjax.weights.downloads` for the names.

All else follows from the data, see `wamjax.runs.fine_tuning`, and what training reads beside it is
made by the run before its first step, once, and kept beside the data: DATA/weights,
DATA/mine-latents-224x448, DATA/mine-umt5-128. Killed, the same command goes on.

Memory is that of the published trainings (fast_wam_libero, cosmos_policy_libero), of which lora=16
needs no gradient and no moments of the backbone. `debug` writes small random weights in the
published formats and goes the same way with them, in about a minute; it learns nothing.
"""

from wamjax import config as configs
from wamjax.runs import fine_tuning


def get_config(arg=None):
    args = configs.parse_arg(
        arg, base="fast_wam", data="", weights="", cameras="", layout="", hold="", lora=0,
        successes=False, chunk=0, steps=0, batch=0, debug=False,
    )  # fmt: skip
    config = configs.base_config()
    values = args.to_dict()
    for key in ("cameras", "hold"):
        values[key] = tuple(filter(None, values[key].split("+")))
    base, data, weights = (values.pop(key) for key in ("base", "data", "weights"))
    fine_tuning.configure(config, base, data, weights, fine_tuning.Choices(**values))
    return config
