"""Fast-WAM at the published RoboTwin 2.0 sizes: 14-dim actions and states, three cameras.

    python -m wamjax.doctor --config=experiments/configs/fast_wam_robotwin.py
    python -m wamjax.train --config=experiments/configs/fast_wam_robotwin.py:debug --workdir=runs/a

Arguments: variant=fast|joint|idm|no_cotrain|optional_idm|ladder, preset=2026-08|paper, debug.

The head camera (256x320) above the two wrist cameras (128x160 each) forms one 384x320 picture: 120
tokens for each of 3 latent frames. z-score normalisation, global batch 1024, 30,000 steps.
Published: 91.9 % clean, 91.8 % randomized.

Latents (840 GB for the 6.07 M windows; --stride=4 keeps every fourth) and text embeddings are
computed once, from a data set with pictures in DATA/robotwin. Wan's video model, autoencoder and
text encoder are converted as in fast_wam_libero; the released policy's file contains its sizes:

    python -m wamjax.convert --family=fast_wam --source=RELEASED.pt \\
        --output=weights/fast_wam_robotwin
    python -m wamjax.data.precompute --config=experiments/configs/fast_wam_robotwin.py \\
        --data=DATA/robotwin --out=DATA/robotwin-latents --codec=wan2.2 \\
        --layout=cam_high:256x320/cam_left_wrist:128x160+cam_right_wrist:128x160 \\
        --encode=wamjax.weights.encoders:video --weights=weights/wan22_vae
    python -m wamjax.data.embeddings --cache=DATA/robotwin-text --data=DATA/robotwin-latents \\
        --template=fast_wam --encoder=umt5-xxl --length=128 \\
        --encode=wamjax.weights.encoders:text --weights=weights/umt5
    python -m wamjax.train --config=experiments/configs/fast_wam_robotwin.py \\
        --config.data.root=DATA --config.init_from.path=weights/wan22 \\
        --config.init_from.missing="('action/.*', 'blocks/action/.*', 'proprio/.*')" \\
        --workdir=runs/robotwin

`debug` generates random latents and embeddings and trains a miniature for 20 steps.
"""

from wamjax import config as configs
from wamjax.wam.fast_wam import presets


def get_config(arg=None):
    args = configs.parse_arg(arg, variant="fast", preset="2026-08", debug=False)
    config = configs.base_config()
    presets.fast_wam(config, args.variant, args.preset)
    presets.wan22_5b(config)
    presets.wan22_training(config)
    presets.wan22_windows(config)
    config.total_steps, config.data.batch_size = 30_000, 1024
    # The composite is made when latents are cached, so to the model it is one camera.
    config.data.cameras, config.data.normalization = ("composite",), "mean_std"
    config.data.padding = "hold:6,13"  # after the end, joints are 0 and grippers keep their command
    config.data.declared.camera_size = (384, 320)
    config.data.declared.action_dim, config.data.declared.proprio_dim = 14, 14
    config.data.sources.demos = configs.source(path="robotwin-latents")
    config.data.embeddings = "robotwin-text"
    config.eval.execute = 24
    if args.debug:
        presets.miniature(config)
        config.data.sources.demos = configs.source(path="stand-in-robotwin-latents", stand_in=12)
        config.data.embeddings = "stand-in-robotwin-text"
    return config
