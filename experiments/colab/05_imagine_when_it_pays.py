# ---
# jupyter:
#   colab:
#     private_outputs: true
#     provenance: []
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: colab
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Imagine when it pays: a ladder of proposals, and a gate with a price
#
# A policy that samples its actions can sample several and choose. That needs a judge that can tell
# proposals from the same state apart. It also costs milliseconds in every state, although in most
# states choosing gains nothing. Here a policy learns from demonstrations of mixed quality, a judge
# learns from the outcomes of the policy's proposals, and a gate learns when more proposals are
# worth their time.
#
# * **Hardware**: a CPU is enough; a GPU or TPU is used if the installed JAX sees one.
# * **Time**: about half an hour on two CPU cores, added up from its parts; not timed as a whole.
# * **Expected**: acting directly succeeds in about a quarter of the episodes, the best of eight in
#   about half, and the gate comes close to that with two or three proposals per plan.
#
# You need the installed package, not a clone.
# In Colab: *File*, *Open notebook*, *GitHub*, then enter the address of the repository.

# %%
import subprocess
import sys

# In Colab wamjax is installed from its repository, git+https://..., or from a wheel, file:///...
source = ""  # @param {type: "string"}
if "google.colab" in sys.modules:  # elsewhere: pip install 'wamjax[notebooks]' beforehand
    if not source:
        raise ValueError("set source: the address of the repository that this notebook is from")
    words = [sys.executable, "-m", "pip", "install", "-q", f"wamjax @ {source}"]
    subprocess.run(words, check=True)

import wamjax

print("wamjax", wamjax.__version__, "on Python", sys.version.split()[0])

# %% tags=["parameters"]
# @title Numbers { run: "auto" }
folder = "wamjax-adaptive"  # @param {type: "string"}
steps = 800  # @param {type: "slider", min: 100, max: 1500, step: 100}
states = 2048  # @param {type: "integer"}
judge_steps = 1000  # @param {type: "slider", min: 100, max: 1500, step: 100}
held_out = 512  # @param {type: "integer"}
episodes = 300  # @param {type: "integer"}
prices = (0.0, 0.001, 0.003, 0.01)  # @param {type: "raw"}
miniature = False  # @param {type: "boolean"}

# %% [markdown]
# ## A policy with two modes
#
# In half of the demonstrations the expert confuses red with blue and left with right. The policy
# imitates all of them, so from the same state it proposes sometimes one and sometimes the other.

# %%
import json
import pathlib

root = pathlib.Path(folder).absolute()
root.mkdir(parents=True, exist_ok=True)


