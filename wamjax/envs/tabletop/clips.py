"""Makes video clips of the tabletop world, for video models: no actions, no episodes, one camera.

    clips = ensure_clips(Settings(count=4096, frames=9, stride=2, size=32))
    clips["video"]  # uint8 (4096, 9, 32, 32, 3)
    clips["task"]  # int32 (4096,), indices into tabletop.TASKS

Every clip comes from its own episode, from a part in which the gripper moves. Clip i depends only
on the seed and on i, so a smaller set is the start of a larger one; another seed shares no scene
with it.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from wamjax import files
from wamjax.data.records import turn
from wamjax.data.sources import cache_root
from wamjax.envs import tabletop
from wamjax.envs.tabletop.render import SIZE

LAST = "settings.json"
CHUNK = 128  # episodes simulated, and frames drawn, by one call
NOISE = 0.1  # on the expert's actions, in action units: a slightly shaky hand
MOVING = 0.75  # a clip shows at least this share of the most travel that its episode has to show


class Settings(NamedTuple):
    """Determines the content of a set of clips.

    Attributes:
      count: number of clips, N.
      frames: frames per clip, f.
      stride: control steps (of 0.1 s) from one frame to the next.
      size: H = W, a divisor of 64; smaller pictures are means over squares of pixels.
      camera: one of `tabletop.CAMERAS`.
      tasks: tasks, in turn.
      seed: seed of everything.
    """

    count: int
    frames: int
    stride: int = 2
    size: int = 64
    camera: str = "overhead"
    tasks: tuple[str, ...] = tabletop.TASKS
    seed: int = 0


def ensure_clips(settings: Settings, root: str = "", progress: bool = True) -> dict[str, Any]:
    """Returns the clips as read-only memory maps and makes them if they do not exist.

    Args:
      settings: the clips to make.
      root: parent folder; "" is the cache of `wamjax.data.sources`. The name of the folder hashes
        the settings and the code of the world.
      progress: whether to show a bar while making them.

    Returns:
      video uint8 (N, f, size, size, 3) and task int32 (N,).

    Raises:
      KeyError, ValueError: the settings are invalid.
    """
    _check(settings)
    root = files.path(root, "config.data.root") if root else cache_root()
    path = root / f"clips-{_fingerprint(settings)}"
    if not files.is_there(path, LAST):
        with turn(path):
            if not files.is_there(path, LAST):  # another process may have been faster
                _make(settings, path, progress)
    places = {name: files.fetch(path / f"{name}.npy") for name in ("video", "task")}
    return {name: np.load(place, mmap_mode="r") for name, place in places.items()}


def chunks(settings: Settings) -> Iterator[dict[str, np.ndarray]]:
    """Yields the clips, up to `CHUNK` at a time: {"video": uint8, "task": int32}."""
    _check(settings)
    tasks = np.array([tabletop.task_id(name) for name in settings.tasks], np.int32)
    offsets = settings.stride * np.arange(settings.frames)
    key = jax.random.key(settings.seed)
    for begin in range(0, settings.count, CHUNK):
        numbers = np.arange(begin, begin + CHUNK)  # padded, for one shape and one compilation
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers.astype(np.uint32))
        ids = tasks[numbers % len(tasks)]
        episodes = tabletop.expert_episodes(keys, ids, NOISE)
        states = jax.tree.map(np.asarray, episodes.states)
        rows = np.arange(min(CHUNK, settings.count - begin))
        dice = np.random.default_rng([settings.seed, begin]).random(CHUNK)
        starts = _starts(states.gripper, dice, int(offsets[-1]))
        video = [_draw(states, starts + k, settings)[rows] for k in offsets]
        yield {"video": np.stack(video, axis=1), "task": ids[rows]}


def _starts(gripper: np.ndarray, dice: np.ndarray, span: int) -> np.ndarray:
    """Returns a start for each episode, one of those from which the gripper travels far enough.

    Args:
      gripper: (e, t, 3) positions.
      dice: (e,) in [0, 1), chooses among them.
      span: steps from the first frame to the last.
    """
    steps = np.linalg.norm(np.diff(gripper, axis=1), axis=-1)
    so_far = np.pad(np.cumsum(steps, axis=1), ((0, 0), (1, 0)))
    travel = so_far[:, span:] - so_far[:, : so_far.shape[1] - span]
    good = travel >= MOVING * travel.max(axis=1, keepdims=True)
    rank = np.floor(dice * good.sum(axis=1)).astype(int)  # rank among the good starts
    return np.argmax(np.cumsum(good, axis=1) > rank[:, None], axis=1)


def _draw(states: tabletop.State, times: np.ndarray, settings: Settings) -> np.ndarray:
    """Renders all episodes, each at its own times: uint8 (e, size, size, 3)."""
    at = jax.tree.map(lambda x: x[np.arange(len(times)), times], states)
    picture = tabletop.render_episode(at, tabletop.Shift.none())[settings.camera]
    return shrink(np.asarray(picture), settings.size)


def shrink(pictures: np.ndarray, size: int) -> np.ndarray:
    """Shrinks pictures (..., H, H, c) to (..., size, size, c): means over squares, rounded."""
    *lead, side, _, channels = pictures.shape
    p = side // size
    squares = pictures.reshape(*lead, size, p, size, p, channels).astype(np.float32)
    return np.round(squares.mean(axis=(-2, -4))).astype(np.uint8)


def _make(settings: Settings, path: files.Path, progress: bool) -> None:
    """Writes the clips next to `path` and renames them when they are complete."""
    shape = (settings.count, settings.frames, settings.size, settings.size, 3)
    bar = tqdm.tqdm(total=settings.count, unit="clip", desc="clips", disable=not progress)
    try:
        with files.draft(path, last=LAST) as folder, bar:
            folder.mkdir()
            create = np.lib.format.open_memmap
            video = create(folder / "video.npy", "w+", np.uint8, shape)
            task = create(folder / "task.npy", "w+", np.int32, shape[:1])
            start = 0
            for chunk in chunks(settings):
                end = start + len(chunk["task"])
                video[start:end], task[start:end] = chunk["video"], chunk["task"]
                bar.update(end - start)
                start = end
            video.flush()
            task.flush()
            (folder / LAST).write_text(json.dumps(settings._asdict()) + "\n")
    except OSError:
        # Another process may have been faster; its clips are the same.
        if not files.is_there(path, LAST):
            raise


def _check(settings: Settings) -> None:
    for name in settings.tasks:
        tabletop.task_id(name)  # an unknown task raises, with a suggestion
    if settings.camera not in tabletop.CAMERAS:
        raise KeyError(f"no camera {settings.camera!r}; there are {', '.join(tabletop.CAMERAS)}")
    if settings.size < 1 or SIZE % settings.size:
        raise ValueError(f"size {settings.size} does not divide the {SIZE} pixels of the cameras")
    span, longest = settings.stride * (settings.frames - 1), tabletop.MAX_STEPS
    if min(settings.count, settings.frames, settings.stride, len(settings.tasks)) < 1:
        raise ValueError(f"count, frames, stride and tasks must be positive: {settings}")
    if span > longest:
        raise ValueError(
            f"{settings.frames} frames of stride {settings.stride} span {span} steps, an episode "
            f"has {longest}; lower frames or stride"
        )


def _fingerprint(settings: Settings) -> str:
    digest = hashlib.sha256(json.dumps(settings._asdict()).encode())
    world = sorted(pathlib.Path(tabletop.__file__).parent.glob("*.py"))
    for file in (pathlib.Path(__file__), *world):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
