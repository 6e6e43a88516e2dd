"""When does choosing among proposals pay, and does a gate know? Success against milliseconds.

    python experiments/adaptive_tabletop.py --workdir=runs/adaptive --judge=runs/judge

Of one checkpoint with a judge (experiments/configs/judge.py), on equal episodes: acting directly,
every fixed rung of its ladder, the learned gate at several prices of a millisecond, and three gates
that it has to beat: the spread of the first proposals above a threshold, a random choice, and going
on only while the best value still rises (convergence). Thresholds come from branches of other
episodes (--branches). Milliseconds are those of each rung at one robot, measured here, times how
often it was climbed to.

Writes frontier.json, frontier.md and frontier.png. Each row is kept as soon as it is measured; all
rows of a gate are one compiled program.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from wamjax import cli
from wamjax.data import branches as store
from wamjax.envs.world import open_world, shift_of
from wamjax.runs import branches, closed_loop, trained
from wamjax.viz import intervals
from wamjax.wam import ladder

PRICES = (0.0, 0.001, 0.003, 0.01)  # return per millisecond
SHARES = (0.25, 0.5)  # of states that a baseline goes on in


def learned(policy, observation, keys):
    """The gate that was trained, at the costs of the policy."""
    return policy.decide(observation, keys)


def _with(gate, policy, observation, keys):
    done = policy.objective.decide(
        policy.params, policy.normalizers, observation, keys, "adaptive", gate=gate
    )
    return done.actions, {"rung": done.rung}


def spread(policy, observation, keys):
    """Four proposals always; all where they are further apart than the threshold costs[1]."""

    def gate(rung, proposals, values):
        far = ladder.spread(proposals)
        return (far > policy.costs[rung]) | (rung == 0), far

    return _with(gate, policy, observation, keys)


def random(policy, observation, keys):
    """Each rung with the probability costs[rung]."""

    def gate(rung, proposals, values):
        dice = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 50 + rung)))(keys)
        return dice < policy.costs[rung], dice

    return _with(gate, policy, observation, keys)


def convergence(policy, observation, keys):
    """Four proposals always; all while the best value rises by more than costs[1]."""

    def gate(rung, proposals, values):
        rise = jnp.max(values, axis=1) - values[:, 0]
        return (rise > policy.costs[rung]) | (rung == 0), rise

    return _with(gate, policy, observation, keys)


GATES = {f.__name__: f for f in (learned, spread, random, convergence)}


def rows(policy: trained.Policy, milliseconds, quantiles) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (gate, costs)."""
    rungs, ms = policy.objective.rungs, np.array(milliseconds)
    steps = np.arange(len(rungs))
    out = {
        f"best of {n}" if n > 1 else "direct":
            ("learned", np.where(steps <= h, -1e6 * steps, 1e9)) for h, n in enumerate(rungs)
    }  # fmt: skip
    out |= {f"gate, price {price:g}": ("learned", price * ms) for price in PRICES}
    for share in SHARES:
        costs = np.full(len(rungs), 0.0)
        out[f"spread, {share:.0%}"] = "spread", costs + quantiles["spread"][str(share)]
        out[f"convergence, {share:.0%}"] = "convergence", costs + quantiles["rise"][str(share)]
        out[f"random, {share:.0%}"] = "random", costs + share
    return out


def thresholds(policy: trained.Policy, folder: pathlib.Path) -> dict[str, dict[str, float]]:
    """Of spread and of the rise of the best value, above which there is each share of states."""
    _, _, arrays = store.read(folder)
    arrays["actions"] = arrays["actions"][:, : policy.objective.rungs[1]]
    values = branches.values_of(policy, arrays)
    proposals = policy.normalizers["actions"].forward(arrays["actions"])
    far = np.asarray(ladder.spread(jnp.asarray(proposals)))
    rise = values.max(axis=1) - values[:, 0]
    return {
        name: {str(share): float(np.quantile(x, 1 - share)) for share in SHARES}
        for name, x in (("spread", far), ("rise", rise))
    }


