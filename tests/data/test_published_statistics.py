"""Tests round trips of hand-written statistics files of Fast-WAM and Cosmos Policy."""

import copy
import json

import numpy as np
import pytest
from data import synthetic

from wamjax import stats
from wamjax.data import normalize
from wamjax.data import published_statistics as published
from wamjax.data.records import Reader

# As the public code writes them, the format of the specifications (fast_wam 5.3, cosmos 7.4).
FAST_WAM = {
    "state": {
        "default": {
            "stepwise_min": [[-0.5, 0.0, 1.25], [-0.25, 0.0, 1.25]],
            "stepwise_max": [[0.5, 0.1, 1.25], [0.75, 0.1, 1.25]],
            "global_min": [-0.5, 0.0, 1.25],
            "global_max": [0.75, 0.1, 1.25],
            "stepwise_q01": [[-0.4, 0.01, 1.25], [-0.2, 0.0, 1.25]],
            "stepwise_q99": [[0.4, 0.09, 1.25], [0.7, 0.1, 1.25]],
            "global_q01": [-0.4, 0.0, 1.25],
            "global_q99": [0.7, 0.1, 1.25],
            "stepwise_mean": [[0.1, 0.05, 1.25], [0.2, 0.05, 1.25]],
            "stepwise_std": [[0.3, 0.02, 0.0], [0.3, 0.02, 0.0]],
            "global_mean": [0.15000000596046448, 0.05, 1.25],
            "global_std": [0.3, 0.02, 0.0],
        }
    },
    "action": {
        "default": {
            "stepwise_min": [[-1.0, 0.0]],
            "stepwise_max": [[0.9375, 1.0]],
            "global_min": [-1.0, 0.0],
            "global_max": [0.9375, 1.0],
            "stepwise_q01": [[-0.9, 0.0]],
            "stepwise_q99": [[0.9, 1.0]],
            "global_q01": [-0.9, 0.0],
            "global_q99": [0.9, 1.0],
            "stepwise_mean": [[0.01, 0.5]],
            "stepwise_std": [[0.4, 0.5]],
            "global_mean": [0.01, 0.5],
            "global_std": [0.4, 0.5],
        }
    },
    "num_episodes": 1693,
    "num_transition": 1693,
}
COSMOS = {
    "actions_min": [-0.9375, -1.0],
    "actions_max": [0.9375, 1.0],
    "actions_mean": [0.06278137117624283, -0.1],
    "actions_std": [0.335520476102829, 0.9],
    "actions_median": [0.0, -1.0],
    "proprio_min": [-0.04, 0.0, 0.9],
    "proprio_max": [0.04, 0.5, 1.6],
    "proprio_mean": [0.0, 0.2, 1.2],
    "proprio_std": [0.01, 0.1, 0.2],
    "proprio_median": [0.0, 0.2, 1.1],
}
SAMPLES = {"fast_wam": FAST_WAM, "cosmos_policy": COSMOS}


@pytest.mark.parametrize("form", SAMPLES)
def test_reading_and_writing_is_exact(tmp_path, form):
    path = tmp_path / "published.json"
    path.write_text(json.dumps(SAMPLES[form]))
    ours = published.read(path)
    assert json.loads(json.dumps(ours)) == ours
    published.write(ours, tmp_path / "again.json", form)
    assert json.loads((tmp_path / "again.json").read_text()) == SAMPLES[form]
    # Through a file in our format, as stored in a checkpoint or a data set.
    published.write(ours, tmp_path / "ours.json", "wamjax")
    again = published.read(tmp_path / "ours.json")
    assert again == ours and published.to_published(again, form) == SAMPLES[form]


def test_normalisers_made_of_published_statistics_are_those_of_the_public_code():
    for form, low, high, n in (
        ("fast_wam", FAST_WAM["action"]["default"]["global_min"], [0.9375, 1.0], 3),
        ("cosmos_policy", COSMOS["actions_min"], COSMOS["actions_max"], 3),
    ):
        ours = published.from_published(SAMPLES[form])
        assert len(ours["proprio"]["min"]) == n
        made = normalize.normalizers(ours, "min_max")
        x = np.float32([[0.25, 0.5]])
        low, high = np.float32(low), np.float32(high)
        want = 2 * (x - low) / (high - low) - 1
        np.testing.assert_allclose(made["actions"].forward(x), want, rtol=1e-6, atol=1e-7)
        back = (want + 1) / 2 * (high - low) + low
        np.testing.assert_allclose(made["actions"].inverse(want), back, rtol=1e-6, atol=1e-7)
    # A constant dimension of Fast-WAM becomes 0, as in the public code.
    state = normalize.normalizers(published.from_published(FAST_WAM), "mean_std")["proprio"]
    assert state.forward(np.float32([[0, 0, 7.0]]))[0, 2] == 0


