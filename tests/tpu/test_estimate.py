"""Tests estimates from the text of a program, and the search over programs."""

import types

import estimate
import jax
import pytest
import search

from wamjax import config as configs
from wamjax import hardware
from wamjax.bench import cycles
from wamjax.training.compile import LADDER

HLO = """\
HloModule jit_train_step, is_scheduled=true

%body.1 (t: (s32[], bf16[256,16])) -> (s32[], bf16[256,16]) {
  %fusion.1 = bf16[256,16]{1,0} fusion(%t.1), kind=kOutput, metadata={op_name="jit(train_step)/jvp(DiT.evaluate)/DiT/transformer/while/body/closed_call/blocks/video.finish/ffn/in/dot_general"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %fusion.2 = bf16[256,16]{1,0} fusion(%t.1), kind=kLoop, metadata={op_name="jit(train_step)/jvp(DiT.evaluate)/DiT/transformer/while/body/closed_call/blocks/video.finish/video._enter/sub"}, backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  %all-gather.1 = bf16[256,256]{1,0} all-gather(%fusion.1), channel_id=5, replica_groups=mesh['axis_0'=4,'axis_1'=16], device_ids=([4,16]T(1,0)) {'axis_1'}, dimensions={1}
  %all-reduce.1 = f32[100]{0} all-reduce(%x.1), channel_id=6, replica_groups=[16,4]<=[64]
  ROOT %tuple.1 = (s32[], bf16[256,16]{1,0}) tuple(%t.1)
}

%cond.1 (t: (s32[], bf16[256,16])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(30)
  %gte.2 = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%gte.2, %constant.3), direction=LT
}

ENTRY %main.1 (x: (s32[], bf16[256,16])) -> (s32[], bf16[256,16]) {
  %fusion.3 = f32[10]{0} fusion(%x.1), kind=kLoop, metadata={op_name="jit(train_step)/jit(_where)/select_n"}, backend_config={"window_config":{"estimated_cycles":"500"}}
  ROOT %while.1 = (s32[], bf16[256,16]{1,0}) while(%x.1), condition=%cond.1, body=%body.1
}
"""  # noqa: E501


def test_cycles_are_counted_by_part_as_often_as_they_run():
    assert cycles.count(HLO) == {"feed-forward": 30_000, "optimiser and cast": 500}


def test_an_estimate_has_compute_wire_and_utilisation():
    chip = hardware.CHIPS["TPU v5"]
    guess = estimate.of(HLO, chip, "v5p:4x4x4", 64, model=10**12)
    compute = 30_500 / 1.75e9
    gathered = 30 * 256 * 256 * 2 * 15 / 16 / (2 * 180e9)  # over two dimensions of the torus
    reduced = 30 * 400 * 2 * 3 / 4 / 180e9  # over one
    assert guess["seconds"]["compute"] == pytest.approx(compute)
    assert guess["seconds"]["collectives_exposed"] == pytest.approx(gathered + reduced, rel=1e-6)
    step = compute + gathered + reduced
    assert guess["mfu"]["step"] == pytest.approx(1e12 / step / (64 * 459e12), rel=1e-6)
    assert [estimate.dimensions(n, [4, 4, 4]) for n in (1, 4, 16, 64)] == [1, 1, 2, 3]
    assert estimate.dimensions(16, [16, 16]) == 1


def report(batch, remat, seconds, peak, mesh=None):
    return {
        "batch_size": batch, "remat": remat, "mesh": mesh or {"data": 4, "fsdp": 16},
        "memory": {"fits": peak <= 95, "peak_bytes": peak},
        "estimate": {"seconds": {"step": seconds}},
    }  # fmt: skip


def test_the_front_is_pareto_optimal_and_has_training_commands():
    fast, small = report(64, "none", 1, 90), report(64, "full", 2, 10)
    beaten, large = report(64, "attention", 3, 20), report(64, "dots", 0.5, 99)
    best = search.front([beaten, large, small, fast])
    assert best == [fast, small]
    line = search.command(best[0], "dit.py")
    assert "--config=dit.py" in line and "--config.mesh.fsdp=16" in line
    assert "--config.data.batch_size=64" in line and "--config.model.remat=none" in line


def test_the_search_skips_candidates_known_not_to_fit(monkeypatch):
    monkeypatch.setattr(search, "line", lambda report: "")
    config = configs.base_config()
    config.data.batch_size = 8
    values = types.SimpleNamespace(
        topology="v5e:2x2", cache="", meshes=["4:1"], batches=["2", "4"],
        remats=["none", "projections", "full"],
    )  # fmt: skip
    tried = []

    def compile_for(case, devices, topology, cache):
        batch = case.data.batch_size
        tried.append((batch, case.model.remat))
        size = {"full": 10, "projections": 30, "none": 60}[case.model.remat]
        return report(batch, case.model.remat, 1, size * batch // 8)

    search.run(config, [None] * 4, values, compile_for)
    small = [(8, "full"), (8, "projections"), (8, "none")]
    assert tried == [*small, (16, "full"), (16, "projections"), (16, "none")]
    tried.clear()
    values.batches = ["4", "8", "16"]
    search.run(config, [None] * 4, values, compile_for)
    # "none" does not fit at 16, so 32 and 64 do not try it.
    assert tried[:3] == [(16, "full"), (16, "projections"), (16, "none")]
    assert tried[3:] == [(32, "full"), (32, "projections"), (64, "full")]


def test_an_estimate_of_automatic_remat_is_of_what_training_compiles():
    def compile_for(case, devices, topology, cache):
        remat = case.model.remat
        if remat == LADDER[0]:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")
        return report(8, remat, 1, 90 if remat == "full" else 99)

    config = configs.base_config()
    config.model.remat = "auto"
    assert search.fitting(config, [], "", "", compile_for)["remat"] == "full"
    with pytest.raises(ValueError, match="no policy of"):
        search.fitting(config, [], "", "", lambda *_: report(8, "", 1, 99))
