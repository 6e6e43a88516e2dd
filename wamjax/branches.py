"""Tries out, from states that a policy visits, what comes of several of its proposals.

    python -m wamjax.branches --workdir=runs/choice --out=DIR --states=2048 --proposals=8

Every branch begins in the saved state, carries one proposal out and is gone on from by the policy
itself. What a judge is trained on (experiments/configs/judge.py); and by itself the answer to
whether there is anything to choose: the success of the best of N by its true outcome. Of a run with
a judge also how well it ranks the branches of a state. A killed run goes on where it stopped.

    python -m wamjax.branches --workdir=runs/ladder --out=DIR --proposals=8 --rungs=1,2,3,4,8 \
        --modes=direct,anticipate,imagine:2,imagine,direct

makes the proposals of a ladder of several ways to act, for a judge and a gate of it.
"""

from __future__ import annotations

import json

from absl import flags

from wamjax import cli, files
from wamjax.data import branches as store
from wamjax.runs import branches, trained
from wamjax.training.checkpoint import find


def define_flags() -> None:
    """Not on import: several entry points define flags of the same names."""
    flags.DEFINE_string("workdir", None, "the run whose policy acts", required=True)
    flags.DEFINE_string("out", None, "folder of the branches; made, or gone on with", required=True)
    flags.DEFINE_integer("states", 2048, "states, one of each visited episode")
    flags.DEFINE_integer("proposals", 8, "of each state")
    flags.DEFINE_integer("continuations", 1, "of each proposal")
    flags.DEFINE_integer("seed", 2000, "which episodes; not that of the evaluation")
    flags.DEFINE_string("mode", None, "how to propose; the policy's own way by default")
    flags.DEFINE_list("rungs", [], "proposals on each rung of a ladder, growing, e.g. 1,2,3,8")
    flags.DEFINE_list("modes", [], "how those are made that each rung adds, e.g. "
                      "direct,anticipate,imagine,direct")  # fmt: skip


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""
    asked = flags.FLAGS
    policy, config, step = trained.load(asked.workdir, None, asked.mode)
    statistics = find(asked.workdir, None).statistics
    cohort = branches.Cohort(
        asked.states, asked.proposals, asked.continuations, asked.seed,
        tuple(map(int, asked.rungs)), tuple(asked.modes),
    )  # fmt: skip
    about = {"policy": store.fingerprint(asked.workdir), "step": step, "mode": asked.mode}
    out = files.path(asked.out, "--out")
    result = branches.grow(policy, config, statistics, out, cohort, about)
    if policy.objective.rungs:
        arrays = store.read(out)[2]
        result["judge"] = branches.judged(policy, arrays, policy.objective.discount)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    cli.run(main, define_flags, huge_pages=True)
