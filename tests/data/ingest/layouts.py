"""Writes files in published layouts with their own libraries, and returns their content."""

from __future__ import annotations

import io
import json

import numpy as np

HZ = 20


def motion(seed: int, steps: int):
    """Returns (actions (T, 7), states (T, 8)): delta actions that move a hand, with a gripper that
    closes at 1; state t precedes action t."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-0.5, 0.5, (steps, 7))
    actions[:, 6] = np.where(np.arange(steps) < steps // 2, -1, 1)
    states = np.zeros((steps, 8))
    states[0, 6:] = 0.02, -0.02
    for t in range(steps - 1):
        states[t + 1, :6] = states[t, :6] + 0.05 * actions[t, :6]
        finger = np.clip(states[t, 6] - 0.005 * actions[t, 6], 0, 0.04)
        states[t + 1, 6:] = finger, -finger
    return actions, states


def pictures(seed: int, steps: int, size=(16, 24)) -> np.ndarray:
    """Returns distinct pictures, uint8 (T, h, w, 3), with a brighter top half."""
    rng = np.random.default_rng(seed)
    out = rng.integers(0, 100, (steps, *size, 3), np.uint8)
    out[:, : size[0] // 2] += 150
    return out


def smooth(seed: int, steps: int, size=(32, 48)) -> np.ndarray:
    """Returns pictures that survive video encoding: one grey level each, by episode and step."""
    level = (40 * seed + 3 * np.arange(steps)) % 250
    return np.broadcast_to(level[:, None, None, None], (steps, *size, 3)).astype(np.uint8).copy()


def libero(path, lengths=(12, 9), attributes=(), flip=True, seed=0):
    """Writes a file of LIBERO; `attributes` are additional ones of /data."""
    import h5py

    truth = []
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "open the drawer"})
        data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": HZ}})
        data.attrs.update(dict(attributes))
        for i, steps in enumerate(lengths):
            actions, states = motion(seed + i, steps)
            shown = pictures(seed + i, steps)
            demo = data.create_group(f"demo_{i}")
            demo["actions"], demo["dones"] = actions, np.arange(steps) == steps - 1
            demo["rewards"] = (np.arange(steps) == steps - 1).astype(np.uint8)
            obs = demo.create_group("obs")
            obs["ee_states"], obs["gripper_states"] = states[:, :6], states[:, 6:]
            obs["agentview_rgb"] = shown[:, ::-1] if flip else shown
            truth.append((actions, states, shown))
    return truth


def encode_video(path, frames, fps=HZ, gop=2, codec="libx264"):
    """Writes frames as MP4 with PyAV."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "10", "g": str(gop)})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


CAMERAS = ("observation.images.front", "observation.images.wrist")
TASKS = ("lift the cube", "push the cube")


def _features(cameras=CAMERAS, image=(), size=(32, 48)):
    out = {"action": {"dtype": "float32", "shape": [7], "names": ["dx", "dy", "dz", "drx", "dry",
                                                                  "drz", "gripper"]},
           "observation.state": {"dtype": "float32", "shape": [8], "names": {"motors": list(
               ("x", "y", "z", "rx", "ry", "rz", "finger_l", "finger_r"))}}}  # fmt: skip
    for c in cameras:
        out[c] = {"dtype": "image" if c in image else "video", "shape": [*size, 3],
                  "names": ["height", "width", "channels"], "info": {"video.fps": HZ}}  # fmt: skip
    for key in ("frame_index", "episode_index", "index", "task_index"):
        out[key] = {"dtype": "int64", "shape": [1], "names": None}
    return out | {"timestamp": {"dtype": "float32", "shape": [1], "names": None}}


