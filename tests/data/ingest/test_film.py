"""Tests pictures that stay video: the same frames to the last bit, from any group."""

import json
from fractions import Fraction

import msgpack
import numpy as np
import pytest
from data.ingest import layouts

from wamjax.data import film, frames
from wamjax.data.film import Film, Group
from wamjax.data.ingest import plan, run
from wamjax.data.ingest.reader import SourceError
from wamjax.data.ingest.video import Videos
from wamjax.data.records import Reader, RecordError

av = pytest.importorskip("av")
HZ = 20
WAYS = {
    "every other": {"g": "2"},
    "long": {"g": "25"},
    "both ways": {"g": "12", "bf": "2", "x264-params": "scenecut=0"},
    "open groups": {"g": "12", "bf": "2", "x264-params": "open-gop=1:scenecut=0"},
}


def video(path, options, count=40, size=(32, 48)):
    """Writes moving noise in H.264; returns its times."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=HZ, options={"crf": "20", **options})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for t in range(count):
            picture = np.ascontiguousarray(np.roll(scene, 2 * t, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return [float(Fraction(t, HZ)) for t in range(count)]


@pytest.mark.parametrize("way", WAYS)
def test_any_part_of_a_video_decodes_from_its_packets(tmp_path, way):
    times = video(tmp_path / "x.mp4", WAYS[way])
    whole = list(Videos().frames(tmp_path / "x.mp4", times))
    rng = np.random.default_rng(1)
    for first, last in ((0, 40), (7, 31), (13, 14), (30, 40)):
        part = Videos().film(tmp_path / "x.mp4", times[first:last])
        assert len(part) == last - first and len(part.starts) == len(part.groups)
        again = Film.of_record(msgpack.unpackb(msgpack.packb(part.to_record())))
        assert again == part
        for _ in range(5):
            some = sorted(rng.integers(0, last - first, 4).tolist())
            for got, i in zip(part.decoded(some), some, strict=True):
                assert np.array_equal(got, whole[first + i])
    lead = max(len(g.packets) for g in Videos().film(tmp_path / "x.mp4", times).groups)
    assert lead > 12 if way == "open groups" else lead <= int(WAYS[way]["g"])
    twice = Videos().film(tmp_path / "x.mp4", [times[3], times[3], times[5]])
    assert [np.array_equal(x, whole[i]) for x, i in zip(twice.decoded([0, 1, 2]), (3, 3, 5),
                                                        strict=True)] == [True] * 3  # fmt: skip


def test_missing_frames_and_broken_packets_are_errors(tmp_path):
    times = video(tmp_path / "x.mp4", {"g": "4"})
    with pytest.raises(SourceError, match=r"0.0200 s off; give --option=tolerance"):
        Videos().film(tmp_path / "x.mp4", [0.02 + times[3]])
    with pytest.raises(SourceError, match="decoded"):
        Videos().film(tmp_path / "none.mp4", times)
    group = Videos().film(tmp_path / "x.mp4", times[:4]).groups[0]
    lost = Group(group.codec, group.extradata, group.packets[:2], group.shown)
    with pytest.raises(ValueError, match="its video has no frame at"):
        Film((lost,)).decoded([0, 3])
    noise = Group(group.codec, group.extradata, ((0, b"no packet"),), (0,))
    with pytest.raises(ValueError, match="its video"):
        Film((noise,)).decoded([0])
    assert len(Film((group,)).decoded([0, 3])) == 2  # the decoder still works
    with pytest.raises(ValueError, match="holds no video"):
        Group.of_record({"codec": "h264"})


def ingested(tmp_path, pictures, **more):
    out = tmp_path / f"{pictures}{len(list(tmp_path.iterdir()))}"
    ask = plan.Request(pictures=pictures, **more)
    report = run.ingest("lerobot", tmp_path / "in", out, ask, progress=False)
    return Reader(out), report


@pytest.mark.parametrize("layout", ["lerobot_v21", "lerobot_v30"])
def test_a_data_set_of_video_equals_one_of_pictures(tmp_path, layout):
    getattr(layouts, layout)(tmp_path / "in")
    still, _ = ingested(tmp_path, "auto")
    kept, _ = ingested(tmp_path, "video")
    assert kept.info == still.info and kept.digest("actions") == still.digest("actions")
    size = still.info.cameras["front"]
    for a, b in zip(kept, still, strict=True):
        for camera in still.info.cameras:
            for indices in (range(a.length + 1), [a.length, 0, 3, 3]):
                got = a.frames(camera, indices, size)
                assert np.array_equal(got, b.frames(camera, indices, size))
            assert a.images[camera][1] == b.images[camera][1]  # as PNG
            with pytest.raises(ValueError, match="not 9 x 9"):
                a.frames(camera, [0], (9, 9))
            with pytest.raises(ValueError, match="has no frame 99"):
                a.frames(camera, [99])


def test_another_rate_selects_frames_and_unsupported_options_are_errors(tmp_path):
    layouts.lerobot_v30(tmp_path / "in")
    still, kept = (ingested(tmp_path, kind, fps=10)[0] for kind in ("auto", "video"))
    assert np.array_equal(kept[1].frames("front", range(4)), still[1].frames("front", range(4)))
    with pytest.raises(ValueError, match="--resize.*config.data.layout"):
        ingested(tmp_path, "video", resize=(8, 8))
    info = tmp_path / "in/meta/info.json"
    values = json.loads(info.read_text())
    values["features"][layouts.CAMERAS[0]]["dtype"] = "image"
    info.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"cameras \['front'\] are not video"):
        ingested(tmp_path, "video")


def test_a_record_that_shows_too_few_frames_is_bad(tmp_path, monkeypatch):
    layouts.lerobot_v30(tmp_path / "in")
    pack = frames.pack_video

    def short(episode, camera, start, part):
        return pack(episode, camera, start, Film(part.groups[:-1]))

    monkeypatch.setattr(frames, "pack_video", short)
    kept, _ = ingested(tmp_path, "video")
    with pytest.raises(RecordError, match=r"it shows \d+ frames, \d+ were written"):
        kept[0].frames("front", [0])


def test_neighbouring_groups_share_a_record_up_to_its_size(tmp_path):
    times = video(tmp_path / "x.mp4", {"g": "2"})
    whole = Videos().film(tmp_path / "x.mp4", times)
    for limit in (1, 3000, 10**6):
        parts = whole.parts(limit)
        assert Film(sum((part.groups for part in parts), ())) == whole
        sizes = [sum(len(x) for g in part.groups for _, x in g.packets) for part in parts]
        assert all(size <= limit or len(part.groups) == 1
                   for size, part in zip(sizes, parts, strict=True))  # fmt: skip
    assert len(whole.parts(1)) == len(whole.groups) and len(whole.parts(10**6)) == 1


def test_each_thread_keeps_few_decoders_of_its_own(tmp_path):
    times = video(tmp_path / "x.mp4", {"g": "4"})
    part = Videos().film(tmp_path / "x.mp4", times[:4])
    part.decoded([0])
    count = len(film._here.decoders)
    part.decoded([1])
    assert len(film._here.decoders) == count <= 9