def command(module, *arguments):
    """Runs a command of wamjax and returns what it prints."""
    words = [sys.executable, "-m", f"wamjax.{module}", *map(str, arguments)]
    done = subprocess.run(words, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


choice, judge = root / "choice", root / "judge"
small = ":debug" if miniature else ""
command("train", f"--config=choice_tabletop{small}", f"--workdir={choice}",
        f"--config.total_steps={steps}", f"--config.eval.episodes={episodes}",
        f"--config.data.root={root / 'data'}")  # fmt: skip
direct = json.loads((choice / "eval.json").read_text())
print(f"acting directly: {direct['success_rate']:.1%} of {direct['episodes']} episodes")

# %% [markdown]
# ## What is there to choose?
#
# From states that the policy visits, each of eight proposals is executed in the simulator and the
# policy then finishes the episode. The gain of the best proposal, by its true outcome, is the
# *headroom*: what a judge that is always right would gain. If it is small, choosing cannot help.

# %%
import matplotlib.pyplot as plt
import numpy as np

from wamjax.data import branches as stored

command("branches", f"--workdir={choice}", f"--out={root / 'branches'}", f"--states={states}")
arrays = stored.read(root / "branches")[2]
success = arrays["success"].mean(axis=2)
best = {n: success[:, :n].max(axis=1).mean() for n in (1, 2, 4, 8)}

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
left.hist(success.sum(axis=1), bins=np.arange(10) - 0.5, rwidth=0.8, color="C0")
left.set(xlabel="of eight proposals succeed", ylabel="states")
right.bar([str(n) for n in best], [100 * x for x in best.values()], color="C1")
right.set(xlabel="best of so many, by what came of them", ylabel="success %")
figure.tight_layout()
plt.show()
print(f"headroom of eight: {100 * (best[8] - success.mean()):.1f} points")

# %% [markdown]
# ## A judge, and a gate
#
# The judge is one more token: it attends to the first frame and a proposal, nothing attends to it,
# and everything else is frozen. So the policy still acts directly as before, bit for bit. For every
# state the gate predicts how much more a choice among more proposals would return than the current
# best.

# %%
command("train", f"--workdir={judge}", f"--config=judge:run={choice},branches={root / 'branches'}"
        + (",debug" if miniature else ""), f"--config.total_steps={judge_steps}",
        f"--config.eval.episodes={episodes}", "--config.eval.untrained=False",
        "--config.eval.blind=False")  # fmt: skip
report = json.loads(command("branches", f"--workdir={judge}", f"--out={root / 'others'}",
                            f"--states={held_out}", "--seed=3000"))  # fmt: skip
print("on states that neither was trained on")
print("  points gained by the judge's choice of N:", report["judge"]["gain"])
print("  points that there are to gain:           ", report["headroom"])
print("  rank correlation within a state:         ", report["judge"]["rank_correlation"])

# %% [markdown]
# ## Where does it pay?
#
# The states in which the gate expects the largest and the smallest gain. The title of each picture
# is the task given to the policy, the expected gain, and how many proposals succeed.

# %%
from wamjax.runs import branches, trained

policy = trained.load(judge)[0]
others = stored.read(root / "others")[2]
expected = branches.benefits_of(policy, others)[:, 0, -1]
order = np.argsort(-expected)
chosen = [*order[:4], *order[-4:]]
figure, axes = plt.subplots(2, 4, figsize=(9, 4.2))
for axis, i in zip(axes.flat, chosen, strict=True):
    ended = others["success"][i].mean(axis=1)
    axis.imshow(others["video"][i, 0])
    axis.set(title=f"{others['tasks'][i]}\nexpects {expected[i]:+.2f}, {ended.sum():.0f} of "
             f"{len(ended)} succeed", xticks=[], yticks=[])  # fmt: skip
    axis.title.set_fontsize(8)
figure.suptitle("more proposals pay most (above) and least (below), says the gate")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Success against milliseconds
#
# Every mode acts in the same episodes. The price is the cost of a millisecond in units of the
# return; the milliseconds are measured on this machine before it acts.

# %%
modes = ["direct", "plan:4", "plan:8", *(f"adaptive:{price:g}" for price in prices)]
results = {}
for mode in modes:
    command("evaluate", f"--workdir={judge}", f"--mode={mode}")
    results[mode] = json.loads((judge / f"eval_{mode.replace(':', '-')}.json").read_text())

rungs, ms = (results[modes[-1]][key] for key in ("rung_proposals", "rung_ms"))
print(f"{'way to act':16} success            proposals  ms")
points = {}
for mode, result in results.items():
    count = int(mode.partition(":")[2]) if mode.startswith("plan") else 1
    shares = result.get("rungs") if mode.startswith("adaptive") else None
    shares = shares or [float(n == count) for n in rungs]
    points[mode] = float(np.dot(shares, ms)), 100 * result["success_rate"]
    low, high = result["interval"]
    print(f"{mode:16} {result['success_rate']:6.1%} [{low:.1%}, {high:.1%}]"
          f"  {np.dot(shares, rungs):6.2f}  {points[mode][0]:6.1f}")  # fmt: skip

# %%
figure, axis = plt.subplots(figsize=(6, 3.5))
for label, kind in (("fixed", ("direct", "plan")), ("gate", ("adaptive",))):
    some = sorted(x for mode, x in points.items() if mode.startswith(kind))
    axis.plot(*zip(*some, strict=True), "o-", label=label)
axis.set(xlabel="milliseconds of a plan, on average", ylabel="success %")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What next
#
# * Do the same on a robot: `wamjax.load_policy(folder, mode="adaptive:0.003")` after
#   `python -m wamjax.export_policy`.
# * Read what was compared and what was not: `docs/adaptive.md`.
# * Try another world: branches need one that can continue from a saved state (`World.restores`).
