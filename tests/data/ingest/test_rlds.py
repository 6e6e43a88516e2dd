"""Tests RLDS in TFRecord and ArrayRecord, without TensorFlow."""

import io
import json
import pathlib
import subprocess
import sys

import crc32c
import h5py
import numpy as np
import pytest
from data.ingest import layouts
from data.ingest.test_hdf5 import ingest, shown
from PIL import Image

from wamjax.data.ingest import tfrecord
from wamjax.data.ingest.reader import SourceError
from wamjax.data.records import Reader


def test_openvlas_libero_is_converted_exactly(tmp_path):
    folder, truth = layouts.rlds_libero(tmp_path)
    report, episodes = ingest(tmp_path, tmp_path / "out", "rlds")  # or <name>/<version>
    for episode, (actions, states, jpeg) in zip(episodes, truth, strict=True):
        assert np.array_equal(episode.actions, actions)
        assert np.array_equal(episode.proprio[:-1], states)
        assert list(episode.images["image"][:-1]) == jpeg  # the same bytes
        assert episode.instruction == "open the drawer" and episode.returns[-1] == 1
    assert Reader(tmp_path / "out").info.control_hz == 20  # from its name; the files state no rate
    assert report["gripper"] == "gripper minus_opens"


def test_an_unknown_rate_must_be_stated(tmp_path):
    folder, _ = layouts.rlds_libero(tmp_path)
    folder.parent.rename(tmp_path / "other")
    with pytest.raises(ValueError, match="give --source_fps"):
        ingest(tmp_path / "other", tmp_path / "out", "rlds")
    report, _ = ingest(tmp_path / "other", tmp_path / "out", "rlds", source_fps=5)
    # Dimensions have no names either: one with two values is a gripper, and is named so.
    assert Reader(tmp_path / "out").info.action_names[5:] == ("action[5]", "action[6].gripper")
    assert "which command opens" in report["warnings"][0]
    with pytest.raises(ValueError, match=r"split=test.* has the splits \['train'\]"):
        ingest(tmp_path / "other", tmp_path / "out2", "rlds", {"split": "test"}, source_fps=5)


def test_a_truncated_file_is_reported_counted_and_skipped(tmp_path):
    folder, truth = layouts.rlds_libero(tmp_path)
    file = folder / "libero_object_no_noops-train.tfrecord-00001-of-00002"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(SourceError, match="00001-of-00002 is cut off.*--skip_bad=1"):
        ingest(folder, tmp_path / "out", "rlds")
    assert not (tmp_path / "out").exists()
    report, episodes = ingest(folder, tmp_path / "out", "rlds", skip_bad=1)
    assert len(episodes) == 2 and "cut off" in report["bad"][file.name]


def test_a_damaged_picture_is_found_when_it_is_read(tmp_path):
    folder, truth = layouts.rlds_libero(tmp_path)
    file = folder / "libero_object_no_noops-train.tfrecord-00000-of-00002"
    data = file.read_bytes()
    at = data.index(truth[1][2][4])
    file.write_bytes(data[:at] + bytes(40) + data[at + 40 :])
    with pytest.raises(SourceError, match=r"00000-of-00002 .*:1\): cannot decode a picture"):
        ingest(folder, tmp_path / "out", "rlds")


def test_checksums_and_numbers_are_those_of_other_libraries():
    data = np.random.default_rng(0).bytes(99)
    assert tfrecord.crc32c(data) == crc32c.crc32c(data)
    from tfrecord import example_pb2

    ints = [0, 1, -1, 127, 128, 2**40, -(2**63), 2**63 - 1]
    feature = example_pb2.Feature(int64_list=example_pb2.Int64List(value=ints))
    assert tfrecord.numbers(memoryview(feature.SerializeToString())).tolist() == ints
    # Unpacked lists are valid, too: field 1, one float after the other.
    loose = b"".join(b"\x0d" + np.float32(x).tobytes() for x in (1.5, -2.0))
    feature = b"\x12" + bytes([len(loose)]) + loose
    assert tfrecord.numbers(memoryview(feature)).tolist() == [1.5, -2.0]


PATHS = ("/lab/success/a.h5", "/lab/failure/b.h5", "/lab/success/c.h5")


def test_droid_has_successes_only_and_joint_velocities(tmp_path):
    layouts.rlds_droid(tmp_path, PATHS)
    report, episodes = ingest(tmp_path / "droid", tmp_path / "out", "droid")
    assert len(episodes) == 2 and {e.instruction for e in episodes} == {"put it away"}
    joints = np.random.default_rng(2).normal(size=(6, 7)).astype(np.float32)
    assert np.array_equal(episodes[1].actions[:, :7], -joints)
    assert np.array_equal(episodes[1].proprio[:-1, :7], joints)
    info = Reader(tmp_path / "out").info
    assert info.control_hz == 15 and info.action_dim == info.proprio_dim == 8
    assert "1 records are left out" in report["notes"][0]
    assert report["gripper"] == "gripper zero_opens" and report["actions are"] == "velocity"
    _, slow = ingest(tmp_path / "droid", tmp_path / "slow", "droid", fps=5)
    mean = -joints.reshape(2, 3, 7).mean(1)  # velocities are averaged
    assert np.allclose(slow[1].actions[:, :7], mean, atol=1e-6) and slow[1].length == 2
    _, episodes = ingest(tmp_path / "droid", tmp_path / "all", "droid", {"files": ".*"})
    assert [e.success for e in episodes] == [True, False, True]


