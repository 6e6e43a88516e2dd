"""Trains a codec on the tabletop's pictures, with a Gaussian (KL), FSQ or VQ bottleneck.

    python -m wamjax.train --config=experiments/configs/codec_tabletop.py:kind=kl \\
        --workdir=runs/codec_kl
    python -m wamjax.reconstruct --workdir=runs/codec_kl

Arguments: kind=kl|fsq|vq, temporal=1|2, steps=N, debug.

Uses the clips of video_tabletop.py, one frame at a time, or with temporal=2 clips of 9 frames in
which every two frames after the first become one latent. 4x4 pixels become a latent of 8 numbers
(kl), or one of 512 tokens (vq; fsq has 8x8x8). About 3 minutes on two idle CPU cores (computed from
0.27 CPU seconds a step; no full run yet).

The metrics are psnr in dB and, for discrete codecs, usage and perplexity of the codebook in a
batch; media/codec.json has them over held-out clips. video_latents.py trains video models on the
latents.
"""

from wamjax import config as configs


def get_config(arg=None):
    args = configs.parse_arg(arg, kind="kl", temporal=1, steps=700, debug=False)
    config = configs.base_config()
    data, codec, optim = config.data, config.model.codec, config.optim
    frames = 8 if args.temporal == 1 else 9
    data.kind, data.arrays, data.batch_size = "arrays", f"clips:frames={frames}", 4
    config.objective.name = "codec"
    codec.kind, codec.spatial, codec.temporal, codec.width = args.kind, 4, args.temporal, 32
    if args.kind == "fsq":
        codec.levels = (8, 8, 8)
    else:
        codec.channels = 8
    optim.learning_rate, optim.b2, optim.weight_decay = 2e-3, 0.99, 0.0
    optim.final_fraction, optim.ema_decay = 0.02, 0.99
    config.total_steps, config.log_every, config.checkpoint.every = args.steps, 50, 200
    if args.debug:
        config.total_steps, config.log_every, config.checkpoint.every = 6, 2, 3
        frames = 4 if args.temporal == 1 else 5
        data.arrays = f"clips:count=64,frames={frames},size=16"
        codec.width = 8
        if args.kind != "fsq":
            codec.channels = 4
        if args.kind == "vq":
            codec.codes = 32
    return config
