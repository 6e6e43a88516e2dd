"""Text-to-image on rendered scenes with captions: where should text enter?

    python -m wamjax.train --config=experiments/configs/text_scenes.py:route=cross --workdir=runs/s
    python -m wamjax.sample --workdir=runs/s --count=16 --output=runs/s/more \\
        --caption="a red circle left of a blue square"
    python experiments/routes_scenes.py --workdir=runs/routes

Arguments: route=pooled|cross|both|joint, steps=N, debug.

route=cross takes 3.8 minutes on two cores. Of 400 held-out captions (unseen combinations of seen
objects) it then renders 53 % without a mistake: colors are right in 86 %, shapes in 97 %, counts in
63 % of those that count. Relations are still at chance, 36 %; they take longer to learn.

20,000 pictures of 24x24 pixels with up to four colored shapes on a grid of 3x3 cells. Each cell is
a token, so the task is to learn what goes where. The caption enters as its mean embedding next to
the timestep (pooled), through cross-attention to its words (cross), through both, or as tokens of a
second expert in joint attention (joint, MMDiT). A two-layer text encoder, trained with the model,
processes the words first, so every route starts from contextual embeddings. The network predicts
x0: tokens have 192 values and the network is 128 wide.
"""

from wamjax import config as configs


def get_config(arg=None):
    args = configs.parse_arg(arg, route="cross", steps=3000, debug=False)
    config = configs.base_config()
    data, model, objective, optim = config.data, config.model, config.objective, config.optim
    data.kind, data.arrays, data.batch_size = "arrays", "scenes:size=24,length=13", 64
    model.layers, model.heads, model.head_dim, model.unroll = 4, 4, 32, 4
    model.video.width, model.video.ffn, model.patch, model.freq_dim = 128, 512, 1, 128
    model.codec.kind, model.codec.patch, model.positions = "pixel", 8, "sincos"
    model.text.kind, model.text.route = "tokens", args.route
    model.text.layers, model.context_width = 2, 64
    objective.name, objective.process = "denoising", "flow:predicts=x0"
    objective.weighting, objective.video_shift = "uniform", 3.0
    objective.infer_steps, objective.guidance = 25, 1.5
    optim.name, optim.learning_rate, optim.b2, optim.weight_decay = "muon", 5e-3, 0.99, 0.0
    optim.final_fraction, optim.ema_decay = 0.02, 0.995
    config.total_steps, config.log_every, config.checkpoint.every = args.steps, 100, 500
    if args.debug:
        config.total_steps, config.log_every, config.checkpoint.every = 6, 2, 3
        data.arrays, data.batch_size = "scenes:count=64,size=24,length=13", 16
        objective.infer_steps = 3
        model.layers, model.heads, model.head_dim, model.unroll = 2, 2, 16, 1
        model.video.width, model.video.ffn, model.context_width = 32, 64, 16
    return config
