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
# # One network, three factorizations
#
# Policy, world model and value function are one network with different *roles*. This notebook
# prints the slots, roles and visibility tables of Cosmos Policy and Fast-WAM from the objects that
# wamjax trains with. It shows which keys and values can be cached while the rest is denoised, and
# measures what the cache saves on your machine.
#
# * **Hardware**: a CPU; a GPU or TPU gives other latencies. Nothing is trained, because latency
#   does not depend on training.
# * **Time**: one to six minutes on two busy cores, nearly all of it compiling.
# * **Expected**: actions with and without the cache agree up to rounding. On two busy cores `fast`
#   took 2.1 ms with the cache and 5.2 without (2.2 when XLA hoists the work by itself), `joint`
#   12.9 and 16.1, `idm` 20.9 and 38.9.
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
layers = 4  # @param {type: "slider", min: 2, max: 12, step: 1}
width = 128  # @param [64, 128, 256] {type: "raw"}
calls = 20  # @param {type: "integer"}
variants = ("fast", "joint", "idm")  # @param {type: "raw"}

# %% [markdown]
# ## Slots
#
# Cosmos Policy packs everything a robot senses and does into one clip. A layout is a list of words,
# one per slot.

# %%
from wamjax.wam.cosmos_policy import layouts
from wamjax.wam.cosmos_policy import uses as cosmos
from wamjax.wam.uses import describe

layout = layouts.named("libero")
print(layout)

# %% [markdown]
# ## Roles
#
# The policy $p(a, s', V \mid s)$, the world model $p(s', V \mid s, a)$ and the value function
# $p(V \mid s, a, s')$ use the same slots, given or predicted.

# %%
print(describe(cosmos.uses(), [(layouts.name_of(s), s.group) for s in layout.slots]))

# %% [markdown]
# Roles are numbers, one row per example of a batch. The network sees them as noise levels: 0 where
# a slot is given.

# %%
import numpy as np

from wamjax.wam.uses import roles

for group, rows in roles(cosmos.uses(), layout.sizes).items():
    print(f"{group:8}", dict(zip([u.name for u in cosmos.uses()], rows.tolist(), strict=True)))

# %% [markdown]
# Fast-WAM has frames, an action chunk, and five variants:

# %%
from wamjax.wam.fast_wam.uses import USES

groups = [(g, g) for g in ("first", "future", "cond", "action")]
for name, trained in USES.items():
    print(name)
    print(describe(trained, groups))

# %% [markdown]
# ## Which group attends to which, and what can be cached
#
# `cacheable`, a function of three lines, returns the given groups that attend, transitively, to
# given groups only.

# %%
from wamjax.models.visibility import cacheable

tables = {f"fast_wam {n}": u[-1] for n, u in USES.items() if n != "optional_idm"}
tables |= {f"cosmos_policy {v}": cosmos.uses(visibility=v)[0] for v in cosmos.VISIBILITIES}
for name, use in tables.items():
    print(f"{name}\n{use.table}\nkept: {', '.join(cacheable(use.table, use.given)) or 'nothing'}\n")

# %%
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

figure, axes = plt.subplots(2, 3, figsize=(10, 6.4))
for panel, (name, use) in zip(axes.flat, tables.items(), strict=True):
    table, kept = use.table, cacheable(use.table, use.given)
    cells = table.matrix().astype(int)
    cells[np.ix_([g in kept for g in table.groups], [True] * len(table.groups))] *= 2
    panel.imshow(cells, cmap="Blues", vmin=0, vmax=2.5)
    marks = range(len(table.groups))
    panel.set_xticks(marks, table.groups, rotation=45)
    panel.set_yticks(marks, table.groups)
    panel.set_title(name)
figure.legend(handles=[Patch(color=plt.cm.Blues(0.4), label="attends, in every step"),
                       Patch(color=plt.cm.Blues(0.8), label="attends, computed once")],
              loc="lower center", ncols=2, frameon=False)  # fmt: skip
figure.tight_layout(rect=(0, 0.05, 1, 1))
plt.show()

# %% [markdown]
# In the published Cosmos Policy every slot attends to every slot, so nothing is constant. Under
# `prefix`, which needs training under that table, given slots attend to given slots only. The third
# option, `frozen`, reuses the first step's keys and values although they would change: an
# approximation.
#
# ## What the cache saves
#
# These are policies for the quickstart's simulator, at the sizes above, with random parameters.
# Each objective acts with and without its cache. All denoising steps are one compiled program here,
# so the compiler may find the same savings: XLA hoists loop-invariant code. The cell therefore
# measures with and without that XLA pass. The derived cache does not depend on it and also works
# across programs: from one frame to the next, and from an imagined video to the actions.

# %%
import dataclasses
import time

import jax.numpy as jnp

from wamjax import config as configs
from wamjax import wam
from wamjax.data.spec import DataSpec
from wamjax.envs import tabletop
from wamjax.wam.cosmos_policy import presets as cosmos_presets
from wamjax.wam.fast_wam import presets as fast_wam_presets


