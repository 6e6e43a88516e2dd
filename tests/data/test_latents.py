"""Tests precomputed latents: writing, reading, training; composite pictures."""

import hashlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax
import ml_dtypes
import numpy as np
import pytest
from data import synthetic
from PIL import Image

from wamjax import train, wam
from wamjax.data import layout, pipeline, precompute, stand_in
from wamjax.data.latents import LatentInfo, Latents
from wamjax.data.records import Reader, RecordError
from wamjax.data.sources import open_sources
from wamjax.data.windows import Windows
from wamjax.training import metrics, sharding

LAYOUT = "top:8x6+wrist:8x10"
CONFIGS = pathlib.Path(__file__).parents[2] / "experiments" / "configs"
INFO = LatentInfo("toy", LAYOUT, {"top": (8, 6), "wrist": (8, 10)}, 5, 2, 1, (2, 4, 8, 5))


def encode(video):
    """Encodes as a causal codec with temporal factor 4, spatial factor 2 and five channels.

    A latent holds (episode, step) of the first and of the last frame so far, and the mean of all
    steps so far, as read from the pictures of `synthetic`.
    """
    b, f, h, w, _ = video.shape
    steps = video[..., 1].astype(np.float32)
    so_far = np.cumsum(steps, axis=1) / np.arange(1, f + 1)[:, None, None]
    parts = [video[:, :1, ..., 0].repeat(f, 1), steps[:, :1].repeat(f, 1), video[..., 0], steps,
             so_far]  # fmt: skip
    return np.stack(parts, -1)[:, ::4, ::2, ::2]


class Counting:
    def __init__(self, fail_at=None):
        self.fail_at, self.calls, self.sizes = fail_at, 0, set()

    def __call__(self, video):
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.sizes.add(len(video))
        return encode(video)


@pytest.fixture
def demos(tmp_path):
    return synthetic.write(tmp_path / "demos")


def write(demos, out, info=INFO, encode=encode, **options):
    return precompute.precompute(Reader(demos), out, info, encode, 4, progress=False, **options)


def opened(path):
    return Latents(path, Reader(path).index["lengths"])


def contents(path):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in path.iterdir()}


def changed(**values):
    return LatentInfo(**INFO.__dict__ | values)


# ---- what is written ----


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("shard_bytes", [1, 3000, 2**28])
def test_every_window_has_the_latents_that_encoding_online_would_give(
    demos, tmp_path, stride, shard_bytes
):
    info = changed(stride=stride)
    count = write(demos, tmp_path / "out", info, shard_bytes=shard_bytes)
    starts = [(e, s) for e, n in enumerate(synthetic.LENGTHS) for s in range(0, n, stride)]
    assert count == len(starts)
    got = opened(tmp_path / "out")
    assert got.info == info
    # Online: the same codec encodes the pictures of a window, by the ordinary path.
    config = synthetic.config(tmp_path, demos={"path": "demos"})
    config.data.frames, config.data.frame_stride = 5, 2
    spec, _, sources = open_sources(config.data)
    windows = Windows(sources[0].reader, spec)
    online = {windows.locate(i): windows[i]["images"] for i in range(len(windows))}
    for episode, start in starts:
        images = online[episode, start]
        video = np.concatenate([images["top"], images["wrist"]], axis=2)
        want = encode(video[None])[0].astype(ml_dtypes.bfloat16)
        read = got.read(episode, start)
        assert read.dtype == ml_dtypes.bfloat16 and np.array_equal(read, want)
        assert (read[..., 0] == episode).all() and (read[..., 1] == start).all()
    shards = len(list((tmp_path / "out").glob("latents-*")))
    assert (
        (shards == 6) if shard_bytes == 1 else (shards == 1) if shard_bytes > 3000 else shards > 1
    )


