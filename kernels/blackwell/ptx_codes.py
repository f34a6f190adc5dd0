"""Numbers of eight and four bits as PTX converts them, and the maximum for their scale."""

from __future__ import annotations

from cutlass import Float32, Int32
from cutlass.cutlass_dsl import T, dsl_user_op

from cute_fmha.kernels.blackwell.ptx import floats, inline


@dsl_user_op
def max3_magnitude(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    """max.NaN.abs.f32 of three: the largest magnitude, NaN if one of them is NaN."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c)]
    result = inline(
        "max.NaN.abs.f32 $0, $1, $2, $3;", [T.f32()], operands, "=f,f,f,f", effects=False,
        loc=loc, ip=ip,
    )  # fmt: skip
    return Float32(result)


@dsl_user_op
def pack_e4m3(values: list[Float32], *, loc=None, ip=None) -> Int32:
    """cvt.rn.satfinite.e4m3x2.f32 of up to four values, the first in the lowest byte: beyond the
    range ±448, NaN 0x7F. Bytes for which there is no value are 0.

    Pairs are made as words with an upper half of 0, and joined by prmt: of two conversions that are
    the halves of one word ptxas makes one that merges into the other, and of two equal ones one
    that merges into a register that nobody wrote.
    """
    operands = [value.ir_value(loc=loc, ip=ip) for value in [*values, Float32(0.0)]]
    count = (len(values) + 1) // 2 * 2
    made = "".join(
        f"cvt.rn.satfinite.e4m3x2.f32 pair, ${j + 2}, ${j + 1};\n\t"
        f"mov.b32 {'upper' if j else '$0'}, {{pair, none}};\n\t"
        for j in range(0, count, 2)
    )
    joined = "prmt.b32 $0, $0, upper, 0x5410;\n\t" if count == 4 else ""
    result = inline(
        "{\n\t.reg .b16 pair, none;\n\t.reg .b32 upper;\n\tmov.b16 none, 0;\n\t"
        f"{made}{joined}}}",
        [T.i32()], operands[:count], ",".join(["=&r"] + ["f"] * count), effects=False,
        loc=loc, ip=ip,
    )  # fmt: skip
    return Int32(result)


@dsl_user_op
def unpack_e4m3(codes: Int32, *, loc=None, ip=None) -> list[Float32]:
    """cvt.rn.f16x2.e4m3x2: the values of the two lowest bytes, exact."""
    result = inline(
        "{\n\t.reg .b16 pair, a, b;\n\t.reg .b32 both;\n\tcvt.u16.u32 pair, $2;\n\t"
        "cvt.rn.f16x2.e4m3x2 both, pair;\n\tmov.b32 {a, b}, both;\n\t"
        "cvt.f32.f16 $0, a;\n\tcvt.f32.f16 $1, b;\n\t}",
        [T.f32()] * 2, [Int32(codes).ir_value(loc=loc, ip=ip)], "=f,=f,r", effects=False,
        loc=loc, ip=ip,
    )  # fmt: skip
    return floats(result, 2, loc, ip)


@dsl_user_op
def pack_e2m1(values: list[Float32], *, loc=None, ip=None) -> Int32:
    """cvt.rn.satfinite.e2m1x2.f32 of eight values, the first in the lowest four bits: beyond the
    range ±6, NaN +6."""
    pairs = " ".join(
        f"cvt.rn.satfinite.e2m1x2.f32 b{j}, ${2 * j + 2}, ${2 * j + 1};" for j in range(4)
    )
    result = inline(
        f"{{\n\t.reg .b8 b0, b1, b2, b3;\n\t{pairs}\n\tmov.b32 $0, {{b0, b1, b2, b3}};\n\t}}",
        [T.i32()], [value.ir_value(loc=loc, ip=ip) for value in values],
        ",".join(["=r"] + ["f"] * 8), effects=False, loc=loc, ip=ip,
    )  # fmt: skip
    return Int32(result)
