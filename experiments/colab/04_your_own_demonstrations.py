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
# # Your own demonstrations
#
# Turn recorded files into a policy. You convert a LeRobot v3.0 folder and robomimic HDF5 files to
# data sets in one format, check them on a page, train a small Fast-WAM on one, fine-tune it on the
# other, and plot its actions next to the demonstrated ones.
#
# So that there is something to read, the notebook first writes such files with the scripted expert
# of the built-in simulator. To use your own files, skip the two cells that write and change the
# paths.
#
# * **Hardware**: a CPU is enough; a GPU or TPU is used if the installed JAX sees one.
# * **Time**: a few minutes on two CPU cores, mostly for the two trainings; not timed yet at these
#   settings.
# * **Expected**: no warnings for either data set. How close the predicted actions come at these
#   settings has not been measured yet; in a miniature run of 8 steps, which learns nothing, their
#   error is twice that of the mean action.
#
# You need the installed package with the extra `ingest`, not a clone.
# In Colab: *File*, *Open notebook*, *GitHub*, then enter the address of the repository.

# %%
import subprocess
import sys

# In Colab wamjax is installed from its repository, git+https://..., or from a wheel, file:///...
source = ""  # @param {type: "string"}
if "google.colab" in sys.modules:  # elsewhere: pip install 'wamjax[notebooks,ingest]' beforehand
    if not source:
        raise ValueError("set source: the address of the repository that this notebook is from")
    words = [sys.executable, "-m", "pip", "install", "-q", f"wamjax[ingest] @ {source}"]
    subprocess.run(words, check=True)

import wamjax

print("wamjax", wamjax.__version__, "on Python", sys.version.split()[0])

# %% tags=["parameters"]
# @title Numbers { run: "auto" }
folder = "wamjax-demonstrations"  # @param {type: "string"}
lab = 240  # @param {type: "integer"}
mine = 60  # @param {type: "integer"}
steps = 240  # @param {type: "integer"}
tuning = 60  # @param {type: "integer"}
miniature = False  # @param {type: "boolean"}

# %% [markdown]
# ## Record demonstrations
#
# An episode has actions, the state of the arm, and pictures from two cameras. One episode is held
# out of both data sets; at the end the policy is compared with it.

# %%
import pathlib

import matplotlib.pyplot as plt
import numpy as np

from wamjax.data import images
from wamjax.data.records import Reader
from wamjax.envs.collection import Settings, collect

root = pathlib.Path(folder).absolute()
root.mkdir(parents=True, exist_ok=True)
tasks = "reach_red", "pick_red"
count = lab + mine + len(tasks)
if not (root / "recorded").exists():
    collect(root / "recorded", Settings(tasks=tasks, episodes=count, noise=0.1, intended=True))
episodes = list(Reader(root / "recorded"))
cameras = tuple(episodes[0].images)
hz = round(Reader(root / "recorded").info.control_hz)


def frames(episode, camera):
    """uint8 (T, h, w, 3): what was seen before each action."""
    return np.stack([images.decode(x) for x in episode.images[camera][: episode.length]])


order = np.random.default_rng(0).permutation(len(episodes))  # tasks stand in a row
of_lab, of_mine, rest = np.split(order, [lab, lab + mine])
unseen = max((episodes[i] for i in rest), key=lambda e: e.length)
figure, axes = plt.subplots(len(cameras), 6, figsize=(9, 1.6 * len(cameras)))
for row, camera in zip(axes, cameras, strict=True):
    shown = np.linspace(0, unseen.length - 1, len(row)).astype(int)
    for axis, t in zip(row, shown, strict=True):
        axis.imshow(frames(unseen, camera)[t])
        axis.set(title=f"{camera} {t}", xticks=[], yticks=[])
figure.suptitle(f"{unseen.instruction!r}, {unseen.length} actions")
plt.show()

# %% [markdown]
# ### robomimic HDF5
#
# `/data/demo_i` holds observations and seven actions; this arm does not use the three rotations.
# Nothing in the file says what the task is, so here each task has a file named after it.

# %%
import json

import h5py


