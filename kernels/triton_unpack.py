"""Packed words to numbers on a GPU: what every Triton kernel that reads a page is built from.

A plane of a token's codes is D/8 words of 16 bits (page.py). *Field* f of word j, its bits 2 f and 2 f + 1, belongs to
channel `(f % 4) * D/4 + 2 j + f // 4`. One field of a tile of words is a tile of fp16 numbers that a tensor core takes
as it is, and codes never become integers: `word << s & 0x0300 | 0x3C00` is the fp16 number 1 + code/4, which the folded
scale and zero point turn into the value by one fused multiply-add. Further planes cost another one each: 4 * high + low
is exact in fp16 (`scales.py`: u = F + code/4). Byte scales become fp16 numbers in the same way, by shifts and masks.

`ASM` picks inline PTX: one shift and one LOP3 for two codes. Without it the same bits come from plain operations, for
Triton's interpreter and for HIP.
"""

# Triton is untyped, and the annotations of a kernel are Triton's, not Python's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def unpack_asm(field: int, low: bool = False) -> str:
    """PTX that turns two 16-bit words into two fp16 numbers, 1 + code/4 or, if `low`, 4 + code/4, for one field."""
    masks = "0x00C000C0, 0x44004400" if low else "0x03000300, 0x3C003C00"
    logic = "lop3.b32 $0, {}, " + masks + ", 0xEA;"  # 0xEA: (a & b) | c
    shift = (6 if low else 8) - 2 * field  # moves the field to bits 6 and 7 or 8 and 9
    if shift == 0:
        return logic.format("$1")
    move = f"shl.b32 t, $1, {shift};" if shift > 0 else f"shr.u32 t, $1, {-shift};"
    return "{ .reg .b32 t; " + move + " " + logic.format("t") + " }"


@triton.constexpr_function
def high_byte_asm() -> str:
    """PTX that moves the high bytes of two 16-bit words down. What is above them then is undefined."""
    return "shr.u32 $0, $1, 8;"


@triton.constexpr_function
def move_down_asm() -> str:
    """PTX that shifts two 16-bit words down by $2, given twice; what comes in from above is undefined."""
    # "wrap" looks at five bits of the shift, that is at the lower one.
    return "shf.r.wrap.b32 $0, $1, $1, $2;"


@triton.jit
def move_down(words, shift, ASM: tl.constexpr):
    """int16 words >> shift, which is the same for words that share a register; upper bits are undefined."""
    shift = shift.to(tl.int16).broadcast_to(words.shape)
    if ASM:
        return tl.inline_asm_elementwise(
            move_down_asm(), "=r,r,r", [words, shift], dtype=tl.int16, is_pure=True, pack=2
        )
    return words >> shift


