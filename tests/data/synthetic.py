"""Writes small data sets whose numbers identify their episode and step."""

from __future__ import annotations

import contextlib
import json

import numpy as np
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter

from wamjax.config import base_config, source
from wamjax.data import images
from wamjax.data.records import Episode, Writer, pack, shard_name
from wamjax.data.shards import OPTIONS
from wamjax.data.spec import Info

CAMERAS = {"top": (8, 6), "wrist": (8, 10)}
LENGTHS = (5, 1, 9, 3, 12, 2)


def info(**changes) -> Info:
    values = dict(cameras=CAMERAS, proprio_dim=3, action_dim=2, control_hz=10.0, robot="toy")
    return Info(**values | changes)


def picture(episode: int, t: int, camera: str, cameras=CAMERAS) -> np.ndarray:
    out = np.zeros((*cameras[camera], 3), np.uint8)
    out[..., 0], out[..., 1], out[..., 2] = episode, t, list(cameras).index(camera)
    return out


def episode(number: int, length: int, of: Info, task: str = "lift") -> Episode:
    """Returns an episode: action t is (number, t), proprio t (number, t, random); returns count
    down."""
    t = np.arange(length + 1, dtype=np.float32)
    noise = np.random.default_rng(number).normal(size=length + 1)
    proprio = np.stack([np.full(length + 1, number), t, noise], -1)[:, : of.proprio_dim]
    actions = np.stack([np.full(length, number), t[:-1]], -1)
    actions = np.resize(actions, (length, of.action_dim)) if of.action_dim != 2 else actions
    return Episode(
        images={
            c: [images.encode(picture(number, i, c, of.cameras)) for i in range(length + 1)]
            for c in of.cameras
        },
        proprio=proprio.astype(np.float32),
        actions=(actions[:, :0] if of.action_free else actions).astype(np.float32),
        instruction=f"{task} the block",
        success=number % 2 == 0,
        returns=t[:-1][::-1].copy(),
        task=task,
        seed=number,
    )


def write(path, lengths=LENGTHS, shard_bytes: int = 2**28, first: int = 0, **changes):
    """Writes a data set with episodes of these lengths; returns its path."""
    of = info(**changes)
    with Writer(path, of, shard_bytes) as writer:
        for i, length in enumerate(lengths):
            writer.write(episode(first + i, length, of))
    return path


def rewrite(path, episodes):
    """Rewrites a data set in format 1, as one file of records with the pictures."""
    for file in path.glob("*.arrayrecord"):
        file.unlink()
    writer = ArrayRecordWriter(str(path / shard_name(0, 1)), OPTIONS)
    for episode in episodes:
        writer.write(pack(episode))
    writer.close()
    for name, gone in {"index.json": ("frames", "digests"), "spec.json": ()}.items():
        values = json.loads((path / name).read_text())
        values = {k: v for k, v in values.items() if k not in gone}
        values |= {"shards": [len(episodes)]} if gone else {"format": 1}
        (path / name).write_text(json.dumps(values))
    return path


def config(root, batch_size: int = 4, **sources):
    """Returns a config of data sets below `root`; sources are dicts of `wamjax.config.source`."""
    out = base_config()
    out.data.root = str(root)
    out.data.cameras = ()
    out.data.batch_size = batch_size
    out.data.frames, out.data.frame_stride, out.data.chunk = 3, 2, 4
    for name, values in sources.items():
        out.data.sources[name] = source(**values)
    return out


@contextlib.contextmanager
def command(module, *arguments):
    """Parses the flags of an entry point from a command line, and undefines them afterwards."""
    before = set(flags.FLAGS)
    module.define_flags()
    try:
        flags.FLAGS(["test", *arguments])
        yield
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
