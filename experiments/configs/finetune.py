"""Fine-tunes a published model on your own data set, in one command.

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

The data set comes from wamjax.ingest or wamjax.data.write_episodes. `weights` is the folder of
published files as downloaded: for Fast-WAM Wan-AI/Wan2.2-TI2V-5B, with Fast-WAM's own
libero_uncond_2cam224.pt in it to start from that policy; for Cosmos Policy
nvidia/Cosmos-Predict2-2B-Video2World, with google-t5/t5-11b in its subfolder t5-11b.
`wamjax.weights.downloads` lists the file names.

Everything else follows from the data, see `wamjax.runs.fine_tuning`. Before its first step the run
prepares what training needs, once, and keeps it next to the data: DATA/weights,
DATA/mine-latents-224x448, DATA/mine-umt5-128. If the run is killed, the same command continues.

Memory use is that of the published trainings (fast_wam_libero, cosmos_policy_libero); with lora=16
there are no gradients or optimizer moments for the backbone. `debug` writes small random weights in
the published formats and runs the same steps with them, in about a minute; it learns nothing.
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
