"""Cases of cvt: integers, floats, every rounding, saturation, and the packed small formats."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from alu_cases import name_of, signed
from alu_harness import Case
from alu_numbers import E2M1, F16, F32, FORMATS, TF32, Format, Real
from float_cases import clamp_to_one

CASES: list[Case] = []
INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
FLOATS = ("f16", "bf16", "f32", "f64")
MODES = ("rn", "rz", "rm", "rp")


def bits_of(kind: str) -> int:
    return int("".join(ch for ch in kind if ch.isdigit()))


def register(kind: str) -> str:
    """8-bit values live in 16-bit registers here."""
    return f"b{max(bits_of(kind), 16)}" if kind[0] in "us" else kind


def add(
    instruction: str,
    sources: tuple[str, ...],
    to: str,
    reference: Callable[..., int],
    sm: int = 80,
    any_nan: bool = False,
) -> None:
    operands = ", ".join(f"%{name}" for name in "abcef"[: len(sources)])
    body = f"{instruction} %d, {operands};"
    CASES.append(
        Case(name_of(instruction), body, sources, (to,), reference, sm=sm, any_nan=any_nan)
    )


def number(kind: str, code: int) -> int:
    bits = bits_of(kind)
    return signed(code, bits) if kind[0] == "s" else code & ((1 << bits) - 1)


def limits(kind: str) -> tuple[int, int]:
    bits = bits_of(kind)
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def stored(kind: str, value: int) -> int:
    """An integer result fills its register with zeros or signs."""
    return value & ((1 << max(bits_of(kind), 16)) - 1)


# ---------------------------------------------------------------- integers
for a in INTEGERS:
    for d in INTEGERS:
        if a == d:
            continue

        def cut(code: int, a: str = a, d: str = d) -> int:
            return stored(d, number(d, number(a, code) & ((1 << bits_of(d)) - 1)))

        def saturated(code: int, a: str = a, d: str = d) -> int:
            low, high = limits(d)
            return stored(d, max(low, min(high, number(a, code))))

        add(f"cvt.{d}.{a}", (register(a),), register(d), cut)
        if limits(a)[0] < limits(d)[0] or limits(a)[1] > limits(d)[1]:
            add(f"cvt.sat.{d}.{a}", (register(a),), register(d), saturated)

# ---------------------------------------------------------------- integers and floats
ROUND: dict[str, Callable[[Real], int]] = {
    "rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil,
}  # fmt: skip


def to_integer(code: int, fmt: Format, d: str, rounding: str, ftz: bool) -> int:
    value = fmt.decode(fmt.flush(code) if ftz else code)
    low, high = limits(d)
    if not isinstance(value, Fraction):
        if math.isnan(value):
            wide = fmt.bits == 64 or bits_of(d) == 64
            nan = 1 << (bits_of(d) - 1) if wide else 0
            return stored(d, number(d, nan))
        if math.isinf(value):
            return stored(d, high if value > 0 else low)
        return 0
    return stored(d, max(low, min(high, ROUND[rounding](value))))


for kind in FLOATS:
    fmt, sm = FORMATS[kind], 90 if kind == "bf16" else 80
    integers = INTEGERS[2:] if kind == "bf16" else INTEGERS
    for d in integers:
        for rounding in ROUND:
            for ftz in ("", ".ftz") if kind == "f32" and d in ("s32", "u16") else ("",):
                add(
                    f"cvt.{rounding}{ftz}.{d}.{kind}", (kind,), register(d),
                    lambda code, f=fmt, d=d, r=rounding, t=bool(ftz): to_integer(code, f, d, r, t),
                    sm=sm,
                )  # fmt: skip
    for a in integers:
        for mode in MODES:
            add(
                f"cvt.{mode}.{kind}.{a}", (register(a),), kind,
                lambda code, f=fmt, a=a, m=mode: f.encode(Fraction(number(a, code)) or 0.0, m),
                sm=sm,
            )  # fmt: skip
        if kind in ("f16", "f32"):
            add(
                f"cvt.rn.sat.{kind}.{a}", (register(a),), kind,
                lambda code, f=fmt, a=a: f.encode(Fraction(1) if number(a, code) > 0 else 0.0),
                sm=sm,
            )  # fmt: skip


def shortened_nan(code: int, fmt: Format) -> int:
    """Of an f64: sign and upper bits remain, as on an H200."""
    fraction = (code & (1 << 52) - 1) >> (52 - fmt.mantissa) | 1 << (fmt.mantissa - 1)
    return (fmt.sign if code >> 63 else 0) | (fmt.infinity or 0) | fraction


# ---------------------------------------------------------------- floats
for a in FLOATS:
    for d in FLOATS:
        source, target = FORMATS[a], FORMATS[d]
        sm = 90 if "bf16" in (a, d) else 80
        nan = d == "f64"
        if a == d:
            for rounding, function in ROUND.items():
                for ftz in ("", ".ftz") if a == "f32" else ("",):

                    def integral(code: int, f=source, function=function, t=bool(ftz)) -> int:
                        value = f.decode(f.flush(code) if t else code)
                        if not isinstance(value, Fraction):
                            return f.encode(value)
                        return f.encode(Fraction(function(value)) or math.copysign(0.0, value))

                    add(f"cvt.{rounding}{ftz}.{d}.{a}", (a,), d, integral, sm=sm, any_nan=nan)
            continue
        widens = source.bits < target.bits
        for mode in ("",) if widens else MODES:
            for ftz in ("", ".ftz") if "f32" in (a, d) and "bf16" not in (a, d) else ("",):
                for sat in ("", ".sat") if "bf16" not in (a, d) else ("",):

                    def converted(
                        code: int, s=source, t=target, m=mode or "rn", f=bool(ftz), c=bool(sat)
                    ) -> int:
                        # Silicon does not flush what becomes an f16.
                        value = s.decode(s.flush(code) if f and s is F32 and t is not F16 else code)
                        if s.bits == 64 and math.isnan(value) and not c:
                            return shortened_nan(code, t)
                        result = t.encode(clamp_to_one(value) if c else value, m)
                        return t.flush(result) if f and t is F32 else result

                    modifiers = f".{mode}" if mode else ""
                    # The payload of a NaN may come through where bits are only appended.
                    payload = nan or (a == "bf16" and d == "f32" and not sat)
                    add(
                        f"cvt{modifiers}{ftz}{sat}.{d}.{a}",
                        (a,),
                        d,
                        converted,
                        sm=sm,
                        any_nan=payload,
                    )


def narrowed(code: int, fmt: Format, mode: str, relu: bool, finite: bool) -> int:
    value = F32.decode(code)
    if relu and value <= 0:
        value = 0.0
    return fmt.encode(value, mode, finite)


for d in ("f16", "bf16"):
    for mode in ("rn", "rz"):
        for relu in ("", ".relu"):
            for finite in ("", ".satfinite"):
                flags = (mode, bool(relu), bool(finite))
                one = lambda x, f=FORMATS[d], g=flags: narrowed(x, f, *g)  # noqa: E731
                if relu or finite:
                    add(f"cvt.{mode}{relu}{finite}.{d}.f32", ("f32",), d, one, sm=80)
                add(
                    f"cvt.{mode}{relu}{finite}.{d}x2.f32", ("f32", "f32"), f"{d}x2",
                    lambda a, b, one=one: one(a) << 16 | one(b), sm=80,
                )  # fmt: skip
for mode in ("rn", "rz", "rna"):
    for relu in ("", ".relu") if mode != "rna" else ("",):
        for finite in ("", ".satfinite"):

            def to_tf32(code: int, m=mode, r=bool(relu), f=bool(finite)) -> int:
                if (code & 0x7FFFFFFF) > 0x7F800000 and m == "rna":
                    # As on an H200: a signalling NaN stays one, saturating is a step towards zero.
                    return (code & 0xFFFFE000) - (0x2000 if f else 0)
                return narrowed(code, TF32, m, r, f) << 13

            sm = 100 if finite and mode != "rna" else 90
            add(f"cvt.{mode}{finite}{relu}.tf32.f32", ("f32",), "f32", to_tf32, sm=sm)

# ---------------------------------------------------------------- FP8, FP6, FP4
SMALL = {"e4m3": 8, "e5m2": 8, "e2m3": 8, "e3m2": 8, "e2m1": 4}
BYTE = "{{ .reg .b8 t; .reg .b16 h; {}; mov.b16 %d, {{t, 0}}; }}"


def small(name: str, relu: bool, source: Format) -> Callable[[int], int]:
    def one(code: int) -> int:
        value = source.decode(code)
        return FORMATS[name].encode(0.0 if relu and value <= 0 else value, "rn", True)

    return one


for name, step in SMALL.items():
    sm = 89 if name in ("e4m3", "e5m2") else 100
    for relu in ("", ".relu"):
        for a in ("f32", "f16x2", "bf16x2"):
            if a == "bf16x2" and relu:
                continue
            single = small(name, bool(relu), FORMATS[a.removesuffix("x2")])
            instruction = f"cvt.rn.satfinite{relu}.{name}x2.{a}"
            sources = ("f32", "f32") if a == "f32" else (a,)

            def joined(x: int, y: int | None = None, one=single, step=step) -> int:
                high, low = (x, y) if y is not None else (x >> 16, x & 0xFFFF)
                return one(high) << step | one(low)

            operands = "%a, %b" if a == "f32" else "%a"
            place = "t" if name == "e2m1" else "%d"
            body = f"{instruction} {place}, {operands}"
            body = BYTE.format(body) if name == "e2m1" else body + ";"
            level = 101 if a == "bf16x2" or (a == "f16x2" and sm == 100) else sm
            CASES.append(Case(name_of(instruction), body, sources, ("b16",), joined, sm=level))
        wide = FORMATS[name]

        def widened(code: int, f=wide, step=step, relu=bool(relu)) -> int:
            result = 0
            for i in range(2):
                value = f.decode(code >> step * i & ((1 << f.bits) - 1))
                if relu and value <= 0:
                    value = 0.0
                result |= F16.encode(value) << 16 * i
            return result

        instruction = f"cvt.rn{relu}.f16x2.{name}x2"
        body = f"{instruction} %d, %a;"
        if fmt is E2M1:
            body = f"{{ .reg .b8 t, u; mov.b16 {{t, u}}, %a; {instruction} %d, t; }}"
        elif fmt.bits == 6:
            body = f"and.b16 %h0, %a, 0x3f3f; {instruction} %d, %h0;"
        CASES.append(Case(name_of(instruction), body, ("b16",), ("f16x2",), widened, sm=sm))


def scale(code: int, up: bool, finite: bool) -> int:
    """UE8M0: the magnitude as a power of two, 2^-127 at least."""
    value = F32.decode(code & 0x7FFFFFFF)
    if not isinstance(value, Fraction):
        if math.isnan(value):
            return 255
        return 0 if value == 0 else (254 if finite else 255)
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    if Fraction(2) ** exponent > value:
        exponent -= 1
    if up and Fraction(2) ** exponent != value:
        exponent += 1
    if exponent > 127:
        return 254 if finite else 255
    return max(exponent, -127) + 127


for mode in ("rz", "rp"):
    for finite in ("", ".satfinite"):
        pair = (mode == "rp", bool(finite))
        add(
            f"cvt.{mode}{finite}.ue8m0x2.f32", ("f32", "f32"), "b16",
            lambda a, b, g=pair: scale(a, *g) << 8 | scale(b, *g), sm=100,
        )  # fmt: skip
        add(
            f"cvt.{mode}{finite}.ue8m0x2.bf16x2", ("bf16x2",), "b16",
            lambda a, g=pair: scale(a & 0xFFFF0000, *g) << 8 | scale(a << 16 & 0xFFFF0000, *g),
            sm=100,
        )  # fmt: skip


def bf16_scale(code: int) -> int:
    return 0x7FFF if code == 255 else 0x0040 if code == 0 else code << 7


add(
    "cvt.rn.bf16x2.ue8m0x2", ("b16",), "bf16x2",
    lambda a: bf16_scale(a >> 8) << 16 | bf16_scale(a & 255), sm=100,
)  # fmt: skip


# ---------------------------------------------------------------- stochastic rounding
def stochastic(code: int, random: int, relu: bool, finite: bool) -> int:
    magnitude = code & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return 0x7FFF
    if relu and code >> 31:
        return 0
    result = magnitude >> 16
    if magnitude < 0x7F800000 and (magnitude & 0xFFFF) + random > 0xFFFF:
        result += 1
    if finite and result == 0x7F80:
        result = 0x7F7F
    return result | code >> 16 & 0x8000


for relu in ("", ".relu"):
    for finite in ("", ".satfinite"):
        pair = (bool(relu), bool(finite))
        add(
            f"cvt.rs{relu}{finite}.bf16x2.f32", ("f32", "f32", "b32"), "bf16x2",
            lambda a, b, r, g=pair: (
                stochastic(a, r >> 16, *g) << 16 | stochastic(b, r & 0xFFFF, *g)
            ),
            sm=100,
        )  # fmt: skip

# ---------------------------------------------------------------- cvt.pack
for kind in ("u16", "s16", "u8", "s8", "u4", "s4", "u2", "s2"):
    bits = int(kind[1:])
    sm = 72 if bits >= 8 else 75

    def packed(a: int, b: int, c: int = 0, kind: str = kind, bits: int = bits) -> int:
        low, high = limits(kind)
        mask = (1 << bits) - 1
        x, y = (max(low, min(high, signed(v, 32))) & mask for v in (a, b))
        return (x << bits | y | c << 2 * bits) & 0xFFFFFFFF

    if bits == 16:
        add(f"cvt.pack.sat.{kind}.s32", ("b32", "b32"), "b32", packed, sm=sm)
    else:
        add(f"cvt.pack.sat.{kind}.s32.b32", ("b32", "b32", "b32"), "b32", packed, sm=sm)
