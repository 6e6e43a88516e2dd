import json
import shutil

import numpy as np
import pytest
from data import synthetic

from wamjax import stats
from wamjax.config import base_config, source
from wamjax.data import pipeline
from wamjax.data.records import Reader, pack
from wamjax.envs import collection, tabletop
from wamjax.envs.collection import Settings
from wamjax.envs.tabletop import embedded

TASKS = ("reach_red", "push_blue_right", "pick_red")
SMALL = Settings(tasks=TASKS, episodes=8, noise=0.1, seed=3)


@pytest.fixture(scope="module", autouse=True)
def small_calls():
    """Makes calls of the simulator and the renderer smaller, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded.Tabletop, "batch", 24)
        patch.setattr(embedded, "FRAMES", 64)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("collected") / "a"
    collection.collect(path, SMALL, progress=False)
    return path


def records(path):
    return [pack(episode) for episode in Reader(path)]


def test_the_same_settings_give_the_identical_data_set_and_another_seed_does_not(data, tmp_path):
    collection.collect(tmp_path / "b", SMALL, progress=False)
    names = sorted(file.name for file in data.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "b").iterdir())
    for name in names:
        assert (data / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    collection.collect(tmp_path / "c", SMALL._replace(seed=4), progress=False)
    assert not set(records(data)) & set(records(tmp_path / "c"))


def test_episodes_are_whole_balanced_successful_and_replay_in_the_world(data):
    reader = Reader(data)
    assert sorted(reader.index["tasks"][:6]) == sorted(TASKS * 2)  # any prefix is balanced
    assert len(reader) == 8
    for episode in reader:
        assert episode.success and episode.returns[-1] >= 0 and episode.returns.max() == 1
        assert episode.instruction == tabletop.instruction(episode.task)
        frames = episode.frames("overhead", range(episode.length + 1))
        assert frames.shape == (episode.length + 1, 64, 64, 3)
        # Pictures and proprio match: the gripper moves as commanded.
        moved = np.diff(episode.proprio[:, :2], axis=0)
        wanted = 0.12 * np.clip(episode.actions[:, :2], -1, 1)
        assert np.corrcoef(moved.ravel(), wanted.ravel())[0, 1] > 0.9
    view = reader[0].frames("gripper", [0, reader[0].length])
    assert np.abs(view[0].astype(int) - view[1]).mean() > 5


def test_action_free_data_hold_the_same_videos_and_no_actions(data, tmp_path):
    collection.collect(tmp_path / "v", SMALL._replace(action_free=True), progress=False)
    for video, full in zip(Reader(tmp_path / "v"), Reader(data), strict=True):
        assert video.actions.shape == (full.length, 0)
        assert video.images == full.images and np.array_equal(video.proprio, full.proprio)
    assert set(Reader(tmp_path / "v").stored_statistics()) == {"proprio"}


def test_failures_are_kept_only_when_asked(tmp_path):
    shaky = SMALL._replace(noise=0.6, episodes=12, tasks=("pick_red",))
    collection.collect(tmp_path / "kept", shaky._replace(keep_failures=True), progress=False)
    summary = collection.collect(tmp_path / "good", shaky, progress=False)
    success = Reader(tmp_path / "kept").index["success"]
    assert 0 < np.mean(success) < 1 and summary["success_rate"] < 1
    assert all(Reader(tmp_path / "good").index["success"])
    failed = Reader(tmp_path / "kept")[success.index(False)]
    assert not failed.success and not failed.returns.any()
    assert failed.length == tabletop.MAX_STEPS


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_collection_leaves_nothing(tmp_path, monkeypatch, error):
    encode, calls = collection.images.encode, []

    def interrupt(frame):
        calls.append(0)
        if len(calls) > 100:
            raise error
        return encode(frame)

    monkeypatch.setattr(collection.images, "encode", interrupt)
    with pytest.raises(error):
        collection.collect(tmp_path / "a", SMALL, progress=False)
    assert not list(tmp_path.iterdir())


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="tabletop has no task 'pick_rd', did you mean 'pick_red'"):
        collection.collect(tmp_path / "a", SMALL._replace(tasks=("pick_rd",)))
    with pytest.raises(ValueError, match="episodes must be positive"):
        collection.collect(tmp_path / "a", SMALL._replace(episodes=0))


def test_the_config_collects_once_and_reuses(tmp_path, monkeypatch, capsys):
    config = base_config()
    config.data.root = str(tmp_path)
    ask = dict(tasks=("reach_red",), episodes=3, noise=0.1)
    config.data.sources.demos = source(collect=ask)
    config.data.sources.videos = source(collect=ask | {"seed": 1}, action_free=True)
    spec, _, sources = pipeline.open_sources(config.data)
    assert dict(spec.cameras) == tabletop.CAMERAS
    said = capsys.readouterr()  # not on the standard output of `doctor --json`
    assert not said.out and said.err.count("collecting 3 episodes") == 2
    assert [len(s.reader) for s in sources] == [3, 3]
    assert sources[0].reader.path != sources[1].reader.path
    monkeypatch.setattr(collection, "collect", lambda *a, **k: pytest.fail("collected again"))
    again = pipeline.open_sources(config.data)[2]
    assert [s.reader.path for s in again] == [s.reader.path for s in sources]
    config.data.sources.demos.path = sources[0].reader.path.name
    config.data.sources.demos.collect.noise = 0.2
    with pytest.raises(ValueError, match=r"other settings .*'noise': \(0.1, 0.2\)") as error:
        pipeline.open_sources(config.data)
    assert "emove" not in str(error.value)


def test_errors_never_advise_removing_the_users_own_data(data, tmp_path):
    own = shutil.copytree(data, tmp_path / "own")
    values = json.loads((own / "spec.json").read_text())
    (own / "spec.json").write_text(json.dumps(values | {"collection": {}}))
    config = base_config()
    config.data.root = str(tmp_path)
    config.data.sources.own = source(path="own", collect={"tasks": TASKS, "episodes": 8})
    with pytest.raises(ValueError, match="did not collect: .* config.data.sources to 0") as error:
        pipeline.open_sources(config.data)
    assert "emove" not in str(error.value)


def test_the_stats_command_recomputes_compares_and_draws(data, tmp_path, capsys):
    arguments = f"--data={data}", f"--out={tmp_path}/s.json", f"--plots={tmp_path}/plots"
    with synthetic.command(stats, *arguments):
        stats.main(["stats"])
    text = capsys.readouterr().out
    assert "actions[3] grip" in text and "statistics.json says" not in text
    assert json.loads((tmp_path / "s.json").read_text()) == Reader(data).stored_statistics()
    assert {f.name for f in (tmp_path / "plots").iterdir()} == {"proprio.png", "actions.png"}
    stored = Reader(data).stored_statistics()
    stored["actions"]["max"][0] += 1
    found = Reader(data).stored_statistics()
    assert ["actions.max" in w for w in stats.compare(stored, found)] == [True]
