"""Tests records that contradict their data set: reported, or skipped up to a limit."""

import dataclasses
import io
import json
import pathlib
import struct
import zlib

import numpy as np
import pytest
from absl import flags
from data import synthetic
from PIL import Image

from wamjax import stats
from wamjax.data import episodes, pipeline, records, skips
from wamjax.data.checks import checks
from wamjax.data.latents import BFLOAT16
from wamjax.data.records import Reader, RecordError
from wamjax.data.spec import DataSpec
from wamjax.data.windows import Windows

LENGTHS = (6, 5, 7, 6, 5, 4)
BAD = 2  # the damaged episode
SPEC = DataSpec(synthetic.CAMERAS, 3, 2, 4, 3, 2, 8, 10.0)


def png(width: int, height: int) -> bytes:
    """Returns a picture whose header promises more than its data holds."""

    def part(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"")) + part(
        b"IEND", b"")


def grey16() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 6), 40_000, np.uint16)).save(out, "png")
    return out.getvalue()


def at(x, step, value):
    out = x.copy()
    out[step] = value
    return out


def pictures(episode, change):
    return {"images": episode.images | {"top": change(list(episode.images["top"]))}}


# Changes of an episode, and the error about each.
HEADS = {
    "flat actions": (lambda e: {"actions": e.actions[:, 0]}, r"actions is \(7,\), .* \(7, 2\)"),
    "one action": (lambda e: {"actions": e.actions[:, :1]}, r"actions is \(7, 1\)"),
    "one state": (lambda e: {"proprio": e.proprio[:, :1]}, r"proprio is \(8, 1\), .* \(8, 3\)"),
    "short state": (lambda e: {"proprio": e.proprio[:-1]}, r"proprio is \(7, 3\)"),
    "short returns": (lambda e: {"returns": e.returns[:-1]}, r"returns is \(6,\)"),
    "nan": (lambda e: {"actions": at(e.actions, 3, np.nan)}, r"non-finite .*actions\[0\] .*step 3"),
    "inf": (lambda e: {"proprio": at(e.proprio, 5, np.inf)}, "proprio holds non-finite.*step 5"),
    "huge": (lambda e: {"actions": at(e.actions, 1, 3e8)}, "actions holds impossible .*3e.08"),
    "few pictures": (lambda e: pictures(e, lambda x: x[:-1]), "7 pictures of camera 'top'.*need 8"),
    "no camera": (lambda e: {"images": {"top": e.images["top"]}}, r"cameras \['top'\]"),
    "words": (lambda e: {"instruction": "drop it"}, "'drop it' is not one of index.json"),
    "no words": (lambda e: {"instruction": 3}, "instruction is 3"),
}
PICTURES = {
    "bomb": (lambda e: pictures(e, lambda x: [png(60_000, 60_000)] * len(x)), "decode a picture"),
    "large": (lambda e: pictures(e, lambda x: [png(5_000, 5_000)] * len(x)), "is 5000 x 5000, not"),
    "cut": (lambda e: pictures(e, lambda x: [y[:-30] for y in x]), "cannot decode"),
    "text": (lambda e: pictures(e, lambda x: [b"GIF89a"] * len(x)), "cannot decode"),
    "depth": (lambda e: pictures(e, lambda x: [grey16()] * len(x)), "8 bits per colour"),
}


def spoil(path: pathlib.Path, change, bad=(BAD,)) -> pathlib.Path:
    """Writes a data set in which some episodes are changed afterwards."""
    of = synthetic.info()
    synthetic.write(path, LENGTHS)
    some = [synthetic.episode(i, n, of) for i, n in enumerate(LENGTHS)]
    for i in bad:
        some[i] = dataclasses.replace(some[i], **change(some[i]))
    return synthetic.rewrite(path, some)


@pytest.mark.parametrize("fault", HEADS)
def test_a_mismatched_episode_is_an_error_with_file_record_and_key(tmp_path, fault):
    change, message = HEADS[fault]
    reader = Reader(spoil(tmp_path / "a", change))
    where = rf"episodes-00000-of-00001.arrayrecord: record {BAD} \(episode {BAD}\).*"
    for _ in range(2):
        with pytest.raises(RecordError, match=where + message) as error:
            reader[BAD]
    assert "remove" not in str(error.value)  # they may be the user's own demonstrations
    assert reader[BAD + 1].length == LENGTHS[BAD + 1]


@pytest.mark.parametrize("fault", PICTURES)
def test_an_invalid_picture_is_an_error_with_file_record_camera_and_frame(tmp_path, fault):
    change, message = PICTURES[fault]
    windows = Windows(Reader(spoil(tmp_path / "a", change)), SPEC)
    where = rf"arrayrecord: record {BAD} \(episode {BAD}\): camera 'top', frame 0: .*"
    with pytest.raises(RecordError, match=where + message):
        windows[sum(LENGTHS[:BAD])]
    assert windows[0]["images"]["top"].shape == (3, 8, 6, 3)


def test_a_record_with_changed_numbers_fails_its_digest(tmp_path, monkeypatch):
    path = synthetic.write(tmp_path / "a", LENGTHS)
    other = synthetic.write(tmp_path / "b", LENGTHS, first=10)
    for file in other.glob("*.arrayrecord"):
        (path / file.name).write_bytes(file.read_bytes())
    message = r"record 1 \(episode 1\).*proprio is not what was written"
    with pytest.raises(RecordError, match=message):
        Reader(path)[1]


