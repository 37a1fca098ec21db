"""Steps compiled for pods: what is read of the program, what is refused, and a small one where the compiler is."""

import importlib.util

import pytest

from benchmarks import pod

TEXT = """
HloModule jit_f, is_scheduled=true

%body (state: (s32[], f32[64,512])) -> (s32[], f32[64,512]) {
  %state = (s32[], f32[64,512]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %x = f32[64,512]{1,0} get-tuple-element(%state), index=1
  %sum = f32[64,512]{1,0} all-reduce(%x), to_apply=%add
  ROOT %next = (s32[], f32[64,512]{1,0}) tuple(%n, %sum)
}

%all-reduce-scatter (y: bf16[64,512]) -> bf16[16,512] {
  %y = bf16[64,512]{1,0} parameter(0)
  %whole = bf16[64,512]{1,0} all-reduce(%y), to_apply=%add
  ROOT %part = bf16[16,512]{1,0} dynamic-slice(%whole), dynamic_slice_sizes={16,512}
}

ENTRY %main (p: (s32[], f32[64,512]), q: bf16[64,512], r: bf16[16,512]) -> f32[64,512] {
  %p = (s32[], f32[64,512]{1,0}) parameter(0)
  %q = bf16[64,512]{1,0} parameter(1)
  %r = bf16[16,512]{1,0} parameter(2)
  %all-gather-start = (bf16[16,512]{1,0}, bf16[64,512]{1,0}) all-gather-start(%r), dimensions={0}
  %all-gather-done = bf16[64,512]{1,0} all-gather-done(%all-gather-start)
  %scatter = bf16[16,512]{1,0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter
  %while = (s32[], f32[64,512]{1,0}) while(%p), condition=%condition, body=%body
  ROOT %result = f32[64,512]{1,0} get-tuple-element(%while), index=1
}
"""


def test_collectives_by_kind():
    whole = 2 * 64 * 512
    assert pod.collectives(TEXT) == [
        {"kind": "all-gather", "count": 1, "bytes": whole, "largest": whole, "in_loops": 0},
        {"kind": "all-reduce", "count": 1, "bytes": 2 * whole, "largest": 2 * whole, "in_loops": 1},
        {"kind": "reduce-scatter", "count": 1, "bytes": whole, "largest": whole, "in_loops": 0},
    ]


def moving(kind, largest, in_loops=0):
    made = {"kind": kind, "count": 1, "bytes": largest, "largest": largest, "in_loops": in_loops}
    return {"program": "a step", "mesh": [2, 4], "sizes": [64, 16, 4096], "collectives": [made]}


def test_what_is_refused():
    """Hidden states may be gathered, and a chip's part of the gradient summed, 1024 × 16; not all of the weight, nor
    the scores, nor anything in a loop."""
    pod.check(moving("all-gather", 2 * 64 * 16))
    pod.check(moving("all-reduce", 2 * 1024 * 16))
    for row in (moving("all-gather", 2 * 4096 * 16), moving("all-reduce", 4, 1), moving("all-to-all", 2 * 64 * 4096)):
        with pytest.raises(SystemExit, match="a step on"):
            pod.check(row)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs XLA's compiler for TPUs, jax[tpu]")
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2"])
def test_a_small_pod(topology):
    of_devices = pod.devices(topology)
    for name in ("loss and gradients", "top 50"):
        row = pod.row_of(of_devices, (2, 4), name, (256, 128, 4096))
        pod.check(row)
        assert row["arguments"] >= 2 * (256 // 4 + 4096 // 4) * 128  # top 50 takes no labels
