"""Wan's text-to-video transformers at their published sizes: Wan2.1-T2V-1.3B, Wan2.2-TI2V-5B.

    python -m wamjax.doctor --config=experiments/configs/wan_t2v.py:size=5b
    python -m wamjax.train --config=experiments/configs/wan_t2v.py \\
        --config.data.root=DATA --workdir=runs/wan
    python -m wamjax.train --config=experiments/configs/wan_t2v.py:debug --workdir=runs/try

Arguments: size=1.3b|5b, scheme=diffusion|image_to_video|forcing|forcing_causal|blocks, debug.

1,418,996,800 and 4,999,787,712 parameters. 1.3b: 81 frames of 480x832 are 21 latents of 60x104x16
(8 x 8 pixels, 4 frames), 32,760 tokens; 5b: 121 frames of 704x1280 are 31 of 44x80x48 (16 x 16),
27,280 tokens. Text is 512 umT5 XXL tokens, zero where padded, read by cross-attention without a
mask. DATA/wan-latents holds latents.npy and context.npy.

A rectified flow on timesteps up to 1000, shifted by 5; 50 steps at a guidance of 5. In Wan2.2's
image to video the first latent has its own noise level, 0, and attends to the others. Here, with
scheme=image_to_video, it attends to itself only, so that its keys and values can be cached.

`debug` needs no latents: it trains a miniature on captioned scenes.
"""

from wamjax import config as configs

# size -> (layers, heads, ffn), (t, h, w, c) of the latents, pixels along a side of a latent.
SIZES = {
    "1.3b": ((30, 12, 8960), (21, 60, 104, 16), 8),
    "5b": ((30, 24, 14336), (31, 44, 80, 48), 16),
}


def get_config(arg=None):
    args = configs.parse_arg(arg, size="1.3b", scheme="diffusion", debug=False)
    if args.size not in SIZES:
        raise ValueError(f"size {args.size!r} is not one of {sorted(SIZES)}")
    (layers, heads, ffn), latents, spatial = SIZES[args.size]
    config = configs.base_config()
    data, model, objective, optim = config.data, config.model, config.objective, config.optim
    data.kind, data.arrays, data.batch_size = "arrays", "latents:path=wan-latents", 64
    data.declared.arrays = f"latents={'x'.join(map(str, latents))},context=512x4096"
    model.layers, model.heads, model.head_dim, model.patch = layers, heads, 128, 2
    model.video.width, model.video.ffn, model.remat = heads * 128, ffn, "auto"
    model.positions, model.freq_dim = "rope", 256
    model.text.kind, model.text.route, model.context_width = "context", "cross", 4096
    model.codec.kind, model.codec.channels = "cached", latents[-1]
    model.codec.spatial, model.codec.temporal = spatial, 4
    objective.name, objective.scheme = "wan", args.scheme
    objective.video_shift, objective.weighting = 5.0, "wan"
    objective.infer_steps, objective.guidance = 50, 5.0
    optim.learning_rate, optim.b2, optim.weight_decay = 1e-5, 0.999, 0.01
    config.precision.compute, model.residual = "bfloat16", "float32"
    config.total_steps, config.checkpoint.every = 100_000, 5_000
    config.mesh.fsdp, config.mesh.data = 64, -1
    if args.debug:
        config.total_steps, config.log_every, config.checkpoint.every = 6, 2, 3
        data.arrays, data.declared.arrays = "scenes:count=64,size=24", ""
        configs.reset(config, "model.codec")
        model.codec.patch, model.remat = 4, "none"
        model.layers, model.heads, model.head_dim, model.patch = 2, 2, 12, 1
        model.video.width, model.video.ffn, model.freq_dim = 24, 48, 32
        model.text.kind, model.context_width = "tokens", 16
        data.batch_size, objective.infer_steps, config.mesh.fsdp = 16, 3, 1
        config.precision.compute = "float32"
    return config