def write_robomimic(path, chosen):
    """A file of demonstrations."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        settings = {"env_name": "Arm", "type": 1, "env_kwargs": {"control_freq": hz}}
        data.attrs["env_args"] = json.dumps(settings)
        for i, episode in enumerate(chosen):
            demo = data.create_group(f"demo_{i}")
            demo.attrs["num_samples"] = episode.length
            none = np.zeros((episode.length, 3), np.float32)
            parts = episode.actions[:, :3], none, episode.actions[:, 3:]
            demo["actions"] = np.concatenate(parts, axis=1)
            obs, state = demo.create_group("obs"), episode.proprio[:-1]
            obs["robot0_eef_pos"] = state[:, :3]
            obs["robot0_gripper_qpos"] = np.stack([state[:, 3], -state[:, 3]], axis=1)
            for name, camera in zip(("agentview", "robot0_eye_in_hand"), cameras, strict=True):
                obs[f"{name}_image"] = frames(episode, camera)


(root / "lab_files").mkdir(exist_ok=True)
for task in tasks:
    chosen = [episodes[i] for i in of_lab if episodes[i].task == task]
    words = chosen[0].instruction.replace(" ", "_")
    write_robomimic(root / "lab_files" / f"{words}.hdf5", chosen)
print(*sorted(p.name for p in (root / "lab_files").iterdir()), sep="\n")

# %% [markdown]
# ### LeRobot v3.0
#
# The rows of all episodes are in parquet, each camera has a video, and metadata says where
# everything is.

# %%
import av
import pyarrow as pa
import pyarrow.parquet as pq


def write_video(path, pictures):
    """An mp4 whose frames are all in it, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=hz, options={"crf": "12", "g": "2"})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_lerobot(place, chosen):
    """A folder of demonstrations."""
    words = sorted({e.instruction for e in chosen})
    lengths = [e.length for e in chosen]
    starts = np.cumsum([0, *lengths]).tolist()
    clock = np.concatenate([np.arange(n) for n in lengths])
    columns = {
        "action": np.concatenate([e.actions for e in chosen]),
        "observation.state": np.concatenate([e.proprio[:-1, :4] for e in chosen]),
        "timestamp": (clock / hz).astype(np.float32),
        "frame_index": clock,
        "episode_index": np.repeat(np.arange(len(chosen)), lengths),
        "index": np.arange(starts[-1]),
        "task_index": np.repeat([words.index(e.instruction) for e in chosen], lengths),
    }
    names = {"action": ["dx", "dy", "dz", "gripper"],
             "observation.state": ["x", "y", "z", "finger"]}  # fmt: skip
    features = {k: {"dtype": str(x.dtype), "shape": list(x.shape[1:] or (1,)),
                    "names": names.get(k)} for k, x in columns.items()}  # fmt: skip
    rows = [{"episode_index": i, "tasks": [e.instruction], "length": e.length,
             "dataset_from_index": starts[i], "dataset_to_index": starts[i + 1],
             "data/chunk_index": 0, "data/file_index": 0} for i, e in enumerate(chosen)]
    for camera in cameras:
        key = f"observation.images.{camera}"
        shown = np.concatenate([frames(e, camera) for e in chosen])
        write_video(place / "videos" / key / "chunk-000" / "file-000.mp4", shown)
        features[key] = {"dtype": "video", "shape": list(shown.shape[1:]),
                         "names": ["height", "width", "channels"], "info": {"video.fps": hz}}
        for row, start, end in zip(rows, starts, starts[1:], strict=False):
            row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0,
                    f"videos/{key}/from_timestamp": start / hz,
                    f"videos/{key}/to_timestamp": end / hz}  # fmt: skip
    table = pa.table({k: pa.array(list(x) if x.ndim > 1 else x) for k, x in columns.items()})
    index = {"task_index": list(range(len(words))), "__index_level_0__": words}
    info = {"codebase_version": "v3.0", "robot_type": "arm", "fps": hz, "chunks_size": 1000,
            "features": features, "total_episodes": len(chosen),
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"}
    for name, rows_of in {"data/chunk-000/file-000.parquet": table,
                          "meta/episodes/chunk-000/file-000.parquet": pa.Table.from_pylist(rows),
                          "meta/tasks.parquet": pa.table(index)}.items():  # fmt: skip
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows_of, place / name)
    (place / "meta" / "info.json").write_text(json.dumps(info))


write_lerobot(root / "mine_files", [episodes[i] for i in of_mine])
print(*sorted(str(p.relative_to(root)) for p in root.glob("mine_files/**/*.[jmp]*")), sep="\n")

# %% [markdown]
# ## One command for each
#
# The flags select what the two have in common, so that one policy fits both: the same camera names,
# four state values and four action values. The format is guessed. Read the report: it lists every
# decision.

