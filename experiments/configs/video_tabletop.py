"""Video diffusion on clips of the tabletop simulator, with any scheme.

    python -m wamjax.train --config=experiments/configs/video_tabletop.py:scheme=blocks \\
        --workdir=runs/blocks
    python -m wamjax.sample --workdir=runs/blocks --count=16 --given=2

Arguments: scheme=diffusion|image_to_video|forcing|forcing_causal|blocks, steps=N, debug.

4096 clips of 8 frames of 32x32 pixels, 0.2 s apart; 16 tokens per frame, 64 numbers each (with raw
pixels, 192 per token, and AdamW the samples are still noise at this budget). The task of a clip is
its class. Schemes differ only in noise levels and visibility tables (`wamjax.wam.video.schemes`);
the network has 2.8 M parameters. Takes about 10 minutes on one CPU core, plus one to generate the
clips the first time.
"""

from wamjax import config as configs


def get_config(arg=None):
    args = configs.parse_arg(arg, scheme="blocks", steps=1400, debug=False)
    config = configs.base_config()
    data, model, objective, optim = config.data, config.model, config.objective, config.optim
    data.kind, data.arrays, data.batch_size = "arrays", "clips:frames=8", 8
    model.layers, model.heads, model.head_dim, model.unroll = 4, 6, 32, 4
    model.video.width, model.video.ffn, model.patch, model.freq_dim = 192, 768, 2, 128
    model.codec.kind, model.codec.patch, model.codec.channels = "cosine", 4, 16
    model.positions = "both"  # trays and borders have fixed places
    model.label = True
    objective.name, objective.scheme = "denoising", args.scheme
    objective.weighting, objective.video_shift, objective.infer_steps = "uniform", 2.0, 10
    optim.name, optim.learning_rate, optim.b2, optim.weight_decay = "muon", 3e-3, 0.99, 0.0
    optim.final_fraction, optim.ema_decay = 0.02, 0.99
    config.total_steps, config.log_every, config.checkpoint.every = args.steps, 50, 100
    if args.debug:
        config.total_steps, config.log_every, config.checkpoint.every = 6, 2, 3
        data.arrays, data.batch_size = "clips:count=64,frames=4,size=16", 16
        model.layers, model.heads, model.head_dim, model.unroll = 2, 2, 16, 1
        model.video.width, model.video.ffn, model.freq_dim, objective.infer_steps = 32, 64, 32, 2
    return config
