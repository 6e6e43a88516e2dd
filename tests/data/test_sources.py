import json

import numpy as np
import pytest
from data import synthetic

from wamjax.config import base_config
from wamjax.data.checks import alike, checks
from wamjax.data.records import Reader, Writer
from wamjax.data.sources import compute_statistics, open_sources
from wamjax.data.spec import DataSpec
from wamjax.data.tokens import Vocabulary


def opened(root, **sources):
    return open_sources(synthetic.config(root, **sources).data)


def test_statistics_are_over_the_episodes_with_actions_that_are_in_use(tmp_path):
    for i, name in enumerate("abv"):
        synthetic.write(tmp_path / name, (4, 6, 3), first=10 * i)
    a, b, v = ({"path": name} for name in "abv")
    _, statistics, sources = opened(tmp_path, a=a, v=v | {"action_free": True})
    assert statistics == Reader(tmp_path / "a").stored_statistics()
    assert [s.offset for s in sources] == [0, 3]
    _, statistics, _ = opened(tmp_path, a=a | {"episodes": 2})
    assert statistics["actions"]["count"] == 4 + 6
    _, statistics, _ = opened(tmp_path, a=a | {"episodes": 2}, b=b, v=v | {"action_free": True})
    wanted = compute_statistics([Reader(tmp_path / "a", 2), Reader(tmp_path / "b")])
    assert statistics == wanted
    assert statistics["actions"]["count"] == 4 + 6 + 13
    assert statistics["actions"]["max"][0] == 12  # not the 22 of v


def test_config_decides_the_cameras_and_their_order(tmp_path):
    synthetic.write(tmp_path / "a")
    config = synthetic.config(tmp_path, a={"path": "a"})
    config.data.cameras = ("wrist", "top")
    assert list(open_sources(config.data)[0].cameras) == ["wrist", "top"]
    config.data.cameras = ("wrist", "side")
    with pytest.raises(
        ValueError, match=r"sources.a .*no camera 'side'; it has \['top', 'wrist'\].*data.cameras"
    ):
        open_sources(config.data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_dim": 5}, "sources.b .* has action_dim 5, .*sources.a .* has 2"),
        ({"proprio_dim": 2}, "sources.b .* has proprio_dim 2"),
        ({"control_hz": 50.0}, "sources.b .* has control_hz 50"),
        ({"cameras": {"top": (8, 6)}}, "sources.b .* has no camera 'wrist'"),
        (
            {"cameras": synthetic.CAMERAS | {"top": (8, 8)}},
            r"sources.b .* has camera 'top' of size \(8, 8\)",
        ),
        ({"action_free": True}, "sources.b .* recorded without actions: set its action_free"),
    ],
)
def test_sources_that_do_not_agree_are_an_error_naming_the_offender(tmp_path, changes, message):
    synthetic.write(tmp_path / "a", (3,))
    synthetic.write(tmp_path / "b", (3,), **changes)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, a={"path": "a"}, b={"path": "b"})


def test_other_bad_input_is_named(tmp_path):
    synthetic.write(tmp_path / "a", (3,))
    with pytest.raises(FileNotFoundError, match="no data set in .*nowhere"):
        opened(tmp_path, a={"path": "nowhere"})
    with pytest.raises(ValueError, match="sources.a has neither a path nor collect.episodes"):
        opened(tmp_path, a={})
    with pytest.raises(ValueError, match="sources is empty"):
        open_sources(base_config().data)
    with pytest.raises(ValueError, match="all of config.data.sources are action_free"):
        opened(tmp_path, a={"path": "a", "action_free": True})
    config = synthetic.config(tmp_path, a={"path": "a"})
    config.data.instruction_length = 2
    with pytest.raises(ValueError, match="sources.a .*3 words.*instruction_length"):
        open_sources(config.data)
    synthetic.write(tmp_path / "b", (3,), action_dim=3)
    (tmp_path / "a" / "statistics.json").write_text(
        (tmp_path / "b" / "statistics.json").read_text()
    )
    with pytest.raises(ValueError, match="actions.min has 3 dimensions, the policy 2"):
        opened(tmp_path, a={"path": "a"})


