"""A small Fast-WAM on four tasks of LIBERO-Object, from a scripted expert, at 64 pixels.

    pip install -e ".[libero]"
    python -m wamjax.train --config=experiments/configs/libero_object.py --workdir=runs/object

Two CPU cores, beside other work: an hour and a half, half of it for 160 demonstrations. Trains
1.8 M parameters for 2,000 steps and evaluates over 100 episodes and a blind replay. Expected from
one run (see BUILD_NOTES.md): 83 % success, 70 % blind, because the published initial states of a
task hardly differ. For the published model see fast_wam_libero.py.

Arguments: variant=fast|joint|idm|no_cotrain|optional_idm|ladder, preset=2026-08|paper,
tasks=1..8, demos=N (over all tasks), debug.
"""

from wamjax import config as configs
from wamjax.wam.fast_wam import presets

ENV = "libero:suite=libero_object,size=64,fast=true"
THINGS = (
    "alphabet_soup", "salad_dressing", "bbq_sauce", "ketchup", "tomato_sauce", "butter", "milk",
    "orange_juice",
)  # fmt: skip
TASKS = tuple(f"pick_up_the_{thing}_and_place_it_in_the_basket" for thing in THINGS)


def get_config(arg=None):
    args = configs.parse_arg(
        arg, variant="fast", preset="2026-08", tasks=4, demos=160, debug=False
    )
    config = configs.base_config()
    presets.fast_wam(config, args.variant, args.preset)
    presets.tabletop(config)
    presets.simulator(config, ENV, TASKS[: args.tasks], args.demos, noise=0.1)
    data = config.data
    data.cameras, data.chunk = ("image", "wrist_image"), 20
    data.frames, data.frame_stride = 2, 20  # now, and at the end of the chunk
    data.instruction_length = 16
    config.total_steps = 2000
    config.eval.execute, config.eval.max_steps = 10, 280
    if args.debug:
        presets.simulator_debug(config)
    return config
