"""Reading listings and the static estimate, on listings short enough to count by hand."""

from __future__ import annotations

import pytest

from kvferry.kernels.machine_code import (
    Instruction,
    amd_opcodes,
    compile_kernels,
    loop_passes,
    main_loop,
    sass_instructions,
    tensor_core,
)
from kvferry.kernels.roofline import ASSUMED_BANDWIDTH_SHARE, AssumedDevice, count_units, static_bound, unit_clocks

LISTING = """
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR6][R2.64] ;
        /*0020*/                   LDSM.16.M88.4 R8, [R5] ;
        /*0030*/                   LOP3.LUT R8, R8, 0x3000300, R9, 0xea, !PT ;
        /*0040*/              @!P0 SHF.R.U32.HI R9, RZ, 0x4, R8 ;
        /*0050*/                   HFMA2 R8, R8, R10, R11 ;
        /*0060*/                   HMMA.16816.F32 R12, R8, R16, R12 ;
        /*0070*/                   HMMA.16816.F32 R12, R9, R16, R12 ;
        /*0080*/                   MUFU.EX2 R13, R13 ;
        /*0090*/                   IMAD.SHL.U32 R14, R14, 0x10, RZ ;
        /*00a0*/              @!P1 BRA `(.L_x_1) ;
.L_x_2:
        /*00b0*/                   FADD R1, R1, R2 ;
        /*00c0*/               @P2 BRA `(.L_x_2) ;
        /*00d0*/                   EXIT ;
"""
DEVICE = AssumedDevice(name="round numbers", multiprocessors=100, clock_ghz=1.0, bandwidth_tb_s=1.0)


def loop() -> list[str]:
    return [instruction.opcode for instruction in main_loop(sass_instructions(LISTING))]


def test_instructions_keep_address_opcode_and_where_a_branch_goes() -> None:
    code = sass_instructions(LISTING)
    assert len(code) == 14
    assert code[4] == (0x40, "SHF.R.U32.HI", None)
    assert [instruction.target for instruction in code if instruction.opcode == "BRA"] == [0x10, 0xB0]


def test_the_main_loop_is_the_one_on_tensor_cores() -> None:
    assert len(loop()) == 10
    assert tensor_core(loop()) == 2
    assert main_loop(sass_instructions("/*0000*/ EXIT ;")) == []


def test_a_part_that_a_branch_skips_counts_once_in_several_passes() -> None:
    # The loop's third instruction goes to its sixth; its last but one leaves the loop.
    opcodes = ["LDG", "ISETP", "BRA", "MUFU", "MUFU", "HMMA", "BRA", "BRA"]
    targets = {2: 5, 6: 99, 7: 0}
    skipping = [
        Instruction(16 * i, opcode, 16 * targets[i] if i in targets else None) for i, opcode in enumerate(opcodes)
    ]
    common = ["LDG", "ISETP", "BRA", "HMMA", "BRA", "BRA"]
    assert loop_passes(skipping, 1) == [*common, "MUFU", "MUFU"]
    assert loop_passes(skipping, 4) == [*common * 4, "MUFU", "MUFU"]


def test_instructions_are_counted_by_unit() -> None:
    assert count_units(loop()) == {
        "issue": 10,
        "memory": 2,
        "integer": 2,
        "half": 1,
        "tensor": 2,
        "special": 1,
        "fma": 1,
    }


def test_clocks_are_counts_over_the_assumed_rates() -> None:
    clocks = unit_clocks(loop(), DEVICE, warps=2)
    assert clocks == {"issue": 5, "memory": 4, "integer": 2, "half": 0.5, "tensor": 8, "special": 4, "fma": 0.5}


@pytest.mark.parametrize(("num_bytes", "bound"), [(40, 0.5), (80, 1.0), (800, 1.0)])
def test_the_bound_sets_memory_against_the_slowest_unit(num_bytes: int, bound: float) -> None:
    # 1 TB/s for 100 multiprocessors at 1 GHz: 10 bytes a clock, and the tensor cores take 8 clocks.
    delivered = num_bytes * ASSUMED_BANDWIDTH_SHARE
    assert static_bound(loop(), DEVICE, warps=2, num_bytes=delivered) == pytest.approx(bound)


def test_amd_opcodes_leave_out_directives_and_labels() -> None:
    assembly = "\t.globl k\nk:\n.LBB0_1:\n\tv_mfma_f32_16x16x16_f16 a[0:3], v1, v2\n\ts_cbranch_scc1 .LBB0_1\n; v_x\n"
    assert amd_opcodes(assembly) == ["v_mfma_f32_16x16x16_f16", "s_cbranch_scc1"]
    assert tensor_core(amd_opcodes(assembly)) == 1


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="sm_35"):
        compile_kernels(["sm_35"])
