"""Tests sizes and load plans of the published models, and a small measured conversion."""

import json
import math

import pytest

from wamjax.bench import conversion, weights
from wamjax.weights import families

FAST_WAM = families.named(
    layers=2, heads=2, head_dim=12, width=16, ffn=24, action_width=8, action_ffn=12, channels=3,
    context_width=10, freq_dim=6, action_dim=5, proprio_dim=4,
)  # fmt: skip


def test_a_mesh_is_read_from_text():
    assert weights.parse_mesh("") == {"data": 1, "fsdp": 1, "tensor": 1}
    assert weights.parse_mesh("data=4,fsdp=16") == {"data": 4, "fsdp": 16, "tensor": 1}
    for text, message in (("fdsp=2", "no axis 'fdsp', did you mean 'fsdp'"), ("data", "''"),
                          ("data=0", "'0', it must be a number"), ("data=-1", "'-1'")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            weights.parse_mesh(text)


def test_every_family_has_a_plan_that_adds_up(capsys):
    one = weights.run([], weights.parse_mesh(""))
    assert [row["family"] for row in one["rows"]] == list(families.FAMILIES)
    for row in one["rows"]:
        load = row["load"]
        assert load["device_bytes"] == row["bytes"]
        assert load["host_bytes"] == load["largest"]["bytes"]
        assert (load["sharded"], load["replicated"]) == (0, row["arrays"])
        for layout, said in row["layouts"].items():
            shared = layout == "diffusers" and row["family"] == "dit"  # embedders in every block
            assert (said["numbers"] == row["parameters"]) != shared
            assert said["numbers"] >= row["parameters"]
    weights.show(one)
    shown = capsys.readouterr().out
    assert "fast_wam " in shown and "6,020,710,599" in shown and "released (1651)" in shown


def test_a_mesh_divides_what_its_rules_split():
    names = ["fast_wam", "wan21_vae"]
    report = weights.run(names, weights.parse_mesh("data=4,fsdp=16"))
    assert report["devices"] == 64 and "fast_wam" in json.dumps(report)
    policy, vae = (row["load"] for row in report["rows"])
    whole, split = policy["replicated_bytes"], policy["device_bytes"]
    total = report["rows"][0]["bytes"]
    for dtype in weights.ITEM:
        assert split[dtype] == whole[dtype] + (total[dtype] - whole[dtype]) / 16
    largest = policy["largest"]
    assert largest["path"] == "blocks/video/ffn/in/kernel"
    assert largest["bytes"]["bfloat16"] == 2 * math.prod(largest["shape"]) == 2_642_411_520
    assert policy["host_bytes"]["float32"] == largest["bytes"]["float32"] / 16
    assert vae["sharded"] == 0 and vae["device_bytes"] == report["rows"][1]["bytes"]
    with pytest.raises(ValueError, match="does not divide by mesh axis 'fsdp' of size 7"):
        weights.run(["dit"], weights.parse_mesh("fsdp=7"))
    with pytest.raises(ValueError, match="no family 'umt6', did you mean"):
        weights.run(["umt6"], weights.parse_mesh(""))


def test_the_measured_conversion_runs_both_ways(tmp_path, capsys):
    (tmp_path / "sizes.json").write_text(json.dumps(FAST_WAM))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    report = conversion.run("fast_wam", scratch, str(tmp_path / "sizes.json"))
    assert list(scratch.iterdir()) == []
    peaks = {r["what"]: r["peak_bytes"] for r in report["rows"] if "peak_bytes" in r}
    assert list(peaks) == ["import safetensors", "export .pt", "import .pt"]
    assert all(5e7 < peak < 3e9 for peak in peaks.values())
    plan = families.plans("fast_wam", FAST_WAM)["released"]
    numbers = sum(map(math.prod, plan.published.values()))
    assert report["bytes"] == 2 * numbers and report["tensors"] == len(plan.published)
    conversion.show(report)
    assert "import .pt" in capsys.readouterr().out


def test_random_tensors_are_finite_and_reproducible():
    sizes = families.named(layers=2, width=16, heads=2, ffn=32, classes=3)
    plan = families.plans("dit", sizes)["diffusers"]
    for dtype in ("bfloat16", "float16", "float32"):
        tensors = conversion.random_tensors(plan, dtype)
        plan.check(tensors)  # copies are equal
        for key, x in tensors.items():
            values = x.read().astype("float64")
            assert x.dtype == dtype and abs(values).max() < 2 and values.any(), key
            assert (x.read() == x.read()).all()
    a, b = (tensors[f"transformer_blocks.{i}.attn1.to_q.weight"].read() for i in (0, 1))
    assert (a != b).any()


def test_a_tensor_that_comes_back_changed_is_an_error(tmp_path):
    sizes = families.named(layers=1, width=16, heads=2, ffn=32, classes=3)
    plan = families.plans("dit", sizes)["official"]
    tensors = conversion.random_tensors(plan)
    changed = tensors | {"pos": tensors["x_embedder.proj.bias"]}
    conversion.files.write(tmp_path / "x.safetensors", changed)
    with pytest.raises(RuntimeError, match="not have the tensors drawn: {'pos'}"):
        conversion._compare(tmp_path / "x.safetensors", tensors)
    changed = tensors | {"x_embedder.proj.bias": tensors["blocks.0.attn.proj.bias"]}
    conversion.files.write(tmp_path / "y.safetensors", changed)
    with pytest.raises(RuntimeError, match="x_embedder.proj.bias of .* is not what was drawn"):
        conversion._compare(tmp_path / "y.safetensors", tensors)


@pytest.mark.slow
def test_twelve_gigabytes_convert_in_less_than_three(tmp_path):
    report = conversion.run("fast_wam", tmp_path)
    assert report["bytes"] > 12e9
    assert all(row.get("peak_bytes", 0) < 3e9 for row in report["rows"])
