"""A small Cosmos Policy in the built-in tabletop simulator: policy, world model and value in one.

    python -m wamjax.train --workdir=runs/world \
        --config=experiments/configs/cosmos_policy_tabletop.py:action_weight=0,steps=2500
    python -m wamjax.train --workdir=runs/cosmos \
        --config=experiments/configs/cosmos_policy_tabletop.py:steps=700 \
        --config.init_from.path=runs/world
    python -m wamjax.evaluate --workdir=runs/cosmos --mode=plan
    python -m wamjax.train --config=experiments/configs/cosmos_policy_tabletop.py:debug \
        --workdir=runs/try

The published policies are fine-tuned video models. Likewise, the first command trains a world model
without an action loss, and the second starts the policy from it. They take 18 and 5 minutes on one
CPU core. The policy then succeeds in 66 % of 96 episodes, executing four actions of each plan.
Training from scratch for 1,500 steps, the default, reaches 45 % of 300 episodes, executing two.
`debug` takes under a minute.

Nine slots of 16 tokens: blank, state, two cameras, 8 actions, state and cameras at the end of the
chunk, value. Half of a batch are demonstrations of three tasks; a quarter each are successful and
failed episodes of a noisy expert.

Arguments:
  steps=N, seed=N, demos=N, rollouts=N
  tasks=NAME+NAME+...   of wamjax.envs.tabletop
  value=value|value_v|value_q, auxiliary=BOOL, action_weight=W (of the action loss)
  uniform=SHARE (of uniform noise levels)
  sigma_min=S, infer_steps=N, visibility=bidirectional|prefix
  planner, recorded=DIR  fine-tunes world model and V(s') on rollouts of a policy
  debug

To train a planner on the policy's rollouts and plan with it:

    python -m wamjax.rollouts --workdir=runs/cosmos --out=DIR
    python -m wamjax.train --workdir=runs/planner \
        --config=experiments/configs/cosmos_policy_tabletop.py:planner,steps=500,recorded=DIR \
        --config.init_from.path=runs/cosmos
    python -m wamjax.evaluate --workdir=runs/cosmos --mode=plan --planner=runs/planner
"""

from wamjax import config as configs
from wamjax.wam.cosmos_policy import presets

TASKS = "reach_red+reach_left_zone+pick_red"


def get_config(arg=None):
    args = configs.parse_arg(
        arg, steps=1500, seed=0, demos=1500, rollouts=900, tasks=TASKS, value="value",
        auxiliary=True, action_weight=4.0, uniform=0.3, sigma_min=4.0, infer_steps=5,
        visibility="bidirectional",
        planner=False, recorded="", debug=False,
    )  # fmt: skip
    config = configs.base_config()
    presets.tabletop(config)
    config.seed, config.total_steps, config.data.batch_size = args.seed, args.steps, 16
    config.optim.name, config.optim.learning_rate = "muon", 3e-3
    model, objective = config.model, config.objective
    model.video.width, model.video.ffn, model.modulation_rank = 128, 512, 32
    # These differ from the published values, since no published weights are loaded.
    model.time_scale = 1000.0
    model.positions = "both"  # tokens of a chunk hold different actions and need their index
    objective.value, objective.uniform = args.value, args.uniform
    objective.auxiliary, objective.action_weight = args.auxiliary, args.action_weight
    objective.sigma_min, objective.visibility = args.sigma_min, args.visibility
    objective.infer_steps, objective.discount = args.infer_steps, 0.98
    tasks = tuple(args.tasks.split("+"))
    noisy = dict(tasks=tasks, episodes=args.rollouts, noise=0.8, seed=1, keep_failures=True)
    sources = config.data.sources
    sources.demos = configs.source(
        weight=2.0,
        collect={"tasks": tasks, "episodes": args.demos, "noise": 0.1, "intended": True},
    )
    sources.successes = configs.source(rollout=True, ended="success", collect=noisy)
    sources.failures = configs.source(rollout=True, ended="failure", collect=noisy)
    if args.planner:
        presets.planner(config, args.recorded)
    config.eval.tasks = tasks
    config.eval.episodes, config.eval.execute = 300, 2
    if args.debug:
        presets.tabletop_debug(config)
    return config