def test_droid_is_cut_where_nothing_moves(tmp_path):
    layouts.rlds_droid(tmp_path, PATHS)
    ranges = {f"/rec/0--{PATHS[0]}": [[0, 2], [3, 6]], f"/rec/1--{PATHS[1]}": [[0, 6]]}
    (tmp_path / "ranges.json").write_text(json.dumps(ranges))
    _, (first, second) = ingest(tmp_path / "droid", tmp_path / "out", "droid",
                                {"ranges": str(tmp_path / "ranges.json")})  # fmt: skip
    joints = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)
    assert np.array_equal(first.actions[:, :7], -joints[:2])
    assert np.array_equal(second.actions[:, :7], -joints[3:])
    frames = shown(second, "wrist_image_left")[:-1].astype(int)
    assert abs(frames - layouts.pictures(0, 6)[3:]).mean() < 30  # JPEG of noise


def test_array_record_is_read_as_tfds_reads_it(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    def png(i, t):
        Image.fromarray(layouts.pictures(i, 9)[t]).save(out := io.BytesIO(), "png")
        out.seek(0)
        return out

    class Toy(tfds.core.GeneratorBasedBuilder):
        VERSION, pkg_dir_path = tfds.core.Version("1.0.0"), pathlib.Path(tmp_path)

        def _info(self):
            f = tfds.features
            steps = f.Dataset({
                "observation": {"image": f.Image(shape=(16, 24, 3), encoding_format="png"),
                                "state": f.Tensor(shape=(8,), dtype=np.float32)},
                "action": f.Tensor(shape=(7,), dtype=np.float32),
                "is_last": np.bool_, "language_instruction": f.Text(),
            })  # fmt: skip
            return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict({"steps": steps}))

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                actions, states = (x.astype(np.float32) for x in layouts.motion(i, 9))
                yield i, {"steps": [
                    {"observation": {"image": png(i, t), "state": states[t]},
                     "action": actions[t], "is_last": t == 8, "language_instruction": f"do {i}"}
                    for t in range(9)
                ]}  # fmt: skip

    builder = Toy(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = tfds.builder_from_directory(builder.data_dir).as_data_source(split="train")
    _, episodes = ingest(builder.data_dir, tmp_path / "out", "rlds", source_fps=10)
    assert len(episodes) == len(source) == 4
    for episode, theirs in zip(episodes, source, strict=True):
        steps = list(theirs["steps"])
        assert np.array_equal(episode.actions, [s["action"] for s in steps])
        assert np.array_equal(episode.proprio[:-1], [s["observation"]["state"] for s in steps])
        want = np.stack([s["observation"]["image"] for s in steps])
        assert np.array_equal(shown(episode, "image")[:-1], want)
        assert episode.instruction == steps[0]["language_instruction"].decode()


def test_no_tensorflow_is_imported(tmp_path):
    folder, _ = layouts.rlds_libero(tmp_path)
    code = ("import sys; from wamjax.data.ingest.reader import open_reader; "
            f"list(open_reader('rlds', {str(folder)!r}, {{}}).arrays(0)); "
            "assert not {'tensorflow', 'tensorflow_datasets'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def droid_raw(root, steps=12, off=(3, 4)):
    """Writes an episode as recorded by DROID; in the steps `off`, movement was not enabled."""
    rng = np.random.default_rng(0)
    folder = root / "success" / "2023-06-01" / "Thu_1"
    joints, moves = rng.normal(size=(steps, 7)), rng.normal(size=(steps, 7))
    (folder / "recordings/MP4").mkdir(parents=True)
    with h5py.File(folder / "trajectory.h5", "w") as file:
        file["action/joint_velocity"] = moves
        file["action/gripper_position"] = np.linspace(0, 1, steps)
        file["observation/robot_state/joint_positions"] = joints
        file["observation/robot_state/gripper_position"] = np.zeros(steps)
        file["observation/controller_info/movement_enabled"] = ~np.isin(np.arange(steps), off)
        for serial, kind in {"222": 1, "111": 0, "333": 1}.items():
            file[f"observation/camera_type/{serial}"] = np.full(steps, kind)
    shown = {serial: layouts.smooth(i, steps) for i, serial in enumerate(("111", "222", "333"))}
    for serial, frames in shown.items():
        layouts.encode_video(folder / f"recordings/MP4/{serial}.mp4", frames, fps=60)
    (folder / "metadata_LAB+1.json").write_text(json.dumps({"current_task": "free play"}))
    words = {"LAB+1": {"language_instruction1": "", "language_instruction2": "wipe it"}}
    (root / "aggregated-annotations-030724.json").write_text(json.dumps(words))
    return joints, moves, shown


def test_raw_droid_skips_steps_without_movement(tmp_path):
    joints, moves, videos = droid_raw(tmp_path)
    on = np.delete(np.arange(12), [3, 4])
    report, (episode,) = ingest(tmp_path, tmp_path / "out", "droid_raw")
    assert np.array_equal(episode.actions[:, :7], np.float32(moves[on]))
    assert np.array_equal(episode.proprio[:-1, :7], np.float32(joints[on]))
    assert episode.instruction == "wipe it" and episode.success
    cameras = dict(zip(("wrist_image_left", "exterior_image_1_left", "exterior_image_2_left"),
                       ("111", "222", "333"), strict=True))  # fmt: skip
    assert set(episode.images) == set(cameras)
    for camera, serial in cameras.items():
        frames = shown(episode, camera)[:-1].astype(int)
        assert abs(frames - videos[serial][on]).max() < 3, camera
    assert Reader(tmp_path / "out").info.control_hz == 15  # the video says 60
    (video,) = tmp_path.glob("**/222.mp4")
    video.unlink()
    with pytest.raises(SourceError, match="no video of exterior_image_1_left"):
        ingest(tmp_path, tmp_path / "out2", "droid_raw")
