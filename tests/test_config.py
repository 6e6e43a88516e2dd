import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from wamjax import config as configs
from wamjax import config_keys


def _other(value):
    """Returns another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "_other"
    if isinstance(value, tuple):
        return (*value, "other")
    return value + 1


def _with_source():
    config = configs.base_config()
    config.data.sources.demos = configs.source(path="a", collect={"tasks": ("reach",)})
    return config


KEYS = [k for k, _, _ in config_keys.TABLE]
KEYS += [f"data.sources.demos.{k}" for k, _, _ in config_keys.SOURCE]


def test_every_key_is_documented_and_every_documented_key_exists():
    flat = configs.flatten(_with_source())
    assert set(flat) == set(KEYS)
    for key in flat:
        assert len(configs.doc(key)) > 10, key
    assert len(KEYS) == len(set(KEYS))


def test_a_misspelt_key_is_an_error_with_a_suggestion():
    config = configs.base_config()
    with pytest.raises(AttributeError, match="learning_rate"):
        config.optim.learning_rte = 1.0
    with pytest.raises(KeyError, match="batch_size"):
        config.update_from_flattened_dict({"data.batch_sise": 3})
    with pytest.raises((AttributeError, KeyError), match="weight"):
        configs.source(wieght=2.0)
    with pytest.raises((AttributeError, KeyError), match="noise"):
        configs.source(collect={"niose": 2.0})


def test_parse_arg():
    defaults = dict(variant="fast", debug=False, layers=3, rate=0.5)
    out = configs.parse_arg("variant=idm,debug,layers=7,rate=1e-3", **defaults)
    assert out.to_dict() == dict(variant="idm", debug=True, layers=7, rate=1e-3)
    assert configs.parse_arg(None, **defaults).to_dict() == defaults
    assert configs.parse_arg("debug=false", debug=True).debug is False
    with pytest.raises(ValueError, match="'varient'.*did you mean 'variant'"):
        configs.parse_arg("varient=idm", **defaults)
    for bad in ("layers=x", "layers", "debug=maybe", "rate="):
        with pytest.raises(ValueError, match=bad.partition("=")[0]):
            configs.parse_arg(bad, **defaults)


def test_save_and_load_round_trip(tmp_path):
    config = _with_source()
    config.data.cameras = ("gripper",)
    config.eval.shift.camera = 0.25
    config.data.sources.demos.weight = 3.0
    configs.save(config, tmp_path / "config.json")
    loaded = configs.load(tmp_path / "config.json")
    assert configs.diff(config, loaded) == {}
    assert loaded.data.cameras == ("gripper",)
    assert loaded.to_dict() == config.to_dict()
    with pytest.raises(AttributeError):
        loaded.optim.nothing = 1


def test_load_names_an_unknown_key():
    saved = configs.to_json(_with_source())
    saved["optim"]["learning_rte"] = 1
    with pytest.raises(ValueError, match="optim.learning_rte.*did you mean 'optim.learning_rate'"):
        configs.load(saved)


def test_load_fills_keys_that_are_newer_than_the_file():
    saved = configs.to_json(_with_source())
    del saved["optim"]["b2"], saved["model"]["remat"]
    assert configs.load(saved).optim.b2 == configs.base_config().optim.b2


@pytest.mark.parametrize("key", KEYS)
def test_resume_refuses_frozen_keys_and_reports_the_others(key):
    old, new = _with_source(), _with_source()
    value = configs.flatten(old)[key]
    new.update_from_flattened_dict({key: _other(value)})
    saved = configs.to_json(old)
    if configs.frozen(key):
        with pytest.raises(ValueError) as error:
            configs.check_resume(saved, new, "checkpoint 7")
        for part in (key, repr(value), repr(_other(value)), "checkpoint 7", "--workdir"):
            assert part in str(error.value)
    else:
        assert configs.check_resume(saved, new, "") == {key: (value, _other(value))}


def test_what_is_frozen():
    must = ("model.layers", "model.video.width", "objective.name", "precision.params", "data.chunk",
            "data.frames", "data.cameras", "data.normalization", "objective.action_shift",
            "data.sources.x.weight")  # fmt: skip
    may = ("mesh.data", "optim.learning_rate", "total_steps", "precision.compute", "eval.episodes",
           "optim.accumulate", "checkpoint.every", "model.remat", "data.root")  # fmt: skip
    assert all(map(configs.frozen, must))
    assert not any(map(configs.frozen, may))


def test_resume_refuses_another_set_of_sources_but_not_a_key_the_old_code_lacked():
    saved = configs.to_json(_with_source())
    more = _with_source()
    more.data.sources.videos = configs.source(action_free=True)
    with pytest.raises(ValueError, match="data.sources.videos"):
        configs.check_resume(saved, more, "checkpoint 1")
    with pytest.raises(ValueError, match="data.sources.demos"):
        configs.check_resume(saved, configs.base_config(), "checkpoint 1")
    del saved["model"]["layers"], saved["data"]["sources"]["demos"]["weight"]
    changes = configs.check_resume(saved, _with_source(), "checkpoint 1")
    assert set(changes) == {"model.layers", "data.sources.demos.weight"}
    assert changes["model.layers"][0] is configs.ABSENT


def test_a_run_older_than_a_key_resumes_as_it_was_trained():
    """It was trained with normalised zeros after the end of an episode, and still is."""
    saved = configs.to_json(configs.base_config())
    del saved["data"]["padding"]
    assert configs.load(saved).data.padding == "normalized"
    new = configs.base_config()
    with pytest.raises(ValueError, match="data.padding was 'normalized' when .* now 'hold:grip'"):
        configs.check_resume(saved, new, "checkpoint 1")
    new.data.padding = "normalized"
    assert set(configs.check_resume(saved, new, "checkpoint 1")) == {"data.padding"}
    del saved["data"]["vocabulary"]  # words were hashed
    assert configs.load(saved).data.vocabulary == "hash"
    with pytest.raises(ValueError, match="data.vocabulary was 'hash' when .* now 'words'"):
        configs.check_resume(saved, new, "checkpoint 1")
    new.data.vocabulary = "hash"
    assert set(configs.check_resume(saved, new, "checkpoint 1")) == {
        "data.padding", "data.vocabulary"
    }  # fmt: skip
    # A newer key must have its default, which is what the old code did.
    del saved["objective"]["video_shift"]
    new.objective.video_shift = 3.0
    with pytest.raises(ValueError, match="objective.video_shift was 5.0 .* now 3.0"):
        configs.check_resume(saved, new, "checkpoint 1")


@pytest.mark.parametrize(
    "key, value",
    [("total_steps", 0), ("data.batch_size", -1), ("precision.compute", "float8"),
     ("optim.ema_decay", 1.5), ("optim.accumulate", 0), ("data.frame_stride", -1),
     ("optim.learning_rate", -1.0), ("optim.b1", 1.5), ("objective.cond_noise_prob", 5.0),
     ("objective.action_weight", -1.0), ("optim.clip_norm", -1.0), ("model.patch", 0),
     ("model.text.kind", "token"), ("eval.execute", 0), ("eval.episodes", -5),
     ("objective.infer_steps", 0)],
)  # fmt: skip
def test_validate_names_the_key(key, value):
    config = configs.base_config()
    configs.validate(config)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=key):
        configs.validate(config)


def test_importing_is_light():
    code = (
        "import sys, wamjax; assert 'jax' not in sys.modules; import wamjax.train; "
        "heavy = {'torch', 'tensorflow', 'wandb', 'tensorboardX', 'matplotlib'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_source_is_added_and_changed_on_the_command_line(tmp_path, monkeypatch):
    file = tmp_path / "experiment.py"
    file.write_text(
        "from wamjax import config\n"
        "def get_config(arg=None):\n"
        "    out = config.base_config()\n"
        "    out.data.sources.demos = config.source(path='there')\n"
        "    return out\n"
    )

    def parsed(*arguments):
        line = ["test", f"--config={file}", *arguments]
        monkeypatch.setattr("sys.argv", line)
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, "", flag_values=values, lock_config=True)
        values(line)
        return values.config.data.sources

    got = parsed("--config.data.sources.mine.path=/data", "--config.data.sources.mine.weight=2",
                 "--config.data.sources.demos.action_free=True")  # fmt: skip
    assert list(got) == ["demos", "mine"]
    assert got.mine == configs.source(path="/data", weight=2.0)
    assert got.demos == configs.source(path="there", action_free=True)
    assert parsed("--config.data.sources.mine.collect.episodes=3").mine.collect.episodes == 3
    assert list(parsed()) == ["demos"]
    with pytest.raises((KeyError, AttributeError), match="pth"):
        parsed("--config.data.sources.mine.pth=/data")


def test_reading_an_undeclared_source_is_an_error():
    config = configs.base_config()
    with pytest.raises((KeyError, AttributeError), match="mine"):
        _ = config.data.sources.mine.path
    assert "mine" not in config.data.sources


@pytest.mark.parametrize("name, variant", [
    ("fast_wam", "idm"), ("fast_wam_judge", "ladder"), ("cosmos_policy", "fast"),
])  # fmt: skip
def test_a_saved_variant_is_the_same_after_loading(name, variant):
    """Cosmos Policy once stored its own name there."""
    config = configs.base_config()
    config.objective.name, config.objective.variant = name, variant
    assert configs.load(config.to_dict()).objective.variant == variant
    if name == "cosmos_policy":
        config.objective.variant = name
        assert configs.load(config.to_dict()).objective.variant == "fast"
