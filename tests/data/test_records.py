import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from data import synthetic

from wamjax.data import frames, images
from wamjax.data.records import Reader, RecordError, Writer, pack, shard_name, unpack
from wamjax.data.shards import OPTIONS, Shards
from wamjax.data.spec import DataSpec, Info
from wamjax.data.windows import Windows


def equal(a, b):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and x.shape == y.shape
            assert np.array_equal(x, y)
        else:
            assert x == y
    return True


def test_an_episode_survives_packing():
    original = synthetic.episode(3, 7, synthetic.info())
    assert equal(unpack(pack(original)), original)


@pytest.mark.parametrize("shard_bytes", [1, 5000, 2**28])
def test_a_data_set_reads_back_in_any_order_from_any_number_of_shards(tmp_path, shard_bytes):
    path = synthetic.write(tmp_path / "a", shard_bytes=shard_bytes)
    reader = Reader(path)
    shards = sorted(path.glob("episodes-*.arrayrecord"))
    assert len(shards) == len(reader.index["shards"]) == len(list(path.glob("frames-*")))
    assert (len(shards) == len(synthetic.LENGTHS)) == (shard_bytes == 1)
    assert shards[0].name == shard_name(0, len(shards))
    for i in np.random.default_rng(0).permutation(len(reader)):
        assert equal(
            reader[int(i)], synthetic.episode(int(i), synthetic.LENGTHS[i], synthetic.info())
        )
    assert repr(reader) == repr(Reader(path)) and "0x" not in repr(reader)


def test_png_is_lossless_and_jpeg_is_near():
    x, y = np.mgrid[:32, :48]
    smooth = np.stack([4 * x, 5 * y, x + y], -1).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    assert np.array_equal(images.decode(images.encode(noise)), noise)
    jpeg = images.decode(images.encode(smooth, "jpeg")).astype(int)
    assert abs(jpeg - smooth).max() < 12
    with pytest.raises(ValueError, match="uint8"):
        images.encode(noise.astype(np.float32))
    with pytest.raises(ValueError, match="decode"):
        images.decode(b"not a picture")


def test_the_index_alone_knows_the_lengths_and_a_limit_takes_the_first(tmp_path):
    path = synthetic.write(tmp_path / "a")
    assert Reader(path, 3).lengths.tolist() == list(synthetic.LENGTHS[:3])
    with pytest.raises(IndexError):
        Reader(path, 3)[3]
    with pytest.raises(ValueError, match="so it cannot give 99"):
        Reader(path, 99)


def test_info_survives_json_and_other_formats_are_refused():
    info = synthetic.info(collection={"seed": 1})
    assert Info.from_json(info.to_json(), "spec.json") == info
    with pytest.raises(ValueError, match="format 99.*collect"):
        Info.from_json(info.to_json() | {"format": 99}, "spec.json")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_a_corrupt_record_is_an_error_that_names_file_and_record(tmp_path, damage):
    path = synthetic.write(tmp_path / "a", (5, 200, 4))
    file = path / shard_name(0, 1)
    data = bytearray(file.read_bytes())
    if damage == "flip":
        at = data.find(synthetic.episode(1, 200, synthetic.info()).proprio.tobytes())
        assert at > 0
        data[at + 100] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[: len(data) // 3])
    elif damage == "remove":
        file.unlink()
    else:
        other = synthetic.write(tmp_path / "b", (5, 7, 4))
        file.write_bytes((other / file.name).read_bytes())
    reader = Reader(path)
    with pytest.raises(RecordError, match=r"arrayrecord: record 1 \(episode 1\).*Copy the file"):
        reader[1]
    if damage == "truncate":  # ArrayRecord itself sees an empty file
        with pytest.raises(RecordError, match="0 records found in the file, 3 were written"):
            reader[0]
    if damage == "flip":
        assert reader[0].length == 5 and reader[2].length == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: {"actions": e.actions[:, :1]}, r"actions is \(4, 1\)"),
        (lambda e: {"proprio": e.proprio[:-1]}, "proprio"),
        (lambda e: {"actions": e.actions * np.nan}, "actions holds non-finite"),
        (lambda e: {"images": {"top": e.images["top"]}}, r"cameras \['top'\]"),
        (lambda e: {"images": e.images | {"top": e.images["top"][1:]}}, "pictures of camera 'top'"),
    ],
)
def test_the_writer_refuses_episodes_that_do_not_match(tmp_path, change, message):
    episode = synthetic.episode(0, 4, synthetic.info())
    with pytest.raises(ValueError, match=message):
        with Writer(tmp_path / "a", synthetic.info()) as writer:
            writer.write(dataclasses.replace(episode, **change(episode)))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with Writer(tmp_path / "a", synthetic.info()) as writer:
            writer.write(synthetic.episode(0, 4, synthetic.info()))
            assert not (tmp_path / "a").exists()
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="wamjax.collect"):
        Reader(tmp_path / "a")