def _table(number, actions, states, first, task):
    import pyarrow as pa

    steps = len(actions)
    flat = {"action": actions, "observation.state": states}
    columns = {
        key: pa.FixedSizeListArray.from_arrays(pa.array(x.ravel(), pa.float32()), x.shape[1])
        for key, x in flat.items()
    }
    columns["timestamp"] = pa.array((np.arange(steps) / HZ).astype(np.float32))
    counters = {"frame_index": np.arange(steps), "episode_index": np.full(steps, number),
                "index": first + np.arange(steps), "task_index": np.full(steps, task)}  # fmt: skip
    return pa.table(columns | {k: pa.array(x, pa.int64()) for k, x in counters.items()})


def _episodes(lengths):
    out = []
    for i, steps in enumerate(lengths):
        actions, states = motion(i, steps)
        frames = {c: smooth(2 * i + j, steps) for j, c in enumerate(CAMERAS)}
        out.append((actions.astype(np.float32), states.astype(np.float32), frames))
    return out


def lerobot_v21(root, lengths=(12, 9, 15)):
    """Writes files of LeRobot v2.1; returns (actions, states, camera -> frames) per episode."""
    import pyarrow.parquet as pq

    truth, first, rows = _episodes(lengths), 0, []
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    for i, (actions, states, frames) in enumerate(truth):
        pq.write_table(_table(i, actions, states, first, i % 2),
                       root / f"data/chunk-000/episode_{i:06d}.parquet")  # fmt: skip
        for camera, shown in frames.items():
            encode_video(root / f"videos/chunk-000/{camera}/episode_{i:06d}.mp4", shown)
        rows.append({"episode_index": i, "tasks": [TASKS[i % 2]], "length": len(actions)})
        first += len(actions)
    info = {"codebase_version": "v2.1", "robot_type": "arm", "fps": HZ, "chunks_size": 1000,
            "features": _features(), "total_episodes": len(lengths),
            "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/"
                          "episode_{episode_index:06d}.mp4"}  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info))
    lines = {"episodes": rows, "tasks": [{"task_index": i, "task": t} for i, t in enumerate(TASKS)]}
    for name, values in lines.items():
        (root / f"meta/{name}.jsonl").write_text("".join(json.dumps(v) + "\n" for v in values))
    return truth