def test_the_data_set_is_complete_without_pictures(demos, tmp_path):
    write(demos, tmp_path / "out", shard_bytes=3000)
    before, after = Reader(demos), Reader(tmp_path / "out")
    assert after.stored_statistics() == before.stored_statistics()
    for key in ("lengths", "tasks", "success", "instructions"):
        assert after.index[key] == before.index[key]
    assert after.info.cameras == {} and after.info.action_dim == 2
    for a, b in zip(before, after, strict=True):
        assert b.images == {} and a.instruction == b.instruction and a.seed == b.seed
        assert np.array_equal(a.actions, b.actions) and np.array_equal(a.proprio, b.proprio)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_codec_gets_batches_of_one_size(demos, tmp_path):
    codec = Counting()
    write(demos, tmp_path / "out", encode=codec)
    assert codec.sizes == {4} and codec.calls == sum(-(-n // 4) for n in synthetic.LENGTHS)


def test_the_first_episodes_alone_can_be_written(demos, tmp_path):
    reader = Reader(demos, 3)
    precompute.precompute(reader, tmp_path / "out", INFO, encode, progress=False)
    got = Reader(tmp_path / "out")
    assert got.lengths.tolist() == list(synthetic.LENGTHS[:3])
    assert got.stored_statistics()["actions"]["max"] == [2.0, 8.0]


# ---- interruptions ----


def test_an_interrupted_encoding_resumes_with_the_same_result(demos, tmp_path):
    write(demos, tmp_path / "whole", shard_bytes=3000)
    codec = Counting(fail_at=5)
    with pytest.raises(KeyboardInterrupt):
        write(demos, tmp_path / "out", encode=codec, shard_bytes=3000)
    assert not (tmp_path / "out").exists()
    again = Counting()
    count = write(demos, tmp_path / "out", encode=again, shard_bytes=3000)
    assert 0 < count < sum(synthetic.LENGTHS) and again.calls < Counting().calls + 10
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_killed_encoding_resumes(demos, tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys
        from data import test_latents as t
        class Kill(t.Counting):
            def __call__(self, video):
                if self.calls == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__call__(video)
        t.write(sys.argv[1], t.pathlib.Path(sys.argv[2]), encode=Kill(), shard_bytes=3000)
    """)
    here = pathlib.Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    command = [sys.executable, "-c", script, str(demos), str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.latents").exists()
    assert 0 < write(demos, tmp_path / "out", shard_bytes=3000) < sum(synthetic.LENGTHS)
    write(demos, tmp_path / "whole", shard_bytes=3000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_kill_at_the_very_end_costs_no_encoding(demos, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(precompute, "_complete", killed)
        with pytest.raises(KeyboardInterrupt):
            write(demos, tmp_path / "out")
    assert write(demos, tmp_path / "out", encode=killed) == 0
    assert opened(tmp_path / "out").read(2, 4)[0, 0, 0, 1] == 4


def test_partial_files_of_other_settings_are_not_continued(demos, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(demos, tmp_path / "out", encode=Counting(fail_at=5), shard_bytes=3000)
    with pytest.raises(ValueError, match=r"\.out\.latents holds part of the latents .* job: "
                       r"\{'codec': \('toy', 'vae'\)\}.*Remove it"):  # fmt: skip
        write(demos, tmp_path / "out", changed(codec="vae"), shard_bytes=3000)
    other = synthetic.write(tmp_path / "other", (5, 1, 9), first=3)
    with pytest.raises(ValueError, match="part of the latents of another job: .*'source'"):
        write(other, tmp_path / "out", shard_bytes=3000)
    write(demos, tmp_path / "done")
    with pytest.raises(FileExistsError, match="done exists; remove it"):
        write(demos, tmp_path / "done")


def test_two_processes_do_not_write_the_same_data_set(demos, tmp_path):
    def meanwhile(video):
        with pytest.raises(ValueError, match="is being written by another process"):
            write(demos, tmp_path / "out")
        return encode(video)

    write(demos, tmp_path / "out", encode=meanwhile)


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (lambda v: encode(v)[:, :1], r"made latents \(4, 1, 4, 8, 5\) .* make \(4, 2, 4, 8, 5\)"),
        (lambda v: encode(v)[:2], r"made latents \(2, 2, 4, 8, 5\)"),
        (
            lambda v: np.where(encode(v) == 4, np.nan, encode(v)),
            "of episode 0, step 4 hold non-fin",
        ),
    ],
)
def test_the_codecs_output_is_checked(demos, tmp_path, codec, message):
    with pytest.raises(ValueError, match=message):
        write(demos, tmp_path / "out", encode=codec)
    assert not (tmp_path / "out").exists()


# ---- what is read ----


@pytest.mark.parametrize("damage", ["flip", "remove", "swap", "index", "format"])
def test_damage_is_an_error_that_names_the_file(demos, tmp_path, damage):
    path = tmp_path / "out"
    write(demos, path, shard_bytes=3000)
    files = sorted(path.glob("latents-*"))
    if damage == "flip":
        data = bytearray(files[1].read_bytes())
        data[len(data) // 2] ^= 255
        files[1].write_bytes(data)
    elif damage == "remove":
        files[1].unlink()
    elif damage == "swap":  # two shards with equally many windows of different episodes
        synthetic.write(tmp_path / "even", (4, 4, 4))
        path = tmp_path / "even-out"
        write(tmp_path / "even", path, shard_bytes=1)
        one, two = sorted(path.glob("latents-*"))[:2]
        data = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(data)
    else:
        values = json.loads((path / "latents.json").read_text())
        values |= {"windows": [3]} if damage == "index" else {"format": 7}
        (path / "latents.json").write_text(json.dumps(values))
    lengths = Reader(path).index["lengths"]
    every = [(e, s) for e, n in enumerate(lengths) for s in range(n)]
    want = (
        RecordError,
        r"latents-0000\d-of.*record \d+ \(episode \d, step \d\).*write the latents",
    )
    if damage in ("index", "format"):
        want = ValueError, r"latents.json (counts 3 windows, the episodes have 32|has format 7)"
    with pytest.raises(want[0], match=want[1]):
        found = opened(path)
        for episode, start in every:
            found.read(episode, start)


def cached(root, **sources):
    """Returns a config whose model reads the latents of `INFO`."""
    config = synthetic.config(root, **sources or {"demos": {"path": "out"}})
    config.data.frames, config.data.frame_stride = 5, 2
    config.data.cameras = ("top", "wrist")
    codec = config.model.codec
    codec.kind, codec.channels, codec.spatial, codec.temporal = "cached", 5, 2, 4
    return config


def test_batches_of_latents_are_those_of_pictures_encoded(demos, tmp_path):
    """Both have the same windows in the same order."""
    write(demos, tmp_path / "out")
    config, plain = cached(tmp_path), cached(tmp_path, demos={"path": "demos"})
    plain.model.codec.kind = "pixel"
    spec, statistics, ours = pipeline.open_data(config)
    assert (spec, statistics) == pipeline.open_data(plain)[:2]
    for _, a, b in zip(range(12), ours, pipeline.open_data(plain)[2], strict=False):
        assert a.keys() ^ b.keys() == {"latents", "video"}
        assert np.array_equal(a["latents"], encode(b["video"]).astype(ml_dtypes.bfloat16))
        for key in a.keys() & b.keys():
            assert np.array_equal(a[key], b[key]), key


def test_a_stride_thins_the_windows_out_and_each_comes_once_an_epoch(demos, tmp_path):
    write(demos, tmp_path / "out", changed(stride=3))
    config = cached(tmp_path)
    config.data.batch_size = 2
    starts = [(e, s) for e, n in enumerate(synthetic.LENGTHS) for s in range(0, n, 3)]
    iterator, seen = pipeline.open_data(config)[2], []
    for _ in range(len(starts) // 2):
        batch = next(iterator)
        seen += [(int(e), int(x[0, 0, 0, 1]))
                 for e, x in zip(batch["episode"], batch["latents"], strict=True)]  # fmt: skip
    assert len(starts) % 2 == 0 and sorted(seen) == starts
    state = iterator.get_state()
    want = next(iterator)
    second = pipeline.open_data(config)[2]
    second.set_state(json.loads(json.dumps(state)))
    assert np.array_equal(next(second)["latents"], want["latents"])


def test_action_free_videos_have_latents_too(demos, tmp_path):
    write(demos, tmp_path / "out")
    synthetic.write(tmp_path / "videos", (6, 2), first=50, action_free=True)
    write(tmp_path / "videos", tmp_path / "free")
    config = cached(tmp_path, a={"path": "out"}, v={"path": "free", "action_free": True})
    batch = next(pipeline.open_data(config)[2])
    free = batch["episode"] >= len(synthetic.LENGTHS)
    assert free.sum() == 2 and not batch["action_valid"][free].any()
    assert (batch["latents"][free, 0, 0, 0, 0] >= 50).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.frames": 9}, "sources.demos .*computed with frames 5, config.data.frames is 9.*"),
        ({"data.frame_stride": 1}, "with frame_stride 2, config.data.frame_stride is 1"),
        (
            {"data.cameras": ("wrist", "top")},
            r"with cameras \('top', 'wrist'\), config.data.camera",
        ),
        ({"data.cameras": ("side",)}, r"no camera 'side'; it has \['top', 'wrist'\]"),
        ({"model.codec.kind": "pixel"}, "holds no pictures: .*model.codec.kind = 'cached'"),
        ({"data.declared.action_dim": 7}, "data.declared gives .* the data has"),
    ],
)
def test_latents_that_do_not_fit_the_config_are_named(demos, tmp_path, changes, message):
    write(demos, tmp_path / "out")
    config = cached(tmp_path)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        pipeline.open_data(config)


def test_a_missing_data_set_is_an_error_with_the_command_that_writes_it(demos, tmp_path):
    for name in ("demos", "nothing"):  # one with pictures, and none at all
        with pytest.raises(
            FileNotFoundError,
            match=rf"no latents in .*/{name} \(no latents.json\).*\n  python -m "
            rf"wamjax.data.precompute --config=FILE --data=DATASET --out=.*/{name} --layout",
        ):
            pipeline.open_data(cached(tmp_path, demos={"path": name}))


# ---- layouts ----

ROBOTWIN = "cam_high:256x320/cam_left_wrist:128x160+cam_right_wrist:128x160"


def test_layouts_of_the_published_models():
    libero = layout.parse("image:224x224+wrist_image:224x224")
    assert libero.cameras == {"image": (224, 224), "wrist_image": (224, 224)}
    robotwin = layout.parse(ROBOTWIN)
    assert robotwin.cameras == {"composite": (384, 320)}
    assert str(robotwin) == ROBOTWIN and layout.parse(str(libero)) == libero
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (2, 240, 320, 3), np.uint8)
              for name in ("cam_left_wrist", "cam_right_wrist")}  # fmt: skip
    images["cam_high"] = rng.integers(0, 256, (2, 256, 320, 3), np.uint8)
    whole = robotwin.compose(images)
    assert whole.shape == (2, 384, 320, 3) and whole.dtype == np.uint8
    assert np.array_equal(whole[:, :256], images["cam_high"])
    for t in range(2):
        for camera, x in (("cam_left_wrist", 0), ("cam_right_wrist", 160)):
            want = Image.fromarray(images[camera][t]).resize((160, 128), Image.Resampling.BILINEAR)
            assert np.array_equal(whole[t, 256:, x : x + 160], np.asarray(want))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image", "'image' is not NAME:HEIGHTxWIDTH"),
        ("a:8x8+b:8", r"'a:8x8\+b:8' is not"),
        ("a:8x8+b:6x8", "side by side, so they must be equally high"),
        ("a:8x8/b:8x6", "the rows of 'a:8x8/b:8x6' are not equally wide"),
    ],
)
def test_other_layouts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        layout.parse(text)


def test_a_layout_needs_its_cameras():
    with pytest.raises(ValueError, match="shows camera 'b', which does not exist"):
        layout.parse("a:2x2+b:2x2").compose({"a": np.zeros((1, 2, 2, 3), np.uint8)})


# ---- the published configs ----


def published(name, arg="debug"):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize("name", ["fast_wam_libero", "fast_wam_robotwin"])
def test_published_configs_train_in_miniature_from_nothing(name, tmp_path, monkeypatch):
    """Starts from an empty data root: the code for real data writes and reads stand-ins.

    Only one of the two is trained, since the other differs in its data alone.
    """
    config = published(name)
    config.data.root = str(tmp_path / "data")
    if name == "fast_wam_libero":
        assert train.run(config, tmp_path / "run", devices=jax.devices()[:1])
        rows = metrics.read(tmp_path / "run")
        assert [row["step"] for row in rows] == list(range(1, 21)) and config.total_steps == 20
        assert all(np.isfinite(row["loss"]) and row["skips"] == 0 for row in rows)
        assert (tmp_path / "run" / "DONE").exists()
        assert (tmp_path / "run/media/batch.png").exists()
    else:
        pipeline.open_data(config)
    monkeypatch.setattr(precompute, "precompute", lambda *a, **k: pytest.fail("made again"))
    spec, _, iterator = pipeline.open_data(config)
    assert spec == pipeline.declared(config.data)
    objective = wam.build(config, spec)
    batch, want = next(iterator), objective.batch_spec(8)
    assert want.keys() == batch.keys() - {"episode"}
    for key, leaf in want.items():
        assert batch[key].shape == leaf.shape and batch[key].dtype == leaf.dtype, key
    # Only the rows after the words of an instruction are zero.
    used = np.abs(batch["context"].astype(np.float32)).sum(-1) > 0
    assert (used.sum(1) > 10).all() and not used[:, 40:].any()
    if name != "fast_wam_libero":
        params = jax.eval_shape(objective.init, jax.random.key(0))
        batch = {key: batch[key] for key in want}
        with jax.set_mesh(sharding.make_mesh(config.mesh, jax.devices()[:1])):
            loss, _ = jax.eval_shape(objective.loss, params, batch, jax.random.key(0))
        assert loss.shape == ()


def test_published_configs_report_missing_data(tmp_path):
    config = published("fast_wam_libero", None)
    config.data.root = str(tmp_path)
    message = (
        "no latents in .*/libero-latents .*\n.*wamjax.data.precompute .*--out=.*libero-latents"
    )
    with pytest.raises(FileNotFoundError, match=message):
        pipeline.open_data(config)


def test_the_command_writes_what_the_config_trains_on(tmp_path):
    """The commands turn raw pictures of other sizes than the model's into a batch."""
    synthetic.write(tmp_path / "raw", (9, 4), cameras={"image": (20, 20), "wrist_image": (8, 8)},
                    action_dim=7, proprio_dim=3)  # fmt: skip
    config = CONFIGS / "fast_wam_libero.py"
    arguments = (
        f"--config={config}:debug", f"--data={tmp_path}/raw", f"--out={tmp_path}/out",
        "--encode=wamjax.data.stand_in:codec", "--weights=48x16x4", "--stride=2",
    )  # fmt: skip
    with (
        synthetic.command(precompute, *arguments, "--layout=image:32x32"),
        pytest.raises(ValueError, match=r"makes cameras \('image',\), config.data.cameras is"),
    ):
        precompute.main([""])
    with synthetic.command(precompute, *arguments, "--layout=image:32x32+wrist_image:32x32"):
        precompute.main([""])
    info = opened(tmp_path / "out").info
    assert info.codec == "wamjax.data.stand_in:codec 48x16x4" and info.stride == 2
    assert info.shape == (3, 2, 4, 48) and info.cameras["wrist_image"] == (32, 32)
    assert opened(tmp_path / "out").read(0, 8).std() > 0


def test_the_stand_in_codec_is_causal():
    """Latent k depends only on frames up to 4 k, the first one on frame 0 alone."""
    codec = stand_in.codec("5x4x4")
    video = np.random.default_rng(0).integers(0, 256, (1, 9, 8, 8, 3), np.uint8)
    whole = codec(video)
    assert whole.shape == (1, 3, 2, 2, 5)
    for k in range(3):
        np.testing.assert_allclose(codec(video[:, : 4 * k + 1])[:, k], whole[:, k], rtol=1e-6)
    with pytest.raises(ValueError, match="CHANNELSxSPATIALxTEMPORAL"):
        stand_in.codec("5x4")
