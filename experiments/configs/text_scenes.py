"""Text-to-image on rendered scenes with captions: where should text enter?

    python -m wamjax.train --config=experiments/configs/text_scenes.py:route=cross --workdir=runs/s
    python -m wamjax.sample --workdir=runs/s --count=16 --output=runs/s/more \\
        --caption="a red circle left of a blue square"
    python experiments/routes_scenes.py --workdir=runs/routes

Arguments: route=pooled|cross|both|joint, steps=N, debug.

20,000 pictures of 24x24 pixels with up to four coloured shapes, 36 tokens; the caption enters as
its mean embedding beside time (pooled), by cross-attention to its words, by both, or as tokens of a
second expert in joint attention (MMDiT). Words are embedded by a table that is trained along.
"""

from wamjax import config as configs


def get_config(arg=None):
    args = configs.parse_arg(arg, route="cross", steps=1500, debug=False)
    config = configs.base_config()
    data, model, objective, optim = config.data, config.model, config.objective, config.optim
    data.kind, data.arrays, data.batch_size = "arrays", "scenes:size=24", 64
    model.layers, model.heads, model.head_dim, model.unroll = 4, 4, 32, 4
    model.video.width, model.video.ffn, model.patch, model.freq_dim = 128, 512, 1, 128
    model.codec.kind, model.codec.patch, model.positions = "pixel", 4, "sincos"
    model.text.kind, model.text.route, model.context_width = "tokens", args.route, 128
    objective.name, objective.weighting, objective.video_shift = "denoising", "uniform", 2.0
    objective.infer_steps, objective.guidance = 25, 3.0
    optim.learning_rate, optim.b2, optim.weight_decay = 1e-3, 0.99, 0.0
    optim.final_fraction, optim.ema_decay = 0.02, 0.99
    config.total_steps, config.log_every, config.checkpoint.every = args.steps, 50, 250
    if args.debug:
        config.total_steps, config.log_every, config.checkpoint.every = 6, 2, 3
        data.arrays, data.batch_size, objective.infer_steps = "scenes:count=64,size=24", 16, 3
        model.layers, model.heads, model.head_dim, model.unroll = 2, 2, 16, 1
        model.video.width, model.video.ffn, model.context_width = 32, 64, 16
    return config
