"""HBM traffic of compiled programs' texts, worked out by hand."""

import pytest

from cromss_jax.costs import traffic


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        # 16 channels and 16 images, the innermost, become 128 and 16.
        ("bf16[16,256,256,16]{3,0,2,1:T(8,128)(2,1)}", 256 * 256 * 16 * 128 * 2),
        # Batch innermost: 16 become 128, and 9 classes 16.
        ("f32[16,64,64,9]{0,3,2,1:T(8,128)}", 64 * 64 * 16 * 128 * 4),
        ("bf16[16,64,64,64]{3,0,2,1:T(8,128)(2,1)S(1)}", 0),  # on the chip
        ("(f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)S(6)})", 8 * 128 * 4),
        ("f32[100]{0:T(128)}", 400),  # vectors' tiles are none of theirs
        ("pred[8,128]{1,0:T(8,128)(4,1)}", 8 * 128),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert traffic.hbm_bytes(shape) == size


# f32[8,128] takes 4,096 bytes. A loop of 30 rounds that reads a slice of an array, and one of
# unknown rounds that updates a row in place.
HLO = """\
HloModule jit_step, is_scheduled=true

%fused_slice (p.0: f32[64,128], p.1: s32[]) -> f32[8,128] {
  %p.0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %cut = f32[8,128]{1,0:T(8,128)} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={8,128}
}

%known_body (t: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %t = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  %x = f32[64,128]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %read = f32[8,128]{1,0:T(8,128)} fusion(%x, %i), kind=kLoop, calls=%fused_slice
  ROOT %next = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) tuple(%i, %x)
}

%known_condition (t: (s32[], f32[64,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(30)
  ROOT %less = pred[]{:T(512)S(6)} fusion(%t, %limit), kind=kLoop, calls=%compare
}

%open_body (t: (s32[], f32[64,128])) -> (s32[], f32[64,128]) {
  %t = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  %x = f32[64,128]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %new = f32[8,128]{1,0:T(8,128)S(1)} constant({...})
  %y = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%x, %new, %i)
  ROOT %next = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) tuple(%i, %y)
}

%open_condition (t: (s32[], f32[64,128])) -> pred[] {
  %limit = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %less = pred[]{:T(512)S(6)} fusion(%t, %limit), kind=kLoop, calls=%compare
}

ENTRY %main_spmd (p: f32[64,128]) -> f32[64,128] {
  %p = f32[64,128]{1,0:T(8,128)} parameter(0), metadata={op_name="x"}
  %start = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]) copy-start(%p)
  %near = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%start)
  %sum = f32[64,128]{1,0:T(8,128)} fusion(%near, %p), kind=kLoop, calls=%add, \
metadata={op_name="jit(step)/transpose(jvp(encoder))/add"}
  %after = f32[64,128]{1,0:T(8,128)} negate(%sum)
  %w.0 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) tuple(%zero, %after)
  %w.1 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) while(%w.0), condition=%known_condition, \
body=%known_body, metadata={op_name="jit(step)/losses/selection/while"}
  %w.2 = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}) while(%w.1), condition=%open_condition, \
body=%open_body, metadata={op_name="jit(step)/preprocessing/while"}
  ROOT %out = f32[64,128]{1,0:T(8,128)} get-tuple-element(%w.2), index=1
}
"""


def test_traffic_by_part():
    parts = ("preprocessing", "encoder", "losses", "selection")
    whole = 8 * 4096
    counts = traffic.count(HLO, parts, unknown_rounds=3.2)
    assert counts.hbm_bytes == {
        # The update is written; it comes from the chip.
        "preprocessing": pytest.approx(3.2 * 4096),
        # Written and one operand read, then read and written by what has no name of its own.
        "encoder": 2 * whole + 2 * whole,
        "losses": 0,
        # A slice read and written in each round.
        "selection": 30 * 2 * 4096,
        "others": whole,  # the copy to the chip
    }
    assert [loop.rounds for loop in counts.loops] == [30, None]
    assert counts.loops[1].name == "jit(step)/preprocessing/while"


def test_branches_are_refused():
    line = "  %either = f32[8] conditional(%p, %p, %p), branch_computations={%a, %b}\n"
    with pytest.raises(traffic.UnreadableProgram, match="a branch, either"):
        traffic.count(HLO.replace("  ROOT %out", line + "  ROOT %out"), unknown_rounds=1)


