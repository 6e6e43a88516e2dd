"""Tests the outcome of a training window against brute force and published values."""

import json

import numpy as np
import pytest
from data import synthetic

from wamjax.config import source
from wamjax.data import pipeline
from wamjax.data.normalize import normalizers
from wamjax.data.records import Episode, Reader, Writer
from wamjax.data.spec import DataSpec
from wamjax.data.windows import Windows, outcome

CHUNK = 4


def rewards_to_returns(rewards, discount):
    out, total = [], 0.0
    for reward in rewards[::-1]:
        total = reward + discount * total
        out.append(total)
    return np.array(out[::-1], np.float32)


@pytest.mark.parametrize("score", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("length, ends", [(9, 8), (9, 5), (1, 0), (40, 39)])
def test_score_and_steps_to_go_are_read_from_returns_of_any_discount(score, length, ends):
    rewards = np.zeros(length)
    rewards[ends] = score
    for discount in (0.9, 0.98, 1.0):
        returns = rewards_to_returns(rewards, discount)
        for at in range(length + 1):
            got, to_go = outcome(returns, at)
            assert got == np.float32(score)
            if score:
                assert to_go == max(ends + 1 - at, 0)


def write(path, endings):
    """Writes episodes of 2 CHUNK steps each, with the reward at the last action."""
    info = synthetic.info(cameras={"top": (8, 6)})
    with Writer(path, info) as writer:
        for i, score in enumerate(endings):
            made = synthetic.episode(i, 2 * CHUNK, info)
            returns = rewards_to_returns([0.0] * (2 * CHUNK - 1) + [score], 0.9)
            values = vars(made) | {"returns": returns, "success": score > 0.5}
            writer.write(Episode(**values))
    return path


ENDINGS = (1.0, 0.0, 0.4, 1.0, 0.0)


def spec():
    return DataSpec({"top": (8, 6)}, 3, 2, CHUNK, 2, CHUNK, 12, 10.0)


def test_windows_hold_the_end_of_the_chunk_and_what_comes_of_it(tmp_path):
    windows = Windows(Reader(write(tmp_path / "a", ENDINGS)), spec(), rollout=True)
    for i in range(len(windows)):
        number, start = windows.locate(i)
        window, end = windows[i], min(start + CHUNK, 2 * CHUNK)
        assert window["future_proprio"][:2].tolist() == [number, end]
        assert window["images"]["top"][1, 0, 0, :2].tolist() == [number, end]
        assert window["score"] == np.float32(ENDINGS[number]) and window["rollout"]
        if ENDINGS[number]:
            assert window["to_go"] == 2 * CHUNK - end


@pytest.mark.parametrize("reader", ["last action dropped", "last frame repeated"])
def test_a_source_of_as_many_observations_as_actions_has_the_published_labels(tmp_path, reader):
    """Section 5.4: T observations and T actions; the label of future frame i is discount^(T-1-i).

    Frame min(t + K, T - 1) is the future one, under either reading.
    """
    steps, discount = 2 * CHUNK + 1, 0.9
    final = reader == "last action dropped"
    kept = steps - final
    of = synthetic.info(cameras={"top": (8, 6)}, final_observation=final)
    whole = synthetic.episode(3, steps, of)  # whose proprio and pictures number the observations
    frames = [*range(steps), *([] if final else [steps - 1])]
    values = vars(whole) | {
        "images": {"top": [whole.images["top"][i] for i in frames]},
        "proprio": whole.proprio[frames],
        "actions": whole.actions[:kept],
        "returns": rewards_to_returns([0.0] * (kept - 1) + [1.0], discount),
    }
    with Writer(tmp_path / "a", of) as writer:
        writer.write(Episode(**values))
    windows = Windows(Reader(tmp_path / "a"), spec())
    for start in range(kept):
        window, future = windows[start], min(start + CHUNK, steps - 1)
        assert window["future_proprio"][1] == future
        assert window["images"]["top"][1, 0, 0, 1] == future
        assert window["score"] * discount ** window["to_go"] == pytest.approx(
            discount ** (steps - 1 - future)
        )
        assert window["frame_valid"].tolist() == [True, start + CHUNK < steps]


def test_older_data_sets_have_a_final_observation(tmp_path):
    path = write(tmp_path / "a", ENDINGS)
    said = json.loads((path / "spec.json").read_text())
    assert said.pop("final_observation") is True
    (path / "spec.json").write_text(json.dumps(said))
    assert Reader(path).info.final_observation


def test_episodes_are_chosen_by_how_they_ended(tmp_path):
    reader = Reader(write(tmp_path / "a", ENDINGS))
    for ended, numbers in (("success", {0, 3}), ("failure", {1, 2, 4}), ("", set(range(5)))):
        windows = Windows(reader, spec(), ended=ended)
        assert len(windows) == len(numbers) * 2 * CHUNK
        got = [windows.locate(i) for i in range(len(windows))]
        assert got == [(n, t) for n in sorted(numbers) for t in range(2 * CHUNK)]
    with pytest.raises(ValueError, match="'succes' is not 'success'"):
        Windows(reader, spec(), ended="succes")
    only = Reader(write(tmp_path / "b", (1.0, 1.0)))
    with pytest.raises(ValueError, match="no episode ended in failure"):
        Windows(only, spec(), ended="failure")


def test_a_batch_mixes_demonstrations_successes_and_failures_in_exact_shares(tmp_path):
    write(tmp_path / "demos", (1.0, 1.0, 1.0))
    write(tmp_path / "rollouts", ENDINGS)
    config = synthetic.config(tmp_path, 8)
    config.data.cameras, config.data.chunk, config.data.outcome = ("top",), CHUNK, True
    config.data.frames, config.data.frame_stride = 2, CHUNK
    config.data.sources.demos = source(path="demos", weight=2)
    config.data.sources.good = source(path="rollouts", rollout=True, ended="success")
    config.data.sources.bad = source(path="rollouts", rollout=True, ended="failure")
    shape, statistics, sources = pipeline.open_sources(config.data)
    batch = next(pipeline.train_iterator(config, shape, statistics, sources))
    assert batch["rollout"].sum() == 4 and batch["rollout"].dtype == bool
    assert (batch["score"][batch["rollout"]] == 1).sum() == 2
    assert batch["future_proprio"].shape == (8, 3) and batch["to_go"].dtype == np.float32
    # Rollouts are normalised by the demonstrations: their proprio 0 is the episode's number, 0..2
    # there and 0..4 here, so it leaves the unit box.
    assert statistics["proprio"]["max"][0] == 2
    state = normalizers(statistics, "min_max")["proprio"]
    end = state.inverse(batch["future_proprio"])[:, 1]
    start = state.inverse(batch["proprio"])[:, 1]
    np.testing.assert_allclose(end, np.minimum(start + CHUNK, 2 * CHUNK), atol=1e-5)
    config.data.outcome = False
    plain = next(pipeline.train_iterator(config, shape, statistics, sources))
    assert plain.keys() == batch.keys() - {"future_proprio", "score", "to_go", "rollout"}
