import numpy as np
import pytest
from data import synthetic

from wamjax.data import images, pipeline
from wamjax.data.checks import checks
from wamjax.data.normalize import normalizers
from wamjax.data.records import Reader, RecordError
from wamjax.data.spec import DataSpec
from wamjax.data.windows import Windows, held, padding


def spec(frames=3, stride=2, chunk=4, cameras=synthetic.CAMERAS) -> DataSpec:
    return DataSpec(cameras, 3, 2, chunk, frames, stride, 8, 10.0)


def oracle(lengths, spec):
    """Computes every window by brute force, straight from the definition."""
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
    """Windows are the same with other actions in the records, or none."""
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


def padded_windows(tmp_path, said):
    """Returns batches of the pipeline whose actions are (number, step), and their normaliser."""
    lengths = (5, 3)
    synthetic.write(tmp_path / "a", lengths, action_names=("dx", "gripper"))
    config = synthetic.config(tmp_path, 8, mine={"path": "a"})
    config.data.padding, config.data.cameras = said, ("top",)
    shape, statistics, sources = pipeline.open_sources(config.data)
    batch = pipeline.batches(config, shape, statistics, sources)[0]
    return batch, normalizers(statistics, "min_max")["actions"], (sources, statistics)


def test_after_the_end_motions_are_zero_and_the_gripper_keeps_its_command(tmp_path):
    batch, scale, _ = padded_windows(tmp_path, "hold:grip")
    actions, valid = batch["actions"], batch["action_valid"]
    assert 0 < (~valid).sum() and valid.any(axis=1).all()
    for row, good in zip(actions, valid, strict=True):
        number = good.sum()
        # As published: 0 in robot units before normalisation, and the last command repeated.
        want = scale.forward(np.zeros((len(row) - number, 2), np.float32))
        np.testing.assert_array_equal(row[number:, 0], want[:, 0])
        np.testing.assert_array_equal(row[number:, 1], np.repeat(row[number - 1, 1], len(want)))
    everything = padded_windows(tmp_path / "b", "hold:.*")[0]["actions"]
    for row, good in zip(everything, valid, strict=True):
        assert (row[good.sum() :] == row[good.sum() - 1]).all()
    by_number = padded_windows(tmp_path / "c", "hold:1")[0]["actions"]
    np.testing.assert_array_equal(by_number, actions)


def test_older_runs_keep_zeros_in_normalised_units(tmp_path):
    new, old = (padded_windows(tmp_path / w, w)[0] for w in ("hold:", "normalized"))
    valid = new["action_valid"]
    np.testing.assert_array_equal(new["actions"][valid], old["actions"][valid])
    assert not old["actions"][~valid].any() and (new["actions"][~valid] == -1).all()


def test_held_dimensions_are_given_by_name_or_number():
    names = ("dx", "gripper", "grip_left")
    assert held(("grip",), names, 3).tolist() == [False, True, True]
    assert held(("0", "left$"), names, 3).tolist() == [True, False, True]
    assert not held(("grip",), (), 3).any() and held((".*",), (), 3).all()
    for words, known, message in (
        (("jaw",), names, r"'jaw' matches none of the 3 actions, which are \['dx'"),
        (("3",), names, "'3' matches none of the 3 actions"),
        (("jaw",), (), "not named: give their numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            held(words, known, 3)
    assert padding("normalized") is None and padding("hold:") == ()
    assert padding("hold:6,13") == ("6", "13")
    with pytest.raises(ValueError, match="data.padding = 'zero' is neither 'normalized' nor"):
        padding("zero")


def test_an_absolute_command_that_is_not_held_gives_a_warning(tmp_path):
    *_, (sources, statistics) = padded_windows(tmp_path, "hold:grip")
    statistics["actions"]["min"] = [0.5, 0.5]
    said = [w for w in checks(sources, statistics, None, ("grip",)) if "absolute command" in w]
    assert len(said) == 1 and "actions[0] (dx) spans 0.5 to 1" in said[0] and "add 0" in said[0]
    assert not any("absolute command" in w for w in checks(sources, statistics, None, None))
