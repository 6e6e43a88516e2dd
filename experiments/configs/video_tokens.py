"""Autoregressive video on clips of the tabletop simulator: a decoder-only transformer over tokens.

    python -m wamjax.train --config=experiments/configs/video_tokens.py --workdir=runs/tokens
    python -m wamjax.sample --workdir=runs/tokens --count=16 --given=2

Arguments: steps=N, debug.

Uses the clips of video_tabletop.py with 64 tokens per frame: each square of 4x4 pixels is one of
512 patches, fitted by k-means (30.5 dB). A clip is 512 tokens after one start token that carries
the task. The network has the depth of video_tabletop.py and trains about as long, 10 minutes on one
CPU core; with four times the tokens that means fewer steps.
"""

from wamjax import config as configs


def get_config(arg=None):
    args = configs.parse_arg(arg, steps=700, debug=False)
    config = configs.base_config()
    data, model, objective, optim = config.data, config.model, config.objective, config.optim
    data.kind, data.arrays, data.batch_size = "arrays", "clips:frames=8", 4
    model.layers, model.heads, model.head_dim, model.unroll = 4, 4, 32, 4
    model.video.width, model.video.ffn = 128, 512
    model.codec.kind, model.codec.patch, model.codec.codes = "palette", 4, 512
    model.positions, model.label, objective.name = "rope", True, "autoregressive"
    objective.top_p = 0.9
    optim.name, optim.learning_rate, optim.b2, optim.weight_decay = "muon", 3e-3, 0.98, 0.01
    optim.final_fraction, optim.ema_decay = 0.02, 0.99
    config.total_steps, config.log_every, config.checkpoint.every = args.steps, 50, 100
    if args.debug:
        config.total_steps, config.log_every, config.checkpoint.every = 6, 2, 3
        data.arrays, data.batch_size = "clips:count=64,frames=4,size=16", 16
        model.layers, model.heads, model.head_dim, model.unroll = 2, 2, 16, 1
        model.video.width, model.video.ffn, model.codec.codes = 32, 64, 32
    return config
