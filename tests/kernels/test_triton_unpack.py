"""The PTX that unpacks words, emulated bit by bit: the interpreter runs the plain path only."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("triton")

from kvferry.kernels.triton_unpack import (
    byte_scale_asm,
    byte_zero_asm,
    half_asm,
    high_byte_asm,
    move_down_asm,
    unpack_asm,
)

PAIRS = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32)
"""Two words in a register."""


def emulate(asm: str, operand: np.ndarray, second: int = 0) -> np.ndarray:
    """Runs shl.b32, shr.u32, shf.r.wrap.b32 and lop3.b32 on $1 and $2, and returns $0. Anything else is an error."""
    registers = {"$1": operand, "$2": np.uint32(second)}
    for statement in asm.strip("{} ").split(";"):
        if not statement.strip() or statement.strip() == ".reg .b32 t":
            continue
        opcode, target, *sources = re.split(r"[ ,]+", statement.strip())
        values = [registers[source] if source in registers else np.uint32(int(source, 0)) for source in sources]
        if opcode == "shl.b32":
            registers[target] = values[0] << values[1]
        elif opcode == "shr.u32":
            registers[target] = values[0] >> values[1]
        elif opcode == "shf.r.wrap.b32":
            pair = values[1].astype(np.uint64) << np.uint64(32) | values[0]
            registers[target] = (pair >> np.uint64(values[2] & 31)).astype(np.uint32)
        elif opcode == "lop3.b32":
            registers[target] = lop3(values[0], values[1], values[2], int(values[3]))
        else:
            raise AssertionError(f"{statement!r} is not emulated")
    return registers["$0"]


def lop3(a: np.ndarray, b: np.uint32, c: np.uint32, table: int) -> np.ndarray:
    """PTX's three-input logic: bit `4 a + 2 b + c` of the table, for each bit."""
    result = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            terms = [value if index & bit else ~value for value, bit in ((a, 4), (b, 2), (c, 1))]
            result |= terms[0] & terms[1] & terms[2]
    return result


@pytest.mark.parametrize("field", range(8))
def test_unpack_asm_is_one_plus_a_quarter_of_the_code(field: int) -> None:
    got = emulate(unpack_asm(field), PAIRS).view(np.float16)
    codes = PAIRS.view(np.uint16) >> (2 * field) & 3
    assert np.array_equal(got.astype(np.float32), 1 + codes.astype(np.float32) / 4)


@pytest.mark.parametrize("field", range(1, 8, 2))
def test_low_unpack_asm_is_four_plus_a_quarter_of_the_code(field: int) -> None:
    got = emulate(unpack_asm(field, True), PAIRS).view(np.float16)
    codes = PAIRS.view(np.uint16) >> (2 * field) & 3
    assert np.array_equal(got, 4 + codes.astype(np.float16) / 4)


def test_an_odd_field_shares_its_shift_with_the_next() -> None:
    for field in range(1, 7, 2):
        shifts = [re.findall(r"sh[lr].*?;", asm) for asm in (unpack_asm(field, True), unpack_asm(field + 1))]
        assert shifts[0] == shifts[1]


@pytest.mark.parametrize("is_second", [False, True])
def test_half_asm_puts_one_half_of_two_words_together(is_second: bool) -> None:
    selector = re.fullmatch(r"prmt\.b32 \$0, \$1, \$2, 0x([0-7]{4});", half_asm(is_second))
    assert selector is not None
    words = [0x3322_1100, 0x7766_5544]
    eight = b"".join(word.to_bytes(4, "little") for word in words)
    got = bytes(eight[int(nibble)] for nibble in reversed(selector[1]))
    assert got == b"".join((word >> 16 * is_second & 0xFFFF).to_bytes(2, "little") for word in words)


@pytest.mark.parametrize("field", range(4))
def test_high_byte_asm_moves_the_upper_fields_down(field: int) -> None:
    moved = emulate(high_byte_asm(), PAIRS)
    got = emulate(unpack_asm(field), moved).view(np.float16)
    codes = PAIRS.view(np.uint16) >> (8 + 2 * field) & 3
    assert np.array_equal(got.astype(np.float32), 1 + codes.astype(np.float32) / 4)


@pytest.mark.parametrize("slots", [2, 4, 8])
def test_fields_moved_down_are_unpacked_as_those_of_the_word(slots: int) -> None:
    for shift in range(0, 16, slots):
        moved = emulate(move_down_asm(), PAIRS, shift << 16 | shift)
        for field in range(slots // 2):
            got = emulate(unpack_asm(field), moved).view(np.float16)
            codes = PAIRS.view(np.uint16) >> (shift + 2 * field) & 3
            assert np.array_equal(got.astype(np.float32), 1 + codes.astype(np.float32) / 4)


@pytest.mark.parametrize("second", [False, True])
def test_byte_scale_asm_puts_a_byte_where_an_fp16_number_has_exponent_and_mantissa(second: bool) -> None:
    got = emulate(byte_scale_asm(second), PAIRS).view(np.uint16)
    assert np.array_equal(got, (PAIRS.view(np.uint16) >> 8 * second & 255) << 7)


@pytest.mark.parametrize("second", [False, True])
def test_byte_zero_asm_is_1152_plus_a_signed_byte(second: bool) -> None:
    got = emulate(byte_zero_asm(second), PAIRS).view(np.float16)
    assert np.array_equal(got, 1152 + PAIRS.view(np.int8)[second::2].astype(np.float16))


def test_a_field_costs_at_most_two_instructions() -> None:
    for field in range(8):
        assert len(re.findall(r"shl|shr|lop3", unpack_asm(field))) <= 2
