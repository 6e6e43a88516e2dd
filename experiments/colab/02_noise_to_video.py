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
# # From noise to video
#
# See what a denoiser does, in the plane, where the exact answer is known: data turn into noise and
# noise turns into data, along the path of diffusion and along the straight path of a flow. Then see
# what makes a video model autoregressive or not (a table), and the four ways to condition DiT on
# the timestep and the class.
#
# * **Hardware**: a CPU. Nothing is trained.
# * **Time**: half a minute on two busy cores, most of it compiling.
# * **Expected**: in a flow, the paths between given pairs of data and noise are straight, but its
#   trajectories are not; UniPC on the flow comes within 0.1 of the exact end points in 5 steps;
#   with six frames, `forcing_causal` attends to 58 % of the token pairs and `blocks` to 67 %; the
#   DiT designs differ in parameters and in the tokens attention sees, not in the transformer.
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

import jax

import wamjax

print("wamjax", wamjax.__version__, "on", jax.devices()[0].platform)

# %% tags=["parameters"]
# @title Numbers { run: "auto" }
points = 512  # @param {type: "integer"}
shown = 24  # @param {type: "slider", min: 4, max: 60, step: 1}
states = 51  # @param {type: "integer"}
steps = (2, 3, 5, 10, 20, 50)  # @param {type: "raw"}
frames = 6  # @param {type: "slider", min: 2, max: 12, step: 1}
tokens = 4  # @param {type: "integer"}

# %% [markdown]
# ## Forward: data to noise
#
# A *process* defines how much data and how much noise there is at each noise level:
# $x = \alpha x_0 + \sigma \varepsilon$. Diffusion (DDPM) keeps the variance at one; a rectified
# flow goes straight, $x = (1 - \tau)\,x_0 + \tau\,\varepsilon$. Move the slider from data to
# noise.

# %%
import ipywidgets
import matplotlib.pyplot as plt
import numpy as np

from wamjax.viz import paths

data = paths.moons().sample(jax.random.key(0), points)
noise = jax.random.normal(jax.random.key(1), data.shape)
forward = {name: np.asarray(paths.pairs(name, data, noise, states))[::-1] for name in paths.PATHS}


def plane(axes, x, title):
    axes.plot(*np.asarray(x).T, ".", ms=3, alpha=0.6)
    axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", title=title)
    axes.set_axis_off()


def noising(level=0):
    figure, axes = plt.subplots(1, 2, figsize=(8, 4))
    for panel, (name, x) in zip(axes, forward.items(), strict=True):
        plane(panel, x[level], f"{name}, {level / (states - 1):.0%} of the way to noise")
    plt.show()


ipywidgets.interact(noising, level=(0, states - 1));

# %% [markdown]
# ## Backward: noise to data
#
# The data are a mixture of Gaussians, so the perfect network is known in closed form
# (`wamjax/diffusion/mixture.py`) and the only error is the solver's. These are the exact
# trajectories.

# %%
start = jax.random.normal(jax.random.key(2), (points, 2))
exact = {name: np.asarray(paths.trajectories(name, start, states=states)) for name in paths.PATHS}


def denoising(until=states - 1):
    figure, axes = plt.subplots(1, 2, figsize=(8, 4))
    for panel, (name, x) in zip(axes, exact.items(), strict=True):
        plane(panel, x[until], f"{name}, {until / (states - 1):.0%} of the way to data")
        panel.plot(x[: until + 1, :shown, 0], x[: until + 1, :shown, 1], lw=0.8, color="C1")
    plt.show()


ipywidgets.interact(denoising, until=(0, states - 1));

# %% [markdown]
# The trajectories of the flow are not quite straight. The path from one data point to its paired
# noise is straight, but many such paths cross, and the network learns their mean. `detour` is the
# length of a path divided by the distance between its ends, minus one.

# %%
for kind, found in (("given pairs", forward), ("trajectories", exact)):
    for name, x in found.items():
        bent = paths.curvature(x[:, :256])
        print(f"{kind:13} {name:10} detour {bent['detour']:.3f}")

# %% [markdown]
# ## How many network calls?
#
# Compare the end points of a solver with few steps with the exact ones.

# %%
def error(name, solver, count):
    """Distance of the end points from the exact ones, root mean square."""
    process = paths.PATHS[name]
    begin = process.corrupt(0.0, start, process.schedule(count)[0])
    ends = paths.sample(name, solver, count, begin, jax.random.key(3))
    return float(np.sqrt(np.mean(np.sum((np.asarray(ends) - exact[name][-1]) ** 2, axis=-1))))


pairs = ("diffusion", "ddim"), ("diffusion", "euler"), ("flow", "euler"), ("flow", "unipc")
errors = {pair: [error(*pair, n) for n in steps] for pair in pairs}
figure, axes = plt.subplots(figsize=(6, 4))
for (name, solver), values in errors.items():
    axes.plot(steps, values, "o-" if name == "flow" else "o--", label=f"{name}, {solver}", ms=4)
    print(f"{name:10} {solver:6}", *(f"{n}: {v:.3f}  " for n, v in zip(steps, values, strict=True)))
axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="error (data have std 1)")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# `python -m wamjax.viz paths --output=DIR` measures all solvers by network calls instead of steps.
#
# ## Autoregressive or diffusion: a table
#
# A clip is a list of groups of frames. Three choices define a scheme: which frames share a noise
# level, which are given, and which attend to which. The tables below are drawn from the objects
# that wamjax trains with (`wamjax/wam/video/schemes.py`).

# %%
from collections import Counter

from wamjax.models.visibility import bidirectional, cacheable, causal
from wamjax.wam.video.schemes import SCHEMES, slots_of


def table_of(name):
    """The visibility of a scheme, and the frames of each of its groups."""
    scheme = SCHEMES[name]
    clip = slots_of(scheme, frames - frames % 2 + scheme.first)
    groups = Counter(slot.group for slot in clip)
    return (causal if scheme.causal else bidirectional)(*groups), groups


figure, axes = plt.subplots(1, len(SCHEMES), figsize=(3 * len(SCHEMES), 3.4))
for panel, name in zip(axes, SCHEMES, strict=True):
    table, groups = table_of(name)
    mask = table.mask({group: tokens * count for group, count in groups.items()})
    panel.imshow(mask, cmap="Blues", vmin=0, vmax=1.3)
    panel.set(title=f"{name}\n{mask.mean():.0%} of pairs", xlabel="attended", xticks=[], yticks=[])
axes[0].set_ylabel("attends")
plt.show()

# %% [markdown]
# Step by step: which frames are noisy, which are done, and whose keys and values are in the cache.
# Under a causal table what is done sees only what is done, so it is computed once; where all see
# all, nothing can be kept.

# %%
def generation(scheme="blocks", step=1):
    table, groups = table_of(scheme)
    names = list(groups)
    done = names[: min(step, len(names))] if SCHEMES[scheme].causal else []
    kept = cacheable(table, done)
    figure, axes = plt.subplots(figsize=(7, 1.6))
    for i, name in enumerate(names):
        now = name not in done and (not SCHEMES[scheme].causal or i == len(done))
        colour = "C0" if name in kept else "C1" if now else "lightgrey"
        text = "cached" if name in kept else "denoised now" if now else "later"
        axes.add_patch(plt.Rectangle((i, 0), 0.95, 1, color=colour))
        axes.text(i + 0.47, 0.5, f"{name}\n{groups[name]} frames\n{text}", ha="center", va="center")
    axes.set(xlim=(0, len(names)), ylim=(0, 1))
    axes.set_axis_off()
    plt.show()


ipywidgets.interact(generation, scheme=list(SCHEMES), step=(0, frames));

# %% [markdown]
# Causal schemes give up at most half a dB, measured in `BUILD_NOTES.md`, in exchange for caches and
# clips of any length.
#
# ## Four ways to condition DiT
#
# Timestep and class enter through `adaln_zero` (scale, shift and a gate that starts at zero),
# `adaln` (without the gate), `cross_attention` to two tokens, or `in_context` as two more tokens.
# The config key is `model.conditioning`.

# %%
from wamjax import config as configs
from wamjax import tree, wam
from wamjax.data import arrays
from wamjax.models.dit import CONDITIONING


def digits(design):
    """A small DiT of 8x8 digits, and the shapes of its parameters; nothing is allocated."""
    config = configs.base_config()
    model, objective = config.model, config.objective
    config.data.kind, config.data.declared.arrays = "arrays", "video=1x8x8x1,label=:10"
    model.layers, model.heads, model.head_dim = 4, 4, 16
    model.video.width, model.video.ffn, model.patch, model.freq_dim = 64, 256, 2, 128
    model.codec.kind, model.codec.patch, model.positions = "pixel", 1, "sincos"
    model.label, model.conditioning = True, design
    objective.name, objective.weighting = "denoising", "uniform"
    built = wam.build(config, arrays.declared(config.data))
    return built, tree.flatten(jax.eval_shape(built.init, jax.random.key(0)))


shapes = {}
for design in CONDITIONING:
    built, shapes[design] = digits(design)
    count = sum(int(np.prod(x.shape)) for x in shapes[design].values())
    print(f"{design:16} {count:8,} parameters; attention:", *built.tables[0].groups)

# %%
def parameters_of(design=CONDITIONING[0]):
    """What a design has that not all have."""
    common = set.intersection(*(set(s) for s in shapes.values()))
    for path, x in shapes[design].items():
        if path not in common:
            print(f"{path:48} {x.shape}")


ipywidgets.interact(parameters_of, design=list(CONDITIONING));

# %% [markdown]
# On digits the four designs perform the same (96 to 97 % of the samples show the requested digit,
# `BUILD_NOTES.md`). At ImageNet scale the paper finds adaLN-Zero ahead.
#
# Next: `03_three_factorizations`, where slots are more than frames.
