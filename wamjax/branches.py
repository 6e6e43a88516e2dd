"""Tries several proposals of a policy from the states it visits, and records their outcomes.

    python -m wamjax.branches --workdir=runs/choice --out=DIR --states=2048 --proposals=8

Each branch starts in a saved state and executes one proposal; the policy then finishes the episode.
A judge is trained on branches (experiments/configs/judge.py). The report also shows whether
choosing is worth it: the success of the best of N proposals by true outcome. For a run with a judge
it says how well the judge ranks the branches of a state. If the command is killed, run it again to
continue.

    python -m wamjax.branches --workdir=runs/ladder --out=DIR --proposals=8 --rungs=1,2,3,4,8 \
        --modes=direct,anticipate,imagine:2,imagine,direct

makes the proposals of a ladder whose rungs act in different modes, to train its judge and gate on.
"""

from __future__ import annotations

import json

from absl import flags

from wamjax import cli, files
from wamjax.data import branches as store
from wamjax.runs import branches, trained
from wamjax.training.checkpoint import find


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    flags.DEFINE_string("workdir", None, "run whose policy acts", required=True)
    flags.DEFINE_string(
        "out", None, "folder for the branches; created, or continued", required=True
    )
    flags.DEFINE_integer("states", 2048, "number of states, one from each visited episode")
    flags.DEFINE_integer("proposals", 8, "proposals per state")
    flags.DEFINE_integer("continuations", 1, "continuations per proposal")
    flags.DEFINE_integer(
        "seed", 2000, "seed of the episodes; must differ from that of the evaluation"
    )
    flags.DEFINE_string("mode", None, "mode of the policy; its own by default")
    flags.DEFINE_list("rungs", [], "proposals at each rung of a ladder, increasing, e.g. 1,2,3,8")
    flags.DEFINE_list("modes", [], "mode of the proposals that each rung adds, e.g. "
                      "direct,anticipate,imagine,direct")  # fmt: skip


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    options = flags.FLAGS
    policy, config, step = trained.load(options.workdir, None, options.mode)
    statistics = find(options.workdir, None).statistics
    cohort = branches.Cohort(
        options.states, options.proposals, options.continuations, options.seed,
        tuple(map(int, options.rungs)), tuple(options.modes),
    )  # fmt: skip
    about = {"policy": store.fingerprint(options.workdir), "step": step, "mode": options.mode}
    out = files.path(options.out, "--out")
    result = branches.grow(policy, config, statistics, out, cohort, about)
    if policy.objective.rungs:
        arrays = store.read(out)[2]
        result["judge"] = branches.judged(policy, arrays, policy.objective.discount)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    cli.run(main, define_flags, huge_pages=True)