def spec_of(data):
    """The sizes that data of the embedded world would decide."""
    return DataSpec(
        cameras={name: tabletop.CAMERAS[name] for name in data.cameras},
        proprio_dim=tabletop.PROPRIO_DIM, action_dim=tabletop.ACTION_DIM, chunk=data.chunk,
        frames=data.frames, frame_stride=data.frame_stride,
        instruction_length=data.instruction_length, control_hz=tabletop.CONTROL_HZ,
    )  # fmt: skip


def sized(config):
    config.model.layers, config.model.video.width, config.model.video.ffn = layers, width, 4 * width
    return wam.build(config, spec_of(config.data))


def fast_wam(variant):
    config = configs.base_config()
    fast_wam_presets.fast_wam(config, variant, "2026-08")
    fast_wam_presets.tabletop(config)
    return sized(config)


def cosmos_policy(visibility):
    config = configs.base_config()
    cosmos_presets.tabletop(config)
    config.objective.visibility = visibility
    return sized(config)


class Same:
    """Statistics that change nothing."""

    forward = inverse = staticmethod(lambda x: x)


def random_params(objective):
    """Of no use, but none is zero: a fresh network's outputs are, whatever it attends."""
    params = objective.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        x + 0.1 * jax.random.normal(key, x.shape, x.dtype)
        for x, key in zip(leaves, keys, strict=True)
    ]
    return objective.prepare(jax.tree.unflatten(tree, moved))


# XLA moves what does not change out of a loop by itself, where the loop is one program.
STILL = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def acting(objective, mode=None, options=None):
    """A call without arguments that plans once; `options` are the compiler's."""
    params = jax.jit(random_params, static_argnums=0)(objective)
    seen = {k: jnp.ones(s.shape, s.dtype) for k, s in objective.observation_spec(1).items()}
    normalizers = {"actions": Same, "proprio": Same}
    act = jax.jit(lambda p, x, key: objective.policy(p, normalizers, x, key, mode))
    inputs = params, seen, jax.random.key(1)
    act = act.lower(*inputs).compile(compiler_options=options)
    return lambda: np.asarray(act(*inputs))


def timed(*policies):
    """(milliseconds of a plan, median, and the actions) of each; taken in turns, so that what else
    the machine does is shared."""
    actions = [policy() for policy in policies]  # compiles
    times = np.zeros((calls, len(policies)))
    for row in times:
        for i, policy in enumerate(policies):
            begin = time.perf_counter()
            policy()
            row[i] = 1e3 * (time.perf_counter() - begin)
    return list(zip(np.median(times, axis=0).tolist(), actions, strict=True))


results = {}
for variant in variants:
    objective = fast_wam(variant)
    without = dataclasses.replace(objective, use_cache=False)
    three = timed(acting(without, options=STILL), acting(without), acting(objective))
    (before, reference), (moved, _), (after, actions) = three
    largest = float(np.abs(actions - reference).max() / np.abs(reference).max())
    results[f"fast_wam {variant}"] = before, after
    print(f"fast_wam {variant:6} {before:6.1f} ms, as XLA moves it {moved:6.1f}, with the cache "
          f"{after:6.1f}; actions differ by {largest:.1e} of the largest")  # fmt: skip
    assert largest < 1e-3

# %% [markdown]
# The published Cosmos Policy has no cache. `prefix` is exact under its own table. `frozen` is not:
# from the second layer on, the keys and values of given slots depend on the slots being denoised.

# %%
full, prefix = cosmos_policy("bidirectional"), cosmos_policy("prefix")
three = timed(acting(full, options=STILL), acting(full, mode="frozen"), acting(prefix))
(exact, actions), (frozen, approximate), (exact_prefix, _) = three
results["cosmos_policy frozen"] = exact, frozen
results["cosmos_policy prefix"] = exact, exact_prefix
largest = float(np.abs(actions - approximate).max() / np.abs(actions).max())
print(f"bidirectional {exact:.1f} ms, frozen {frozen:.1f}, prefix {exact_prefix:.1f}")
print(f"frozen changes the actions of these parameters by {largest:.1e} of the largest")
assert largest > 0

# %%
figure, axes = plt.subplots(figsize=(7, 3))
for i, (before, after) in enumerate(results.values()):
    axes.barh(i + 0.2, before, 0.35, color="lightgrey", label="without" if i == 0 else None)
    axes.barh(i - 0.2, after, 0.35, color="C0", label="with the cache" if i == 0 else None)
axes.set_yticks(range(len(results)), results)
axes.set_xlabel("milliseconds of a plan")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# Small networks on a CPU are limited by memory as much as by compute, so these times say less than
# the FLOPs that `python -m wamjax.doctor --config=FILE` counts for any size.
# `python -m wamjax.bench fast_wam` measures at LIBERO's token geometry.
