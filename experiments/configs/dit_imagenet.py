"""DiT-XL/2 on ImageNet as published (arXiv 2212.09748), from latents encoded ahead of time.

    python -m wamjax.doctor --config=experiments/configs/dit_imagenet.py --sizes
    python -m wamjax.train --config=experiments/configs/dit_imagenet.py \\
        --config.data.root=DATA --workdir=runs/dit
    python -m wamjax.train --config=experiments/configs/dit_imagenet.py:debug --workdir=runs/try

Arguments: size=S|B|L|XL, patch=2|4|8, design=adaln_zero|adaln|cross_attention|in_context,
resolution=256|512, debug.

DATA/imagenet-latents holds latents.npy (N, 32, 32, 4), from the autoencoder of Stable Diffusion
and in its units (mean of the posterior times 0.18215), and label.npy (N,).

AdamW at a constant 1e-4 without weight decay, batch 256, moving average 0.9999, labels dropped in a
tenth of the examples, linear noise with learned variance, 250 ancestral steps. Published FID-50K at
256x256: 19.5 at 400,000 steps without guidance, 2.27 at 7,000,000 with a guidance of 1.5. A sample
costs 119 GMAC forward, so 400,000 steps are 7.3e19 FLOPs: 17 hours on eight TPU v5p at a third of
their rate.

`debug` needs no latents: it trains a miniature on digits.
"""

from wamjax import config as configs
from wamjax.models import dit


def get_config(arg=None):
    args = configs.parse_arg(
        arg, size="XL", patch=2, design="adaln_zero", resolution=256, debug=False
    )
    if args.size not in dit.SIZES:
        raise ValueError(f"size {args.size!r} is not one of {sorted(dit.SIZES)}")
    config = configs.base_config()
    data, model, objective, optim = config.data, config.model, config.objective, config.optim
    data.kind, data.batch_size = "arrays", 256
    data.arrays = "latents:path=imagenet-latents"
    side = args.resolution // 8
    data.declared.arrays = f"latents=1x{side}x{side}x4,label=:1000"
    model.layers, width, model.heads = dit.SIZES[args.size]
    model.head_dim, model.video.width, model.video.ffn = width // model.heads, width, 4 * width
    model.patch, model.positions, model.conditioning = args.patch, "sincos", args.design
    model.label, model.remat = True, "auto"
    model.codec.kind = "cached"
    model.codec.channels, model.codec.spatial, model.codec.temporal = 4, 8, 1
    objective.name, objective.process = "denoising", "ddpm:variance=learned"
    objective.weighting, objective.drop = "uniform", 0.1
    objective.infer_steps, objective.solver, objective.guidance = 250, "ancestral", 1.5
    objective.guidance_channels = 3  # of 4, as in the public sampler
    optim.learning_rate, optim.b2, optim.weight_decay = 1e-4, 0.999, 0.0
    optim.warmup_fraction, optim.final_fraction, optim.clip_norm = 0.0, 1.0, 0.0
    optim.ema_decay, config.precision.compute = 0.9999, "bfloat16"
    model.residual = "float32"  # published: float32 throughout
    config.total_steps, config.checkpoint.every = 400_000, 10_000
    config.mesh.fsdp, config.mesh.data = 8, -1
    if args.debug:
        config.total_steps, config.log_every, config.checkpoint.every = 6, 2, 3
        data.arrays, data.declared.arrays, data.batch_size = "digits:size=8", "", 16
        configs.reset(config, "model.codec")
        model.codec.patch, model.remat = 1, "none"
        model.layers, model.heads, model.head_dim, model.patch = 2, 2, 16, 2
        model.video.width, model.video.ffn, model.freq_dim = 32, 64, 32
        objective.infer_steps, config.precision.compute, config.mesh.fsdp = 3, "float32", 1
        objective.guidance_channels = 0
    return config