def test_numbers_far_outside_the_statistics_make_a_record_bad(tmp_path):
    """An action of 300, where the demonstrations have 0 to 6: too far even for a wrong unit."""
    spoil(tmp_path / "a", lambda e: {"actions": at(e.actions, 1, 30_000.0)})
    config = synthetic.config(tmp_path, a={"path": "a"})
    with pytest.raises(RecordError, match=rf"episode {BAD}\): actions\[0\] is 30000 at step 1"):
        batches(config, 12)


def batches(config, count, rows=None):
    data = pipeline.batches(config, *pipeline.open_sources(config.data), rows)
    return [data[i] for i in range(count)]


def same(a, b):
    return all(np.array_equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


@pytest.mark.parametrize("fault", ["nan", "bomb"])
def test_bad_episodes_are_counted_logged_and_replaced_reproducibly(tmp_path, capsys, fault):
    change, _ = (HEADS | PICTURES)[fault]
    spoil(tmp_path / "a", change, bad=(1, BAD))
    synthetic.write(tmp_path / "clean", LENGTHS)
    config = synthetic.config(tmp_path, a={"path": "a"})
    config.data.skip_bad = 2
    got = batches(config, 16)
    said = capsys.readouterr().err
    assert said.count("skipped a bad episode") == 2 and "2 of config.data.skip_bad = 2" in said
    assert not {1, BAD} & {int(i) for batch in got for i in batch["episode"]}
    assert same(got, batches(config, 16))
    size = config.data.batch_size
    halves = [batches(config, 16, rows) for rows in np.split(np.arange(size), 2)]
    both = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)]
    assert same(got, both)
    # Good episodes are read as usual.
    config.data.sources.a.path = "clean"
    for batch, clean in zip(got, batches(config, 16), strict=True):
        for i, number in enumerate(clean["episode"]):
            if number not in (1, BAD):
                assert all(np.array_equal(batch[k][i], clean[k][i]) for k in clean)
    config.data.sources.a.path, config.data.skip_bad = "a", 1
    with pytest.raises(RecordError, match=r"1 bad episodes were skipped.*allows no more"):
        batches(config, 16)


def test_resuming_with_bad_records_is_bitwise_exact(tmp_path):
    change, _ = HEADS["nan"]
    spoil(tmp_path / "a", change)
    config = synthetic.config(tmp_path, a={"path": "a"})
    config.data.skip_bad = 1
    opened = pipeline.open_sources(config.data)
    iterator = pipeline.train_iterator(config, *opened)
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    wanted = [next(iterator) for _ in range(12)]
    again = pipeline.train_iterator(config, *pipeline.open_sources(config.data))
    again.set_state(state)
    assert same(wanted, [next(again) for _ in range(12)])


def test_a_source_without_good_records_is_an_error(tmp_path):
    change, _ = HEADS["nan"]
    windows = Windows(
        Reader(spoil(tmp_path / "a", change, range(len(LENGTHS)))), SPEC, skips=skips.Skips(99)
    )
    with pytest.raises(RecordError, match="64 windows in a row could not be read"):
        windows[0]
    others = [skips.instead(5, tries, 30) for tries in range(8)]
    assert others[0] == 5 and len(set(others)) > 4 and max(others) < 30


def test_statistics_leave_bad_episodes_out_and_say_which(tmp_path, capsys):
    change, message = HEADS["nan"]
    path = spoil(tmp_path / "a", change)
    with synthetic.command(stats, f"--data={path}"):
        with pytest.raises(RecordError, match=message):
            stats.main(["stats"])
    arguments = f"--data={path}", f"--out={path}/statistics.json", "--skip_bad=1"
    with synthetic.command(stats, *arguments):
        assert flags.FLAGS.skip_bad == 1
        stats.main(["stats"])
    stored = json.loads((path / "statistics.json").read_text())
    assert stored["actions"]["skipped"] == [BAD]
    assert stored["actions"]["count"] == sum(LENGTHS) - LENGTHS[BAD]
    config = synthetic.config(tmp_path, a={"path": "a"})
    config.data.skip_bad = 1
    spec, statistics, sources = pipeline.open_sources(config.data)
    assert statistics == stored
    capsys.readouterr()
    checks(sources, statistics, spec)
    assert f"episode {BAD}" in capsys.readouterr().err


def test_statistics_of_impossible_numbers_are_refused(tmp_path):
    path = synthetic.write(tmp_path / "a", LENGTHS)
    stored = json.loads((path / "statistics.json").read_text())
    stored["actions"]["max"][0] = 1e9
    (path / "statistics.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="statistics of actions hold numbers above.*wamjax.stats"):
        pipeline.open_sources(synthetic.config(tmp_path, a={"path": "a"}).data)


def test_records_are_checked_once(tmp_path, monkeypatch):
    calls = []
    reader = Reader(synthetic.write(tmp_path / "a", LENGTHS))
    monkeypatch.setattr(records, "check", lambda *a: calls.append(0) or episodes.check(*a))
    for _ in range(3):
        reader[0]
    assert len(calls) == 1


def test_non_finite_latents_are_recognised():
    x = np.array([1.0, -3e38, 0.0, np.inf, -np.inf, np.nan]).astype(BFLOAT16)
    assert (x.view(np.uint16) & 0x7F80 == 0x7F80).tolist() == [False] * 3 + [True] * 3