def lerobot_v30(root, lengths=(12, 9, 15), data_files=((0, 1, 2),), video_files=None, spoil=None,
                gop=2, shards=((0,), (1, 2)), fps=HZ):  # fmt: skip
    """Writes files of LeRobot v3.0.

    Args:
      data_files, shards: numbers of the episodes in each data file, and in each metadata file.
      video_files: camera -> likewise; by default the front camera has two files, the wrist one.
      spoil: changes a row of the metadata before it is written.
      fps: rate in info.json.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    truth = _episodes(lengths)
    front, wrist = CAMERAS
    everything = tuple(range(len(lengths)))
    video_files = video_files or {front: ((0,), everything[1:]), wrist: (everything,)}
    starts = np.cumsum([0, *lengths])
    rows = {i: {"episode_index": i, "tasks": [TASKS[i % 2]], "length": n,
                "dataset_from_index": int(starts[i]), "dataset_to_index": int(starts[i + 1]),
                "stats/action/mean": [0.0] * 7} for i, n in enumerate(lengths)}  # fmt: skip
    for number, members in enumerate(data_files):
        path = root / f"data/chunk-000/file-{number:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(path, _table(0, *truth[0][:2], 0, 0).schema) as writer:
            for i in members:
                writer.write_table(_table(i, *truth[i][:2], int(starts[i]), i % 2))
                rows[i] |= {"data/chunk_index": 0, "data/file_index": number}
    for camera, files in video_files.items():
        for number, members in enumerate(files):
            shown = np.concatenate([truth[i][2][camera] for i in members])
            encode_video(root / f"videos/{camera}/chunk-000/file-{number:03d}.mp4", shown, gop=gop)
            at = 0
            for i in members:
                place = {"chunk_index": 0, "file_index": number, "from_timestamp": at / HZ,
                         "to_timestamp": (at + lengths[i]) / HZ}  # fmt: skip
                rows[i] |= {f"videos/{camera}/{k}": x for k, x in place.items()}
                at += lengths[i]
    for i in rows:
        if spoil:
            spoil(i, rows[i])
    for number, members in enumerate(shards):
        path = root / f"meta/episodes/chunk-{number:03d}/file-000.parquet"  # one base name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([rows[i] for i in members]), path)
    tasks = {"task_index": [0, 1], "__index_level_0__": list(TASKS)}
    pq.write_table(pa.table(tasks), root / "meta/tasks.parquet")
    info = {"codebase_version": "v3.0", "robot_type": "arm", "fps": fps, "chunks_size": 1000,
            "features": _features(), "total_episodes": len(lengths),
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/"
                          "file-{file_index:03d}.mp4"}  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info))
    return truth


def robomimic(path, steps=10, after=True):
    """Writes a file of robomimic with masks; `after`: with next_obs."""
    import h5py

    truth = []
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(
            {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": HZ}}
        )
        for i in (0, 2, 10):
            actions, states = motion(i, steps + 1)
            shown = pictures(i, steps + 1)
            demo = data.create_group(f"demo_{i}")
            demo.attrs["num_samples"] = steps
            demo["actions"], demo["dones"] = actions[:-1], np.zeros(steps)
            demo["rewards"] = np.zeros(steps)
            half = np.full((steps + 1, 4), 0.5)  # a quaternion
            for name, part in {"obs": slice(None, -1), "next_obs": slice(1, None)}.items():
                if name == "obs" or after:
                    obs = demo.create_group(name)
                    obs["robot0_eef_pos"], obs["robot0_eef_quat"] = states[part, :3], half[part]
                    obs["robot0_gripper_qpos"] = states[part, 6:]
                    obs["agentview_image"] = shown[part]
            truth.append((actions[:-1], states, shown))
        file["mask/train"] = np.array([b"demo_0", b"demo_10"])
    return truth


def aloha(folder, count=3, steps=8, compress=False, sim=True):
    """Writes files of ALOHA; `compress`: JPEG in rows padded with zeros."""
    import h5py
    from PIL import Image

    truth = []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        qpos = np.cumsum(rng.normal(0, 0.05, (steps, 14)), axis=0).astype(np.float32)
        action = np.concatenate([qpos[1:], qpos[-1:]]) + np.float32(0.001)
        shown = smooth(i, steps, (24, 32))
        shown[..., 0] = 200  # red, so that swapped colours show
        with h5py.File(folder / f"episode_{i}.hdf5", "w") as file:
            file.attrs.update({"sim": sim, "compress": compress})
            file["action"], obs = action, file.create_group("observations")
            for key in ("qpos", "qvel", "effort"):
                obs[key] = qpos if key == "qpos" else np.zeros_like(qpos)
            if compress:
                rows = []
                for x in shown:
                    Image.fromarray(x).save(buffer := io.BytesIO(), "jpeg", quality=95)
                    rows.append(np.frombuffer(buffer.getvalue(), np.uint8))
                filled = np.zeros((steps, max(map(len, rows)) + 7), np.uint8)
                for row, x in zip(filled, rows, strict=True):
                    row[: len(x)] = x
                obs["images/cam_high"] = filled
            else:
                obs.create_dataset("images/cam_high", data=shown, chunks=(1, 24, 32, 3))
        truth.append((action, qpos, shown))
    return truth


def _tensor(*shape, dtype="float32"):
    return {"tensor": {"dtype": dtype, "encoding": "none", "shape": {
        "dimensions": [str(n) for n in shape]} if shape else {}}}  # fmt: skip


def _dict(**features):
    return {"featuresDict": {"features": features}}


def _image(*shape):
    return {"image": {"dtype": "uint8", "encodingFormat": "jpeg", "shape": {
        "dimensions": [str(n) for n in shape]}}}  # fmt: skip


def rlds(folder, steps_features, rows, name="toy"):
    """Writes a version of a data set in TFDS's layout: features.json and two TFRecord files, by the
    package tfrecord. `rows` has for each episode path -> (list, "float" | "int" | "byte")."""
    import tfrecord

    folder = folder / name / "1.0.0"
    folder.mkdir(parents=True)
    tree = _dict(steps={"sequence": {"feature": steps_features, "length": "-1"}},
                 episode_metadata=_dict(file_path={"text": {}}))  # fmt: skip
    (folder / "features.json").write_text(json.dumps(tree))
    half = (len(rows) + 1) // 2
    for i, part in enumerate((rows[:half], rows[half:])):
        writer = tfrecord.TFRecordWriter(folder / f"{name}-train.tfrecord-{i:05d}-of-00002")
        for row in part:
            writer.write(row)
        writer.close()
    return folder


def rlds_libero(folder, lengths=(12, 9, 7)):
    """Writes LIBERO as converted by OpenVLA; returns (actions, states, JPEG files) per episode."""
    from wamjax.data import images

    truth, rows = [], []
    for i, steps in enumerate(lengths):
        actions, states = (x.astype(np.float32) for x in motion(i, steps))
        shown = [images.encode(x, "jpeg") for x in pictures(i, steps)]
        rows.append({
            "steps/action": (actions.ravel(), "float"),
            "steps/observation/state": (states.ravel(), "float"),
            "steps/observation/image": (shown, "byte"),
            "steps/reward": ((np.arange(steps) == steps - 1).astype(float), "float"),
            "steps/is_first": ((np.arange(steps) == 0).astype(int), "int"),
            "steps/language_instruction": ([b"open the drawer"] * steps, "byte"),
            "episode_metadata/file_path": ([f"/x/{i}.hdf5".encode()], "byte"),
        })  # fmt: skip
        truth.append((actions, states, shown))
    features = _dict(
        action=_tensor(7), reward=_tensor(), is_first=_tensor(dtype="bool"),
        language_instruction={"text": {}},
        observation=_dict(state=_tensor(8), image=_image(16, 24, 3)),
    )  # fmt: skip
    return rlds(folder, features, rows, "libero_object_no_noops"), truth


def rlds_droid(folder, paths):
    """Writes DROID's features, with an episode of 6 steps per file_path; readers skip its depth."""
    from wamjax.data import images

    rows = []
    for i, path in enumerate(paths):
        rng = np.random.default_rng(i)
        joints = rng.normal(size=(6, 7)).astype(np.float32)
        shown = [images.encode(x, "jpeg") for x in pictures(i, 6)]
        rows.append({
            "steps/observation/joint_position": (joints.ravel(), "float"),
            "steps/observation/gripper_position": ([0, 0, 0, 0, 0.5, 1], "float"),
            "steps/action_dict/joint_velocity": (-joints.ravel(), "float"),
            "steps/action_dict/gripper_position": ([0, 0, 0, 1, 1, 1], "float"),
            "steps/action": (np.zeros(42), "float"),
            "steps/observation/wrist_image_left": (shown, "byte"),
            "steps/language_instruction": ([b""] * 6, "byte"),
            "steps/language_instruction_2": ([b"put it away"] * 6, "byte"),
            "steps/is_last": ((np.arange(6) == 5).astype(int), "int"),
            "episode_metadata/file_path": ([path.encode()], "byte"),
            "episode_metadata/recording_folderpath": ([f"/rec/{i}".encode()], "byte"),
        })  # fmt: skip
    features = _dict(
        action=_tensor(7), is_last=_tensor(dtype="bool"),
        language_instruction={"text": {}}, language_instruction_2={"text": {}},
        action_dict=_dict(joint_velocity=_tensor(7), gripper_position=_tensor(1)),
        observation=_dict(joint_position=_tensor(7), gripper_position=_tensor(1),
                          wrist_image_left=_image(16, 24, 3)),
    )  # fmt: skip
    return rlds(folder, features, rows, "droid")
