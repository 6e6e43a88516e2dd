"""Tests that a method reads exactly the keys that it declares, and that no others can be set."""

import fnmatch

import pytest
from ml_collections import ConfigDict
from test_configs import FILES, get, spec_of
from test_video_configs import clips

from wamjax import config as configs
from wamjax import wam
from wamjax.models.palette import Palette
from wamjax.wam.video import builder

CLIPS = {"codec_tabletop", "video_latents", "video_tabletop", "video_tokens"}
ARGUMENTS = {
    "fast_wam_tabletop": [f"variant={v}" for v in ("fast", "idm", "optional_idm", "ladder")],
    "codec_tabletop": ["kind=fsq", "kind=vq"],
    "dit_digits": ["process=ddpm", "design=in_context"],
    "text_scenes": ["route=joint", "route=pooled"],
    "video_latents": ["scheme=tokens", "scheme=blocks"],
    "cosmos_policy_tabletop": ["visibility=prefix", ""],
}
CASES = [(name, arg) for name in FILES for arg in ARGUMENTS.get(name, [""])]
# Keys read as a whole, or by the codec of tokens, which needs data.
ELSEWHERE = {"objective.plan.*"}
TOKENS = {"model.codec.*"}
# Keys that are read, but have no effect under this condition.
IDLE = {
    "objective.cond_noise_prob": lambda c: "idm" not in c.objective.variant
    and c.objective.variant != "ladder",
    "model.text.kind": lambda c: not c.objective.name.startswith("fast_wam")
    and c.model.text.route == "none" and not c.objective.slots,
    "model.text.layers": lambda c: c.model.text.route == "none",
    "model.position_table": lambda c: c.model.positions == "rope",
}


class Spy(ConfigDict):
    """Records which keys of a config are read."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if "_spy" in vars(self):
            reads, prefix = vars(self)["_spy"]
            path = f"{prefix}{key}"
            if isinstance(value, ConfigDict):
                return spied(value, reads, f"{path}.")
            reads.add(path)
        return value

    def __getattr__(self, key):
        return self[key]


def spied(config, reads, prefix=""):
    out = Spy(config)
    vars(out)["_spy"] = reads, prefix
    return out


def reads_of(name, arg):
    config, reads = get(name, arg), set()
    config.data.arrays = config.data.arrays.replace("scenes:", "scenes:count=64,")
    spec = clips() if name in CLIPS else spec_of(config)
    patterns = wam.method(config.objective.name).keys(config)
    wam.build(spied(config, reads), spec)
    wam.method(config.objective.name).check(spied(config, reads))
    ours = {k for k in reads if k.startswith(("objective.", "model.")) and k != "objective.name"}
    return ours - {k for k, idle in IDLE.items() if idle(config)}, patterns


@pytest.mark.parametrize("name, arg", CASES, ids=[f"{n}:{a}" for n, a in CASES])
def test_methods_read_exactly_the_keys_that_they_declare(name, arg, monkeypatch):
    monkeypatch.setattr(builder, "tokenizer", lambda _: Palette(4, codes=bytes(512 * 48)))
    reads, patterns = reads_of(name, arg)

    def declared(key):
        return any(fnmatch.fnmatchcase(key, p) for p in patterns)

    every = {k for k in configs.flatten(configs.base_config())
             if k.startswith(("objective.", "model."))}  # fmt: skip
    assert not {k for k in reads - set(patterns) if not declared(k)}  # nothing undeclared is read
    elsewhere = ELSEWHERE | (TOKENS if name == "video_tokens" or "tokens" in arg else set())
    unread = {k for k in every if declared(k)} - reads
    assert not {k for k in unread if not any(fnmatch.fnmatchcase(k, p) for p in elsewhere)}


def test_unread_keys_are_errors_that_name_the_method_that_reads_them():
    config = get("quickstart")
    wam.check_training(config)
    config.objective.guidance = 7.5
    said = r"config.objective.guidance = 7.5 has .*'fast_wam' .*denoising and wan read it.: leave"
    with pytest.raises(ValueError, match=said):
        wam.check_training(config)
    config.objective.guidance, config.model.codec.levels = 1.0, (2, 2)
    with pytest.raises(ValueError, match=r"model.codec.levels = \(2, 2\) has no effect"):
        wam.check_training(config)
    configs.reset(config, "model.codec")
    wam.check_training(config)


def test_old_names_of_keys_are_still_read():
    config = get("quickstart")
    saved = configs.to_json(config)
    objective, model = saved["objective"], saved["model"]
    objective["lambda_video"], objective["lambda_action"] = 0.5, 2.0
    del objective["video_weight"]
    model["lora_rank"] = model.pop("modulation_rank")
    loaded = configs.load(saved)
    assert (loaded.objective.video_weight, loaded.objective.action_weight) == (0.5, 2.0)
    assert loaded.model.modulation_rank == 256
    config.objective.video_weight, config.objective.action_weight = 0.5, 2.0
    assert configs.check_resume(saved, config, "") == {}
    cosmos = get("cosmos_policy_tabletop")
    saved = configs.to_json(cosmos)
    saved["objective"] |= {"variant": "cosmos_policy", "lambda_action": 1.0}
    assert configs.load(saved).objective.action_weight == 4.0
    assert configs.check_resume(saved, cosmos, "") == {}