def test_a_killed_writer_leaves_no_data_set_and_the_next_one_cleans_up(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import synthetic\n"
        "from wamjax.data.records import Writer\n"
        "with Writer(sys.argv[2], synthetic.info()) as w:\n"
        "    w.write(synthetic.episode(0, 4, synthetic.info())); print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    here = pathlib.Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(here), str(tmp_path / "a")],
        stdout=subprocess.PIPE,
        cwd=here.parent.parent,
    )
    assert process.stdout.readline() == b"ready\n"
    synthetic.write(tmp_path / "a")  # faster than the other process, without touching its files
    shutil.rmtree(tmp_path / "a")
    assert [p.name.startswith(".a.partial") for p in tmp_path.iterdir()] == [True]
    os.kill(process.pid, signal.SIGKILL)
    process.stdout.read()  # returns when it is dead; a zombie counts as dead
    process.stdout.close()
    assert [p.name.startswith(".a.partial") for p in tmp_path.iterdir()] == [True]
    synthetic.write(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    process.wait()


def test_an_existing_data_set_is_not_overwritten(tmp_path):
    synthetic.write(tmp_path / "a")
    with pytest.raises(FileExistsError, match="exists already: write to another folder"):
        synthetic.write(tmp_path / "a", (3,))
    assert len(Reader(tmp_path / "a")) == len(synthetic.LENGTHS)


def test_data_sets_of_format_1_are_read(tmp_path):
    path = synthetic.write(tmp_path / "a")
    new = [synthetic.episode(i, n, synthetic.info()) for i, n in enumerate(synthetic.LENGTHS)]
    synthetic.rewrite(path, new)
    reader = Reader(path)
    assert reader.digest("actions") == ""
    assert all(equal(old, episode) for old, episode in zip(reader, new, strict=True))
    assert isinstance(reader[0].images["top"], list)


def test_a_window_reads_what_it_shows_however_long_its_episode(tmp_path, monkeypatch):
    """Of a long episode, only states, actions and few frames are read."""
    rng, cameras = np.random.default_rng(0), {"top": (8, 8)}
    pictures = [b"%d" % i + rng.bytes(7000) for i in range(1001)]
    spec = DataSpec(cameras, 3, 2, 4, 3, 2, 8, 10.0)
    monkeypatch.setattr(images, "size", lambda data: (8, 8))
    monkeypatch.setattr(images, "decode", lambda data: np.zeros((8, 8, 3), np.uint8))
    read, amounts = Shards.read, {}
    for length in (30, 1000):
        of = synthetic.info(cameras=cameras)
        episode = synthetic.episode(0, length, dataclasses.replace(of, cameras={}))
        with Writer(tmp_path / str(length), of) as writer:
            writer.write(dataclasses.replace(episode, images={"top": pictures[: length + 1]}))
        windows, sizes = Windows(Reader(tmp_path / str(length)), spec), []
        monkeypatch.setattr(Shards, "read", lambda self, i: _count(read(self, i), sizes))  # noqa: B023
        for i in (0, 7, length // 2, length - 1):
            windows[i]
        amounts[length] = sum(sizes)
    assert amounts[30] > 4 * 7000
    assert amounts[1000] < 2 * amounts[30] + 4 * 4 * 7 * 1000  # four times states and actions
    assert amounts[1000] < 0.1 * sum(map(len, pictures))


def _count(data, sizes):
    sizes.append(len(data))
    return data


def test_frames_are_a_sequence_that_holds_one_record(tmp_path, monkeypatch):
    assert frames.split([b"x" * 2000] * 3, 3000) == [0, 1, 2]
    assert frames.split([b"x" * 1000] * 7, 3000) == [0, 3, 6]
    assert frames.split([b"x" * 9000, b"", b"x"], 3000) == [0, 1]
    of, pictures = synthetic.info(cameras={"top": (8, 8)}), [b"%03d" % i * 300 for i in range(8)]
    monkeypatch.setattr(frames.split, "__defaults__", (3000,))
    with Writer(tmp_path / "a", of) as writer:
        for number in range(2):
            some = synthetic.episode(number, 7, dataclasses.replace(of, cameras={}))
            writer.write(dataclasses.replace(some, images={"top": pictures}))
    for episode in Reader(tmp_path / "a"):
        stored = episode.images["top"]
        assert stored == pictures and stored[-1] == pictures[-1] and stored[2:5] == pictures[2:5]
        with pytest.raises(IndexError):
            stored[8]
        assert len(stored._last[1]) == 3  # all that is cached


@pytest.mark.parametrize("damage", ["remove", "swap", "other place"])
def test_a_damaged_file_of_frames_is_named_with_episode_and_camera(tmp_path, damage):
    path = synthetic.write(tmp_path / "a", (5, 6, 4))
    file = path / shard_name(0, 1, "frames")
    if damage == "remove":
        file.unlink()
    elif damage == "swap":
        other = synthetic.write(tmp_path / "b", (5, 7, 4))
        file.write_bytes((other / file.name).read_bytes())
    else:  # records of frames in another order
        records = Shards(path, Reader(path).index["frames"], "frames")
        data = [records.read(i) for i in range(len(records))]
        writer = ArrayRecordWriter(str(file), OPTIONS)
        for x in data[1:] + data[:1]:
            writer.write(x)
        writer.close()
    windows = Windows(Reader(path), DataSpec(synthetic.CAMERAS, 3, 2, 4, 3, 2, 8, 10.0))
    place = r"frames-0.*record \d \(episode 1, camera 'top', frame 0\).*Copy the file"
    with pytest.raises(RecordError, match=place):
        windows[5]
    assert Reader(path)[1].length == 6
