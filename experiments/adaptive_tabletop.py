"""When does choosing among proposals pay, and does a gate know? Success against milliseconds.

    python experiments/adaptive_tabletop.py --workdir=runs/adaptive --judge=runs/judge

Compares, for one checkpoint with a judge (experiments/configs/judge.py) on equal episodes: acting
directly, every fixed rung of its ladder, the learned gate at several prices of a millisecond, and
three baseline gates: the spread of the first proposals above a threshold, a random choice, and
continuing only while the best value still rises (convergence). Thresholds come from branches of
other episodes (--branches). Milliseconds are those of each rung for one robot, measured here, times
how often the rung was reached.

For one plan it also evaluates, on branches that nothing was trained or chosen on (--held_out), what
every gate would have done and the outcome, over all its prices or thresholds, with an oracle that
knows the outcome of every rung; and whether the learned gate's expected benefits match the observed
ones (reliability).

Writes frontier.{json,md,png} and gates.{json,md,png}. Each row is stored as soon as it is measured;
all rows of a gate are one compiled program.
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
SHARES = (0.25, 0.5)  # shares of states in which a baseline continues


def learned(policy, observation, keys):
    """Returns the trained gate, at the costs of the policy."""
    return policy.decide(observation, keys)


def _with(gate, policy, observation, keys):
    decision = policy.objective.decide(
        policy.params, policy.normalizers, observation, keys, "adaptive", gate=gate
    )
    return decision.actions, {"rung": decision.rung}


def spread(policy, observation, keys):
    """Draws four proposals; draws all if their spread exceeds the threshold costs[1]."""

    def gate(rung, proposals, values):
        far = ladder.spread(proposals)
        return (far > policy.costs[rung]) | (rung == 0), far

    return _with(gate, policy, observation, keys)


def random(policy, observation, keys):
    """Takes each rung with the probability costs[rung]."""

    def gate(rung, proposals, values):
        dice = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 50 + rung)))(keys)
        return dice < policy.costs[rung], dice

    return _with(gate, policy, observation, keys)


def convergence(policy, observation, keys):
    """Draws four proposals; draws all while the best value rises by more than costs[1]."""

    def gate(rung, proposals, values):
        rise = jnp.max(values, axis=1) - values[:, 0]
        return (rise > policy.costs[rung]) | (rung == 0), rise

    return _with(gate, policy, observation, keys)


GATES = {f.__name__: f for f in (learned, spread, random, convergence)}


def rows(policy: trained.Policy, milliseconds, quantiles) -> dict[str, tuple[str, np.ndarray]]:
    """Returns name -> (gate, costs), or (mode, None) for a mode that a rung adds, used alone."""
    rungs, ms = policy.objective.rungs, np.array(milliseconds)
    steps = np.arange(len(rungs))
    modes = policy.objective.rung_modes or ("direct",) * len(rungs)
    out = {}
    for h, (n, mode) in enumerate(zip(rungs, modes, strict=True)):
        name = f"best of {n}" if n > 1 else "direct"
        also = dict.fromkeys(modes[1 : h + 1])  # in order, each once
        name += f" ({', '.join(also)})" if any(m != "direct" for m in also) else ""
        out[name] = "learned", np.where(steps <= h, -1e6 * steps, 1e9)
        if mode != "direct":
            out[f"{mode} alone"] = mode, None
    out |= {f"gate, price {price:g}": ("learned", price * ms) for price in PRICES}
    for share in SHARES:
        costs = np.full(len(rungs), 0.0)
        out[f"spread, {share:.0%}"] = "spread", costs + quantiles["spread"][str(share)]
        out[f"convergence, {share:.0%}"] = "convergence", costs + quantiles["rise"][str(share)]
        out[f"random, {share:.0%}"] = "random", costs + share
    return out


def thresholds(policy: trained.Policy, folder: pathlib.Path) -> dict[str, dict[str, float]]:
    """Returns the thresholds on the spread and on the rise of the best value that each share of
    states exceeds."""
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
    """Measures all rows that are not in the file yet."""
    options = flags.FLAGS
    policy, config, step = trained.load(run)
    done = json.loads(path.read_text()) if path.exists() else {}
    if "rung_ms" not in done:
        policy = trained.priced(dataclasses.replace(policy, mode="adaptive:0"))
        milliseconds = [float(x) for x in policy.milliseconds]
        done = {"step": step, "episodes": options.episodes, "shift": shift, "rows": {},
                "rungs": list(policy.objective.rungs), "rung_ms": milliseconds,
                "thresholds": thresholds(policy, folder)}  # fmt: skip
    policy = dataclasses.replace(policy, mode="adaptive")
    config.eval.episodes, config.eval.blind = options.episodes, False
    world = open_world(config.eval.env)
    dials = shift_of(world, shift)
    for name, (gate, costs) in rows(policy, done["rung_ms"], done["thresholds"]).items():
        if name in done["rows"]:
            continue
        print(name, flush=True)
        if gate in GATES:
            acting = dataclasses.replace(policy, costs=jnp.asarray(costs, jnp.float32))
            found = closed_loop.roll_out(acting, config, dials, world, function=GATES[gate])
            shares = found["rungs"] + [0.0] * (len(done["rungs"]) - len(found["rungs"]))
            ms, proposals = (float(np.dot(shares, done[k])) for k in ("rung_ms", "rungs"))
        else:  # a mode of the checkpoint by itself
            acting, shares, proposals = dataclasses.replace(policy, mode=gate, costs=None), [], 1.0
            found = closed_loop.roll_out(acting, config, dials, world)
            ms = trained.latency(acting, config)["p50"]
        done["rows"][name] = {
            "success_rate": found["success_rate"], "interval": found["interval"],
            "outcomes": found["outcomes"], "rungs": shares, "ms": ms, "proposals": proposals,
            "per_task": {k: v["success_rate"] for k, v in found["per_task"].items()},
        }  # fmt: skip
        path.write_text(json.dumps(done, indent=1) + "\n")
    return done


def table(done: dict) -> str:
    """Compares all rows with acting directly, in pairs."""
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
    """Draws success against milliseconds, one line per gate."""
    from wamjax.viz import figures

    figure = figures.figure(7, 4.5)
    axes = figure.add_subplot()
    kinds = {"fixed": lambda n: n == "direct" or n.startswith("best of")}
    kinds |= {"one mode": lambda n: n.endswith(" alone")}
    gates = "gate", "spread", "convergence", "random"
    kinds |= {k: lambda n, k=k: n.startswith(k) for k in gates}
    for colour, (kind, belongs) in zip(figures.COLORS, kinds.items(), strict=False):
        some = [row for name, row in done["rows"].items() if belongs(name)]
        points = sorted((row["ms"], 100 * row["success_rate"]) for row in some)
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=kind, ms=4)
    axes.set(xlabel="milliseconds of a plan, on average", ylabel="success %")
    axes.legend(frameon=False)
    figures.plain(axes)
    figures.write(figure, path)


# ---- one plan, on branches ----


def gates(policy: trained.Policy, folder: pathlib.Path, milliseconds, orders: int = 16) -> dict:
    """Evaluates what gates would have done in states of branches, in several orders of the
    proposals.

    Returns:
      {"curves": {gate: [[mean milliseconds, mean proposals, success], ...]}, "reliability":
      [[expected, came, standard error, states], ...] of the best higher rung from the first one}.
    """
    _, _, arrays = store.read(folder)
    rungs, discount = policy.objective.rungs, policy.objective.discount
    ways = ladder.ways(rungs, policy.objective.rung_modes, arrays["actions"].shape[1])
    alike = [i for i, way in enumerate(ways) if way == ways[0]]
    rng, parts = np.random.default_rng(0), []
    for i in range(orders):
        shuffled = _in_order(arrays, ways, jax.random.key(i))
        values = branches.values_of(policy, shuffled)
        outcomes = shuffled["success"] * discount ** shuffled["steps"]
        proposals = policy.normalizers["actions"].forward(shuffled["actions"])
        parts.append({
            "benefit": branches.benefits_of(policy, shuffled),
            "came": np.asarray(ladder.outcomes(rungs, values, outcomes.mean(axis=2), alike)),
            "succeeded": np.asarray(
                ladder.outcomes(rungs, values, shuffled["success"].mean(axis=2), alike)
            ),
            "spread": np.asarray(ladder.spread(jnp.asarray(proposals[:, : rungs[1]]))),
            "rise": values[:, : rungs[1]].max(axis=1) - values[:, 0],
        })  # fmt: skip
    x = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    curves = {
        name: [_spent(x["succeeded"], rung, rungs, milliseconds) for rung in choices]
        for name, choices in _choices(x, np.array(milliseconds), rng).items()
    }
    return {"states": len(arrays["actions"]), "orders": orders, "rungs": list(rungs),
            "rung_ms": list(milliseconds), "curves": curves,
            "reliability": _reliability(x, len(arrays["actions"]))}  # fmt: skip


def _in_order(arrays: dict[str, np.ndarray], ways, key) -> dict[str, np.ndarray]:
    """Shuffles the proposals of every state among those made in the same mode."""
    states = len(arrays["actions"])
    order = np.asarray(ladder.shuffled(key, ways, states))
    rows = np.arange(states)[:, None]
    return arrays | {k: arrays[k][rows, order] for k in ("actions", "success", "steps")}


def _choices(x: dict[str, np.ndarray], milliseconds: np.ndarray, rng) -> dict[str, list]:
    """Returns gate -> the rungs it would have reached at each of its prices or thresholds."""
    last = len(milliseconds) - 1
    shares = np.linspace(0, 1, 21)
    prices = np.concatenate([[0.0], np.geomspace(1e-5, 1.0, 41)])
    truth = x["came"][:, None, :] - x["came"][:, :last, None]
    dice = rng.random((last, len(x["came"])))

    def climbed(goes_on):  # (rungs - 1, states) -> the rung of each state
        return np.cumprod(goes_on, axis=0).sum(axis=0)

    def paying(benefit, price):
        return climbed([
            np.asarray(ladder.pays(h, benefit[:, h], price * milliseconds)[0]) for h in range(last)
        ])  # fmt: skip

    def past(mark, share):
        return np.where(mark > np.quantile(mark, 1 - share), last, 1)

    return {
        "fixed": [np.full(len(x["came"]), h) for h in range(last + 1)],
        "learned": [paying(x["benefit"], price) for price in prices],
        "oracle": [paying(truth, price) for price in prices],
        "spread": [past(x["spread"], share) for share in shares],
        "convergence": [past(x["rise"], share) for share in shares],
        "random": [climbed(dice < share) for share in shares],
    }


def _spent(succeeded: np.ndarray, rung: np.ndarray, rungs, milliseconds) -> list[float]:
    came = np.take_along_axis(succeeded, rung[:, None], axis=1)
    return [float(np.array(milliseconds)[rung].mean()), float(np.array(rungs)[rung].mean()),
            float(came.mean())]  # fmt: skip


def _reliability(x: dict[str, np.ndarray], states: int, bins: int = 8) -> list[list[float]]:
    expected, came = x["benefit"][:, 0, -1], x["came"][:, -1] - x["came"][:, 0]
    edges = np.quantile(expected, np.linspace(0, 1, bins + 1))
    which = np.clip(np.searchsorted(edges, expected, side="right") - 1, 0, bins - 1)
    state, out = np.arange(len(expected)) % states, []
    for i in range(bins):
        mine = which == i
        if not mine.any():
            continue
        # Orders of one state are not independent, so the error is that of the states' means.
        each = [came[mine & (state == s)].mean() for s in np.unique(state[mine])]
        error = np.std(each, ddof=1) / np.sqrt(len(each)) if len(each) > 1 else 0.0
        out.append([float(expected[mine].mean()), float(came[mine].mean()), float(error),
                    len(each)])  # fmt: skip
    return out


def at_equal_effort(found: dict) -> str:
    """Returns success of every gate at the same mean number of proposals, as a table."""
    marks = 1.5, 2.0, 3.0, 4.0, 5.0, 6.0
    lines = [
        f"{found['states']} states of branches, one plan; success % at a mean number of proposals",
        "", "| gate | " + " | ".join(f"{m:g}" for m in marks) + " |", "|---" * 7 + "|",
    ]  # fmt: skip
    for name, points in found["curves"].items():
        spent, came = np.array(sorted((p[1], p[2]) for p in points)).T
        row = [f"{100 * np.interp(m, spent, came):.1f}" if spent[0] <= m <= spent[-1] else "-"
               for m in marks]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def draw_gates(found: dict, path: pathlib.Path) -> None:
    """Draws success against milliseconds of one plan, and expected against observed benefits."""
    from wamjax.viz import figures

    figure = figures.figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    for colour, (name, points) in zip(figures.COLORS, found["curves"].items(), strict=False):
        line = sorted((ms, 100 * success) for ms, _, success in points)
        left.plot(*zip(*line, strict=True), ".-", color=colour, label=name, ms=4)
    left.set(xlabel="milliseconds of a plan, on average", ylabel="success % of what follows")
    left.legend(frameon=False)
    expected, came, error, _ = np.array(found["reliability"]).T
    right.errorbar(expected, came, 1.96 * error, fmt="o", color=figures.COLORS[0], ms=4)
    low, high = min(expected.min(), 0), max(expected.max(), came.max())
    right.plot([low, high], [low, high], color="0.7", lw=1, zorder=0)
    right.set(xlabel="benefit of all proposals that the gate expects", ylabel="benefit that came")
    for axes in (left, right):
        figures.plain(axes)
    figures.write(figure, path)


def _marks(row: dict) -> np.ndarray:
    return np.array([mark == "1" for mark in row["outcomes"]], float)


def define_flags() -> None:
    """Defines the flags; not on import, since several entry points share flag names."""
    flags.DEFINE_string("workdir", "runs/adaptive", "folder of the results")
    flags.DEFINE_string("judge", "runs/judge", "a run with a judge")
    flags.DEFINE_string("branches", "runs/judge-branches", "branches that thresholds come from")
    flags.DEFINE_string("held_out", "", "branches of the judge for gates.*; '' = none")
    flags.DEFINE_string("shift", "none", "of the world, by name")
    flags.DEFINE_integer("episodes", 1000, "of every row, the same ones")


def main(argv: list[str]) -> None:
    """Runs the study; flags are parsed."""
    options = flags.FLAGS
    workdir = pathlib.Path(options.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    name = "frontier" if options.shift == "none" else f"frontier-{options.shift}"
    done = measure(
        pathlib.Path(options.judge), pathlib.Path(options.branches), workdir / f"{name}.json",
        options.shift,
    )  # fmt: skip
    (workdir / f"{name}.md").write_text(table(done) + "\n")
    draw(done, workdir / f"{name}.png")
    print(table(done))
    if options.held_out:
        policy = trained.load(pathlib.Path(options.judge))[0]
        found = gates(policy, pathlib.Path(options.held_out), done["rung_ms"])
        (workdir / "gates.json").write_text(json.dumps(found, indent=1) + "\n")
        (workdir / "gates.md").write_text(at_equal_effort(found) + "\n")
        draw_gates(found, workdir / "gates.png")
        print(at_equal_effort(found))


if __name__ == "__main__":
    cli.run(main, define_flags, huge_pages=True)
