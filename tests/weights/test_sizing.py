"""Tests sizes read from files and runs; heads, which shapes do not show, are not guessed."""

import json

import numpy as np
import pytest
from weights.test_convert import DIT, FAST_WAM, published, save

from wamjax import config as configs
from wamjax import convert, weights
from wamjax.wam.cosmos_policy import presets as cosmos_presets
from wamjax.wam.fast_wam import presets
from wamjax.weights import families, sizing, store, tensor
from wamjax.weights.families import named

COMMON = named(layers=3, width=48, heads=2, ffn=40, channels=5, context_width=12)
SIZES = {
    "dit": DIT | named(freq_dim=12, channels=5, outputs=10, patch=4),
    "wan21_t2v": COMMON | named(freq_dim=16, patch=4),
    "wan22_ti2v": COMMON | named(freq_dim=16),
    "cosmos_policy": COMMON | named(lora_rank=6),
    "sd3": COMMON | named(pooled_width=6, freq_dim=8),
    "fast_wam": FAST_WAM | named(patch=4),
}
HEADS = {"model.heads", "model.head_dim"}


def lazily(arrays):
    return {k: tensor.of(x) for k, x in arrays.items()}


@pytest.mark.parametrize("family", SIZES)
def test_tensors_determine_all_sizes_but_heads(family):
    want = families.sizes(family, SIZES[family])
    for layout in families.family(family).layouts:
        file = lazily(published(family, layout, config=SIZES[family]))
        given = {"model.heads": want["model.heads"]}
        if family == "cosmos_policy":
            given = {}  # its heads are normalised separately
        assert sizing.of_file(family, file, given) == want, layout
        if given:
            with pytest.raises(weights.Mismatch, match='such as {"model.heads": 24}'):
                sizing.of_file(family, file)


@pytest.mark.parametrize("family", SIZES)
def test_published_sizes_are_known_by_their_tensors(family):
    for layout in families.family(family).layouts:
        shapes = families.plans(family)[layout].published
        file = {k: tensor.Tensor(s, np.dtype("f4"), None) for k, s in shapes.items()}
        assert sizing.of_file(family, file) == families.sizes(family), layout


def test_the_number_of_heads_comes_from_the_config_file(tmp_path):
    """Reads diffusers' and Wan's; a config of another network is refused."""
    save(tmp_path / "wan.safetensors", published("wan22_ti2v", config=SIZES["wan22_ti2v"]))
    for said in (
        {"dim": 48, "num_heads": 2, "num_layers": 3},
        {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3},
    ):
        (tmp_path / "config.json").write_text(json.dumps(said))
        params = weights.load("wan22_ti2v", tmp_path / "wan.safetensors")
        assert params["blocks"]["video"]["ffn"]["in"]["kernel"].shape == (3, 48, 40)
        out = tmp_path / f"ours{len(said)}{'dim' in said}"
        convert.bring_in("wan22_ti2v", tmp_path, out, progress=False)
        assert store.about(out)["sizes"] == families.sizes("wan22_ti2v", SIZES["wan22_ti2v"])
    for said in ({"dim": 64, "num_heads": 2, "num_layers": 3}, {"num_layers": 2}, []):
        (tmp_path / "config.json").write_text(json.dumps(said))
        with pytest.raises(ValueError, match="number of heads|does not hold the sizes"):
            weights.load("wan22_ti2v", tmp_path / "wan.safetensors")


def test_a_folder_gives_its_part_of_a_config(tmp_path):
    save(tmp_path / "x.pt", published("fast_wam"))
    convert.bring_in(
        "fast_wam", tmp_path / "x.pt", tmp_path / "ours", named(heads=2), progress=False
    )
    config = configs.base_config()
    presets.wan22_5b(config)
    config.update_from_flattened_dict(weights.config_of(tmp_path / "ours"))
    model = config.model
    assert (model.layers, model.heads, model.head_dim) == (2, 2, 12)
    assert (model.video.width, model.video.ffn, model.context_width) == (16, 24, 10)
    assert (model.action.width, model.action.ffn, model.codec.channels) == (8, 12, 3)
    assert (config.data.declared.action_dim, config.data.declared.proprio_dim) == (5, 4)
    save(tmp_path / "c.pt", published("cosmos_policy", config=SIZES["cosmos_policy"]))
    convert.bring_in("cosmos_policy", tmp_path / "c.pt", tmp_path / "c", progress=False)
    said = weights.config_of(tmp_path / "c")
    assert said["model.head_dim"] == 24 and said["model.rope_scale"] == (1.0, 3.0, 3.0)
    cosmos_presets.predict2_2b(config)
    config.update_from_flattened_dict(said)


def test_older_folders_have_short_names(tmp_path):
    save(tmp_path / "x.pt", published("fast_wam"))
    convert.bring_in("fast_wam", tmp_path / "x.pt", tmp_path / "ours", FAST_WAM, progress=False)
    file = tmp_path / "ours" / store.ABOUT
    about = json.loads(file.read_text())
    about["sizes"], about["format"] = families.short(about["sizes"]), 1
    file.write_text(json.dumps(about))
    assert "layers" in store.about(tmp_path / "ours")["sizes"]
    assert weights.config_of(tmp_path / "ours")["model.layers"] == 2
    weights.load("fast_wam", tmp_path / "ours")
    convert.send_out("fast_wam", tmp_path / "ours", tmp_path / "again.pt", progress=False)


def test_a_run_knows_its_sizes_but_must_have_those_of_the_family():
    config = configs.base_config()
    presets.wan22_5b(config)
    presets.miniature(config)
    want = families.sizes("fast_wam", named(
        layers=2, heads=3, head_dim=16, width=48, ffn=96, action_width=16, action_ffn=32,
        context_width=32, freq_dim=32, action_dim=6, proprio_dim=9,
        channels=config.model.codec.channels,
    ))  # fmt: skip
    shapes = families.plans("fast_wam", want)["released"].params
    assert sizing.of_run("fast_wam", config, shapes) == want
    config.model.video.width = 50
    with pytest.raises(weights.Mismatch, match="head_dim = 48 and model.video.width = 50"):
        sizing.of_run("wan22_ti2v", config, {})


def test_a_bad_sizes_file_is_an_error(tmp_path):
    for text in ("[]", "{", "x" * 9):
        (tmp_path / "sizes.json").write_text(text)
        with pytest.raises(weights.BadFile, match="sizes.json must hold a JSON object of sizes: "):
            families.sizes("dit", tmp_path / "sizes.json")