def test_updates_in_place_and_what_others_send():
    # Two arrays of 32,768 bytes of which a fusion updates eight rows each, 4,096 bytes that it
    # reads first; then one of 4,096 bytes gathered from two devices into one of 8,192.
    hlo = """\
%fused (p.0: f32[64,128], p.1: f32[64,128], p.2: f32[8,128], p.3: s32[]) -> (f32[], f32[]) {
  %p.0 = f32[64,128]{1,0:T(8,128)} parameter(0)
  %p.1 = f32[64,128]{1,0:T(8,128)} parameter(1)
  %p.2 = f32[8,128]{1,0:T(8,128)} parameter(2)
  %p.3 = s32[]{:T(128)S(6)} parameter(3)
  %one = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%p.0, %p.2, %p.3)
  %two = f32[64,128]{1,0:T(8,128)} dynamic-update-slice(%p.1, %p.2, %p.3)
  ROOT %both = (f32[64,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) tuple(%one, %two)
}

ENTRY %main (a: f32[64,128], b: f32[64,128], c: f32[8,128], i: s32[]) -> f32[16,128] {
  %a = f32[64,128]{1,0:T(8,128)} parameter(0)
  %b = f32[64,128]{1,0:T(8,128)} parameter(1)
  %c = f32[8,128]{1,0:T(8,128)} parameter(2)
  %i = s32[]{:T(128)S(6)} parameter(3)
  %new = (f32[64,128]{1,0:T(8,128)}, f32[64,128]{1,0:T(8,128)}) fusion(%a, %b, %c, %i), \
kind=kLoop, calls=%fused
  %start = (f32[8,128]{1,0:T(8,128)}, f32[16,128]{1,0:T(8,128)}) all-gather-start(%c)
  ROOT %all = f32[16,128]{1,0:T(8,128)} all-gather-done(%start)
}
"""
    expected = 2 * 4096 + 4096 + (4096 + 8192)
    assert traffic.count(hlo, unknown_rounds=1).hbm_bytes == {"others": expected}


def test_a_text_of_another_form_is_refused():
    unknown = HLO.replace("  %near = ", "  near: ")
    with pytest.raises(traffic.UnreadableProgram, match="near.*install libtpu"):
        traffic.count(unknown, unknown_rounds=1)


# As XLA prints for a GPU, shortened: products of cuBLAS and convolutions of cuDNN with their
# workspaces, a loop, an all-reduce, another library's call. f32[64,64] takes 16,384 bytes.
GPU_HLO = """\
HloModule jit_step, is_scheduled=true

%fused_dot (p.0: f32[64,64], p.1: f32[64,64]) -> f32[64,64] {
  %p.0 = f32[64,64]{1,0} parameter(0)
  %p.1 = f32[64,64]{1,0} parameter(1)
  ROOT %dot.1 = f32[64,64]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (t: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %t = (s32[], f32[64,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[64,64]{1,0} get-tuple-element(%t), index=1
  %y = f32[64,64]{1,0} fusion(%x, %x), kind=kCustom, calls=%fused_dot
  ROOT %next = (s32[], f32[64,64]{1,0}) tuple(%i, %y)
}

ENTRY %main (a: bf16[5,64,128], b: bf16[5,128,32]) -> f32[64,64] {
  %a = bf16[5,64,128]{2,1,0} parameter(0)
  %b = bf16[5,128,32]{2,1,0} parameter(1)
  %product = (bf16[5,64,32]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/losses/dot_general"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  %image = bf16[4,33,33,16]{3,2,1,0} parameter(2)
  %filter = bf16[32,3,3,16]{3,2,1,0} parameter(3)
  %forward = (bf16[4,16,16,32]{3,2,1,0}, u8[0]{0}) custom-call(%image, %filter), \
window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/encoder/conv"}
  %slope = bf16[4,16,16,32]{3,2,1,0} get-tuple-element(%forward), index=0
  %to_image = (bf16[4,33,33,16]{3,2,1,0}, u8[0]{0}) custom-call(%slope, %filter), \
window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardInput"
  %to_filter = (bf16[32,3,3,16]{3,2,1,0}, u8[9]{0}) custom-call(%image, %slope), \
window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, \
custom_call_target="__cudnn$convBackwardFilter"
  %bias = f32[32]{0} parameter(4)
  %biased = (bf16[4,16,16,32]{3,2,1,0}, u8[7]{0}) custom-call(%image, %filter, %bias), \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBiasActivationForward"
  %x = f32[64,64]{1,0} parameter(5)
  %triangle = (f32[64,64]{1,0}, s32[1]{0}) custom-call(%x), custom_call_target="cusolver_potrf_ffi"
  %begun = f32[64,64]{1,0} all-reduce-start(%x), to_apply=%sum
  %reduced = f32[64,64]{1,0} all-reduce-done(%begun)
  %zero = s32[] constant(0)
  %w.0 = (s32[], f32[64,64]{1,0}) tuple(%zero, %reduced)
  %w.1 = (s32[], f32[64,64]{1,0}) while(%w.0), condition=%known, body=%body, \
backend_config={"known_trip_count":{"n":"15"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %out = f32[64,64]{1,0} get-tuple-element(%w.1), index=1
}
"""