@pytest.mark.parametrize("form", SAMPLES)
def test_everything_that_is_missing_is_named(form):
    values = copy.deepcopy(SAMPLES[form])
    if form == "fast_wam":
        del values["action"]["default"]["global_q99"], values["state"]["default"]["global_min"]
        names = ("action.default.global_q99 is missing", "state.default.global_min is missing")
    else:
        del values["actions_median"], values["proprio_max"]
        names = ("actions_median is missing", "proprio_max is missing")
    with pytest.raises(ValueError) as error:
        published.from_published(values, "some/file.json")
    assert "some/file.json" in str(error.value) and all(n in str(error.value) for n in names)


def test_other_files_are_errors(tmp_path):
    (tmp_path / "x.json").write_text('{"mean": [1.0]}')
    with pytest.raises(ValueError, match=r"x.json is neither Fast-WAM's .* it has \['mean'\]"):
        published.read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="x.json is not JSON"):
        published.read(tmp_path / "x.json")
    with pytest.raises(ValueError, match="actions_max has 3 numbers, its minimum 2"):
        published.from_published(COSMOS | {"actions_max": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="actions_std must be a list of finite numbers"):
        published.from_published(COSMOS | {"actions_std": [[1.0, 2.0]]})
    with pytest.raises(ValueError, match=r"actions_min must be a list of .*, not \[nan, 0"):
        published.from_published(COSMOS | {"actions_min": [float("nan"), 0.0]})
    groups = {"arm": {}, "hand": {}}
    with pytest.raises(ValueError, match=r"'state' has groups \['arm', 'hand'\]"):
        published.from_published(FAST_WAM | {"state": groups})


def test_a_policy_checks_the_statistics_that_it_needs():
    ours, sizes = published.from_published(COSMOS), {"actions": 2, "proprio": 3}
    published.check(ours, sizes, "min_max")
    published.check(ours, sizes, "mean_std")
    with pytest.raises(ValueError, match=r"actions.q01 is missing \(config.data.normalization is"):
        published.check(ours, sizes, "quantile")
    with pytest.raises(ValueError, match="proprio.min has 3 dimensions, the policy 8; proprio.max"):
        published.check(ours, sizes | {"proprio": 8}, "min_max")
    with pytest.raises(ValueError, match="'minmax' is not one of"):
        published.check(ours, sizes, "minmax")


def test_the_command_exports_those_of_a_data_set_and_converts_files(tmp_path, capsys):
    data = synthetic.write(tmp_path / "data")

    def run(*arguments):
        with synthetic.command(stats, *arguments):
            stats.main([""])

    reader = Reader(data)
    for form in SAMPLES:
        run(f"--data={data}", f"--out={tmp_path}/{form}.json", f"--format={form}")
        got = published.read(tmp_path / f"{form}.json")
        want = reader.stored_statistics()
        for key in ("actions", "proprio"):
            for row in ("min", "max", "mean", "std"):
                assert got[key][row] == want[key][row]
    everything = np.concatenate([e.actions for e in reader])
    cosmos = json.loads((tmp_path / "cosmos_policy.json").read_text())
    np.testing.assert_allclose(cosmos["actions_median"], np.median(everything, axis=0))
    assert set(cosmos) == set(COSMOS)
    (tmp_path / "theirs.json").write_text(json.dumps(FAST_WAM))
    run(f"--source={tmp_path}/theirs.json", f"--out={tmp_path}/ours.json")
    assert json.loads((tmp_path / "ours.json").read_text()) == published.from_published(FAST_WAM)
    run(f"--source={tmp_path}/ours.json", f"--out={tmp_path}/back.json", "--format=fast_wam")
    assert json.loads((tmp_path / "back.json").read_text()) == FAST_WAM
    assert "state" not in json.loads((tmp_path / "ours.json").read_text())
    with pytest.raises(ValueError, match="needs proprio.median, actions.median"):
        run(f"--source={tmp_path}/ours.json", f"--out={tmp_path}/x.json", "--format=cosmos_policy")


@pytest.mark.parametrize(
    "row, values, message",
    [
        ("std", [0.0, 1.0], "actions.std is 0 in dimension 0, which goes from -1.0 to 1.0"),
        ("std", [1.0, -1.0], "actions.std is negative in dimension 1"),
        ("std", [1.0, True], "actions.std must be a list of finite numbers"),
        ("mean", [0.0, 10**400], "actions.mean must be a list of finite numbers"),
        ("min", [2.0, 0.0], "actions.min is above max in dimension 0: 2.0 > 1.0"),
    ],
)
def test_statistics_that_no_data_can_have_are_refused(row, values, message):
    rows = {"min": [-1.0, 0.0], "max": [1.0, 0.0], "mean": [0.0, 0.0], "std": [0.5, 0.0]}
    published.check({"actions": rows}, {"actions": 2}, "mean_std")
    mode = "min_max" if row == "min" else "mean_std"
    with pytest.raises(ValueError, match=message):
        published.check({"actions": rows | {row: values}}, {"actions": 2}, mode)