def test_statistics_of_other_episodes_of_the_same_robot_are_an_error(tmp_path):
    synthetic.write(tmp_path / "a", (3, 4))
    path = tmp_path / "a" / "statistics.json"
    good = json.loads(path.read_text())
    for change, message in (
        (lambda s: s["actions"].update(count=8), "statistics are of 8 actions, but there are 7"),
        (lambda s: s["proprio"].update(count=7), "statistics are of 7 proprio, but there are 9"),
        (lambda s: s["actions"].update(std=[float("nan"), 1.0]), "of actions are not finite"),
        (lambda s: s["actions"].update(digest="0" * 16), "actions are of other episodes: digest"),
        (lambda s: s["actions"].pop("max"), "actions.max is missing"),
        (lambda s: s.pop("actions"), "actions.min is missing"),
    ):
        changed = json.loads(json.dumps(good))
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"{message}.*python -m wamjax.stats"):
            opened(tmp_path, a={"path": "a"})
    path.write_text(json.dumps(good))
    opened(tmp_path, a={"path": "a"})
    (tmp_path / "a" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json lacks \['lengths', 'shards'\]"):
        opened(tmp_path, a={"path": "a"})


def test_statistics_of_another_data_set_with_equal_counts_are_an_error(tmp_path, capsys):
    for name, first in {"a": 0, "b": 10}.items():
        synthetic.write(tmp_path / name, (3, 4), first=first)
    own, other = (tmp_path / name / "statistics.json" for name in "ab")
    assert opened(tmp_path, a={"path": "a"})[1] == json.loads(own.read_text())
    assert "digest" not in capsys.readouterr().err
    good = own.read_text()
    own.write_text(other.read_text())
    with pytest.raises(ValueError, match="of proprio are of other episodes.*wamjax.stats"):
        opened(tmp_path, a={"path": "a"})
    old = json.loads(good)
    for rows in old.values():
        del rows["digest"]
    own.write_text(json.dumps(old))
    assert opened(tmp_path, a={"path": "a"})[1] == old
    assert capsys.readouterr().err.count("no digest") == 1


def test_checks_warn_of_mistakes_and_nothing_else(tmp_path):
    synthetic.write(tmp_path / "a", (40,) * 12)
    spec, statistics, sources = opened(tmp_path, a={"path": "a"})
    assert checks(sources, statistics, spec) == []

    def of(change):
        rows = {k: {n: np.copy(v) for n, v in r.items()} for k, r in statistics.items()}
        change(rows)
        return "\n".join(checks(sources, rows, spec))

    def constant(rows):
        rows["proprio"]["min"][2] = rows["proprio"]["max"][2] = 0.0

    def elsewhere(rows):
        rows["actions"]["max"][1] = 10.0

    def vast(rows):
        rows["actions"]["max"][1] = 1e5

    assert "proprio[2] is constant" in of(constant)
    assert "actions[1] spans 0 to 39, far outside of the statistics 0 to 10" in of(elsewhere)
    assert "actions[1] spans 0 to 39, a corner of" in of(vast)

    synthetic.write(tmp_path / "short", (2,) * 4)
    spec, statistics, sources = opened(tmp_path, a={"path": "short"})
    assert "100% of the episodes are shorter than a window of 4" in "\n".join(
        checks(sources, statistics, spec)
    )
    other = Reader(synthetic.write(tmp_path / "wide", (9,), action_dim=3)).stored_statistics()
    assert "2 dimensions, the statistics have 3" in "\n".join(checks(sources, other))


def test_words_that_share_a_token_are_found(tmp_path):
    synthetic.write(tmp_path / "a", (40,) * 4)
    config = synthetic.config(tmp_path, a={"path": "a"})
    config.data.vocabulary = "hash"
    spec, _, sources = open_sources(config.data)
    assert spec.words == () and alike(sources, 8, spec.vocabulary) == []
    assert "words" not in spec.to_json()  # as in older checkpoints
    with Writer(tmp_path / "b", synthetic.info()) as writer:  # two words that share an id
        for i, task in enumerate(("bowl", "microwave")):
            writer.write(synthetic.episode(i, 5, synthetic.info(), task))
    config = synthetic.config(tmp_path, a={"path": "a"}, b={"path": "b"})
    spec, _, sources = open_sources(config.data)
    assert spec.words == ("block", "bowl", "lift", "microwave", "the")
    assert DataSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert alike(sources, 8, spec.vocabulary) == []
    lines = "\n".join(alike(sources, 8, Vocabulary()))
    assert "the words ['bowl', 'microwave'] of the instructions share token" in lines
    assert "the instructions ['bowl the block', 'microwave the block'] are the same" in lines
