"""Fast-WAM at the published LIBERO sizes: 5.0 B video expert, 1.0 B action expert.

    python -m wamjax.doctor --config=experiments/configs/fast_wam_libero.py
    python tpu/aot.py --config=experiments/configs/fast_wam_libero.py --topology=v5p:4x4x4

Arguments: variant=fast|joint|idm|no_cotrain|optional_idm, preset=2026-08|paper, debug.

Two 224x224 cameras side by side, 33-frame windows of which every fourth frame is kept (9 frames,
3 latent frames of 98 tokens), 32 actions, global batch 128, 21,700 steps. The batch carries latents
and text embeddings that were computed ahead of time; a data source for those does not exist yet, so
this config is described, counted, sharded and compiled, not trained. Published: 97.6 % average
over the four suites, final losses about 0.07 (video) and 0.01 (action).
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
    config.total_steps, config.data.batch_size = 21_700, 128
    config.data.cameras, config.data.normalization = ("image", "wrist_image"), "min_max"
    config.data.declared.camera_size = (224, 224)
    config.data.declared.action_dim, config.data.declared.proprio_dim = 7, 8
    config.eval.execute, config.eval.max_steps = 10, 700
    if args.debug:
        presets.miniature(config)
    return config
