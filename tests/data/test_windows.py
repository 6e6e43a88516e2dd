import numpy as np
import pytest
from data import synthetic

from wamjax.data import images
from wamjax.data.records import Reader, RecordError
from wamjax.data.spec import DataSpec
from wamjax.data.windows import Windows


def spec(frames=3, stride=2, chunk=4, cameras=synthetic.CAMERAS) -> DataSpec:
    return DataSpec(cameras, 3, 2, chunk, frames, stride, 8, 10.0)


def oracle(lengths, spec):
    """Every window by brute force, straight from the definition."""
    for number, length in enumerate(lengths):
        for start in range(length):
            at = [start + k * spec.frame_stride for k in range(spec.frames)]
            steps = list(range(start, start + spec.chunk))
            yield {
                "number": number,
                "start": start,
                "frames": [t if t <= length else length for t in at],
                "frame_valid": [t <= length for t in at],
                "actions": [[number, t] if t < length else [0, 0] for t in steps],
                "action_valid": [t < length for t in steps],
            }


@pytest.mark.parametrize("sizes", [(3, 2, 4), (1, 1, 1), (5, 1, 2), (2, 7, 16), (4, 3, 3)])
def test_windows_equal_brute_force_and_never_cross_episodes(tmp_path, sizes):
    shape = spec(*sizes)
    windows = Windows(Reader(synthetic.write(tmp_path / "a")), shape, offset=100)
    wanted = list(oracle(synthetic.LENGTHS, shape))
    assert len(windows) == len(wanted) == sum(synthetic.LENGTHS)
    for i in np.random.default_rng(0).permutation(len(wanted)):
        got, want = windows[i], wanted[i]
        number = want["number"]
        assert windows.locate(i) == (number, want["start"])
        assert got["episode"] == 100 + number and got["episode"].dtype == np.int32
        for camera in synthetic.CAMERAS:
            pictures = [synthetic.picture(number, t, camera) for t in want["frames"]]
            assert np.array_equal(got["images"][camera], pictures)
        assert got["frame_valid"].tolist() == want["frame_valid"]
        assert got["action_valid"].tolist() == want["action_valid"]
        assert got["actions"].tolist() == want["actions"]
        assert got["proprio"][:2].tolist() == [number, want["start"]]
    with pytest.raises(IndexError):
        windows[len(wanted)]


def test_windows_are_planned_without_reading_a_record(tmp_path, monkeypatch):
    reader = Reader(synthetic.write(tmp_path / "a"))
    monkeypatch.setattr(Reader, "__getitem__", lambda *_: 1 / 0)
    windows = Windows(reader, spec())
    assert [windows.locate(i) for i in (0, 4, 5, 6)] == [(0, 0), (0, 4), (1, 0), (2, 0)]


def test_only_the_frames_of_the_window_are_decoded(tmp_path, monkeypatch):
    windows = Windows(Reader(synthetic.write(tmp_path / "a", (20,))), spec(frames=3, stride=4))
    decode, calls = images.decode, []
    monkeypatch.setattr(images, "decode", lambda data: calls.append(0) or decode(data))
    windows[2]
    assert len(calls) == 2 * 3  # cameras x frames
    calls.clear()
    windows[19]  # frame 19, then the last one twice: decoded once
    assert len(calls) == 2 * 2


def test_actions_of_an_action_free_source_are_never_read(tmp_path):
    """With other actions in the records, or none at all, the windows are the same."""
    with_actions = Windows(Reader(synthetic.write(tmp_path / "a")), spec(), action_free=True)
    without = Windows(
        Reader(synthetic.write(tmp_path / "b", action_free=True)), spec(), action_free=True
    )
    for windows in (with_actions, without):
        for i in range(len(windows)):
            assert not windows[i]["action_valid"].any() and not windows[i]["actions"].any()
            assert windows[i]["actions"].shape == (4, 2)
    assert any(windows[i]["frame_valid"].all() for i in range(len(windows)))


def test_a_missing_camera_names_it_and_those_present(tmp_path):
    windows = Windows(
        Reader(synthetic.write(tmp_path / "a")), spec(cameras={"top": (8, 6), "side": (8, 6)})
    )
    with pytest.raises(RecordError, match=r"episode 0: .*'side'.*\['top', 'wrist'\].*data.cameras"):
        windows[0]
