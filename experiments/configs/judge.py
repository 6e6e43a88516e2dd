"""A judge and a gate for the proposals of a trained Fast-WAM; the policy itself does not change.

    python -m wamjax.branches --workdir=runs/choice --out=runs/choice-branches
    python -m wamjax.train --workdir=runs/judge \
        --config=experiments/configs/judge.py:run=runs/choice,branches=runs/choice-branches
    python -m wamjax.evaluate --workdir=runs/judge --mode=plan:8
    python -m wamjax.evaluate --workdir=runs/judge --mode=adaptive:0.01

Everything but the value expert and the gate is frozen. So the run acts directly like the one it
starts from, and can also plan and choose when to plan. See docs/adaptive.md.

Branches that were made for a ladder (`wamjax.branches --rungs --modes`) say which one it climbs.

Arguments: run=DIR (of a variant that acts directly), branches=DIR (of that run), steps=N, debug.
"""

from wamjax import config as configs
from wamjax import files
from wamjax.data import branches
from wamjax.training.checkpoint import find
from wamjax.wam.fast_wam import presets


def get_config(arg=None):
    args = configs.parse_arg(arg, run="", branches="", steps=1500, debug=False)
    if args.run:
        config = configs.load(configs.to_json(find(args.run).config))
    else:  # as for a run on the tabletop
        config = configs.base_config()
        presets.fast_wam(config, "fast", "2026-08")
        presets.tabletop(config)
    presets.judge(config, args.run, args.branches)
    if args.branches and (made := branches.ladder_of(files.path(args.branches)))[0]:
        judge = config.objective.judge
        judge.rungs, judge.modes, judge.branches = made
    config.total_steps, config.log_every, config.checkpoint.every = args.steps, 50, 500
    if args.debug:
        config.total_steps, config.log_every, config.data.batch_size = 4, 1, 8
    return config
