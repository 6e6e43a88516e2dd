import collectives
import pytest

# In the form of the TPU compiler's output, shortened.
HLO = """\
HloModule jit_train_step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.9 = f32[]{:T(128)} add(%a, %b)
}

%fused_computation.7 (p: bf16[256,16]) -> (bf16[256,16], bf16[256,256]) {
  %p.1 = bf16[256,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[256,256]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=5, dimensions={1}
  ROOT %custom-call.1 = (bf16[256,16]{1,0}, bf16[256,256]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (p: bf16[256,16]) -> bf16[256,256] {
  %p.2 = bf16[256,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[256,256]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=5, dimensions={1}
}

%fused_computation.8 (p: bf16[256,16]) -> bf16[256,256] {
  %p.3 = bf16[256,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.3 = bf16[256,256]{1,0:T(8,128)(2,1)} all-gather(%p.3), channel_id=5, dimensions={1}
  ROOT %custom-call.3 = bf16[256,256]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.4 (input: f32[64,8]) -> f32[16,8] {
  %input.1 = f32[64,8]{1,0} parameter(0)
  %all-reduce.5 = f32[64,8]{1,0} all-reduce(%input.1), channel_id=1, to_apply=%add.1
  ROOT %dynamic-slice.1 = f32[16,8]{1,0} dynamic-slice(%all-reduce.5), dynamic_slice_sizes={16,8}
}

%body.1 (t: (s32[], bf16[256,16])) -> (s32[], bf16[256,16]) {
  %t.1 = (s32[]{:T(128)}, bf16[256,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.1 = bf16[256,16]{1,0} get-tuple-element(%t.1), index=1
  %fusion.1 = (bf16[256,16]{1,0}, bf16[256,256]{1,0}) fusion(%gte.1), kind=kCustom, calls=%fused_computation.7
  %fusion.2 = bf16[256,256]{1,0} fusion(%gte.1), kind=kCustom, calls=%async_collective_fusion.2
  %fusion.3 = bf16[256,256]{1,0} fusion(%gte.1), kind=kCustom, calls=%fused_computation.8
  %fusion.4 = f32[16,8]{1,0} fusion(%gte.1), kind=kCustom, calls=%all-reduce-scatter.4
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[256,16]{1,0}) tuple(%gte.1)
}

%cond.1 (t: (s32[], bf16[256,16])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(30)
  %t.2 = (s32[]{:T(128)}, bf16[256,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.2 = s32[]{:T(128)} get-tuple-element(%t.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%gte.2, %constant.3), direction=LT
}

ENTRY %main.1 (x: (s32[], bf16[256,16])) -> (s32[], bf16[256,16]) {
  %x.1 = (s32[]{:T(128)}, bf16[256,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %all-reduce.6 = (f32[]{:T(128)}, f32[10]{0:T(256)}) all-reduce(%x.1, %x.1), channel_id=2, to_apply=%add.1
  ROOT %while.1 = (s32[]{:T(128)}, bf16[256,16]{1,0}) while(%x.1), condition=%cond.1, body=%body.1
}
"""  # noqa: E501


def test_counts_loops_and_each_asynchronous_collective_once():
    gather, size = 30, 256 * 256 * 2
    assert collectives.count(HLO) == {
        "all-reduce": collectives.Traffic(1, 4 + 40, 0),
        "all-gather": collectives.Traffic(gather, gather * size, gather * size),
        "reduce-scatter": collectives.Traffic(30, 30 * 16 * 8 * 4, 0),
    }


def test_a_loop_without_a_known_bound_is_an_error():
    with pytest.raises(ValueError, match="trip count.*cond.1"):
        collectives.count(HLO.replace("direction=LT", "direction=NE"))


def test_text_that_is_not_a_program_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives.count("nothing")