def measure(run: pathlib.Path, folder: pathlib.Path, path: pathlib.Path, shift: str) -> dict:
    """All rows; those that are in the file stay."""
    asked = flags.FLAGS
    policy, config, step = trained.load(run)
    done = json.loads(path.read_text()) if path.exists() else {}
    if "rung_ms" not in done:
        policy = trained.priced(dataclasses.replace(policy, mode="adaptive:0"))
        milliseconds = [float(x) for x in policy.milliseconds]
        done = {"step": step, "episodes": asked.episodes, "shift": shift, "rows": {},
                "rungs": list(policy.objective.rungs), "rung_ms": milliseconds,
                "thresholds": thresholds(policy, folder)}  # fmt: skip
    policy = dataclasses.replace(policy, mode="adaptive")
    config.eval.episodes, config.eval.blind = asked.episodes, False
    world = open_world(config.eval.env)
    dials = shift_of(world, shift)
    for name, (gate, costs) in rows(policy, done["rung_ms"], done["thresholds"]).items():
        if name in done["rows"]:
            continue
        acting = dataclasses.replace(policy, costs=jnp.asarray(costs, jnp.float32))
        print(name, flush=True)
        found = closed_loop.roll_out(acting, config, dials, world, function=GATES[gate])
        shares = found["rungs"] + [0.0] * (len(done["rungs"]) - len(found["rungs"]))
        done["rows"][name] = {
            "success_rate": found["success_rate"], "interval": found["interval"],
            "outcomes": found["outcomes"], "rungs": shares,
            "ms": float(np.dot(shares, done["rung_ms"])),
            "proposals": float(np.dot(shares, done["rungs"])),
            "per_task": {k: v["success_rate"] for k, v in found["per_task"].items()},
        }  # fmt: skip
        path.write_text(json.dumps(done, indent=1) + "\n")
    return done


def table(done: dict) -> str:
    """All rows against acting directly, in pairs."""
    base = _marks(done["rows"]["direct"])
    lines = [
        f"{done['episodes']} episodes, rungs of {done['rungs']} proposals take "
        f"{', '.join(f'{x:.2f}' for x in done['rung_ms'])} ms",
        "",
        "| way to act | success % | against direct | proposals | ms |",
        "|---|---|---|---|---|",
    ]
    for name, row in done["rows"].items():
        gain = 100 * (_marks(row) - base)
        half = 1.96 * gain.std(ddof=1) / np.sqrt(len(gain))
        rate = intervals.wilson(int(_marks(row).sum()), len(base))
        lines.append(f"| {name} | {rate.percent()} | {gain.mean():+.1f} +- {half:.1f} | "
                     f"{row['proposals']:.2f} | {row['ms']:.2f} |")  # fmt: skip
    return "\n".join(lines)


def draw(done: dict, path: pathlib.Path) -> None:
    """Success against milliseconds, one line for each gate."""
    from wamjax.viz import figures

    made = figures.figure(7, 4.5)
    axes = made.add_subplot()
    kinds = {"fixed": lambda n: n == "direct" or n.startswith("best of")}
    gates = "gate", "spread", "convergence", "random"
    kinds |= {k: lambda n, k=k: n.startswith(k) for k in gates}
    for colour, (kind, mine) in zip(figures.COLORS, kinds.items(), strict=False):
        some = [row for name, row in done["rows"].items() if mine(name)]
        points = sorted((row["ms"], 100 * row["success_rate"]) for row in some)
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=kind, ms=4)
    axes.set(xlabel="milliseconds of a plan, on average", ylabel="success %")
    axes.legend(frameon=False)
    figures.plain(axes)
    figures.write(made, path)


def _marks(row: dict) -> np.ndarray:
    return np.array([mark == "1" for mark in row["outcomes"]], float)


def define_flags() -> None:
    """Not on import: several entry points define flags of the same names."""
    flags.DEFINE_string("workdir", "runs/adaptive", "folder of the results")
    flags.DEFINE_string("judge", "runs/judge", "a run with a judge")
    flags.DEFINE_string("branches", "runs/judge-branches", "branches that thresholds come from")
    flags.DEFINE_string("shift", "none", "of the world, by name")
    flags.DEFINE_integer("episodes", 1000, "of every row, the same ones")


def main(argv: list[str]) -> None:
    """Runs the study; flags are parsed."""
    asked = flags.FLAGS
    workdir = pathlib.Path(asked.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    name = "frontier" if asked.shift == "none" else f"frontier-{asked.shift}"
    done = measure(
        pathlib.Path(asked.judge), pathlib.Path(asked.branches), workdir / f"{name}.json",
        asked.shift,
    )  # fmt: skip
    (workdir / f"{name}.md").write_text(table(done) + "\n")
    draw(done, workdir / f"{name}.png")
    print(table(done))


if __name__ == "__main__":
    cli.run(main, define_flags, huge_pages=True)
