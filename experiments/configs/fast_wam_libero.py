"""Fast-WAM at the published LIBERO sizes: 5.0 B video expert, 1.0 B action expert.

    python -m wamjax.doctor --config=experiments/configs/fast_wam_libero.py
    python tpu/aot.py --config=experiments/configs/fast_wam_libero.py --topology=v5p:4x4x4
    python -m wamjax.train --config=experiments/configs/fast_wam_libero.py:debug --workdir=runs/try

Arguments: variant=fast|joint|idm|no_cotrain|optional_idm|ladder, preset=2026-08|paper, debug.

Two 224x224 cameras side by side, 33-frame windows that keep every fourth frame (9 frames, 3 latent
frames of 98 tokens), 32 actions, global batch 128, 21,700 steps. Published: 97.6 % average
over the four suites, final losses about 0.07 (video) and 0.01 (action).

From public files to a running policy. You need the folder Wan-AI/Wan2.2-TI2V-5B, Fast-WAM's
libero_uncond_2cam224.pt with its dataset_stats.json, and the task instructions in TASKS.txt, one
per line. Conversion takes at most 3 GB of memory, and disk space for the result:

    python -m wamjax.convert --family=wan22_vae --source=Wan2.2-TI2V-5B/Wan2.2_VAE.pth \\
        --output=weights/wan22_vae
    python -m wamjax.convert --family=umt5 --tokenizer=Wan2.2-TI2V-5B/google/umt5-xxl \\
        --source=Wan2.2-TI2V-5B/models_t5_umt5-xxl-enc-bf16.pth --output=weights/umt5
    python -m wamjax.convert --family=fast_wam --source=libero_uncond_2cam224.pt \\
        --output=weights/fast_wam
    python -m wamjax.data.embeddings --cache=DATA/libero-text --instructions=TASKS.txt \\
        --template=fast_wam --encoder=umt5-xxl --length=128 \\
        --encode=wamjax.weights.encoders:text --weights=weights/umt5
    python -m wamjax.export_policy --config=experiments/configs/fast_wam_libero.py \\
        --weights=weights/fast_wam --codec=weights/wan22_vae --statistics=dataset_stats.json \\
        --embeddings=DATA/libero-text --output=bundles/libero

Then ``wamjax.load_policy("bundles/libero")`` acts.

Training from the public video model. Latents (31 GB for the 277,700 windows) and text embeddings
are computed once, from a data set with pictures (cameras `image` and `wrist_image`) in DATA/libero.
The action expert is initialized by interpolating the video expert:

    python -m wamjax.convert --family=wan22_ti2v --source=Wan2.2-TI2V-5B --output=weights/wan22
    python -m wamjax.data.precompute --config=experiments/configs/fast_wam_libero.py \\
        --data=DATA/libero --out=DATA/libero-latents --codec=wan2.2 \\
        --layout=image:224x224+wrist_image:224x224 \\
        --encode=wamjax.weights.encoders:video --weights=weights/wan22_vae
    python -m wamjax.data.embeddings --cache=DATA/libero-text --data=DATA/libero-latents \\
        --template=fast_wam --encoder=umt5-xxl --length=128 \\
        --encode=wamjax.weights.encoders:text --weights=weights/umt5
    python -m wamjax.train --config=experiments/configs/fast_wam_libero.py \\
        --config.data.root=DATA --config.init_from.path=weights/wan22 \\
        --config.init_from.missing="('action/.*', 'blocks/action/.*', 'proprio/.*')" \\
        --workdir=runs/libero
    python -m wamjax.export_policy --workdir=runs/libero --codec=weights/wan22_vae \\
        --output=bundles/mine

To export back to the file format of the public code:

    python -m wamjax.convert --direction=export --family=fast_wam --source=runs/libero \\
        --output=libero.pt

`debug` generates random latents and embeddings and trains a miniature for 20 steps.
"""

from wamjax import config as configs
from wamjax.wam.fast_wam import presets


def get_config(arg=None):
    args = configs.parse_arg(arg, variant="fast", preset="2026-08", debug=False)
    config = configs.base_config()
    presets.fast_wam(config, args.variant, args.preset)
    presets.wan22_5b(config)
    presets.wan22_training(config)
    presets.wan22_windows(config)
    config.total_steps, config.data.batch_size = 21_700, 128
    config.data.cameras, config.data.normalization = ("image", "wrist_image"), "min_max"
    config.data.padding = "hold:6"  # after the end, motions are 0 and the gripper keeps its command
    config.data.declared.camera_size = (224, 224)
    config.data.declared.action_dim, config.data.declared.proprio_dim = 7, 8
    config.data.sources.demos = configs.source(path="libero-latents")
    config.data.embeddings = "libero-text"
    config.eval.env = "libero"  # as in its public evaluation
    config.eval.execute, config.eval.max_steps = 10, 700
    if args.debug:
        presets.miniature(config)
        config.data.sources.demos = configs.source(path="stand-in-libero-latents", stand_in=12)
        config.data.embeddings = "stand-in-libero-text"
    return config
