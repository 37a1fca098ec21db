"""Counting a compiled program: kernels and traffic of programs whose traffic is known by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo, programs

SIMPLE = """
HloModule jit_f, is_scheduled=true

%fused_computation (param_0: f32[1024,256], param_1: f32[1024,1]) -> bf16[1024,256] {
  %param_0 = f32[1024,256]{1,0} parameter(0)
  %param_1 = f32[1024,1]{1,0} parameter(1)
  %broadcast = f32[1024,256]{1,0} broadcast(%param_1), dimensions={0,1}
  %subtract = f32[1024,256]{1,0} subtract(%param_0, %broadcast)
  ROOT %convert = bf16[1024,256]{1,0} convert(%subtract)
}

ENTRY %main (p0: f32[1024,256], p1: f32[1024,1]) -> (bf16[1024,256]) {
  %p0 = f32[1024,256]{1,0} parameter(0)
  %p1 = f32[1024,1]{1,0} parameter(1)
  %fusion = bf16[1024,256]{1,0} fusion(%p0, %p1), kind=kLoop, calls=%fused_computation
  ROOT %tuple = (bf16[1024,256]{1,0}) tuple(%fusion)
}
"""

SLICES = """
HloModule jit_g, is_scheduled=true

%update (buffer: f32[64,512], row: f32[1,512], i: s32[]) -> f32[64,512] {
  %buffer = f32[64,512]{1,0} parameter(0)
  %row = f32[1,512]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dynamic-update-slice = f32[64,512]{1,0} dynamic-update-slice(%buffer, %row, %i, %zero)
}

%take (table: f32[64,512], j: s32[]) -> f32[1,512] {
  %table = f32[64,512]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %none = s32[] constant(0)
  %dynamic-slice = f32[1,512]{1,0} dynamic-slice(%table, %j, %none), dynamic_slice_sizes={1,512}
  ROOT %negate = f32[1,512]{1,0} negate(%dynamic-slice)
}

%body (state: (s32[], f32[64,512], f32[64,512])) -> (s32[], f32[64,512], f32[64,512]) {
  %state = (s32[], f32[64,512]{1,0}, f32[64,512]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %out = f32[64,512]{1,0} get-tuple-element(%state), index=1
  %in = f32[64,512]{1,0} get-tuple-element(%state), index=2
  %one = f32[1,512]{1,0} fusion(%in, %n), kind=kLoop, calls=%take
  %new = f32[64,512]{1,0} fusion(%out, %one, %n), kind=kLoop, calls=%update
  ROOT %next = (s32[], f32[64,512]{1,0}, f32[64,512]{1,0}) tuple(%n, %new, %in)
}

%condition (state: (s32[], f32[64,512], f32[64,512])) -> pred[] {
  %state.1 = (s32[], f32[64,512]{1,0}, f32[64,512]{1,0}) parameter(0)
  %m = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(64)
  ROOT %less = pred[] compare(%m, %limit), direction=LT
}

ENTRY %main (p: (s32[], f32[64,512], f32[64,512])) -> f32[64,512] {
  %p = (s32[], f32[64,512]{1,0}, f32[64,512]{1,0}) parameter(0)
  %while = (s32[], f32[64,512]{1,0}, f32[64,512]{1,0}) while(%p), condition=%condition, body=%body
  %all-reduce-start = f32[64,512]{1,0} all-reduce-start(%while), replica_groups={}
  %all-reduce-done = f32[64,512]{1,0} all-reduce-done(%all-reduce-start)
  ROOT %result = f32[64,512]{1,0} get-tuple-element(%while), index=1
}
"""


KERNEL = """
ENTRY %main (p0: f32[1024,256]) -> f32[1024,1] {
  %p0 = f32[1024,256]{1,0} parameter(0)
  ROOT %own = f32[1024,1]{1,0} custom-call(%p0), backend_config={"cost_estimate":{"bytes_accessed":"2105344"}}
}
"""


def test_a_kernel_counts_by_its_own_estimate():
    assert hlo.count(hlo.parse(KERNEL)) == (1, 2 * 2**20 + 2**13)


COPIES = """
ENTRY %main (p0: f32[1024,256]) -> f32[256,256] {
  %p0 = f32[1024,256]{1,0:T(8,128)} parameter(0)
  %copy-start = (f32[1024,256]{1,0:T(8,128)S(1)}, f32[1024,256]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p0)
  %copy-done = f32[1024,256]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[1024,256]{1,0:T(8,128)}), f32[256,256]{1,0:T(8,128)}, s32[]{:S(2)}) slice-start(%p0)
  ROOT %slice-done = f32[256,256]{1,0:T(8,128)} slice-done(%slice-start)
}
"""


NESTED = """
%inner (table: f32[64,512], j: s32[]) -> f32[1,512] {
  %table = f32[64,512]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %none = s32[] constant(0)
  ROOT %dynamic-slice = f32[1,512]{1,0} dynamic-slice(%table, %j, %none), dynamic_slice_sizes={1,512}
}