def test_a_program_for_gpus():
    counts = traffic.count(GPU_HLO, ("encoder", "losses"), unknown_rounds=1, is_gpu=True)
    square = 64 * 64 * 4
    image, filters, slope = (2 * n for n in (4 * 33 * 33 * 16, 32 * 3 * 3 * 16, 4 * 16 * 16 * 32))
    assert counts.hbm_bytes == {
        "losses": 2 * 5 * (64 * 128 + 128 * 32 + 64 * 32),
        # What has no name belongs to the part of its first operand: the input's gradient.
        "encoder": 2 * (image + filters + slope),
        "others": 2 * (image + filters + slope) + 32 * 4 + (2 + 2 + 15 * 3) * square + 4,
    }
    assert counts.launches == {"losses": 1, "encoder": 2, "others": 4 + 15}
    convolution = 2 * (3 * 3 * 16 * 32) * (4 * 16 * 16)
    products = 2 * 5 * 64 * 128 * 32 + 15 * 2 * 64**3
    assert counts.flops == pytest.approx(4 * convolution + products, rel=1e-12)
    assert counts.loops == [traffic.Loop("w.1", 15)]


def test_custom_calls_are_free_on_tpus():
    tpu = traffic.count(GPU_HLO, unknown_rounds=1)
    assert (tpu.launches, tpu.flops) == ({"others": 16}, 0)


def test_a_text_of_another_form_names_the_plugin():
    unknown = GPU_HLO.replace("dim_labels=b01f_o01i->b01f", "")
    with pytest.raises(traffic.UnreadableProgram, match="install jax-cuda12-plugin"):
        traffic.count(unknown, unknown_rounds=1, is_gpu=True)


def test_a_fusion_that_sums_two_arrays_at_once_and_writes_a_third():
    program = """\
%fused (p.0: bf16[64,8]) -> ((f32[8], f32[8]), pred[64,8]) {
  %p.0 = bf16[64,8]{1,0} parameter(0)
  %wide = f32[64,8]{1,0} convert(%p.0)
  %zero = f32[] constant(0)
  %sums = (f32[8]{0}, f32[8]{0}) reduce(%wide, %wide, %zero, %zero), dimensions={0}, to_apply=%add
  %mask = pred[64,8]{1,0} compare(%p.0, %p.0), direction=GT
  ROOT %all = ((f32[8]{0}, f32[8]{0}), pred[64,8]{1,0}) tuple(%sums, %mask)
}

ENTRY %main (x: bf16[64,8]) -> ((f32[8], f32[8]), pred[64,8]) {
  %x = bf16[64,8]{1,0} parameter(0)
  ROOT %f = ((f32[8]{0}, f32[8]{0}), pred[64,8]{1,0}) fusion(%x), kind=kInput, calls=%fused
}
"""
    counts = traffic.count(program, unknown_rounds=1, is_gpu=True)
    assert counts.hbm_bytes == {"others": 64 * 8 * 2 + 2 * 8 * 4 + 64 * 8}
    assert counts.launches == {"others": 1}
