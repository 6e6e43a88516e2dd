"""Video models on the latents or tokens of a trained codec.

    python -m wamjax.train --config=experiments/configs/codec_tabletop.py:kind=kl \\
        --workdir=runs/codec_kl
    python -m wamjax.train --workdir=runs/latents \\
        --config=experiments/configs/video_latents.py:codec=runs/codec_kl,scheme=blocks
    python -m wamjax.sample --workdir=runs/latents --count=16 --given=2

Arguments: codec=FOLDER (a run of codec_tabletop.py), scheme= as video_tabletop.py or tokens (with a
codec of kind fsq or vq), steps=N, debug.

Trains the models of video_tabletop.py and video_tokens.py for the same time. The codec is frozen
and part of the checkpoints, so its folder is not needed afterwards. Latents have unit variance.
Without `codec` the codec is random, which is useful for debug only.
"""

from wamjax import config as configs
from wamjax.runs import reconstruction


def get_config(arg=None):
    args = configs.parse_arg(arg, codec="", scheme="blocks", steps=0, debug=False)
    config = configs.base_config()
    data, model, objective, optim = config.data, config.model, config.objective, config.optim
    tokens = args.scheme == "tokens"
    model.codec.spatial, model.codec.temporal, model.codec.width = 4, 1, 32
    model.codec.kind, model.codec.channels = ("vq" if tokens else "kl"), 8
    optim.freeze = ("codec/.*",)
    if args.codec:
        reconstruction.use(config, args.codec)
    data.kind, data.batch_size = "arrays", 4 if tokens else 8
    data.arrays = "clips:frames=8" if model.codec.temporal == 1 else "clips:frames=9"
    model.layers, model.heads, model.head_dim, model.unroll = 4, 4 if tokens else 6, 32, 4
    model.video.width, model.video.ffn = (128, 512) if tokens else (192, 768)
    model.label = True
    model.positions = "rope" if tokens else "both"
    objective.name = "autoregressive" if tokens else "denoising"
    if tokens:
        objective.top_p = 0.9
    else:
        objective.scheme, objective.weighting, objective.video_shift = args.scheme, "uniform", 2.0
        model.patch, model.freq_dim = 2, 128
    optim.name, optim.learning_rate = "muon", 3e-3
    optim.b2, optim.weight_decay = 0.99, 0.0
    optim.final_fraction, optim.ema_decay = 0.02, 0.99
    config.total_steps = args.steps or (700 if tokens else 1400)
    config.log_every, config.checkpoint.every = 50, 100
    if args.debug:
        config.total_steps, config.log_every, config.checkpoint.every = 6, 2, 3
        data.arrays, data.batch_size = "clips:count=64,frames=4,size=16", 16
        model.layers, model.heads, model.head_dim, model.unroll = 2, 2, 16, 1
        model.video.width, model.video.ffn = 32, 64
        if not tokens:
            model.freq_dim, objective.infer_steps = 32, 2
        if not args.codec:
            model.codec.width, model.codec.channels = 8, 4
            if tokens:
                model.codec.codes = 32
    return config
