"""Fast-WAM at the published RoboTwin 2.0 sizes: 14-dim actions and states, three cameras.

    python -m wamjax.doctor --config=experiments/configs/fast_wam_robotwin.py

Arguments: variant=fast|joint|idm|no_cotrain|optional_idm, preset=2026-08|paper, debug.

The head camera (256x320) over the two wrists (128x160 each) makes one 384x320 picture: 120 tokens
for each of 3 latent frames. z-score normalisation, global batch 1024, 30,000 steps. Published:
91.9 % clean, 91.8 % randomized.
"""

from wamjax import config as configs
from wamjax.wam import presets


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
    config.data.declared.camera_size = (384, 320)
    config.data.declared.action_dim, config.data.declared.proprio_dim = 14, 14
    config.eval.execute = 24
    if args.debug:
        presets.miniature(config)
    return config
