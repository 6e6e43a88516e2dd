"""Stable Diffusion 3 medium at its published sizes (arXiv 2403.03206): an MMDiT of 2.0 B.

    python -m wamjax.doctor --config=experiments/configs/sd3_medium.py
    python -m wamjax.train --config=experiments/configs/sd3_medium.py \\
        --config.data.root=DATA --workdir=runs/sd3
    python -m wamjax.train --config=experiments/configs/sd3_medium.py:debug --workdir=runs/try

Arguments: debug.

1024x1024 pixels: 16x128x128 latents of an 8x autoencoder, 4096 tokens. Text is 154 tokens of 4096
(77 of two CLIPs, padded in width, and 77 of T5 v1.1 XXL) in joint attention, and 2048 pooled by the
CLIPs, next to the timestep. DATA/sd3-latents holds latents.npy, context.npy and pooled.npy.

A rectified flow with logit-normal training levels, shifted by 3 at this resolution; 28 Euler steps
at a guidance of 5 or more. Deviation from the paper: the three text encoders are dropped together,
a tenth of the time, while SD3 drops each of them 46 % of the time.

`debug` needs no latents: it trains a miniature on captioned scenes.
"""

from wamjax import config as configs


def get_config(arg=None):
    args = configs.parse_arg(arg, debug=False)
    config = configs.base_config()
    data, model, objective, optim = config.data, config.model, config.objective, config.optim
    data.kind, data.arrays, data.batch_size = "arrays", "latents:path=sd3-latents", 256
    data.declared.arrays = "latents=1x128x128x16,context=154x4096,pooled=2048"
    model.layers, model.heads, model.head_dim, model.patch = 24, 24, 64, 2
    model.video.width, model.video.ffn, model.remat = 1536, 6144, "full"
    model.positions, model.position_table = "sincos", (192, 64)
    model.text.kind, model.text.route, model.context_width = "context", "joint", 4096
    model.text.pooled_width = 2048
    model.codec.kind = "cached"
    model.codec.channels, model.codec.spatial, model.codec.temporal = 16, 8, 1
    objective.name, objective.process = "denoising", "flow:law=logit_normal"
    objective.weighting, objective.video_shift = "uniform", 3.0
    objective.infer_steps, objective.guidance = 28, 5.0
    optim.learning_rate, optim.b2, optim.weight_decay = 1e-4, 0.999, 0.01
    optim.final_fraction, optim.ema_decay, config.precision.compute = 1.0, 0.9999, "bfloat16"
    config.total_steps, config.checkpoint.every = 500_000, 10_000
    config.mesh.fsdp, config.mesh.data = 16, -1
    if args.debug:
        config.total_steps, config.log_every, config.checkpoint.every = 6, 2, 3
        data.arrays, data.declared.arrays = "scenes:count=64,size=24", ""
        configs.reset(config, "model.codec")
        model.codec.patch, model.remat = 4, "none"
        model.layers, model.heads, model.head_dim, model.patch = 2, 2, 16, 1
        model.video.width, model.video.ffn, model.freq_dim = 32, 64, 32
        model.text.kind, model.context_width, model.text.pooled_width = "tokens", 16, 0
        data.batch_size, objective.infer_steps, config.mesh.fsdp = 16, 3, 1
        config.precision.compute = "float32"
    return config