@triton.jit
def unpack(words, field: tl.constexpr, ASM: tl.constexpr):
    """int16 words -> fp16 1 + code/4 of one field."""
    if ASM:
        return tl.inline_asm_elementwise(unpack_asm(field), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    moved = words << (8 - 2 * field) if field < 4 else words >> (2 * field - 8)
    return ((moved & 0x0300) | 0x3C00).to(tl.float16, bitcast=True)


@triton.jit
def unpack_low(words, field: tl.constexpr, ASM: tl.constexpr):
    """int16 words -> fp16 4 + code/4 of one field: an odd field shares its shift with the next one's `unpack`."""
    if ASM:
        return tl.inline_asm_elementwise(
            unpack_asm(field, True), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    moved = words << (6 - 2 * field) if field < 3 else words >> (2 * field - 6)
    return ((moved & 0x00C0) | 0x4400).to(tl.float16, bitcast=True)


@triton.jit
def unpack_planes(planes, field: tl.constexpr, LOW: tl.constexpr, ASM: tl.constexpr):
    """Words of every plane, low bits first -> fp16 u = F + code/4 or, if LOW, u + 3 F of one field."""
    PLANES: tl.constexpr = len(planes)
    unit = unpack_low(planes[PLANES - 1], field, ASM) if LOW else unpack(planes[PLANES - 1], field, ASM)
    for plane in tl.static_range(1, PLANES):
        words = planes[PLANES - 1 - plane]
        unit = unit * 4.0 + (unpack_low(words, field, ASM) if LOW else unpack(words, field, ASM))
    return unit


@triton.jit
def fused_multiply_add(unit, scale, zero, ASM: tl.constexpr):
    """fp16 scale * unit + zero with one rounding; scale and zero are broadcast to unit."""
    scale = scale.broadcast_to(unit.shape)
    zero = zero.broadcast_to(unit.shape)
    if ASM:
        return tl.fma(unit, scale, zero)
    # The interpreter's fma rounds, and may overflow, between multiplication and addition.
    return (unit.to(tl.float32) * scale.to(tl.float32) + zero.to(tl.float32)).to(tl.float16)


@triton.jit
def load_words(pointers, is_high, SPLIT: tl.constexpr, ASM: tl.constexpr):
    """int16 words; with SPLIT, the high byte moved down where `is_high` holds.

    Two masked loads and not one and a select: only loads and pure functions of loads keep the path from memory to a
    tensor-core operand free of shared memory for unpacked values.
    """
    if not SPLIT:
        return tl.load(pointers)
    low = tl.load(pointers, mask=~is_high, other=0)
    high = tl.load(pointers, mask=is_high, other=0)
    if ASM:
        moved = tl.inline_asm_elementwise(high_byte_asm(), "=r,r", [high], dtype=tl.int16, is_pure=True, pack=2)
    else:
        moved = high >> 8
    return low | moved


@triton.constexpr_function
def half_asm(is_second: bool) -> str:
    """PTX that takes one half of two 32-bit words each, together in one register as HFMA2 wants them."""
    return f"prmt.b32 $0, $1, $2, {'0x7632' if is_second else '0x5410'};"


@triton.jit
def half_of_pair(pairs, SECOND: tl.constexpr, ASM: tl.constexpr):
    """int32 loads of two adjacent fp16 numbers -> the first or the second one.

    Loads of 4 bytes can be asynchronous; loads of 2 cannot. Two results are put in one register at once: from shifted
    words ptxas makes two HFMA2 and a permute for every two keys (128 instructions more a page of D = 128).
    """
    if ASM:
        return tl.inline_asm_elementwise(half_asm(SECOND), "=r,r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)
    bits = pairs >> 16 if SECOND else pairs
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def selected_half_of_pair(pairs, is_second):
    """`half_of_pair` with a tensor of booleans."""
    return tl.where(is_second, pairs >> 16, pairs).to(tl.int16).to(tl.float16, bitcast=True)


@triton.constexpr_function
def byte_scale_asm(second: bool) -> str:
    """PTX that turns the low or, if `second`, the high bytes of two 16-bit words into two fp16 numbers, byte << 7."""
    move = "shr.u32 t, $1, 1;" if second else "shl.b32 t, $1, 7;"
    return "{ .reg .b32 t; " + move + " lop3.b32 $0, t, 0x7F807F80, 0, 0xEA; }"


@triton.constexpr_function
def byte_zero_asm(second: bool) -> str:
    """PTX that turns the low or, if `second`, the high bytes b (signed) of two 16-bit words into fp16 1152 + b."""
    logic = "lop3.b32 $0, {}, 0x00FF00FF, 0x64806480, 0x6A;"  # 0x6A: (a & b) ^ c
    if second:
        return "{ .reg .b32 t; shr.u32 t, $1, 8; " + logic.format("t") + " }"
    return logic.format("$1")


@triton.jit
def byte_scale(words, SECOND: tl.constexpr, ASM: tl.constexpr):
    """int16, one byte of which is a scale -> fp16 S."""
    if ASM:
        return tl.inline_asm_elementwise(
            byte_scale_asm(SECOND), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    moved = words >> 1 if SECOND else words << 7
    return (moved & 0x7F80).to(tl.float16, bitcast=True)


@triton.jit
def biased_byte(words, SECOND: tl.constexpr, ASM: tl.constexpr):
    """int16, one byte of which is a signed b -> fp16 1152 + b."""
    if ASM:
        return tl.inline_asm_elementwise(byte_zero_asm(SECOND), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    moved = words >> 8 if SECOND else words
    return ((moved & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True)


@triton.jit
def byte_zero(words, scale, SECOND: tl.constexpr, TENSOR: tl.constexpr, ASM: tl.constexpr):
    """int16, one byte of which is a zero point -> fp16 Z for the scale S: S * (b * zero_step - F)."""
    biased = biased_byte(words, SECOND, ASM)
    return (biased * TENSOR.zero_step - (1152.0 * TENSOR.zero_step + TENSOR.offset)) * scale


@triton.jit
def load_scales(bytes_ptr, halves_ptr, place, mask, TENSOR: tl.constexpr, ASM: tl.constexpr):
    """fp16 S and Z at places counted in scales; 0 where the mask does not hold."""
    other: tl.constexpr = None if mask is None else 0
    if TENSOR.byte_scales:
        scale = tl.load(bytes_ptr + TENSOR.scale + place, mask=mask, other=other).to(tl.int16)
        zero = tl.load(bytes_ptr + TENSOR.zero + place, mask=mask, other=other).to(tl.int16)
        scale = byte_scale(scale, False, ASM)
        return scale, byte_zero(zero, scale, False, TENSOR, ASM)
    else:
        scale = tl.load(halves_ptr + TENSOR.scale // 2 + place, mask=mask, other=other)
        return scale, tl.load(halves_ptr + TENSOR.zero // 2 + place, mask=mask, other=other)
