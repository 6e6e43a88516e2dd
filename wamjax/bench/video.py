"""Measures how fast frames of a LeRobot v3.0 video are read, in one pass and by seeks.

    python -m wamjax.bench video --repeats=3

The data set is encoded as by LeRobot (a keyframe every other frame; H.264 and, if PyAV has it,
AV1), with several episodes in one file. "a seek each" seeks to the keyframe before every frame,
decodes up to the frame, in a file that stays open, and converts it by ``to_ndarray``; "converter
kept" does so without creating a converter per frame. "kept" reads the frames of a data set that
`wamjax.ingest --pictures=video` converted, and "windows" the frames of random training windows,
from that data set and by a seek each. All are timed in turn, and their frames compared. The report
has the best rate of each, and the bytes per frame next to those of JPEG and PNG.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

SIZES = ((96, 96), (256, 256))
WINDOWS, FRAMES, STRIDE = 24, 9, 4  # windows per episode, in Fast-WAM's shape
CODECS = {"h264": ("libx264", {"crf": "23"}), "av1": ("libsvtav1", {"crf": "30", "preset": "8"})}
EPISODES, STEPS, HZ = 4, 120, 30
CAMERA = "observation.images.front"


def run(repeats: int, episodes: int = EPISODES, steps: int = STEPS) -> dict[str, Any]:
    """Returns the report."""
    import av

    from wamjax.data.ingest.formats import lerobot

    rows = {}
    for size in SIZES:
        for codec, (encoder, options) in CODECS.items():
            if encoder not in av.codecs_available:
                continue
            with tempfile.TemporaryDirectory() as folder:
                root = pathlib.Path(folder)
                _write(root, size, encoder, options, episodes, steps)
                kept, sizes = _ingested(root)
                row = _compare(lerobot.open(root), kept, root, repeats)
                rows[f"{codec} {size[0]}x{size[1]}"] = row | sizes
    return {"benchmark": "video", "episodes": episodes, "steps": steps, "rows": rows}


def _ingested(root: pathlib.Path):
    """Returns the data set that keeps the video, and bytes per frame of each way to store it."""
    from wamjax import files
    from wamjax.data.ingest import plan, run
    from wamjax.data.records import Reader

    sizes = {}
    for pictures in ("jpeg", "auto", "video"):
        out = root / pictures
        run.ingest("lerobot", root, out, plan.Request(pictures=pictures), progress=False)
        total = sum(length + 1 for length in Reader(out).lengths)
        name = {"auto": "png"}.get(pictures, pictures)
        stored = sum(map(files.size, out.glob("frames-*")))
        sizes[f"{name}_bytes"] = round(stored / total)
    return Reader(root / "video"), sizes


def _compare(reader, kept, root: pathlib.Path, repeats: int) -> dict[str, float]:
    video = _video(root)
    rng = np.random.default_rng(0)
    windows = [
        [np.minimum(start + STRIDE * np.arange(FRAMES), entry.length - 1).tolist()
         for start in rng.integers(0, entry.length, WINDOWS)]
        for entry in reader.episodes()
    ]  # fmt: skip
    passes = {
        "kept": lambda i: list(kept[i].frames("front", range(count(i)))),
        "kept_windows": lambda i: [x for w in windows[i] for x in kept[i].frames("front", w)],
        "windows": lambda i: [x for w in windows[i] for x in _seek_each(video, i, w)],
        "one_pass": lambda i: list(reader.frames(i, "front", range(count(i)))),
        "seek_each": lambda i: list(_seek_each(video, i, range(count(i)))),
        "converter_kept": lambda i: list(_seek_each(video, i, range(count(i)), True)),
    }

    def count(i: int) -> int:
        return reader.episodes()[i].length

    total = sum(entry.length for entry in reader.episodes())
    best = dict.fromkeys(passes, float("inf"))
    for _ in range(repeats):
        frames = {}
        for name, read in passes.items():
            start = time.perf_counter()
            frames[name] = [read(i) for i in range(len(reader.episodes()))]
            best[name] = min(best[name], time.perf_counter() - start)
        pairs = [(n, "windows" if "windows" in n else "seek_each") for n in passes]
        if not all(np.array_equal(frames[a][i], frames[b][i])
                   for a, b in pairs for i in range(len(windows))):  # fmt: skip
            raise AssertionError("the passes decode different frames")
    shown = {name: len(windows) * WINDOWS * FRAMES if "windows" in name else total
             for name in passes}  # fmt: skip
    return {f"{name}_fps": shown[name] / seconds for name, seconds in best.items()}


def _video(root: pathlib.Path) -> pathlib.Path:
    return root / f"videos/{CAMERA}/chunk-000/file-000.mp4"


def _seek_each(
    path: pathlib.Path, episode: int, steps: Sequence[int], reuse: bool = False
):
    """Yields frames, with a seek to the keyframe before each."""
    import av
    from av.video.reformatter import VideoReformatter

    first = sum(_lengths(path.parents[3])[:episode])
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "SLICE"
        converter = VideoReformatter()
        for t in steps:
            want = (first + t) / HZ
            container.seek(int(Fraction(want) / stream.time_base), stream=stream)
            near = None
            for frame in container.decode(stream):
                if near is None or abs(frame.time - want) < abs(near.time - want):
                    near = frame
                if frame.time >= want:
                    break
            yield (converter.reformat(near, format="rgb24").to_ndarray() if reuse
                   else near.to_ndarray(format="rgb24"))  # fmt: skip


def _lengths(root: pathlib.Path) -> Sequence[int]:
    import pyarrow.parquet as pq

    return pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet")["length"].to_pylist()


def _write(root, size, encoder: str, options: dict[str, str], episodes: int, steps: int) -> None:
    """Writes a small data set in the published layout."""
    import av
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("data/chunk-000", "meta/episodes/chunk-000", f"videos/{CAMERA}/chunk-000"):
        (root / name).mkdir(parents=True)
    total = episodes * steps
    rng = np.random.default_rng(0)
    scene = np.kron(rng.integers(0, 255, (size[0] // 16, size[1] // 16, 3)), np.ones((16, 16, 1)))
    with av.open(str(_video(root)), "w") as container:
        stream = container.add_stream(encoder, rate=HZ, options={"g": "2", **options})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for t in range(total):  # a camera's noise, and a moving object
            x = np.roll(scene, t, 1) + rng.normal(0, 4, scene.shape)
            picture = x.clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    within = np.tile(np.arange(steps), episodes)
    numbers = np.repeat(np.arange(episodes), steps)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(7 * total), pa.float32()), 7)
    pq.write_table(pa.table({
        "action": vectors, "observation.state": vectors,
        "timestamp": pa.array((within / HZ).astype(np.float32)), "episode_index": numbers,
    }), root / "data/chunk-000/file-000.parquet")  # fmt: skip
    starts = np.arange(episodes) * steps
    where = {f"videos/{CAMERA}/{k}": [0] * episodes for k in ("chunk_index", "file_index")}
    pq.write_table(pa.table({
        "episode_index": range(episodes), "tasks": [["lift"]] * episodes,
        "length": [steps] * episodes, "data/chunk_index": [0] * episodes,
        "data/file_index": [0] * episodes, "dataset_from_index": starts,
        "dataset_to_index": starts + steps, **where,
        f"videos/{CAMERA}/from_timestamp": starts / HZ,
        f"videos/{CAMERA}/to_timestamp": (starts + steps) / HZ,
    }), root / "meta/episodes/chunk-000/file-000.parquet")  # fmt: skip
    feature = {"dtype": "float32", "shape": [7], "names": None}
    info = {
        "codebase_version": "v3.0", "robot_type": "arm", "fps": HZ, "chunks_size": 1000,
        "features": {"action": feature, "observation.state": feature,
                     CAMERA: {"dtype": "video", "shape": [*size, 3], "names": None}},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info))


def show(report: dict[str, Any]) -> None:
    """Prints the report."""
    print(f"{report['episodes']} episodes of {report['steps']} frames in one file, frames/s")
    pairs = {"one pass": ("one_pass", "seek_each"), "kept": ("kept", "seek_each"),
             "windows": ("kept_windows", "windows"), "converter": ("one_pass", "converter_kept")}
    head = "".join(f"{name + ' / seeks':>26}" for name in pairs)
    print(f"{'':14}{head}{'bytes video':>14}{'jpeg':>9}{'png':>9}")
    for name, row in report["rows"].items():
        cells = ""
        for one, other in pairs.values():
            a, b = row[f"{one}_fps"], row[f"{other}_fps"]
            cells += f"{a:>9,.0f} / {b:>5,.0f} = {a / b:>5.2f} "
        kinds = (row[f"{kind}_bytes"] for kind in ("video", "jpeg", "png"))
        print(f"{name:14}{cells}" + "".join(f"{size:>{n}}" for size, n in zip(
            kinds, (14, 9, 9), strict=True)))