# %%
def command(module, *arguments):
    """Runs a command of wamjax and returns what it prints."""
    words = [sys.executable, "-m", f"wamjax.{module}", *arguments]
    done = subprocess.run(words, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


if not (root / "lab").exists():
    print(command("ingest", f"--source={root / 'lab_files'}", f"--out={root / 'lab'}",
                  f"--cameras={cameras[0]}=agentview_image,"
                  f"{cameras[1]}=robot0_eye_in_hand_image",
                  "--state=robot0_eef_pos,robot0_gripper_qpos[0:1]",
                  "--action=actions[0:3],actions[6:7]", "--instruction={file}"))  # fmt: skip

# %%
if not (root / "mine").exists():
    print(command("ingest", f"--source={root / 'mine_files'}", f"--out={root / 'mine'}"))

# %% [markdown]
# ## Look before you train
#
# `wamjax.doctor` warns where the two data sets contradict each other, and writes a page about the
# first. Are the pictures upright and the colors right? Do the actions do what their names say? Is
# anything constant or rare?

# %%
import html

from IPython.display import HTML

print(command("doctor", f"--data={root / 'mine'},{root / 'lab'}", f"--out={root / 'report'}"))
page = (root / "report" / "data.html").read_text()
HTML(f'<iframe srcdoc="{html.escape(page)}" width="100%" height="500"></iframe>')

# %% [markdown]
# ## Train on theirs, fine-tune on yours
#
# The config is a few lines. To fine-tune, set `init_from.path` to the run, or the converted
# weights, to start from.

# %%
(root / "arm.py").write_text(f'''
from wamjax import config as configs
from wamjax.wam.fast_wam import presets


def get_config(arg=None):
    args = configs.parse_arg(arg, data="lab", steps={steps})
    config = configs.base_config()
    presets.fast_wam(config, "fast", "2026-08")
    presets.tabletop(config)
    config.data.root = {str(root)!r}
    config.data.cameras = {cameras!r}
    config.data.sources[args.data] = configs.source(path=args.data)
    config.optim.name, config.optim.learning_rate = "muon", 3e-3
    if {miniature}:
        presets.tabletop_debug(config)
    config.total_steps, config.log_every = args.steps, 1
    config.eval.episodes = 0  # there is no simulator of your robot
    return config
''')


def train(name, arg, *overrides):
    """Trains a run to its end; returns its losses of actions."""
    config, run = f"--config={root / 'arm.py'}:{arg}", root / name
    command("train", config, f"--workdir={run}", *overrides)
    rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [r["loss_action"] for r in rows if r.get("loss_action") is not None]


losses = {"theirs": train("theirs", "data=lab")}
start = f"--config.init_from.path={root / 'theirs'}"
losses["yours, from theirs"] = train("yours", f"data=mine,steps={tuning}", start)

# %%
figure, axes = plt.subplots(figsize=(7, 2.5))
for name, values in losses.items():
    axes.plot(values, lw=0.8, label=name)
axes.set(xlabel="step", ylabel="loss of actions", yscale="log")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Act
#
# Export everything that acting needs into one folder; a robot needs neither the run nor the data
# nor the config. Then step through the held-out demonstration and predict an action chunk from the
# observation at every eighth step.

# %%
import shutil

shutil.rmtree(root / "policy", ignore_errors=True)
command("export_policy", f"--workdir={root / 'yours'}", f"--output={root / 'policy'}")
policy = wamjax.load_policy(str(root / "policy"))
video = {camera: frames(unseen, camera) for camera in cameras}
chunks = {}
for t in range(0, unseen.length, 8):
    seen = {camera: pictures[t] for camera, pictures in video.items()}
    chunks[t] = policy({"images": seen, "proprio": unseen.proprio[t, :4],
                        "instruction": unseen.instruction})  # fmt: skip
    chunks[t] = chunks[t][: unseen.length - t]

predicted = np.concatenate(list(chunks.values()))
error = np.abs(predicted - unseen.actions).mean()
mean = np.concatenate([episodes[i].actions for i in of_mine]).mean(axis=0)
constant = np.abs(mean - unseen.actions).mean()
print(f"predicted actions are off by {error:.3f}, the mean action of your data by {constant:.3f}")

# %%
figure, axes = plt.subplots(2, 2, figsize=(9, 4), sharex=True)
for d, (axis, name) in enumerate(zip(axes.flat, ("dx", "dy", "dz", "gripper"), strict=True)):
    axis.step(range(unseen.length), unseen.actions[:, d], color="black", lw=1, where="mid",
              label="demonstrated")  # fmt: skip
    for t, chunk in chunks.items():
        axis.plot(range(t, t + len(chunk)), chunk[:, d], color="C1", marker=".", ms=4,
                  label="predicted" if t == 0 else None)  # fmt: skip
    axis.set(title=name)
axes.flat[0].legend(frameon=False)
axes[1, 0].set_xlabel("step")
figure.suptitle(unseen.instruction)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What next
#
# * Use your own files: `python -m wamjax.ingest --list` lists the formats; `docs/data.md` explains
#   the options and has ten lines of code for any other format.
# * Train a larger model: `--config=fast_wam_libero`, with `wamjax.convert` for its published
#   weights.
# * Run it on a robot: `python -m wamjax.serve --bundle=wamjax-demonstrations/policy`,
#   `docs/robot.md`.
