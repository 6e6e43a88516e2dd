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
# # Quickstart: from nothing to a robot that acts
#
# Train a small Fast-WAM, a video model with an action head, on demonstrations of three tasks in the
# built-in simulator. Watch it learn, watch it act, then change one number and repeat.
#
# * **Hardware**: a CPU is enough; a GPU or TPU is used if the installed JAX sees one.
# * **Time**: five to ten minutes per run on two CPU cores, including collection and evaluation; ten
#   to twenty minutes for both runs.
# * **Expected**: about 94 % of the episodes succeed (about 1 % untrained).
#
# You need the installed package, not a clone: the config is written below, in a few lines.
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
folder = "wamjax-quickstart"  # @param {type: "string"}
variant = "fast"  # @param ["fast", "joint", "idm", "no_cotrain", "optional_idm"]
demonstrations = 1500  # @param {type: "integer"}
steps = 600  # @param {type: "slider", min: 50, max: 1500, step: 50}
episodes = 510  # @param {type: "integer"}
miniature = False  # @param {type: "boolean"}

# %% [markdown]
# ## The config
#
# A config file defines a function that starts from the defaults and changes values. Presets set
# groups of keys that belong together. A key that does not exist is an error with a suggestion.

# %%
import pathlib

root = pathlib.Path(folder).absolute()
root.mkdir(parents=True, exist_ok=True)
(root / "quickstart.py").write_text(f'''
from wamjax import config as configs
from wamjax.wam.fast_wam import presets

TASKS = ("reach_red", "reach_left_zone", "pick_red")


def get_config(arg=None):
    args = configs.parse_arg(arg, variant={variant!r})
    config = configs.base_config()
    presets.fast_wam(config, args.variant, "2026-08")
    presets.tabletop(config)
    config.total_steps = {steps}
    config.optim.name, config.optim.learning_rate = "muon", 3e-3
    config.data.sources.demos = configs.source(
        collect={{"tasks": TASKS, "episodes": {demonstrations}, "noise": 0.1, "intended": True}}
    )
    config.eval.episodes, config.eval.execute, config.eval.untrained = {episodes}, 2, True
    if {miniature}:
        presets.tabletop_debug(config)
    return config
''')
print((root / "quickstart.py").read_text())

# %% [markdown]
# Before you train, check what the config describes: parameters, FLOPs, and which slots attend to
# which.

# %%
def command(module, *arguments):
    """Runs a command of wamjax and returns what it prints."""
    words = [sys.executable, "-m", f"wamjax.{module}", *arguments]
    done = subprocess.run(words, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


print(command("doctor", f"--config={root / 'quickstart.py'}"))

# %% [markdown]
# ## Train and watch
#
# Training runs in its own process, as it would outside a notebook:
# `python -m wamjax.train --config=FILE --workdir=DIR`. This cell starts it and plots what it writes
# to `metrics.jsonl`. If you interrupt the cell, run it again: training resumes from the newest
# checkpoint.

# %%
import json
import time

import ipywidgets
import matplotlib.pyplot as plt
from IPython.display import clear_output, display


def rows_of(run):
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the last one is being written
            break
    return rows


def draw(runs):
    """Losses of runs, smoothed by eye alone."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3))
    for name, rows in runs.items():
        for panel, key in zip(axes, ("loss_video", "loss_action"), strict=True):
            points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), lw=0.8, label=name)
            panel.set(title=key, xlabel="step", yscale="log")
    for panel in axes:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False)
    figure.tight_layout()
    plt.show()


def train(name, *overrides, total, every=5.0):
    """Trains a run to its end, with a bar and live plots; returns its eval.json."""
    run = root / name
    bar = ipywidgets.IntProgress(max=total, description=name)
    log = (root / f"{name}.log").open("w")
    words = [sys.executable, "-m", "wamjax.train", f"--config={root / 'quickstart.py'}",
             f"--workdir={run}", *overrides]  # fmt: skip
    process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        while process.poll() is None:
            time.sleep(every)
            rows = rows_of(run)
            bar.value = len(rows)
            clear_output(wait=True)
            display(bar)
            print(f"step {len(rows)} of {total}" if len(rows) < total else "rolling out")
            draw({name: rows})
    finally:
        if process.poll() is None:
            process.terminate()  # it saves, and stops
            process.wait()
        log.close()
    text = (root / f"{name}.log").read_text()
    if process.returncode:
        raise RuntimeError(text[-3000:])
    print(text[-400:])
    return json.loads((run / "eval.json").read_text())


total = 6 if miniature else steps
first = train("first", total=total)

# %%
low, high = first["interval"]
rate, count = first["success_rate"], first["episodes"]
print(f"success {rate:.1%} [{low:.1%}, {high:.1%}] of {count} episodes")
print(f"untrained {first['untrained_success_rate']:.1%}")
print(f"the same actions in another scene, without looking {first['blind_success_rate']:.1%}")
for task, result in first["per_task"].items():
    print(f"  {task:16} {result['success_rate']:.1%}")

# %% [markdown]
# ## Watch it act
#
# The video shows the real frames next to the frames that the model predicted when it chose its
# actions.

# %%
from IPython.display import Image, Video

display(Image(root / "first" / "media" / "batch.png"))
for picture in (root / "first" / "media").glob("mask_*.png"):
    display(Image(picture))
Video(root / "first" / "media" / "rollout.mp4", embed=True)

# %% [markdown]
# ## Change one number
#
# You can set any key on the command line. This cell trains for half the steps and keeps everything
# else. Or edit it: try another learning rate (`--config.optim.learning_rate=1e-3`), fewer
# demonstrations, or another variant above.

# %%
second = train("second", f"--config.total_steps={max(total // 2, 1)}", total=max(total // 2, 1))

# %%
draw({name: rows_of(root / name) for name in ("first", "second")})
for name, result in (("first", first), ("second", second)):
    low, high = result["interval"]
    print(f"{name:>7}: success {result['success_rate']:.1%} [{low:.1%}, {high:.1%}]")

# %% [markdown]
# ## What next
#
# * Evaluate the same policy in worse light:
#   `python -m wamjax.evaluate --workdir=wamjax-quickstart/first --shift=lighting`.
# * See what denoising means in `02_noise_to_video`, and the attention tables behind it in
#   `03_three_factorizations`.
# * Train on your own demonstrations: `docs/data.md`. Run the policy on a robot: `docs/robot.md`.