%outer (k: s32[], whole: f32[64,512]) -> f32[1,512] {
  %k = s32[] parameter(0)
  %whole = f32[64,512]{1,0} parameter(1)
  %row = f32[1,512]{1,0} fusion(%whole, %k), kind=kLoop, calls=%inner
  ROOT %exponential = f32[1,512]{1,0} exponential(%row)
}

ENTRY %main (n: s32[], p: f32[64,512]) -> f32[1,512] {
  %n = s32[] parameter(0)
  %p = f32[64,512]{1,0} parameter(1)
  ROOT %result = f32[1,512]{1,0} fusion(%n, %p), kind=kOutput, calls=%outer
}
"""


def test_a_slice_within_a_fusion_of_a_fusion():
    """One row is read and written, and a number says which."""
    assert hlo.count(hlo.parse(NESTED)) == (1, 2 * 2048 + 4)


def test_copies_count_where_they_touch_memory():
    """1 MiB is read onto the chip, and a quarter of it is read and written."""
    assert hlo.count(hlo.parse(COPIES)) == (2, 2**20 + 2 * 2**18)


def test_sizes():
    assert hlo.size("f32[1024,256]{1,0}") == 2**20
    assert hlo.size("(bf16[8]{0}, pred[3]{0}, s32[])") == 16 + 3 + 4
    assert hlo.size("f8e4m3fn[10]{0}") == 10
    assert hlo.size("bf16[1024]{0:T(1024)(128)(2,1)S(1)}") == 0  # on the chip


def test_one_kernel():
    """It reads f32[1024, 256] and f32[1024, 1], and writes bf16[1024, 256]."""
    assert hlo.count(hlo.parse(SIMPLE)) == (1, 2**20 + 2**12 + 2**19)


def test_a_loop_over_slices():
    """64 times: a row of 2 KiB and an index read, a row written; a row and an index read, a row written in place."""
    row, index = 4 * 512, 4
    loop = 64 * ((row + index + row) + (row + index + row))
    kernels, traffic = hlo.count(hlo.parse(SLICES))
    assert kernels == 2 * 64 + 1
    assert traffic - loop == hlo.size("f32[64,512]") + hlo.size("(s32[], f32[64,512], f32[64,512])")  # the all-reduce
    assert hlo.collectives(SLICES) == {"all-reduce": 1}


GATHER = """
HloModule jit_h, is_scheduled=true

%of_labels (scores: f32[1024,256], labels: s32[1024,2]) -> f32[1024] {
  %scores = f32[1024,256]{1,0} parameter(0)
  %labels = s32[1024,2]{1,0} parameter(1)
  %least = f32[1024,256]{1,0} constant(-1)
  %above = f32[1024,256]{1,0} maximum(%scores, %least)
  ROOT %gather = f32[1024]{0} gather(%above, %labels), offset_dims={}, slice_sizes={1,1}
}

ENTRY %main (p0: f32[1024,256], p1: s32[1024,2]) -> f32[1024] {
  %p0 = f32[1024,256]{1,0} parameter(0)
  %p1 = s32[1024,2]{1,0} parameter(1)
  ROOT %fusion = f32[1024]{0} fusion(%p0, %p1), kind=kLoop, calls=%of_labels
}
"""


def test_a_gather_reads_what_it_takes():
    """1,024 numbers of the scores, two places for each, and 1,024 numbers written."""
    assert hlo.count(hlo.parse(GATHER)) == (1, 4 * (1024 + 2048 + 1024))


def test_of_this_machine():
    """Compiled here, whatever the kernels are: a sum reads its argument once, and a matrix product all three arrays."""
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    total = hlo.read(jax.jit(jnp.sum).lower(x).compile())
    assert total.least <= total.traffic < 1.1 * total.least
    product = hlo.read(jax.jit(jnp.matmul).lower(x, x).compile())
    assert product.traffic == product.least == 3 * 2**20


@pytest.mark.full  # It is about the benchmarks, not the package.
def test_every_case_has_the_results_of_its_peer():
    for case, mode, shape, dtype in programs.cells():
        if case.peer is not None and shape == programs.SHAPES[0]:
            z, more = jax.ShapeDtypeStruct(shape, dtype), case.more(shape, jnp.dtype(dtype))
            made = [programs.in_mode(f, mode, z, more) for f in (case.ours, case.peer)]
            ours, theirs = (jax.eval_shape(f, *given) for f, given in made)
            assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs), (case.name, mode)


@pytest.mark.full  # It is about the benchmarks, not the package.
def test_every_head_is_a_program():
    for name, (f, given) in (programs.other_heads() | programs.values("v5e")).items():
        results = jax.tree.leaves(jax.eval_shape(f, *given))
        assert results, name
        assert max(a.size for a in results) < programs.TOKENS * programs.CLASSES, name  # no scores


def test_without_the_compiler():
    with pytest.raises(SystemExit) as stopped:
        programs.device("v5e")
    assert "pip install 'jsoftmax[programs-tpu]'" in str(stopped.value)
